"""The CUDA C++ kernels as cells to compile ahead of time: one explicit instantiation each, for one architecture.

Of what a build instantiates these are the cells that differ: every kernel at every head dimension and width in bf16,
plain and with the options that take most registers together; a boolean mask, the other activations and f16 at one
shape each. sm_89 runs what is compiled for sm_86.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from nsk.backends.triton.targets import TARGETS, Target

NAMES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
WIDTHS = (64, 128, 256)
_VARIANTS = {"": "false, Mask::none", "bool": "false, Mask::boolean", "softcap float": "true, Mask::floating"}


@dataclass(frozen=True)
class CudaCell:
    """One kernel, instantiated for one target. What it shares with the cells of Triton is named alike.

    name: unique; the target's name last, as in ``"gated_sdpa dkdv bf16 d128 both softcap float sm_90"``.
    header: which of csrc/cuda has the kernel.
    kernel: the instantiation, in namespace nsk::cuda: ``"gated_sdpa_merge<bf16>(...)"``.
    tile: the type whose kThreads and kSharedBytes the launch takes; empty where there is none.
    threads, shared: of a block, as the compiler is to compute them.
    mma: it multiplies on tensor cores.
    ldmatrix: operands of products come through it.
    asynchronous: it brings its operands by cp.async.
    everyday: compiled by the tests too.
    """

    name: str
    header: str
    kernel: str
    target: Target
    threads: str = "Tiles::kThreads"
    shared: str = "Tiles::kSharedBytes"
    tile: str = "void"
    mma: bool = True
    ldmatrix: bool = True
    asynchronous: bool = True
    everyday: bool = False
    mma_kind: str = "HMMA"

    @property
    def op(self) -> str:
        return self.name.split()[0]

    @property
    def text(self) -> str:
        """A translation unit. In the machine code's table of symbols the sizes of two arrays tell what a launch takes,
        one byte more, as no array is empty."""
        return (
            f'#include "{self.header}"\nnamespace nsk::cuda {{\nusing Tiles = {self.tile};\n'
            f"template __global__ void {self.kernel};\n"
            f'extern "C" __device__ unsigned char nsk_shared[{self.shared} + 1], nsk_threads[{self.threads} + 1];\n'
            "}  // namespace nsk::cuda\n"
        )


def cuda_cells() -> list[CudaCell]:
    """Every cell, those of an architecture together. Names are unique."""
    cells = [cell for name in NAMES for cell in (*_attention(TARGETS[name]), *_mlp(TARGETS[name]))]
    assert len({cell.name for cell in cells}) == len(cells)
    return cells


# The tests' share: what uses the most registers and shared memory, on the architectures that differ most.
_EVERYDAY_TARGETS = ("sm_80", "sm_90", "sm_120")
_EVERYDAY = {
    *(f"gated_sdpa {p} bf16 d{d}" for p in ("forward", "decode", "dq") for d in ("64", "128", "256")),
    *(f"gated_sdpa {p} bf16 d256 softcap float" for p in ("forward", "decode", "dq")),
    "gated_sdpa dkdv bf16 d64 both", "gated_sdpa dkdv bf16 d128 both", "gated_sdpa dkdv bf16 d128 both softcap float",
    "gated_sdpa dkdv bf16 d256 key softcap float", "gated_sdpa dkdv bf16 d256 value softcap float",
    "gated_sdpa forward tf32 d128", "gated_sdpa dq tf32 d256", "gated_sdpa dkdv tf32 d128 both",
    "gated_sdpa norm bf16 d128 softcap", "gated_sdpa mask_grad bf16 d128 softcap", "gated_sdpa rows bf16",
    "residual_mlp forward bf16 w64 r16 silu", "residual_mlp forward bf16 w256 r16 silu",
    "residual_mlp forward bf16 w256 r32 silu", "residual_mlp backward bf16 w64 r32 silu",
    "residual_mlp backward bf16 w256 r16 silu", "residual_mlp weight_gradient bf16 w256",
    "residual_mlp forward tf32 w256 r16 silu", "residual_mlp backward tf32 w256 r16 silu",
}  # fmt: skip


def _cell(name: str, header: str, kernel: str, target: Target, **more) -> CudaCell:
    everyday = name in _EVERYDAY and target.name in _EVERYDAY_TARGETS
    return CudaCell(f"{name} {target}", f"{header}.cuh", kernel, target, everyday=everyday, **more)


def _attention(target: Target) -> Iterator[CudaCell]:
    def products(name: str, kind: str, dims: tuple[int, int], wanted: str = "") -> Iterator[CudaCell]:
        d, dv = dims
        tiles = {"forward": "", "decode": "Decode", "dq": "Dq", "dkdv": "Key"}[name]
        of = f", Wanted::{wanted}" if wanted else ""
        problem = {"forward": "GatedSdpa", "decode": "GatedSdpaDecode"}.get(name, "GatedSdpaBackward")
        for variant, given in _VARIANTS.items():
            if variant == "bool" and (dims != (128, 128) or kind != "bf16" or wanted not in ("", "both")):
                continue
            yield _cell(
                " ".join(filter(None, ("gated_sdpa", name, kind, _dims(dims), wanted, variant))), f"gated_sdpa_{name}",
                f"gated_sdpa_{name}<{kind}, {d}, {dv}, {given}{of}>(const __grid_constant__ {problem}<{kind}>)",
                target, tile=f"GatedSdpa{tiles}Tiles<{kind}, {d}, {dv}{of}>",
            )  # fmt: skip

    for kind, all_dims in (("bf16", HEAD_DIMS), ("f16", ((128, 128),)), ("tf32", HEAD_DIMS)):
        for dims in all_dims:
            for name in ("forward", "decode", "dq"):
                yield from products(name, kind, dims)
            # dK and dV together, as far as registers hold the sums of both; else one launch for each.
            for wanted in ("both",) if sum(dims) <= (256 if kind == "tf32" else 320) else ("key", "value"):
                yield from products("dkdv", kind, dims, wanted)

    for kind, dims in itertools.product(("bf16", "tf32"), HEAD_DIMS):
        arguments, (d, dv) = f"(const __grid_constant__ GatedSdpaBackward<{kind}>)", dims
        for softcap in ("true", "false") if dims == (128, 128) else ("true",):
            label = f"{_dims(dims)}{' softcap' if softcap == 'true' else ''}"
            if d == dv:
                yield _cell(
                    f"gated_sdpa norm {kind} {label}", "gated_sdpa_norm",
                    f"gated_sdpa_norm<{kind}, {d}, {softcap}>{arguments}", target,
                    tile=f"GatedSdpaNormTiles<{kind}, {d}>",
                )  # fmt: skip
            yield _cell(
                f"gated_sdpa mask_grad {kind} {label}", "gated_sdpa_mask_grad",
                f"gated_sdpa_mask_grad<{kind}, {d}, {dv}, {softcap}>{arguments}", target,
                tile=f"GatedSdpaMaskGradTiles<{kind}, {d}, {dv}>",
            )  # fmt: skip
    plain = dict(shared="0", mma=False, asynchronous=False)
    for kind in ("bf16", "tf32"):
        of_backward = f"(const __grid_constant__ GatedSdpaBackward<{kind}>, int)"
        yield _cell(
            f"gated_sdpa rows {kind}", "gated_sdpa_rows", f"gated_sdpa_rows<{kind}>{of_backward}", target,
            tile=f"GatedSdpaRows<{kind}>", **plain,
        )  # fmt: skip
        yield _cell(
            f"gated_sdpa sink {kind}", "gated_sdpa_sink",
            f"gated_sdpa_sink<{kind}>(const __grid_constant__ GatedSdpaSink)", target, tile="GatedSdpaSink", **plain,
        )  # fmt: skip
        yield _cell(
            f"gated_sdpa merge {kind}", "gated_sdpa_decode",
            f"gated_sdpa_merge<{kind}>(const __grid_constant__ GatedSdpaMerge<{kind}>)", target,
            tile="GatedSdpaMergeTiles", **plain,
        )  # fmt: skip


def _dims(dims: tuple[int, int]) -> str:
    d, dv = dims
    return f"d{d}" if d == dv else f"d{d}x{dv}"


def _mlp(target: Target) -> Iterator[CudaCell]:
    for way in ("forward", "backward"):
        args = f"const __grid_constant__ Mlp{way.capitalize()}Args"
        tile = "MlpTile" if way == "forward" else "MlpBackwardTile"
        for kind, width, activation in (
            *(("bf16", width, "silu") for width in WIDTHS),
            ("bf16", 256, "relu"), ("bf16", 256, "gelu_tanh"), ("f16", 256, "silu"),
            *(("tf32", width, "silu") for width in WIDTHS),
        ):  # fmt: skip
            for rows in (16, 32):
                if way == "backward" and (width, rows) == (256, 32) and target.shared < 128 * 1024:
                    continue  # does not fit, and launches take tiles of 16 rows instead
                yield _cell(
                    f"residual_mlp {way} {kind} w{width} r{rows} {activation}", f"residual_mlp_{way}",
                    f"residual_mlp_{way}<{kind}, {width}, {rows}, Activation::{activation}>({args}<{kind}>)",
                    target, tile=f"{tile}<{kind}, {width}, {rows}>",
                )  # fmt: skip
    for kind, width in (*(("bf16", width) for width in WIDTHS), ("f16", 256), ("tf32", 256)):
        yield _cell(
            f"residual_mlp weight_gradient {kind} w{width}", "residual_mlp_weight_gradient",
            f"residual_mlp_weight_gradient<{kind}, {width}>(const __grid_constant__ MlpWeightGradientArgs<{kind}>)",
            target, tile=f"MlpWeightGradientTile<{kind}>", ldmatrix=kind != "tf32",
        )  # fmt: skip
        yield _cell(
            f"residual_mlp vector_gradient {kind} w{width}", "residual_mlp_vector_gradient",
            f"residual_mlp_vector_gradient<{kind}, {width}>(const __grid_constant__ MlpVectorGradientArgs)", target,
            threads=f"{width} / 2", shared="0", mma=False, asynchronous=False,
        )  # fmt: skip
