"""Forward and every gradient against the float64 oracle, with the error budget: random cases, then every feature alone
and in pairs, on every instruction set of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES
from harness import CPU, Target, threads
from residual_mlp_cases import (
    ACTIVATIONS,
    DIFFERENTIABLE,
    GRAD_LAYOUTS,
    PARAMETER_LAYOUTS,
    ROWS,
    WIDTHS,
    X_LAYOUTS,
    Case,
    random_case,
)
from residual_mlp_harness import check

pytestmark = pytest.mark.usefixtures("one_thread")

RANDOM = [random_case(seed) for seed in range(200)]
HALF = (torch.bfloat16, torch.float16)

# Options that combine with each other.
OPTIONS = {
    "relu": dict(activation="relu"),
    "gelu": dict(activation="gelu_tanh"),
    "checkpoint": dict(checkpoint="block"),
    "groups": dict(groups=3),
    "one x for all groups": dict(groups=2, shared_x=True),
    "large eps": dict(eps=0.1),
    "hardly any variance": dict(gain=3e-3),
    "large mean": dict(bias_mean=30.0),
    "x's gradient alone": dict(needs=("x",)),
    "parameters' gradients alone": dict(needs=DIFFERENTIABLE[1:]),
    "one layer a block": dict(blocks=4, layers_per_block=1),
    "leading dimensions": dict(rows=(3, 2, 5)),
    "arena": dict(layouts=("padded", "sliced", "sliced", "sliced", "sliced", "scalar")),
}

EDGES = {
    "plain": dict(),
    **OPTIONS,
    "no rows": dict(rows=(0,)),
    "no rows, with groups": dict(rows=(2, 0), groups=2),
    "a vector": dict(rows=()),
    "one row": dict(rows=(1,)),
    "a row in each group": dict(rows=(), groups=3),
    "one group": dict(groups=1),
    "one feature": dict(width=1),
    "one feature, one row, one layer": dict(width=1, rows=(), blocks=1, layers_per_block=1),
    "two features": dict(width=2),
    "one layer": dict(blocks=1, layers_per_block=1),
    "one block": dict(blocks=1, layers_per_block=4),
    "a long block": dict(blocks=1, layers_per_block=12),
    "deep": dict(blocks=24, layers_per_block=4, width=16, rows=(5,)),
    "many groups": dict(groups=17, width=7, rows=(3,)),
    "wide": dict(width=300, rows=(5,)),
    "wide, with a mean": dict(width=257, rows=(3,), blocks=1, bias_mean=100.0),
    "large x": dict(x_mean=1000.0),
    "eps 0": dict(eps=0.0),
    "eps enormous": dict(eps=1e6),
}


def edge(number: int, **options) -> Case:
    return Case(**dict(seed=1000 + number) | options)


@pytest.mark.parametrize("target", CPU, ids=str)
@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random(case: Case, target: Target):
    with threads(1 + case.seed % 2):
        check(case, target)


@pytest.mark.parametrize("case", RANDOM[::5], ids=str)
def test_random_on_eager(case: Case):
    check(case, Target("eager"))


@pytest.mark.parametrize("name", EDGES)
def test_edge(name: str, target: Target):
    for number, dtype in enumerate(DTYPES):
        options = EDGES[name]
        if dtype == torch.float16 and "gain" in options:  # the gradients would overflow it
            options = options | dict(gain=0.1)
        check(edge(number, **options, dtype=dtype), target)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(OPTIONS, 2)))
def test_pair(first: str, second: str, kernels: Target):
    options = OPTIONS[first] | OPTIONS[second]
    check(edge(10, **options), kernels)
    check(edge(11, **dict(rows=(21,)) | options, dtype=torch.bfloat16, width=40), kernels)


# Every width and every number of rows beside a few of the other: whole and ragged tiles of both.
@pytest.mark.parametrize("width", WIDTHS)
def test_width(width: int, kernels: Target):
    for number, (rows, dtype) in enumerate(itertools.product((1, 17), (torch.float32, torch.bfloat16))):
        check(edge(20 + number, width=width, rows=(rows,), blocks=1, dtype=dtype), kernels)


@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: int, kernels: Target):
    for number, (width, dtype) in enumerate(itertools.product((16, 37), (torch.float32, torch.bfloat16))):
        check(edge(30 + number, width=width, rows=(rows,), dtype=dtype), kernels)


# A matrix unit takes whole tiles of features, and of float32 from 48 or 65 rows on: they end inside of a tile of the
# batch, of a panel and of a piece of the batch; the widest network's weights come in pieces.
@pytest.mark.parametrize("width", [32, 96, 160, 288])
@pytest.mark.parametrize("rows", [48, 65, 97, 113, 257, 300])
def test_whole_tiles(rows: int, width: int, kernels: Target):
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        checkpoint = "none" if rows % 2 else "block"
        case = edge(34 + number, width=width, rows=(rows,), blocks=1, dtype=dtype, checkpoint=checkpoint)
        with threads(2):
            check(case, kernels)


# Weights that leave a core's own cache are multiplied some rows at a time, by all panels in turn; those whose rows are
# a multiple of 4096 bytes apart are copied for the backward of many rows.
@pytest.mark.parametrize(
    ("width", "rows", "layers", "dtype"),
    [
        (300, 150, (1, 4), torch.float32),
        (1024, 513, (1, 2), torch.float32),
        (512, 513, (3, 1), torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_large_weights(
    width: int, rows: int, layers: tuple[int, int], dtype: torch.dtype, checkpoint: str, kernels: Target
):
    blocks, per_block = layers
    case = edge(
        36, width=width, rows=(rows,), blocks=blocks, layers_per_block=per_block, dtype=dtype, checkpoint=checkpoint
    )
    with threads(2):
        check(case, kernels)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_float32_beside_half_types(dtype: torch.dtype, activation: str, kernels: Target):
    for number, single in enumerate(itertools.product((None, torch.float32), repeat=4)):
        names = ("x_dtype", "bias_dtype", "ln_weight_dtype", "ln_bias_dtype")
        check(edge(40 + number, dtype=dtype, activation=activation, **dict(zip(names, single, strict=True))), kernels)


def test_float32_beside_float64(kernels: Target):
    for number, name in enumerate(("x_dtype", "bias_dtype", "ln_weight_dtype", "ln_bias_dtype")):
        check(edge(60 + number, dtype=torch.float64, **{name: torch.float32}), kernels)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("layout", dict.fromkeys((*GRAD_LAYOUTS, *X_LAYOUTS, *PARAMETER_LAYOUTS)))
def test_layout(layout: str, groups: int | None, kernels: Target):
    """Of one tensor after the other, and of all."""
    for number, takes in enumerate((X_LAYOUTS, *(PARAMETER_LAYOUTS,) * 4, GRAD_LAYOUTS)):
        if layout in takes:
            layouts = ["dense"] * 6
            layouts[number] = layout
            check(edge(70 + number, groups=groups, layouts=tuple(layouts)), kernels)
    if layout in X_LAYOUTS and layout in PARAMETER_LAYOUTS:
        check(edge(80, groups=groups, layouts=(layout,) * 6, dtype=torch.bfloat16), kernels)


@pytest.mark.parametrize("checkpoint", ["none", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_layers(dtype: torch.dtype, checkpoint: str, kernels: Target):
    """The residual stream grows with every block; in float32 it loses nothing."""
    case = edge(90, dtype=dtype, blocks=256, layers_per_block=4, width=24, rows=(11,), checkpoint=checkpoint)
    check(case, kernels)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_thread_count_is_within_the_budget(count: int, kernels: Target):
    with threads(count):
        for rows, groups in ((1, None), (40, None), (200, None), (9, 5)):
            check(edge(100, rows=(rows,), groups=groups, width=48), kernels)
            check(edge(101, rows=(rows,), groups=groups, width=48, dtype=torch.bfloat16, checkpoint="block"), kernels)


# What nobody differentiates may share out its columns (csrc/cpu/residual_mlp_rollout.h): more shares than fit evenly,
# and a last one that is ragged; few rows, strips of them, and rows enough for every thread; more groups than threads.
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 17, 32, 33])
def test_shared_columns(rows: int, count: int, kernels: Target):
    with threads(count):
        for number, dtype in enumerate(DTYPES):
            for width, groups in ((64, None), (107, None), (160, 3)):
                case = edge(110 + number, rows=(rows,), width=width, groups=groups, dtype=dtype, needs=(), blocks=1)
                check(case, kernels)
