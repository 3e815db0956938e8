"""The GPU suite: its plumbing on the CPU, and where there is a GPU the real thing."""

from __future__ import annotations

import pytest
import torch
from benchmarks_harness import FAST

from benchmarks import gpu
from benchmarks.gated_sdpa import peers
from benchmarks.gated_sdpa.cases import Attention
from benchmarks.gated_sdpa.cases import make as attention
from benchmarks.residual_mlp.cases import Mlp
from benchmarks.residual_mlp.cases import make as mlp
from benchmarks.workload import BASELINE, OURS
from nsk.backends.triton.targets import TARGETS

SMALL = {
    "attention": attention("training", "bf16", Attention(1, 4, 2, 100, 100, 64, causal=True)),
    "packed": attention("forward", "bf16", Attention(1, 4, 2, 0, 0, 64, causal=True, lengths=(40, 1, 60))),
    "decode": attention("decode", "bf16", Attention(2, 4, 2, 1, 300, 64)),
    "mlp": mlp("training", "bf16", Mlp(40, width=64, depth=4)),
}


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "COLD_BYTES", 1 << 20)


@pytest.mark.parametrize("name", ["packed", "mlp"])
def test_a_row(name: str, monkeypatch: pytest.MonkeyPatch):
    """On the CPU, whose peers need no compiling here."""
    prepare = gpu.workload.module(SMALL[name].op).prepare
    monkeypatch.setattr(gpu.workload.module(SMALL[name].op), "prepare", lambda case, _, device: prepare(case, False))
    settled = []
    row = gpu.run_case(SMALL[name], "cpu", TARGETS["sm_90"], FAST, lambda: settled.append(1))
    assert row["status"] == "ok"
    assert set(row["arms"]) == {OURS, BASELINE}
    turns = 1 + FAST.min_rounds  # the first decides how many calls a turn has
    assert len(settled) == 2 * turns
    assert 0 < row["fraction"] < 1
    assert SMALL[name].name in gpu.line(row)
    assert f"{BASELINE} {row['arms'][BASELINE]['speedup']:.2f}x" in gpu.line(row)


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    case = SMALL["packed"]
    prepare = gpu.workload.module(case.op).prepare

    def wrong(case, _, device):
        work = prepare(case, False)
        arm = work.arms[OURS]
        work.arms[OURS] = lambda: [t + 1 for t in arm()]
        return work

    monkeypatch.setattr(gpu.workload.module(case.op), "prepare", wrong)
    row = gpu.run_case(case, "cpu", None, FAST, None)
    assert row["status"] == "refused"
    assert "REFUSED: out" in gpu.line(row)


def test_cases_have_names_of_their_own():
    names = [case.name for case in gpu.cases()]
    assert len(set(names)) == len(names) > 20


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SMALL)
def test_on_a_gpu(name: str):
    row = gpu.run_case(SMALL[name], "cuda", gpu.target(), FAST, torch.cuda.synchronize)
    assert row["status"] == "ok", row["reasons"]
    assert "compiled" in row["arms"], row["absent"]
