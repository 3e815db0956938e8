"""The benchmark suite's deep residual MLPs: every arm computes the same, the gate bites, memory is counted right."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from benchmarks_harness import run_tiny, short_probes

import nsk
from benchmarks import readme, report, suite, table, workload
from benchmarks.residual_mlp import gate, peers
from benchmarks.residual_mlp.cases import Mlp, make, useful_flops
from benchmarks.residual_mlp.inputs import EPS, by_layer, make_inputs
from benchmarks.residual_mlp.kept import kept, saved_bytes
from benchmarks.workload import MEMORY, OURS
from nsk.reference.residual_mlp import residual_mlp_reference
from nsk.spec.residual_mlp import ResidualMlpCall

TINY = Mlp(20, width=24, depth=8)
KINDS = (
    TINY,
    replace(TINY, checkpoint="block"),
    replace(TINY, groups=2),
    replace(TINY, input_only=True),
    replace(TINY, groups=2, input_only=True),
)


@pytest.fixture(autouse=True)
def _short_probes():
    torch.set_num_threads(1)
    with short_probes():
        yield


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("m", KINDS[:2], ids=lambda m: m.label)
def test_a_case_becomes_a_row(mode, dtype, m):
    (row,), _ = run_tiny(make(mode, dtype, m))
    assert row["status"] == "ok", row["reasons"]
    assert set(row["arms"]) == {"nsk", "eager"}
    assert set(row["absent"]) == {"compiled", "jax"}
    assert row["name"] in table.text([row])


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("m", KINDS, ids=lambda m: m.label)
def test_peers_compute_the_same(mode, dtype, m, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    work = peers.prepare(make(mode, dtype, m), compiled=True)
    if importlib.util.find_spec("jax"):
        assert set(work.arms) == {"nsk", "eager", "compiled", "jax"}
    else:
        assert set(work.arms) == {"nsk", "eager", "compiled"}
        assert work.absent == {"jax": "jax is not installed"}
    for name, arm in work.arms.items():
        assert work.check(arm()).reasons == (), name


def test_torch_compile_is_left_out_where_it_takes_minutes(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    work = peers.prepare(make("forward", "fp32", replace(TINY, depth=68)), compiled=True)
    assert "compiled" not in work.arms
    assert "beyond a depth of 64" in work.absent["compiled"]


@pytest.mark.parametrize(("dtype", "wide"), [("bf16", False), ("fp32", True)], ids=["own type", "float64"])
@pytest.mark.parametrize("m", KINDS, ids=lambda m: m.label)
def test_block_by_block_is_the_reference(m, dtype, wide):
    inputs = make_inputs(make("training", dtype, m))
    leaves = [
        (t.detach().double() if wide else t.detach()).requires_grad_(t.requires_grad)
        for t in (inputs.x, *inputs.parameters)
    ]
    y = residual_mlp_reference(ResidualMlpCall(*leaves, EPS, 4))
    wanted = [t for t in leaves if t.requires_grad]
    whole = [y.detach(), *torch.autograd.grad(y, wanted, inputs.grad_y.to(y.dtype))]
    found = gate.evaluate(inputs, wide)
    assert len(found) == len(whole)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("place", range(6), ids=gate.NAMES)
def test_a_wrong_gradient_is_not_timed(monkeypatch, place):
    def broken(case, compiled):
        work = peers.prepare(case, compiled)
        arm = work.arms[OURS]
        work.arms[OURS] = lambda: [t * (1.01 if i == place else 1) for i, t in enumerate(arm())]
        return work

    monkeypatch.setattr(workload.module("residual_mlp"), "prepare", broken)
    (row,), _ = run_tiny(make("training", "fp32", TINY))
    assert row["status"] == "refused"
    assert all(reason.startswith(gate.NAMES[place]) for reason in row["reasons"])


def test_a_step_of_training_has_new_weights():
    """No arm may profit from weights that never change."""
    case = make("training", "fp32", TINY)
    inputs = make_inputs(case)
    arm = peers.training(peers.ours(TINY), inputs.leaves(), inputs.grad_y, inputs.x, *inputs.parameters)
    before = [t._version for t in inputs.parameters]
    arm()
    assert all(t._version > was for t, was in zip(inputs.parameters, before, strict=True))


def test_flops_count_the_products():
    m = Mlp(3, width=8, depth=4)
    assert useful_flops(m, "forward") == 2 * 3 * 8 * 8 * 4
    assert useful_flops(m, "training") == 3 * useful_flops(m, "forward")
    assert useful_flops(replace(m, input_only=True), "training") == 2 * useful_flops(m, "forward")
    assert useful_flops(replace(m, groups=5), "forward") == 5 * useful_flops(m, "forward")
    assert useful_flops(replace(m, checkpoint="block"), "training") == useful_flops(m, "training")


def test_saved_memory_is_counted():
    case = make(MEMORY, "fp32", TINY)
    inputs = make_inputs(case)
    layer = 4 * TINY.rows * TINY.width
    # Of each layer z, its normalised value and what goes into it (the first block's is x), and two statistics a row.
    eager = TINY.depth * (3 * layer + 2 * 4 * TINY.rows) - layer
    assert saved_bytes(peers.eager(TINY), inputs.x, *by_layer(inputs)) == eager
    found = kept(case)
    assert found["eager"] == eager
    strips, blocks = 32, 2  # rows in strips of 16
    assert 0 <= found["nsk block"] - blocks * strips * TINY.width * 4 < 64
    assert found["nsk block"] < found["nsk"] < found["eager"]


def test_what_is_kept_becomes_a_row_and_a_plot(tmp_path):
    cases = [
        make(mode, "fp32", replace(TINY, depth=depth), series=f"{mode} tiny", size=depth, keeps=keeps)
        for mode in ("forward", MEMORY)
        for depth, keeps in ((4, {}), (8, {"nsk block": 1000.0}))
    ]
    rows, roof = run_tiny(*cases)
    assert [row["status"] for row in rows] == ["ok", "ok", "kept", "kept"]
    assert rows[3]["name"] not in table.text(rows)
    text = table.kept_text(rows)
    assert rows[3]["name"] in text
    assert "[0]!" in text, "the limit of 1000 bytes is exceeded"
    machine = readme.results()["residual_mlp"]["machine"]
    run = {"machine": machine, "rows": rows, "threads": [], "roofs": roof.as_json()}
    names = {path.name for path in report.write(tmp_path, run)}
    assert {"scaling.png", "time.png", "kept.png"} <= names
    assert f"| `{rows[3]['name']}` |" in readme.numbers(run)


def test_aims_against_peers_are_shown():
    case = make("forward", "fp32", TINY, faster={"eager": 1e6})
    (row,), _ = run_tiny(case)
    assert "[1e+06x]!" in table.text([row])
    (line,) = [line for line in readme.times([row]) if row["name"] in line]
    assert "(aim 1e+06x)" in line


def test_every_case_says_its_op_and_aims_are_as_promised():
    cases = workload.module("residual_mlp").cases()
    assert all(case.name.startswith("residual_mlp/") for case in cases)
    by_name = {case.name.removeprefix("residual_mlp/"): case for case in cases}
    assert by_name["forward/fp32/256x64/B256"].target == 0.83
    assert by_name["training/bf16/256x64/B2048/block"].target == 0.56
    assert by_name["forward/bf16/256x64/B16"].target is None
    assert by_name["forward/bf16/256x64/B16"].faster == {"eager": 1.0, "compiled": 1.0, "jax": 1.0}
    assert by_name["forward/fp32/256x64/B1"].faster == {"eager": 5.0, "compiled": 3.0}
    assert by_name["memory/fp32/256x1024/B512"].keeps == {"nsk block": 160e6}
    for mode in ("forward", "training"):
        sizes = [case.size for case in cases if case.series == f"residual_mlp/{mode}/fp32/256xL/B256"]
        assert sorted(sizes) == [4, 16, 64, 256, 1024]


def test_the_whole_table_explains_itself():
    rows = [suite.run_case(make(MEMORY, "fp32", TINY), suite.Plan(1), None, lambda _: None)]
    legend = table.legend(rows)
    assert "2 G B W W L" in legend
    assert "Sq" not in legend


@pytest.mark.parametrize("feature", workload.module("residual_mlp").FEATURES)
def test_features_of_the_support_matrix_run(feature):
    with nsk.use_backend("eager"):
        workload.module("residual_mlp").FEATURES[feature]().sum().backward()
