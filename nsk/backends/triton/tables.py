"""Launch configurations of gated attention, as plain data; nothing is tuned at run time.

``TILES[family][pass][bucket]``: for a GPU family, a pass, and head dimensions up to the bucket (the larger of the two,
rounded up to a power of two, counts), the tile of half types; ``SINGLE`` is the same for float32, ``TF32`` for float32
whose products may run on tensor cores.

Of the tiles that were tried each is the largest, or near it, that ``python -m benchmarks.aot`` finds to fit its
architecture with Triton 3.7: without spills, within the shared and tensor memory, on the matrix instructions meant for
it. Those of half types on sm_90 and sm_100 were tried in the stages given here, which Triton runs from 3.9 on;
``ONE_STAGE`` has what differs before, ``UNDER`` what differs in one version. Under 3.8 and 3.9 the assembler spills
some bytes in a few launches that are not among the tests'. None has been timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nsk.backends.triton.device import stages_of

MAX_HEAD_DIM = 256


class Tile(NamedTuple):
    m: int  # queries
    n: int  # keys
    warps: int
    stages: int
    registers: int = 0  # at most so many a thread; 0: as the assembler likes


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
    masked: Mapping[str, Tile] = {}  # where ``beside_a_mask`` does not fit
    registers: int = 0  # of a thread that walks over keys beside a mask

    def tile(self, name: str, mask: bool) -> Tile:
        """Of a pass, in a call with a mask or without."""
        base = "forward" if name == "norm" else name
        tile = getattr(self, base)
        return (self.masked.get(base) or beside_a_mask(base, tile, self.registers)) if mask else tile


BUCKETS = (64, 128, 256)
OF_KEYS = ("dkdv", "dk", "dv")  # passes whose programs own keys and walk over queries


# Left to itself NVIDIA's assembler aims for two programs of a masked forward a multiprocessor, at 128 registers a
# thread, and spills a few for it.
NVIDIA_REGISTERS = 255


def beside_a_mask(name: str, tile: Tile, registers: int) -> Tile:
    """A mask has an address a score, which takes as many registers: half as many scores leave room for them. What a
    program walks over is halved; where that is few already, what it owns."""
    m, n = tile.m, tile.n
    if name in OF_KEYS:
        return tile._replace(m=max(16, m // 2))
    tile = tile._replace(m=m // 2 if m > 64 and n <= 32 else m, n=max(16, n // 2))
    return tile._replace(registers=registers) if name == "forward" else tile


# The passes without products over long rows take one tile each.
JOIN = Tile(16, 16, 4, 1)
ROWS = {64: Tile(32, 16, 4, 1), 128: Tile(16, 16, 4, 1), 256: Tile(16, 16, 4, 1)}

Row = dict[int, Tile | None]


def _row(*tiles: tuple[int, ...] | None) -> Row:
    return {bucket: tile and Tile(*tile) for bucket, tile in zip(BUCKETS, tiles, strict=True)}


TILES: dict[str, dict[str, Row]] = {
    "sm_80": {
        "forward": _row((128, 128, 8, 3), (64, 64, 8, 3), (64, 32, 8, 3)),
        "dq": _row((128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 3)),
        "dkdv": _row((64, 128, 8, 2), (32, 64, 8, 3), (32, 32, 8, 2)),
    },
    "sm_86": {
        "forward": _row((128, 64, 8, 3), (64, 64, 8, 3), (64, 32, 8, 2)),
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
        "forward": _row((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
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

# Tiles that spill when ``stages_of`` gives sm_90 and sm_100 one stage, whose copies go through registers, and what
# takes their place there.
ONE_STAGE: dict[tuple[str, str, int], Tile] = {
    ("sm_90", "forward", 256): Tile(128, 16, 8, 1),
    ("sm_90", "dq", 64): Tile(128, 64, 8, 1),
    ("sm_90", "dq", 128): Tile(128, 32, 8, 1),
    ("sm_90", "dq", 256): Tile(32, 32, 8, 1),  # no tile of 64 queries fits: the warps' own instructions
    ("sm_100", "forward", 64): Tile(128, 64, 8, 1, 255),
    ("sm_100", "dq", 64): Tile(128, 64, 8, 1, 255),
    ("sm_100", "dq", 256): Tile(128, 16, 8, 1),
    ("sm_100", "dkdv", 256): Tile(16, 64, 8, 1),
}

# Tiles that one version of Triton compiles with spills, and what takes their place there.
UNDER: dict[tuple[int, ...], dict[tuple[str, str, int], Tile]] = {
    (3, 8): {
        ("sm_80", "dkdv", 64): Tile(32, 128, 8, 3),
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
TILES["sm_120"]["mask_grad"] = _NVIDIA_MASK_GRAD | {64: Tile(32, 64, 8, 1)}

# Products in float32 keep their operands in registers, and so have small tiles, the same on all of a vendor's.
_NVIDIA_SINGLE = {
    "forward": _row((64, 32, 8, 2), (32, 16, 8, 2), (32, 32, 8, 1)),
    "dq": _row((64, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1, 255)),
    "dkdv": _row((16, 64, 8, 2), (16, 32, 8, 2), (16, 16, 8, 1)),
    "decode": _row((16, 32, 4, 1), (16, 32, 8, 1, 255), (16, 32, 8, 1)),
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
SINGLE["gfx950"] = _AMD_SINGLE | {"dq": _AMD_SINGLE["dq"] | {256: Tile(32, 16, 2, 1)}}

_TF32 = {
    "forward": _row((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
    "dq": _row((64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
    "dkdv": _row((32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 8, 1)),
    "decode": _row((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
    "mask_grad": _row((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}
TF32 = {family: _TF32 for family in TILES if family.startswith("sm_")}


_OF_KIND = {"half": TILES, "float32": SINGLE, "tf32": TF32}

# Tiles of masked calls where those of ``beside_a_mask`` do not fit, by family and kind of products.
MASKED: dict[tuple[str, str], dict[tuple[str, int], Tile]] = {
    ("sm_86", "half"): {("dq", 128): Tile(64, 16, 8, 2, 255)},
    ("sm_90", "half"): {("dq", 256): Tile(32, 32, 8, 2)},
    ("sm_90", "tf32"): {("forward", 256): Tile(32, 16, 8, 1, 224)},
    ("sm_120", "half"): {("dkdv", 64): Tile(16, 64, 8, 1)},
}


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
    kind = "half" if dtype != torch.float32 else "tf32" if tf32 and family in TF32 else "float32"
    tiles: dict[str, Any] = {name: row[bucket] for name, row in _OF_KIND[kind][family].items()}
    if kind == "half":
        in_one = stages_of(family, 2, version) == 1
        changed = (ONE_STAGE if in_one else {}) | UNDER.get(version, {})
        tiles |= {name: tile for (of, name, at), tile in changed.items() if (of, at) == (family, bucket)}
    masked = {name: tile for (name, at), tile in MASKED.get((family, kind), {}).items() if at == bucket}
    if kind != "float32":
        tiles, masked = (
            {name: tile and tile._replace(stages=stages_of(family, tile.stages, version)) for name, tile in of.items()}
            for of in (tiles, masked)
        )
    registers = NVIDIA_REGISTERS if family.startswith("sm_") else 0
    tiles |= dict(join=JOIN, rows=ROWS[bucket])
    return Table(**tiles, multiprocessors=multiprocessors, masked=masked, registers=registers)
