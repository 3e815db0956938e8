"""Gated attention's Triton kernels against the float64 oracle, with the error budget of every backend."""

from __future__ import annotations

import pytest
import torch
from attention import SMALL, failures, in_both, small
from cases import random_case

from nsk.backends.triton.tables import Tile

OPTIONS = {
    "plain": dict(),
    "headwise": dict(gate="headwise", causal="top_left"),
    "no gate": dict(gate="none", causal="bottom_right"),
    "no gate, sink": dict(gate="none", sink=True),
    "headwise, sink": dict(gate="headwise", sink=True, grad_lse=False),
    "causal": dict(causal="top_left", sq=40, sk=70),
    "more queries than keys": dict(causal="top_left", sq=70, sk=19),
    "dead first rows": dict(causal="bottom_right", sq=50, sk=19, sink=True),
    "bool mask": dict(mask="bool"),
    "float mask": dict(mask="float", mask_dims="1hqk", heads=4, kv_heads=2, batch=2),
    "mask of keys": dict(mask="float", mask_dims="b11k", batch=2, softcap=3.0),
    "mask of queries": dict(mask="float", mask_dims="1hq1", causal="top_left"),
    "scalar mask": dict(mask="float", mask_dims="1111", batch=2),
    "expanded mask": dict(mask="float", mask_dims="qk", mask_layout="expanded"),
    "strided mask": dict(mask="bool", mask_dims="b1qk", mask_layout="strided", batch=2),
    "dead rows": dict(mask="bool", mask_dims="b1qk", dead_rows=True, sink=True),
    "dead rows of a float mask": dict(mask="float", mask_dims="b1qk", dead_rows=True, gate="headwise"),
    "window": dict(window=(7, 3), sq=60, sk=60),
    "window, bottom right": dict(window=(4, 9), bottom_right=True),
    "window without left": dict(window=(None, 2)),
    "window without right": dict(window=(2, None), causal="bottom_right", sk=90),
    "window of one key": dict(window=(0, 0)),
    "window past the last key": dict(sq=90, sk=20, window=(3, 3)),
    "window wider than the keys": dict(window=(1000, 1000)),
    "softcap": dict(softcap=2.0),
    "tiny softcap": dict(softcap=0.05, causal="top_left"),
    "negative scale": dict(scale=-0.3),
    "scale 0": dict(scale=0.0),
    "saturated softmax": dict(scale=4.0, d=64),
    "shut gate": dict(gate_mean=-40.0),
    "groups": dict(heads=6, kv_heads=2, causal="bottom_right"),
    "heads": dict(heads=3, kv_heads=3, batch=2),
    "odd head dims": dict(d=37, dv=29),
    "wide key": dict(d=130, dv=3, sk=33),
    "wide value": dict(d=3, dv=200, sk=33),
    "widest": dict(d=256, dv=256, sq=17, sk=33),
    "head dim 1": dict(d=1, dv=1),
    "one of each": dict(sq=1, sk=1, d=1, dv=1, heads=1),
    "no keys": dict(sk=0, sink=True),
    "no queries": dict(sq=0),
    "no batch": dict(batch=0),
    "whole tiles": dict(sq=64, sk=96, d=16, dv=16),
    "layouts": dict(layouts=("chunk", "transposed", "padded", "stepped", "transposed"), batch=2),
    "expanded": dict(layouts=("expanded", "chunk", "expanded", "padded", "expanded"), batch=2),
    "strided headwise": dict(gate="headwise", layouts=("padded", "stepped", "chunk", "strided", "strided")),
    "only keys": dict(needs=("key",)),
    "only values": dict(needs=("value",), sink=True),
    "only gate": dict(needs=("gate",)),
    "only mask and sink": dict(needs=("attn_mask", "sink"), mask="float", sink=True),
    "everything": dict(
        mask="float", causal="bottom_right", window=(20, None), softcap=3.0, sink=True, scale=-0.4, heads=4, kv_heads=2
    ),
}
FLOAT32_BESIDE_HALF = [
    dict(
        gate=gate, gate_dtype=torch.float32, mask="float", mask_dtype=torch.float32, sink=True, sink_dtype=torch.float32
    )
    for gate in ("elementwise", "headwise")
]
DECODE = {
    "one query": dict(sq=1, sk=131, heads=2, kv_heads=2),
    "a group": dict(sq=1, sk=150, heads=4, kv_heads=1, sink=True),
    "few queries": dict(sq=3, sk=199, heads=4, kv_heads=2, causal="bottom_right", gate="headwise", batch=2),
    "window": dict(sq=2, sk=130, window=(40, 0), bottom_right=True, softcap=2.0),
    "no gate": dict(sq=2, sk=130, gate="none", causal="top_left"),
    "mask": dict(sq=3, sk=100, mask="float", sink=True),
    "bool mask": dict(sq=2, sk=100, mask="bool", mask_dims="b1qk", dead_rows=True),
}
# Random cases of the other backends, those small enough for the interpreter.
RANDOM = [
    case
    for case in map(random_case, range(400))
    if case.dtype in (torch.float32, torch.float16)
    and max(case.d, case.dv) <= 256
    and case.batch * case.heads * -(-case.sq // 16) * -(-case.sk // 16) <= 24
][:40]


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name: str):
    for case in in_both(OPTIONS[name]):
        assert failures(case) == []


@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random(case):
    assert failures(case) == []


@pytest.mark.parametrize("options", FLOAT32_BESIDE_HALF, ids=["elementwise", "headwise"])
def test_float32_beside_half_types(options: dict):
    assert failures(small(dtype=torch.float16, **options)) == []


@pytest.mark.parametrize("name", DECODE)
def test_decode(name: str, watch):
    for case in in_both(dict(needs=()) | DECODE[name]):
        watch.launches.clear()
        assert failures(case, SMALL._replace(multiprocessors=4)) == []
        assert watch.launches == {"gated_sdpa_decode": 1, "gated_sdpa_join": 1}


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (128, 64)], ids=str)
def test_tiles_of_other_shapes(shape: tuple[int, int]):
    tile = Tile(*shape, 4, 1)
    table = SMALL._replace(forward=tile, dq=tile, dkdv=tile, mask_grad=tile, rows=tile)
    for options in (dict(causal="top_left", window=(30, None)), dict(window=(25, 25), sink=True)):
        assert failures(small(sq=70, sk=90, **options), table) == []


def test_two_runs_give_the_same_bits():
    from attention import results_of

    case = small(mask="float", mask_dims="1hqk", sink=True, heads=4, kv_heads=2)
    first, second = results_of(case), results_of(case)
    assert all(torch.equal(first[name], second[name]) for name in first)
