"""Launch configurations of gated attention, as plain data; nothing is tuned at run time.

``TILES[family][pass][bucket]``: for a GPU family, a pass, and head dimensions up to the bucket (the larger of the two,
rounded up to a power of two, counts), the tile of half types; ``SINGLE`` is the same for float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256


class Tile(NamedTuple):
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int


class Table(NamedTuple):
    """The tiles of one call."""

    forward: Tile
    decode: Tile  # m: at most so many rows of a group
    join: Tile
    rows: Tile
    dq: Tile
    dkdv: Tile
    mask_grad: Tile
    multiprocessors: int  # among which a decode is split


BUCKETS = (64, 128, 256)

# The passes without products over long rows take one tile each.
JOIN = Tile(16, 16, 4, 1)
ROWS = {64: Tile(32, 16, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)}


def _row(*tiles: tuple[int, int, int, int]) -> dict[int, Tile]:
    return {bucket: Tile(*tile) for bucket, tile in zip(BUCKETS, tiles, strict=True)}


TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_80": {
        "forward": _row((128, 128, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        "dq": _row((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
        "dkdv": _row((32, 64, 4, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    },
    "sm_86": {
        "forward": _row((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        "dq": _row((128, 64, 8, 3), (64, 64, 8, 2), (32, 32, 8, 1)),
        "dkdv": _row((32, 64, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    },
    "sm_90": {
        "forward": _row((128, 128, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "dq": _row((128, 64, 8, 3), (128, 64, 8, 2), (32, 32, 8, 1)),
        "dkdv": _row((64, 128, 8, 2), (16, 64, 8, 2), (32, 32, 8, 1)),
    },
    "sm_100": {
        "forward": _row((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "dq": _row((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "dkdv": _row((64, 128, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    },
    "sm_120": {
        "forward": _row((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
        "dq": _row((128, 64, 8, 3), (64, 64, 8, 2), (32, 32, 8, 1)),
        "dkdv": _row((32, 64, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    },
    "gfx942": {
        "forward": _row((128, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
        "dq": _row((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
        "dkdv": _row((64, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    },
    "gfx950": {
        "forward": _row((128, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1)),
        "dq": _row((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)),
        "dkdv": _row((64, 64, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    },
}
for _passes in TILES.values():
    _passes["decode"] = _row((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2))
    _passes["mask_grad"] = _row((64, 64, 4, 1), (64, 64, 8, 1), (32, 32, 4, 1))

SINGLE: dict[str, dict[str, dict[int, Tile]]] = {
    family: {
        "forward": _row((64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
        "dq": _row((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
        "dkdv": _row((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1)),
        "decode": _row((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        "mask_grad": _row((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    }
    for family in TILES
}


def table_of(family: str, dtype: torch.dtype, head_dim: int, multiprocessors: int) -> Table:
    """The tiles of a call whose larger head dimension is ``head_dim``."""
    bucket = next(b for b in BUCKETS if head_dim <= b)
    passes = (SINGLE if dtype == torch.float32 else TILES)[family]
    tiles = {name: row[bucket] for name, row in passes.items()}
    return Table(**tiles, join=JOIN, rows=ROWS[bucket], multiprocessors=multiprocessors)
