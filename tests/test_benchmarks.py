"""The benchmark suite: it times only what is right, its arithmetic is right, and README.md is what it generates."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks_harness import run_tiny, short_probes
from harness import HAS_TRITON

from benchmarks import __main__ as suite_main
from benchmarks import measure, readme, report, table, workload
from benchmarks.gated_sdpa import peers
from benchmarks.gated_sdpa.cases import Attention, make, useful_flops
from benchmarks.workload import OURS, Verdict, Workload

TINY = Attention(1, 4, 2, 24, 24, 16, causal=True)


@pytest.fixture(autouse=True)
def _short_probes():
    with short_probes():
        yield


@pytest.mark.parametrize("mode", workload.MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_case_becomes_a_row(mode, dtype):
    shape = Attention(2, 4, 2, 1, 130, 16) if mode == "decode" else TINY
    (row,), roof = run_tiny(make(mode, dtype, shape))
    assert row["status"] == "ok", row["reasons"]
    assert set(row["arms"]) == {"nsk", "eager"}
    assert 0 < row["roof"]["fraction"] <= 1
    assert row["arms"][OURS]["rate"] <= roof.best(row["roof"]["kind"])
    assert row["arms"][OURS]["speedup"] == 1
    assert row["name"] in table.text([row])


@pytest.mark.parametrize(
    "shape",
    [
        Attention(1, 2, 1, 0, 0, 16, causal=True, lengths=(9, 1, 30)),
        Attention(1, 2, 2, 40, 40, 16, causal=True, window=7),
        Attention(2, 2, 2, 24, 24, 16, mask=True),
        Attention(1, 2, 2, 24, 24, 16, gate="headwise"),
        Attention(1, 2, 2, 24, 24, 16, gate=None),
    ],
    ids=lambda shape: shape.label,
)
def test_every_kind_of_call_is_timed_in_training(shape):
    (row,), _ = run_tiny(make("training", "fp32", shape))
    assert row["status"] == "ok", row["reasons"]


def test_a_wrong_result_is_not_timed(monkeypatch):
    def broken(case, compiled):
        work = peers.prepare(case, compiled)
        arm = work.arms[OURS]
        work.arms[OURS] = lambda: [t * 1.01 for t in arm()]
        return work

    monkeypatch.setattr(workload.module("gated_sdpa"), "prepare", broken)
    (row,), _ = run_tiny(make("forward", "fp32", TINY))
    assert row["status"] == "refused"
    assert "arms" not in row
    assert "REFUSED" in table.text([row])


def test_a_peer_that_cannot_run_is_named(monkeypatch):
    def lame():
        raise RuntimeError("no such thing here")

    def prepare(case, compiled):
        return Workload({OURS: lambda: 1, "eager": lambda: 2, "flex": lame}, lambda _: Verdict(None, 0.0))

    monkeypatch.setattr(workload.module("gated_sdpa"), "prepare", prepare)
    (row,), _ = run_tiny(make("forward", "fp32", TINY))
    assert row["absent"] == {"flex": "RuntimeError: no such thing here"}
    assert "no flex in 1 cases: RuntimeError: no such thing here" in table.absent_text([row])


def test_flops_are_those_of_the_papers():
    full = Attention(2, 8, 4, 64, 128, 32)
    assert useful_flops(full, "forward") == 4 * 2 * 8 * 64 * 128 * 32
    assert useful_flops(full, "training") == 3.5 * useful_flops(full, "forward")
    assert useful_flops(Attention(2, 8, 4, 64, 64, 32, causal=True), "forward") == 4 * 2 * 8 * 64 * 64 * 32 / 2
    assert useful_flops(Attention(1, 1, 1, 4, 4, 1, causal=True, window=2), "forward") == 4 * (1 + 2 + 2 + 2)


def test_turns_are_fair():
    """Everyone is first, and last, equally often."""
    names = ["a", "b", "c"]
    orders = [measure.rotated(names, i) for i in range(3)]
    assert sorted(order[0] for order in orders) == names
    assert sorted(order[-1] for order in orders) == names


def test_drift_cancels_in_a_paired_ratio():
    slow_machine = [1.0, 2.0, 4.0, 8.0]
    assert measure.paired_ratio([3 * t for t in slow_machine], slow_machine) == 3


def test_a_slow_arm_has_few_turns(monkeypatch):
    """Next to a peer that takes two hundred times as long the others are still measured in every round."""
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def arm(seconds):
        def run():
            clock[0] += seconds

        return run

    arms = {"fast": arm(0.1), "slow": arm(20.0), "slower": arm(0.9)}
    samples, probes = measure.interleave(arms, measure.Effort(seconds=0.25), lambda: 1.0)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"fast": 7, "slow": 2, "slower": 7}
    assert len(probes) == 7
    assert measure.paired_ratio(samples["slow"], samples["fast"]) == pytest.approx(200)


def test_names_are_unique_and_quick_is_a_selection():
    cases = workload.all_cases()
    assert len({case.name for case in cases}) == len(cases)
    quick = [case for case in cases if case.quick]
    assert {case.mode for case in quick} == set(workload.MODES)
    assert 5 < len(quick) < 20


def test_an_op_can_be_chosen_by_its_name():
    for op in workload.OPS:
        args = suite_main.parser().parse_args(["--only", op])
        assert [case for case in suite_main.chosen(args) if case.op == op] == workload.module(op).cases()
    args = suite_main.parser().parse_args(["--only", "residual_mlp"])
    assert {case.op for case in suite_main.chosen(args)} == {"residual_mlp"}


def test_quick_gives_every_op_its_turn():
    cases = suite_main.chosen(suite_main.parser().parse_args(["--quick"]))
    assert sorted(case.name for case in cases) == sorted(case.name for case in workload.all_cases() if case.quick)
    assert [case.op for case in cases[: len(workload.OPS)]] == list(workload.OPS)


def test_every_op_is_asked_how_it_uses_threads():
    chosen = suite_main.scaling(workload.all_cases())
    assert [case.op for case in chosen] == [op for op in workload.OPS for _ in range(suite_main.THREAD_CASES)]


def test_command_line_writes_json_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(workload, "all_cases", lambda: [make("forward", "fp32", TINY, quick=True)])
    before = torch.get_num_threads()
    arguments = [
        "--quick",
        "--threads",
        str(before),
        "--json",
        str(tmp_path / "run.json"),
        "--report",
        str(tmp_path / "r"),
    ]
    assert suite_main.main(arguments) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["rows"][0]["name"] in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "results.json", "table.txt", "fraction_of_roof.png", "speedup.png",
    }  # fmt: skip
    assert suite_main.main(["--only", "no such case"]) == 2


@pytest.mark.parametrize("op", workload.OPS)
def test_plots_of_a_whole_run(op, tmp_path):
    names = {path.name for path in report.write(tmp_path, readme.results()[op])}
    assert {"fraction_of_roof.png", "speedup.png", "scaling.png", "time.png"} <= names


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_readme_is_generated():
    """``python -m benchmarks.readme`` would change nothing."""
    text = readme.README.read_text()
    assert readme.generated(text) == text
