"""Forward and every gradient against the float64 oracle, with the error budget: random cases, then every feature alone
and in pairs, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS, Case, random_case
from harness import CPU, Target, check

RANDOM = [random_case(seed) for seed in range(320)]

# Options that combine with each other.
OPTIONS = {
    "headwise": dict(gate="headwise"),
    "no gate": dict(gate="none"),
    "bool mask": dict(mask="bool", mask_dims="bhqk"),
    "float mask": dict(mask="float", mask_dims="1hqk"),
    "dead rows": dict(mask="bool", mask_dims="b1qk", dead_rows=True),
    "top left": dict(causal="top_left"),
    "bottom right": dict(causal="bottom_right"),
    "window": dict(window=(7, 3)),
    "bottom right window": dict(window=(4, 9), bottom_right=True),
    "softcap": dict(softcap=3.0),
    "sink": dict(sink=True),
    "negative scale": dict(scale=-0.3),
    "no lse gradient": dict(grad_lse=False),
}

EDGES = {
    "plain": dict(),
    **OPTIONS,
    "window of one key": dict(window=(0, 0)),
    "window without left": dict(window=(None, 2)),
    "window without right": dict(window=(2, None)),
    "window wider than the keys": dict(window=(1000, 1000)),
    "window past the last key": dict(sq=90, sk=20, window=(3, 3)),
    "bottom right before the first key": dict(sq=90, sk=20, window=(3, 3), bottom_right=True),
    "causal, more queries": dict(sq=70, sk=19, causal="top_left"),
    "causal, dead first rows": dict(sq=70, sk=19, causal="bottom_right"),
    "causal, more keys": dict(sq=19, sk=150, causal="top_left"),
    "decode": dict(sq=1, sk=777, causal="bottom_right"),
    "decode of a group": dict(sq=1, sk=513, heads=8, kv_heads=1, d=64),
    "scale 0": dict(scale=0.0),
    "saturated softmax": dict(scale=4.0, d=64),
    "tiny softcap": dict(softcap=0.05),
    "shut gate": dict(gate_mean=-40.0),
    "open gate": dict(gate_mean=12.0),
    "one query": dict(sq=1),
    "one key": dict(sk=1),
    "one of each": dict(sq=1, sk=1, d=1, dv=1, batch=1, heads=1, kv_heads=1),
    "no batch": dict(batch=0),
    "no queries": dict(sq=0),
    "no keys": dict(sk=0),
    "no keys, with sink": dict(sk=0, sink=True),
    "neither": dict(sq=0, sk=0),
    "head dim 1": dict(d=1, dv=1),
    "odd head dims": dict(d=37, dv=29),
    "wide key": dict(d=512, dv=3, sk=33),
    "wide value": dict(d=3, dv=512, sk=33),
    "widest": dict(d=512, dv=512, sq=17, sk=40, heads=2, kv_heads=1),
    "multi-query": dict(heads=8, kv_heads=1),
    "many groups": dict(heads=12, kv_heads=4),
    "multi-head": dict(heads=4, kv_heads=4),
    "many tiles": dict(batch=1, heads=2, kv_heads=1, sq=300, sk=513, d=16, dv=16, causal="bottom_right"),
    "a long head": dict(batch=1, heads=1, kv_heads=1, sq=1100, sk=1100, d=8, dv=8, causal="top_left"),
}
MASKS = ("bhqk", "1hqk", "b1qk", "11qk", "hqk", "qk", "b11k", "bh1k", "k", "bhq1", "1hq1", "q1", "1111", "1")


def edge(number: int, **options) -> Case:
    return Case(**dict(seed=1000 + number) | options)


def by_dtype(case: dict) -> list[Case]:
    return [edge(number, **case, dtype=dtype) for number, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize("target", CPU, ids=str)
@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random(case: Case, target: Target):
    check(case, target)


@pytest.mark.parametrize("case", RANDOM[::8], ids=str)
def test_random_on_eager(case: Case):
    check(case, Target("eager"))


@pytest.mark.parametrize("name", EDGES)
def test_edge(name: str, target: Target):
    for case in by_dtype(EDGES[name]):
        check(case, target)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(OPTIONS, 2)))
def test_pair(first: str, second: str, kernels: Target):
    check(edge(10, **OPTIONS[first] | OPTIONS[second]), kernels)
    check(edge(11, **OPTIONS[first] | OPTIONS[second], dtype=torch.bfloat16, sq=61, sk=29), kernels)


# Few queries a KV head: one row, a few rows of several heads, eight; sizes that line up with nothing, and that do.
@pytest.mark.parametrize("option", ["plain", *OPTIONS])
def test_decode(option: str, target: Target):
    for number, (case, dtype) in enumerate(
        itertools.product(
            (
                dict(sq=1, sk=131, heads=2, kv_heads=2, d=24, dv=40),
                dict(sq=2, sk=199, heads=6, kv_heads=2, d=37, dv=29),
                dict(sq=1, sk=320, heads=8, kv_heads=1, d=64, dv=32),
            ),
            DTYPES,
        )
    ):
        check(edge(60 + number, **case | EDGES[option], dtype=dtype), target)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("dims", MASKS)
def test_mask_shape(dims: str, kind: str, kernels: Target):
    for number, layout in enumerate(("dense", "expanded", "strided")):
        check(edge(20 + number, mask=kind, mask_dims=dims, mask_layout=layout, heads=2, sink=True), kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_gate_mask_and_sink_beside_half_types(dtype: torch.dtype, kernels: Target):
    for number, (gate, f32) in enumerate(itertools.product(("elementwise", "headwise"), (None, torch.float32))):
        wide = dict(gate=gate, gate_dtype=torch.float32, mask="float", mask_dtype=f32, sink=True, sink_dtype=f32)
        check(edge(30 + number, dtype=dtype, **wide), kernels)


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, gate: str, kernels: Target):
    for number in range(5):
        layouts = ["dense"] * 5
        layouts[number] = layout
        check(edge(40 + number, gate=gate, layouts=tuple(layouts)), kernels)
    check(edge(45, gate=gate, layouts=(layout,) * 5, dtype=torch.bfloat16, d=64, dv=64), kernels)


def test_headwise_gate_and_incoming_gradient_without_a_unit_stride(kernels: Target):
    check(edge(50, gate="headwise", layouts=("dense", "dense", "dense", "strided", "strided")), kernels)
