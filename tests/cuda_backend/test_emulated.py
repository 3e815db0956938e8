"""The CUDA kernels against every backend's cases and budgets, run by the emulator: launches, scratch and all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tf32
import torch
from cases import Case, make_inputs
from cuda_cases import SINGLE, attention_cases, expected_of, mlp_cases
from emulated import HEAD_DIMS, SCHEDULES, WIDTHS, Emulator, emulation
from harness import compare, run
from residual_mlp_cases import Case as Mlp
from residual_mlp_cases import make_inputs as make_mlp
from residual_mlp_harness import compare as compare_mlp
from residual_mlp_harness import expected as expected_mlp
from residual_mlp_harness import run as run_mlp

import nsk

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.timeout(1500),  # the first one waits for the build
]


def check(case: Case, emulator: Emulator) -> dict:
    with emulation(emulator), nsk.use_backend("cuda"), tf32.allowed():
        results = run(case, make_inputs(case))
    dtype, expected = expected_of(case)
    for name, report in compare(dtype, results, *expected).items():
        report.check(f"{case}: {name}")
    return results


def check_mlp(case: Mlp, emulator: Emulator) -> dict:
    with emulation(emulator), nsk.use_backend("cuda"):
        results = run_mlp(case, make_mlp(case))
    as_tf32 = case.dtype == torch.float32
    for name, report in compare_mlp(case, results, *expected_mlp(case, as_tf32), as_tf32).items():
        report.check(f"{case}: {name}")
    return results


@pytest.mark.parametrize("case", attention_cases(60, HEAD_DIMS, 70), ids=str)
def test_attention(case: Case):
    check(case, Emulator(schedule=case.seed % SCHEDULES, seed=case.seed))


@pytest.mark.parametrize("case", attention_cases(24, HEAD_DIMS, 70, SINGLE), ids=str)
def test_attention_in_tf32(case: Case):
    check(case, Emulator(schedule=case.seed % SCHEDULES, seed=case.seed))


@pytest.mark.parametrize("case", mlp_cases(24, WIDTHS, 40), ids=str)
def test_mlp(case: Mlp):
    check_mlp(case, Emulator(schedule=case.seed % SCHEDULES, seed=case.seed))


@pytest.mark.parametrize("case", mlp_cases(12, WIDTHS, 40, SINGLE), ids=str)
def test_mlp_in_tf32(case: Mlp):
    with tf32.allowed():
        check_mlp(case, Emulator(schedule=case.seed % SCHEDULES, seed=case.seed))


class Counting(Emulator):
    """Remembers what calls took of scratch."""

    def count(self, function, *args) -> int:
        self.counted = super().count(function, *args)
        return self.counted


# Two tiles of 16 rows park one of two layers each. For x alone nothing was kept: beside that there are the two blocks'
# stream and y of the forward that is run again. Else x's gradient is there, though nobody's, and both operands of the
# weights' gradients, or the tiles' shares of the vectors' and two of these that are nobody's.
_PARKED, _ROWS = 2 * 256 * (4 + 2) * 4, 20 * 64 * 4
_SCRATCH = {
    "x": _PARKED + 3 * _ROWS,
    "weight": _PARKED + _ROWS + 2 * 4 * 20 * 64 * 2,
    "ln_bias": _PARKED + _ROWS + 4 * 2 * 3 * 64 * 4 + 2 * 4 * 64 * 4,
}


@pytest.mark.parametrize("wanted", _SCRATCH)
def test_mlp_of_which_one_gradient_is_wanted(wanted: str):
    case, emulator = Mlp(dtype=torch.bfloat16, width=64, rows=(20,), needs=(wanted,)), Counting()
    check_mlp(case, emulator)
    assert emulator.counted == _SCRATCH[wanted]
    check_mlp(replace(case, checkpoint="block"), Emulator())


def test_a_decode_is_split():
    case = Case(dtype=torch.bfloat16, batch=1, heads=4, kv_heads=1, sq=1, sk=1030, d=64, dv=64, sink=True, needs=())
    check(case, Emulator(multiprocessors=8))


def test_every_schedule_gives_the_same_bits():
    case = Case(dtype=torch.float16, batch=1, sq=40, sk=70, d=64, dv=64, sink=True, mask="float", causal="top_left")
    first = check(case, Emulator())
    for schedule in range(1, SCHEDULES):
        again = check(case, Emulator(schedule=schedule, seed=schedule))
        assert all(torch.equal(first[name], again[name]) for name in first), schedule


@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_tiles_of_rows_do_not_matter(multiprocessors: int):
    """32 rows a tile, which few multiprocessors share, or 16."""
    case = Mlp(dtype=torch.bfloat16, width=64, rows=(70,), blocks=2, layers_per_block=2)
    check_mlp(case, Emulator(multiprocessors=multiprocessors))
    check_mlp(replace(case, groups=2, checkpoint="block"), Emulator(multiprocessors=multiprocessors))


def test_what_is_refused_says_why():
    with emulation(Emulator()), nsk.use_backend("cuda"):
        q = torch.randn(1, 2, 8, 48, dtype=torch.bfloat16)
        with pytest.raises(nsk.BackendUnavailable, match=r"head dimensions \(of query/value\) 64/64.*has 48/48"):
            nsk.gated_sdpa(q, q, q)
        q = torch.randn(1, 2, 8, 64)
        with pytest.raises(nsk.BackendUnavailable, match='only as TF32, which .*fp32_precision = "tf32" allows'):
            nsk.gated_sdpa(q, q, q)
        with pytest.raises(nsk.BackendUnavailable, match="no float64 kernels"):
            nsk.gated_sdpa(q.double(), q.double(), q.double())
        w, v = torch.randn(2, 96, 96).bfloat16(), torch.zeros(2, 96)
        with pytest.raises(nsk.BackendUnavailable, match="width 64, 128 on the chip, and this call has 96"):
            nsk.residual_mlp(torch.randn(3, 96).bfloat16(), w, v, v, v, layers_per_block=2)
        w, v = torch.randn(2, 64, 64), torch.zeros(2, 64)
        with pytest.raises(nsk.BackendUnavailable, match=r'only as TF32, which .*fp32_precision = "tf32" allows'):
            nsk.residual_mlp(torch.randn(3, 64), w, v, v, v, layers_per_block=2)
        w, v = w.double(), v.double()
        with tf32.allowed(), pytest.raises(nsk.BackendUnavailable, match="no float64 kernels for residual_mlp"):
            nsk.residual_mlp(torch.randn(3, 64).double(), w, v, v, v, layers_per_block=2)
        w, v = torch.randn(2, 128, 128), torch.zeros(2, 128)
        with (
            emulation(Emulator(shared_bytes=50000)), tf32.allowed(),
            pytest.raises(nsk.BackendUnavailable, match="needs 54784 bytes of shared memory at this width"),
        ):  # fmt: skip
            nsk.residual_mlp(torch.randn(3, 128), w, v, v, v, layers_per_block=2)
