"""Gated attention on the Triton backend in the interpreter: small tiles, so that small calls cross many of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from cases import Case, make_inputs
from harness import Results, Target, compare, expected, run

from nsk.backends.triton import gated_sdpa
from nsk.backends.triton.tables import Table, Tile

TRITON = Target("triton")
SMALL = Table(
    forward=Tile(16, 32, 4, 1),
    decode=Tile(16, 16, 4, 1),
    join=Tile(2, 0, 4, 1),
    rows=Tile(16, 0, 4, 1),
    dq=Tile(32, 16, 4, 1),
    dkdv=Tile(16, 32, 4, 1),
    mask_grad=Tile(16, 32, 4, 1),
    multiprocessors=1,
)
SIZES = dict(batch=1, heads=2, kv_heads=1, sq=21, sk=37, d=8, dv=12)


@contextlib.contextmanager
def tiles(table: Table) -> Iterator[None]:
    before, gated_sdpa._table = gated_sdpa._table, lambda call: table
    try:
        yield
    finally:
        gated_sdpa._table = before


def small(**options) -> Case:
    return Case(**SIZES | options)


def results_of(case: Case, table: Table = SMALL) -> Results:
    with TRITON.active(), tiles(table):
        return run(case, make_inputs(case))


def failures(case: Case, table: Table = SMALL) -> list[str]:
    """Names and reasons of the results that are out of budget."""
    baseline, oracle, terms = expected(case)
    reports = compare(case.dtype, results_of(case, table), baseline, oracle, terms)
    return [f"{name}: {reason}" for name, report in reports.items() for reason in report.reasons]


def in_both(options: dict) -> list[Case]:
    return [small(**options, dtype=dtype) for dtype in (torch.float32, torch.float16)]
