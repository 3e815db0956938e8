"""The deep residual MLP on the Triton backend in the interpreter: small tiles, so that small calls cross many of them,
and both kinds of kernels on networks of any width."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from harness import Results, Target
from residual_mlp_cases import Case, make_inputs
from residual_mlp_harness import compare, expected, run

from nsk.backends.triton import residual_mlp
from nsk.backends.triton.mlp_tables import Rows, Tiles

TRITON = Target("triton")
ROWS = Rows(4, 1, block_m=16, chunks=2)
TILES = Tiles(4, 1, block_m=16, block_n=16, block_k=16)
KINDS = {"rows": ROWS, "tiles": TILES}
SIZES = dict(rows=(21,), width=24, blocks=2, layers_per_block=2)


@contextlib.contextmanager
def launched_as(kind: str, blocks_per_pass: int | None = None) -> Iterator[None]:
    """Calls use the kernels of this kind, with small tiles, and at most so many blocks in a pass of the backward."""
    plan_of, per_pass = residual_mlp.plan_of, residual_mlp._blocks_per_pass
    launch = KINDS[kind]

    def plan(call, family):
        return replace(plan_of(call, family), forward=launch, backward=launch, parameters=TILES)

    residual_mlp.plan_of = plan
    if blocks_per_pass:
        residual_mlp._blocks_per_pass = lambda call, *_: min(blocks_per_pass, call.depth // call.layers_per_block)
    try:
        yield
    finally:
        residual_mlp.plan_of, residual_mlp._blocks_per_pass = plan_of, per_pass


def small(**options) -> Case:
    return Case(**SIZES | options)


def results_of(case: Case, kind: str, blocks_per_pass: int | None = None) -> Results:
    with TRITON.active(), launched_as(kind, blocks_per_pass):
        return run(case, make_inputs(case))


def failures(case: Case, kind: str) -> list[str]:
    """Names and reasons of the results that are out of budget."""
    reports = compare(case, results_of(case, kind), *expected(case))
    return [f"{name}: {reason}" for name, report in reports.items() for reason in report.reasons]


def in_both(options: dict) -> list[Case]:
    return [small(**options, dtype=dtype) for dtype in (torch.float32, torch.float16)]
