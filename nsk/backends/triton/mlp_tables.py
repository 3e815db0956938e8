"""Launch configurations of the deep residual MLP, as plain data by (architecture family, type, width, pass).

Nothing is tuned at run time: a call's launches follow from this table alone. Each entry was chosen among those that
compile for its architecture without a spilled register, the largest row tile first; ``python -m benchmarks.aot``
compiles them all and shows what came out.

Row tiles of 64 rows multiply on sm_90's and sm_100's own matrix instructions, those of fewer rows on the warps' older
ones, which take tiles of 16 rows. At width 256, and on sm_100 on the way back at 128, no row tile of 64 leaves enough
registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nsk.backends.triton.device import stages_of, version_numbers
from nsk.spec.precision import tf32_allowed
from nsk.spec.residual_mlp import ResidualMlpCall

MAX_ROWS_WIDTH = 256  # a row of a wider network does not fit on the chip: a launch per layer, not per network
MAX_GROUPS = 65535  # of a launch's second axis
MAX_ROWS = 2**31 - 2**10


@dataclass(frozen=True)
class Launch:
    num_warps: int
    num_stages: int
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Rows(Launch):
    """A launch of a kernel that owns row tiles: BLOCK_M rows, weights in CHUNKS pieces."""

    block_m: int = 16
    chunks: int = 1


@dataclass(frozen=True)
class Tiles(Launch):
    """A launch of a tiled product: BLOCK_M x BLOCK_N of the result, BLOCK_K of the sum at a time."""

    block_m: int = 64
    block_n: int = 64
    block_k: int = 32


@dataclass(frozen=True)
class Plan:
    """How a call is launched. ``forward`` and ``backward`` are Rows in narrow networks, Tiles in wide ones."""

    forward: Rows | Tiles
    backward: Rows | Tiles
    parameters: Tiles
    vectors: Launch
    block_w: int
    precision: str
    activation: int
    layers_per_block: int
    eps: float


# Rows by width: BLOCK_M, CHUNKS, warps, stages, compile options. "half" is bfloat16 and float16, "tf32" float32 where
# torch may use it.
_HALF_FORWARD = {16: (64, 1, 4, 2), 32: (64, 1, 4, 2), 64: (64, 1, 4, 2), 128: (64, 1, 8, 2), 256: (32, 4, 8, 2)}
_HALF_BACKWARD = _HALF_FORWARD | {64: (64, 1, 8, 2)}
_SINGLE = {16: (32, 1, 4, 2), 32: (32, 1, 4, 2), 64: (16, 2, 4, 2), 128: (16, 4, 4, 2), 256: (16, 8, 8, 2)}
_TF32 = {16: (32, 1, 4, 2), 32: (32, 1, 4, 2), 64: (32, 1, 4, 2), 128: (32, 2, 8, 2), 256: (16, 8, 8, 2)}
_NVIDIA = {
    ("half", "forward"): _HALF_FORWARD,
    ("half", "backward"): _HALF_BACKWARD,
    ("tf32", "forward"): _TF32,
    ("tf32", "backward"): _TF32,
    ("float32", "forward"): _SINGLE,
    ("float32", "backward"): _SINGLE,
}
_AMPERE = _NVIDIA | {("half", "backward"): _HALF_BACKWARD | {128: (64, 2, 8, 2)}}
_AMD_HALF = {16: (64, 1, 4, 2), 32: (64, 1, 4, 2), 64: (64, 1, 4, 2), 128: (64, 1, 4, 2), 256: (64, 4, 4, 2)}
_AMD_SINGLE = _SINGLE | {256: (16, 8, 4, 2)}
_AMD = {
    ("half", "forward"): _AMD_HALF,
    ("half", "backward"): _AMD_HALF,
    ("float32", "forward"): _AMD_SINGLE,
    ("float32", "backward"): _AMD_SINGLE,
}
_NO_LIMIT = ("maxnreg", 224)  # left to itself the assembler aims for more warps here, and spills a register or two
ROWS = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE
    | {
        ("tf32", "forward"): _TF32 | {64: (32, 1, 4, 2, _NO_LIMIT)},
        ("float32", "forward"): _SINGLE | {128: (16, 4, 4, 2, _NO_LIMIT)},
    },
    "sm_90": _NVIDIA
    | {
        ("half", "backward"): _HALF_BACKWARD | {128: (64, 2, 8, 2), 256: (16, 4, 8, 2)},
        ("float32", "forward"): _SINGLE | {128: (16, 4, 4, 2, _NO_LIMIT), 256: (16, 8, 8, 2, _NO_LIMIT)},
    },
    "sm_100": _NVIDIA
    | {
        ("half", "backward"): _HALF_BACKWARD | {128: (32, 1, 8, 2), 256: (16, 4, 8, 2, _NO_LIMIT)},
        ("tf32", "forward"): _TF32 | {128: (32, 2, 8, 2, _NO_LIMIT)},
        ("tf32", "backward"): _TF32 | {64: (32, 1, 4, 2, _NO_LIMIT)},
        ("float32", "forward"): _SINGLE | {64: (16, 2, 4, 2, _NO_LIMIT)},
    },
    "sm_120": _NVIDIA
    | {
        ("half", "forward"): _HALF_FORWARD | {64: (64, 1, 8, 2, _NO_LIMIT)},
        ("half", "backward"): _HALF_BACKWARD | {128: (32, 1, 8, 2), 256: (16, 4, 8, 2, _NO_LIMIT)},
        ("tf32", "backward"): _TF32 | {128: (32, 2, 8, 2, _NO_LIMIT)},
        ("float32", "forward"): _SINGLE | {256: (16, 8, 8, 2, _NO_LIMIT)},
    },
    "gfx942": _AMD | dict.fromkeys((("half", "forward"), ("half", "backward")), _AMD_HALF | {256: (32, 2, 4, 1)}),
    "gfx950": _AMD | {("half", "backward"): _AMD_HALF | {256: (32, 4, 4, 2)}},
}

# Tiles: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, compile options.
_TILED = {
    ("half", "forward"): (64, 128, 64, 8, 2),
    ("half", "backward"): (64, 128, 64, 8, 2),
    ("half", "parameters"): (128, 128, 32, 8, 3),
    ("tf32", "forward"): (64, 128, 32, 8, 2),
    ("tf32", "backward"): (64, 128, 32, 8, 2),
    ("tf32", "parameters"): (64, 128, 32, 8, 2),
    ("float32", "forward"): (64, 64, 16, 8, 2),
    ("float32", "backward"): (64, 64, 16, 8, 2),
    ("float32", "parameters"): (64, 64, 16, 8, 2),
}
TILES = dict.fromkeys(ROWS, _TILED)
TILES["sm_100"] = _TILED | {("half", "forward"): (64, 128, 64, 8, 2, _NO_LIMIT)}

_VECTORS = Launch(4, 1)


def block_w(width: int) -> int:
    """A row tile's columns: products take no fewer than 16."""
    return max(16, 1 << (width - 1).bit_length())


def kind_of(dtype: torch.dtype, family: str) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if family.startswith("sm_") and tf32_allowed() else "float32"


def _stages(family: str, kind: str, stages: int) -> int:
    return stages if kind == "float32" else stages_of(family, stages, version_numbers())


def rows_of(family: str, kind: str, direction: str, width: int) -> Rows:
    block_m, chunks, warps, stages, *options = ROWS[family][kind, direction][block_w(width)]
    return Rows(warps, _stages(family, kind, stages), tuple(options), block_m=block_m, chunks=chunks)


def tiles_of(family: str, kind: str, what: str, width: int) -> Tiles:
    block_m, block_n, block_k, warps, stages, *options = TILES[family][kind, what]
    if what == "parameters":  # both sides are features
        block_m, block_n = (min(side, block_w(width)) for side in (block_m, block_n))
    stages = _stages(family, kind, stages)
    return Tiles(warps, stages, tuple(options), block_m=block_m, block_n=block_n, block_k=block_k)


def first_of(config: Tiles) -> Tiles:
    """Of the launch that multiplies x itself, and keeps it too. In more than one stage Triton has wgmma read x from the
    one place where the next piece of it already arrives (seen on an H100, with 3.7 and 3.9)."""
    return replace(config, num_stages=1)


def plan_of(call: ResidualMlpCall, family: str) -> Plan:
    """How this call is launched on this architecture."""
    width, kind = call.width, kind_of(call.weight.dtype, family)
    of = rows_of if width <= MAX_ROWS_WIDTH else tiles_of
    return Plan(
        forward=of(family, kind, "forward", width),
        backward=of(family, kind, "backward", width),
        parameters=tiles_of(family, kind, "parameters", width),
        vectors=_VECTORS,
        block_w=block_w(width),
        precision="tf32" if kind == "tf32" else "ieee",
        activation=call.activation,
        layers_per_block=call.layers_per_block,
        eps=call.eps,
    )


def refusals(call: ResidualMlpCall) -> list[str]:
    """Reasons against this call on every architecture."""
    reasons = []
    if call.weight.dtype == torch.float64:
        reasons.append("has no float64 kernels for residual_mlp (the cpu and eager backends have)")
    if call.groups > MAX_GROUPS:
        reasons.append(f"serves up to {MAX_GROUPS} groups, and this call has {call.groups}")
    if call.rows > MAX_ROWS:
        reasons.append(f"serves up to {MAX_ROWS} rows, and this call has {call.rows}")
    return reasons
