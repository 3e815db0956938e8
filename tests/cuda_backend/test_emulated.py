"""The CUDA kernels against every backend's cases and budgets, run by the emulator: launches, scratch and all."""

from __future__ import annotations

import re
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
from test_gated_sdpa_varlen import LENGTHS, Packed, check_packed

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


@pytest.mark.parametrize("dims", [(64, 80), (80, 64), (64, 128), (128, 128)], ids=str)
def test_other_pairs_of_head_dimensions_take_a_wider_ones(dims: tuple[int, int]):
    case = Case(dtype=torch.bfloat16, batch=1, sq=40, sk=70, d=dims[0], dv=dims[1])
    check(case, Emulator())
    check(replace(case, gate="headwise", mask="float", sink=True, layouts=("padded",) * 5), Emulator())
    check(replace(case, gate_dtype=torch.float32, causal="top_left", needs=("value", "gate"), sq=1), Emulator())
    packed = Packed(replace(case, causal="bottom_right"), *LENGTHS["empty ones"])
    with emulation(Emulator()), nsk.use_backend("cuda"):
        check_packed(packed, "chunk")


def test_infinity_stays_out_of_the_columns_that_are_not_there():
    case = Case(dtype=torch.float16, batch=1, sq=20, sk=40, d=64, dv=80)
    results = []
    for backend in ("cuda", "eager"):
        inputs = make_inputs(case)
        with torch.no_grad():
            inputs.tensors["key"][..., 3, :] = torch.inf
            inputs.tensors["value"][..., 5, 7] = torch.inf
            inputs.tensors["gate"][..., 1] = -torch.inf
        with emulation(Emulator()), nsk.use_backend(backend):
            results.append(run(case, inputs))
    for name in results[0]:
        assert torch.equal(results[0][name].isfinite(), results[1][name].isfinite()), name


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
        q = torch.randn(1, 2, 8, 192, dtype=torch.bfloat16)
        with pytest.raises(nsk.BackendUnavailable, match="has 192/192"):  # in which 192/128 does not fit
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


MASK = torch.zeros(1, dtype=torch.bfloat16)
TOO_LARGE = {
    "rows": ((1, 1, 2**29, 64), (1, 1, 2**29 + 1, 64), None, "up to 1073741824 rows.*has 536870912 \\+ 536870913"),
    "queries": ((2**16, 2**15, 1, 64), (2**16, 1, 1, 64), None, "2147483647 blocks.*2147483648 for its queries"),
    "keys": ((2**13, 2**8, 1, 64), (2**13, 2**8, 2**14, 64), None, "takes 2147483648 for its keys"),
    "mask": ((2**11, 2**4, 2**12, 64), (2**11, 1, 2**13, 64), MASK, "takes 2147483648 for its mask's gradient"),
}


@pytest.mark.parametrize(("query", "key", "mask", "reason"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_is_too_large_is_refused(query, key, mask, reason: str):
    """Of these sizes there is one row: nothing of it is read."""
    row = torch.zeros(64, dtype=torch.bfloat16)
    with emulation(Emulator()), nsk.use_backend("cuda"):
        refusal = nsk.explain("gated_sdpa", row.expand(query), *[row.expand(key)] * 2, attn_mask=mask)
    assert re.search(f"cuda: no, .*{reason}", refusal), refusal
    assert refusal.count("cuda: no") == 1


def test_packed_sequences_that_are_too_many_are_refused():
    q, k = torch.zeros(64, dtype=torch.bfloat16).expand(16, 2**12, 64), torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    cu = torch.zeros(1, dtype=torch.int32).expand(2**19)
    with emulation(Emulator()), nsk.use_backend("cuda"):
        refusal = nsk.explain("gated_sdpa_varlen", q, k, k, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert "takes 2147483648 for its queries" in refusal
