"""What this machine can do at best: multiply-adds in registers, and bytes read from memory.

A roof is the best of every measurement of the run (before, within and after the cases), and never below the best
kernel: a kernel that beats the measured roof shows that the measurement was low, not that the kernel is magic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from nsk import _native

PROBE_SECONDS = 0.03
READ_BYTES = 256 << 20  # far more than any cache holds
UNITS = {"float32": "GFLOP/s", "bfloat16": "GFLOP/s", "read": "GB/s"}


@dataclass(slots=True)
class Roofs:
    """The roofs at one thread count, in GFLOP/s or GB/s."""

    threads: int
    measured: dict[str, list[float]] = field(default_factory=dict)
    best_kernel: dict[str, tuple[float, str]] = field(default_factory=dict)
    _buffer: torch.Tensor | None = None

    def measure(self, kind: str, seconds: float = PROBE_SECONDS) -> float:
        """One more measurement, on the best instruction set of the processor, whichever the kernels use."""
        in_use, best = _native.isa(), _native.isas()[0]
        _native.set_isa(best)
        try:
            if kind == "read":
                if self._buffer is None:
                    self._buffer = torch.ones(READ_BYTES, dtype=torch.int8)
                rate = _native.measure_read(self._buffer.data_ptr(), READ_BYTES, self.threads, seconds)
            else:
                rate = _native.measure_fma(kind, self.threads, seconds)
        finally:
            _native.set_isa(in_use)
        self.measured.setdefault(kind, []).append(rate)
        return rate

    def measure_all(self) -> None:
        """Every kind, several times."""
        for kind in self.kinds():
            for _ in range(3):
                self.measure(kind)

    def kinds(self) -> list[str]:
        """The roofs that this processor has."""
        return [kind for kind in UNITS if kind != "bfloat16" or has_bf16_dot()]

    def admit(self, kind: str, rate: float, name: str) -> None:
        """Records what a kernel reached. Float32 products on a matrix unit are not bound by the vectors' roof."""
        if kind == "float32" and has_matrix_unit():
            return
        if rate > self.best_kernel.get(kind, (0.0, ""))[0]:
            self.best_kernel[kind] = (rate, name)

    def best(self, kind: str) -> float:
        """The roof."""
        return max(*self.measured[kind], self.best_kernel.get(kind, (0.0, ""))[0])

    def as_json(self) -> dict[str, dict]:
        """Each roof with where it comes from."""
        facts = {}
        for kind, rates in self.measured.items():
            kernel, name = self.best_kernel.get(kind, (0.0, ""))
            facts[kind] = {
                "best": self.best(kind),
                "unit": UNITS[kind],
                "measured": max(rates),
                "measurements": len(rates),
                "best_kernel": kernel,
                "best_kernel_case": name,
            }
        return facts


def has_bf16_dot() -> bool:
    """Whether the processor multiplies bfloat16 by itself (AVX-512 BF16), whichever instruction set is in use."""
    return "avx512_bf16" in _native.isas()


def has_matrix_unit() -> bool:
    """Whether the processor multiplies bfloat16 in tiles (Intel AMX)."""
    return "avx512_amx" in _native.isas()


def has_aim(bound: str, dtype: str) -> bool:
    """Whether the aims, fractions of the roof of vectors, say something about this processor."""
    return bound == "memory" or dtype != "bfloat16" or (has_bf16_dot() and not has_matrix_unit())


def kind_of(bound: str, dtype: str) -> str:
    """The roof that a case is held against."""
    if bound == "memory":
        return "read"
    return "bfloat16" if dtype == "bfloat16" and has_bf16_dot() else "float32"


def notes() -> list[str]:
    """What a reader of the fractions has to know."""
    lines = ["float16 has no multiply-add unit of its own here: its roof is the float32 one."]
    if has_matrix_unit():
        lines.append(
            "bfloat16's roof is the matrix unit's (AMX). No kernel here comes near it, and no aim was set for it: "
            "softmax, LayerNorm and activations, which vectors compute, take longer than the products."
        )
        lines.append(
            "float32's roof is that of the vectors: a yardstick for residual_mlp, no limit, since from 96 rows on it "
            "multiplies float32 on the matrix unit, in three bfloat16 parts."
        )
    if not has_bf16_dot():
        lines.append(
            "This processor has no bfloat16 dot product (AVX-512 BF16): bfloat16's roof is the float32 one, and its "
            "bar is to be no slower than eager."
        )
    return lines
