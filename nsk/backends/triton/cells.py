"""What a launch table promises about one kernel on one architecture, as plain data.

Each kernels module exposes ``aot_cells() -> list[Cell]``: every configuration that its launch table can choose. A cell
holds all that is needed to compile the kernel ahead of time, with no GPU, and what the result has to show. This module
imports no Triton: ``kernel`` is whatever ``@triton.jit`` made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nsk.backends.triton.targets import Target


@dataclass(frozen=True)
class Cell:
    """One kernel, specialised and launched as the table says, for one target.

    name: unique among all cells; parts separated by spaces, the target's name last, as in
        ``"gated_sdpa forward bfloat16 d128 elementwise causal sm_90"``.
    kernel: the ``@triton.jit`` function.
    signature: each argument's Triton type by its name, ``"*bf16"``, ``"i32"``, ``"fp32"``, ...; ``"constexpr"`` for
        those in ``constexprs``. A named tuple has a named tuple of types.
    constexprs: compile-time arguments by name. ``None`` stands for an absent pointer. Of a tuple only those members
        count whose type is ``"constexpr"``.
    aligned: arguments that Triton finds divisible by 16 at the launch: pointers, and the strides that matter. A
        member of a tuple as ``"query.data"``.
    num_warps, num_stages: as launched.
    options: further compile options by name (``waves_per_eu``, ``maxnreg``, ...).
    mma: the kernel multiplies on tensor cores, in the kind that the architecture has for such a tile; ``False`` for
        kernels without a product, or in a type that has no tensor cores.
    mma_kind: the expected instruction where it is not the target's best: ``"HMMA"`` on sm_90 for tiles of fewer than
        64 rows, which wgmma does not take. Empty: the target's best.
    everyday: compiled by the tests too, not by ``python -m benchmarks.aot`` alone: cells that differ from all others
        in what has made a difference before.
    asynchronous: global to shared copies are expected to bypass registers (cp.async, TMA, direct-to-LDS loads).
    roof: at which of the target's roofs the products run, ``"tf32_flops"``; empty: as the instructions found suggest.
    flops, bytes: what the launch with ``grid`` programs computes and moves from and to memory, 0 where not counted.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    target: Target
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    mma: bool = True
    mma_kind: str = ""
    asynchronous: bool = True
    everyday: bool = True
    roof: str = ""
    workload: str = ""  # of which problem flops and bytes are
    flops: int = 0
    bytes: int = 0

    @property
    def op(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True)
class Refusal:
    """A cell that the launch table does not serve, and why: the words that a user would read."""

    name: str
    target: Target
    reason: str
