"""Anything that validation lets through gives the right numbers on the CUDA backend and touches nothing else: the fuzz
tests' calls, in the emulator. It faults accesses outside the call's tensors, of kernels; a sanitized build of it
(``NSK_SANITIZE``) those of the launches and its own besides. As in all fuzz tests every tensor has memory of its own.

``NSK_FUZZ_EXAMPLES`` and ``NSK_FUZZ_SEED`` are those of the others, of which a third are drawn: emulation takes long.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import test_fuzz
import test_residual_mlp_fuzz
import tf32
import torch
from cases import Case
from cuda_cases import HALF, SINGLE
from emulated import HEAD_DIMS, SCHEDULES, WIDTHS, Emulator, emulation
from harness import plain_copy
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_mlp_cases import Case as Mlp
from test_gated_sdpa_varlen import Packed, make_packed, one_by_one, run_packed

import nsk

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.timeout(1500),  # the first one waits for the build
]

FUZZ = settings(test_fuzz.FUZZ, max_examples=-(-test_fuzz.FUZZ.max_examples // 3))
DTYPES = st.sampled_from([*HALF, *SINGLE])
DIMS = st.sampled_from([*HEAD_DIMS, (64, 80), (80, 64), (64, 128)])  # the last are padded
SIZE = st.one_of(st.integers(0, 9), st.integers(0, 70), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65]))
EMULATORS = st.fixed_dictionaries(
    dict(
        schedule=st.integers(0, SCHEDULES - 1),
        seed=st.integers(0, 2**20),
        multiprocessors=st.sampled_from([1, 2, 8, 64]),
    )
)


@st.composite
def attention(draw) -> Case:
    """The other fuzz tests' options, in types and head dimensions of the kernels."""
    d, dv = draw(DIMS)
    kv_heads = draw(st.integers(1, 2))
    sizes = dict(batch=draw(st.integers(0, 2)), heads=kv_heads * draw(st.integers(1, 3)), kv_heads=kv_heads)
    sizes |= dict(sq=draw(SIZE), sk=draw(SIZE), d=d, dv=dv)
    return replace(draw(test_fuzz.cases()), dtype=draw(DTYPES), **sizes)


@st.composite
def mlp(draw) -> Mlp:
    rows = draw(st.sampled_from([(), (draw(SIZE),), (draw(SIZE),), (2, draw(st.integers(0, 20)))]))
    layers, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sizes = dict(width=draw(st.sampled_from(WIDTHS)), rows=rows, blocks=blocks, layers_per_block=layers)
    return replace(draw(test_residual_mlp_fuzz.cases()), dtype=draw(DTYPES), **sizes)


@contextlib.contextmanager
def emulated(emulator: dict) -> Iterator[None]:
    """The CUDA backend in the emulator. Float32, multiplied as TF32, is as precise as float16."""
    loose = {torch.float32: test_fuzz.LOOSE[torch.float16]}
    with (
        emulation(Emulator(**emulator)), nsk.use_backend("cuda"), tf32.allowed(),
        mock.patch.dict(test_fuzz.LOOSE, loose),
    ):  # fmt: skip
        yield


@FUZZ
@given(case=attention(), emulator=EMULATORS)
def test_attention(case: Case, emulator: dict):
    with emulated(emulator):
        test_fuzz.check(case)


@FUZZ
@given(case=mlp(), emulator=EMULATORS)
def test_mlp(case: Mlp, emulator: dict):
    with emulated(emulator):
        test_residual_mlp_fuzz.check(case)


@st.composite
def cut(draw, total: int, number: int) -> list[int]:
    """Offsets that cut ``total`` rows into sequences."""
    inner = draw(st.lists(st.integers(0, total), min_size=number - 1, max_size=number - 1))
    return [0, *sorted(inner), total]


def any_offsets(total: int, number: int) -> st.SearchStrategy[list[int]]:
    """Offsets that nobody on the host looks at."""
    near, far = st.integers(-3, total + 3), st.integers(-(2**31), 2**31 - 1)
    return st.lists(st.one_of(near, near, far), min_size=number + 1, max_size=number + 1)


@FUZZ
@given(data=st.data(), case=attention(), emulator=EMULATORS)
def test_packed(data, case: Case, emulator: dict):
    """Offsets lead nowhere outside the tensors, whatever they are."""
    number, right = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    totals, offsets = (case.sq, case.sk), cut if right else any_offsets
    cu = [data.draw(offsets(total, number)) for total in totals]
    lengths = [torch.tensor(c).diff().tolist() for c in cu] if right else [[total] for total in totals]
    packed = Packed(replace(case, mask="none"), *map(tuple, lengths))
    inputs = make_packed(packed, data.draw(st.sampled_from(["dense", "head first", "chunk"])))
    cu_q, cu_k = (torch.tensor(c, dtype=torch.int32) for c in cu)
    everything = [*inputs.tensors.values(), inputs.grad_out, inputs.grad_lse, cu_q, cu_k]
    guards = [test_fuzz.Guarded.of(t) for t in everything if t is not None]
    with emulated(emulator | dict(defined=right)):
        results = run_packed(packed, inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        assert all(guard.untouched() for guard in guards)
        if right and abs(case.scale or 0) <= 1:
            exact = one_by_one(packed, plain_copy(inputs, torch.float64))
            assert all(test_fuzz.agrees(results[name], exact[name], case.dtype) for name in exact)
