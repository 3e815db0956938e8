"""Launch configurations of gated attention, as plain data; nothing is tuned at run time.

``TILES[family][pass][bucket]``: for a GPU family, a pass, and head dimensions up to the bucket (the larger of the two,
rounded up to a power of two, counts), the tile of half types; ``SINGLE`` is the same for float32, ``TF32`` for float32
whose products may run on tensor cores.

Of the tiles that were tried each is the largest, or near it, that ``python -m benchmarks.aot`` finds to fit its
architecture with every Triton that the backend takes: without spills, within the shared and tensor memory, on the
matrix instructions meant for it; of the few that still spill some bytes it says so. None has been timed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    dkdv: Tile | None  # None: dK and dV take a launch each
    mask_grad: Tile
    multiprocessors: int  # among which a decode is split
    dk: Tile | None = None
    dv: Tile | None = None


BUCKETS = (64, 128, 256)


def beside_a_mask(tile: Tile, *, of_keys: bool = False) -> Tile:
    """A mask has an address a score, which takes as many registers: half as many scores leave room for them. A program
    ``of_keys`` walks over queries, any other over keys; where they are few already, it owns fewer queries too."""
    if of_keys:
        return tile._replace(m=max(16, tile.m // 2))
    return tile._replace(m=tile.m // 2 if tile.m > 64 and tile.n <= 32 else tile.m, n=max(16, tile.n // 2))


# The passes without products over long rows take one tile each.
JOIN = Tile(16, 16, 4, 1)
ROWS = {64: Tile(32, 16, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)}

Row = dict[int, Tile | None]


def _row(*tiles: tuple[int, int, int, int] | None) -> Row:
    return {bucket: tile and Tile(*tile) for bucket, tile in zip(BUCKETS, tiles, strict=True)}


TILES: dict[str, dict[str, Row]] = {
    "sm_80": {
        "forward": _row((128, 128, 8, 3), (64, 64, 8, 3), (64, 32, 8, 3)),
        "dq": _row((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 3)),
        "dkdv": _row((64, 128, 8, 2), (32, 64, 8, 3), (32, 32, 8, 2)),
    },
    "sm_86": {
        "forward": _row((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
        "dq": _row((128, 64, 8, 3), (128, 32, 8, 2), (64, 16, 8, 2)),
        "dkdv": _row((32, 128, 8, 3), (32, 64, 8, 2), (32, 32, 8, 2)),
    },
    "sm_90": {
        "forward": _row((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        "dq": _row((128, 128, 8, 3), (128, 64, 8, 3), (128, 16, 8, 2)),
        # At 128 columns both sums together leave registers for tiles of 16 queries only, of which wgmma, with operands
        # from shared memory, makes a quarter of its rate. A launch for each sum has 32 queries, half the rate, and
        # repeats the scores' product: 5 products instead of 4, of which 3 and not 2 are of scores, at twice the rate.
        "dkdv": _row((32, 128, 8, 3), None, (32, 32, 8, 2)),
        "dk": _row(None, (32, 128, 8, 3), None),
        "dv": _row(None, (32, 128, 8, 3), None),
    },
    "sm_100": {
        "forward": _row((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        "dq": _row((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "dkdv": _row((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2)),
    },
    "sm_120": {
        "forward": _row((128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)),
        "dq": _row((128, 64, 8, 2), (128, 32, 8, 2), (64, 16, 8, 2)),
        "dkdv": _row((16, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    },
    "gfx942": {
        "forward": _row((128, 128, 4, 2), (128, 64, 4, 2), (128, 32, 4, 2)),
        "dq": _row((128, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        "dkdv": _row((64, 128, 4, 1), (32, 64, 4, 1), (16, 32, 4, 1)),
    },
    "gfx950": {
        "forward": _row((128, 128, 4, 2), (128, 64, 4, 2), (128, 32, 4, 2)),
        "dq": _row((128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
        "dkdv": _row((64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    },
}

# Tiles that one version of Triton compiles with spills, and what takes their place there.
UNDER: dict[tuple[int, ...], dict[tuple[str, str, int], Tile]] = {
    (3, 8): {
        ("sm_80", "dkdv", 64): Tile(32, 128, 8, 3),
        ("sm_90", "forward", 128): Tile(128, 32, 8, 3),
        ("sm_90", "forward", 256): Tile(64, 16, 8, 2),
        ("sm_100", "decode", 128): Tile(64, 32, 8, 2),
        ("gfx942", "dkdv", 128): Tile(32, 32, 4, 1),
    },
    (3, 9): {("sm_90", "forward", 256): Tile(64, 16, 8, 2)},
}

_NVIDIA_MASK_GRAD = _row((64, 64, 8, 1), (32, 64, 8, 1), (32, 16, 8, 1))
_AMD_MASK_GRAD = _row((64, 64, 4, 1), (64, 64, 4, 1), (32, 32, 4, 1))
for _family, _passes in TILES.items():
    _keys = 32 if _family.startswith("gfx") else 64
    _passes["decode"] = _row((64, _keys, 4, 3 if _family == "sm_80" else 2), (64, 32, 4, 2), (32, 32, 4, 2))
    _passes["mask_grad"] = _AMD_MASK_GRAD if _family.startswith("gfx") else _NVIDIA_MASK_GRAD

# Products in float32 keep their operands in registers, and so have small tiles, the same on all of a vendor's.
_NVIDIA_SINGLE = {
    "forward": _row((64, 32, 8, 2), (32, 16, 8, 2), (32, 32, 8, 1)),
    "dq": _row((64, 32, 8, 2), (16, 32, 8, 2), (32, 16, 8, 1)),
    "dkdv": _row((16, 64, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)),
    "decode": _row((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    "mask_grad": _row((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
_AMD_SINGLE = {
    "forward": _row((64, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "dq": _row((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1)),
    "dkdv": _row((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
    "decode": _row((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    "mask_grad": _row((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
}
SINGLE = {family: _AMD_SINGLE if family.startswith("gfx") else _NVIDIA_SINGLE for family in TILES}

_TF32 = {
    "forward": _row((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "dq": _row((64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 1)),
    "dkdv": _row((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
    "decode": _row((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    "mask_grad": _row((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
TF32 = {family: _TF32 for family in TILES if family.startswith("sm_")}


def table_of(
    family: str,
    dtype: torch.dtype,
    head_dim: int,
    multiprocessors: int,
    tf32: bool = False,
    version: tuple[int, ...] = (),
) -> Table:
    """The tiles of a call whose larger head dimension is ``head_dim``; ``tf32``: float32 products need not be exact.
    ``version`` is Triton's."""
    bucket = next(b for b in BUCKETS if head_dim <= b)
    half = dtype != torch.float32
    tables = TILES if half else TF32 if tf32 and family in TF32 else SINGLE
    tiles: dict[str, Any] = {name: row[bucket] for name, row in tables[family].items()}
    if half:
        changed = UNDER.get(version, {})
        tiles |= {name: tile for (of, name, at), tile in changed.items() if (of, at) == (family, bucket)}
    return Table(**tiles, join=JOIN, rows=ROWS[bucket], multiprocessors=multiprocessors)
