"""Packed sequences in the Triton kernels, against one dense call a sequence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_gated_sdpa_varlen as every
import torch
from attention import SMALL, TRITON, tiles
from cases import Case
from test_gated_sdpa_varlen import Packed, check_packed, make_packed, run_packed

LENGTHS = {
    "several": ((5, 17, 34, 1), (9, 40, 34, 3)),
    "empty ones": ((0, 7, 0, 0, 21, 0), (3, 0, 0, 12, 30, 0)),
    "no keys": ((4, 5), (0, 0)),
    "no sequences": ((), ()),
    "decode": ((1, 1, 1), (70, 1, 33)),
    "whole tiles": ((16, 32, 16), (32, 64, 32)),
}
OPTIONS = {
    "bottom right": dict(causal="bottom_right", sink=True),
    "everything": dict(
        causal="bottom_right",
        window=(9, None),
        softcap=4.0,
        sink=True,
        scale=-0.4,
        dtype=torch.float16,
        gate="headwise",
    ),
}
FEW = dict(heads=2, kv_heads=1, d=8, dv=12)


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with TRITON.active(), tiles(SMALL):
        yield


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_is_one_dense_call_a_sequence(lengths: str, options: str):
    check_packed(Packed(Case(seed=60, **FEW | OPTIONS[options]), *LENGTHS[lengths]))


@pytest.mark.parametrize("layout", ["head first", "chunk"])
def test_strided(layout: str):
    check_packed(Packed(Case(seed=61, causal="top_left", **FEW), *LENGTHS["several"]), layout)


def test_wrong_hints_are_harmless():
    packed = Packed(Case(seed=62, causal="bottom_right", **FEW), *LENGTHS["several"])
    check_packed(packed, max_seqlen_q=1, max_seqlen_k=3)


def test_offsets_may_be_strided():
    every.test_offsets_may_be_strided(TRITON)


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("bad", [name for name in every.BAD if name != "empty"])
def test_bad_offsets_are_clamped(bad: str, which: str):
    """Nobody reads them on the host, so nobody raises; but nothing outside a tensor is touched."""
    packed = Packed(Case(seed=64, **FEW), (5, 17, 65), (5, 17, 65))
    run_packed(packed, make_packed(packed), **{which: torch.tensor(every.BAD[bad], dtype=torch.int32)})
