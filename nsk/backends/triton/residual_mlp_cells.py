"""The deep residual MLP's launches as cells to compile ahead of time: what its table launches for the widths that
differ, in every option that changes the code."""

from __future__ import annotations

from collections.abc import Iterator

from nsk.backends.triton import mlp_tables
from nsk.backends.triton import residual_mlp_parameters as parameters
from nsk.backends.triton import residual_mlp_rows as rows
from nsk.backends.triton import residual_mlp_tiles as tiles
from nsk.backends.triton.cells import Cell, Refusal
from nsk.backends.triton.mlp_tables import MAX_ROWS_WIDTH, Launch, Rows, Tiles, rows_of, tiles_of
from nsk.backends.triton.residual_mlp_math import Batch, Layers
from nsk.backends.triton.targets import TARGETS, Target

WIDTHS = (64, 128, 256, 512)
KINDS = {"bf16": "half", "fp16": "half", "fp32": "float32", "tf32": "tf32"}
BATCH, DEPTH, PER_BLOCK = 512, 64, 4  # the workload whose FLOPs and bytes are counted

_INTEGERS = ("rows", "layers", "layers_per_block", "x_block", "shares")
_BATCHES = (
    "x", "y", "grad_in", "grad_out", "h_in", "h_out", "z_in", "z_out", "dh_in", "dh_out", "du_in", "du_out",
)  # fmt: skip
_FLOAT32 = (
    "stream", "rstd", "sums", "sums_below", "parts_in", "parts_out", "h_in", "h_out", "dh_in", "dh_out",
)  # fmt: skip
_LAYER_SOURCES = {"input": 0, "layer": 1, "block": 2}


def aot_cells() -> list[Cell]:
    return [cell for target in TARGETS.values() for cell in _cells(target)]


def aot_refusals() -> list[Refusal]:
    reason = "has no float64 kernels for residual_mlp (the cpu and eager backends have)"
    return [Refusal(f"residual_mlp float64 {target}", target, reason) for target in TARGETS.values()]


def _cells(target: Target) -> Iterator[Cell]:
    for kind in KINDS:
        if kind == "tf32" and target.backend == "hip":
            continue  # torch has it on NVIDIA's devices only
        for width in WIDTHS:
            if width <= MAX_ROWS_WIDTH:
                yield from _rows_cells(kind, width, target)
            else:
                yield from _tiles_cells(kind, width, target)
            yield from _parameters_cells(kind, width, target)


def _make(
    name: str,
    kernel,
    kind: str,
    target: Target,
    launch: Launch,
    *,
    absent=(),
    float32=(),
    narrow=(),
    mma_kind="",
    work=(0, 0),
    **constexprs,
) -> Cell:
    """A cell of one of this op's kernels. ``absent`` are the tensors that are not wanted, ``narrow`` those in the
    weight's type that may be in float32."""
    element = "fp32" if kind == "tf32" else kind
    signature, aligned, constants = {}, [], dict(constexprs)
    for arg in kernel.arg_names:
        if arg in constexprs:
            signature[arg] = "constexpr"
        elif arg in _INTEGERS:
            signature[arg] = "i32"
        elif arg == "eps":
            signature[arg] = "fp32"
        else:
            shape = Batch if arg in _BATCHES else Layers
            pointer = "*fp32" if (arg in _FLOAT32 or arg in float32) and arg not in narrow else f"*{element}"
            signature[arg] = shape("constexpr" if arg in absent else pointer, "i32", "i32")
            if arg in absent:
                constants[arg] = shape(None, 0, 0)
            else:
                aligned += [f"{arg}.{field}" for field in shape._fields]
    flops, size = work
    return Cell(
        name=f"residual_mlp {name} {target}",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        target=target,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        aligned=tuple(aligned),
        options=dict(enable_fp_fusion=False) | dict(launch.options),
        mma=KINDS[kind] != "float32",
        mma_kind=mma_kind,
        asynchronous=launch.num_stages > 1 and _asynchronous(kernel, kind, target, constants),
        workload=f"residual_mlp: batch {BATCH}, {DEPTH} layers ({PER_BLOCK} a block), one launch of each kernel",
        everyday=_everyday(name, target),
        flops=flops,
        bytes=size,
    )


def _asynchronous(kernel, kind: str, target: Target, constants: dict) -> bool:
    """gfx942 has no such copies. On gfx950 the compiler makes none for the product of two half operands of which one is
    activated on its way (seen with six tiles): that kernel loads through registers there."""
    if target.name == "gfx950" and kernel is parameters.weight_gradients:
        return constants["BEGINS"] or KINDS[kind] != "half"
    return target.name != "gfx942"


# The tests' share, by the cells' names: of every architecture what uses the most registers and shared memory, of one
# per vendor the options that change the code besides. sm_86 and sm_89 compile to the same, and so do both half types.
_EVERYDAY = {
    "forward bf16 w64 keep", "forward bf16 w128 keep", "forward bf16 w256 keep", "forward bf16 w512 block keep",
    "backward bf16 w64", "backward bf16 w128", "backward bf16 w256", "backward bf16 w512 block",
    "parameters bf16 w512 layer", "forward bf16 w512 x keep",
}  # fmt: skip
_EVERYDAY_OF_A_VENDOR = {
    "forward bf16 w256", "forward bf16 w248 keep", "forward fp16 w128 keep", "forward fp32 w256 keep",
    "forward tf32 w256 keep", "backward bf16 w128 gelu_tanh", "backward bf16 w248", "backward fp32 w256",
    "backward tf32 w256", "parameters bf16 w512 stream",
}  # fmt: skip


def _everyday(name: str, target: Target) -> bool:
    if name in _EVERYDAY_OF_A_VENDOR:
        return target.name in ("sm_90", "gfx942")
    return name in _EVERYDAY and target.name != "sm_89"


def _common(kind: str, width: int, launch: Rows | Tiles, target: Target, activation: str = "silu") -> dict:
    """What all kernels are compiled for."""
    constants = dict(
        ACTIVATION=("silu", "relu", "gelu_tanh").index(activation),
        WIDTH=width,
        BLOCK_M=launch.block_m,
        PRECISION="tf32" if kind == "tf32" else "ieee",
    )
    if isinstance(launch, Rows):
        constants |= dict(BLOCK_W=mlp_tables.block_w(width), CHUNKS=launch.chunks)
    else:
        constants |= dict(BLOCK_N=launch.block_n, BLOCK_K=launch.block_k)
    # Tiles of fewer than 64 rows go to the warps' own matrix instructions.
    warps_own = target.name in ("sm_90", "sm_100") and launch.block_m < 64
    return constants | dict(mma_kind="HMMA" if warps_own else "")


def _rows_cells(kind: str, width: int, target: Target) -> Iterator[Cell]:
    size = 4 if KINDS[kind] != "half" else 2
    product = 2 * BATCH * width * width * DEPTH
    weights, slab = DEPTH * width * (width + 3) * size, BATCH * width
    forward, backward = (rows_of(target.family, KINDS[kind], way, width) for way in ("forward", "backward"))
    kept = DEPTH * slab * size + DEPTH // PER_BLOCK * slab * 4
    for label, absent, activation, moved in (
        ("", ("stream", "normalised", "rstd"), "silu", weights + 2 * slab * size),
        ("keep", (), "silu", weights + 2 * slab * size + kept),
        ("again", ("y", "stream"), "silu", weights + kept),
        ("keep gelu_tanh", (), "gelu_tanh", 0),
    ):
        if kind != "bf16" and label not in ("", "keep"):
            continue
        yield _make(
            f"forward {kind} w{width} {label}".rstrip(), rows.forward_rows, kind, target, forward, absent=absent,
            work=(product, moved) if moved else (0, 0), **_common(kind, width, forward, target, activation),
        )  # fmt: skip
    moved = weights + 2 * slab * size + DEPTH * slab * size
    for label, absent, activation in (
        ("x", ("products", "sums"), "silu"), ("", (), "silu"), ("gelu_tanh", (), "gelu_tanh"),
    ):  # fmt: skip
        if kind != "bf16" and label:
            continue
        trace = 0 if absent else DEPTH * (slab * size + BATCH // backward.block_m * 3 * width * 4)
        yield _make(
            f"backward {kind} w{width} {label}".rstrip(), rows.backward_rows, kind, target, backward, absent=absent,
            work=(product, moved + trace), **_common(kind, width, backward, target, activation),
        )  # fmt: skip
    if kind == "bf16":  # a width that is masked, and the masks' cost
        yield _make(
            f"forward {kind} w{width - 8} keep", rows.forward_rows, kind, target, forward,
            **_common(kind, width - 8, forward, target),
        )  # fmt: skip
        yield _make(
            f"backward {kind} w{width - 8}", rows.backward_rows, kind, target, backward,
            **_common(kind, width - 8, backward, target),
        )  # fmt: skip


def _tiles_cells(kind: str, width: int, target: Target) -> Iterator[Cell]:
    size = 4 if KINDS[kind] != "half" else 2
    product, slab, weight = 2 * BATCH * width * width, BATCH * width * size, width * width * size
    launch = tiles_of(target.family, KINDS[kind], "forward", width)
    for label, source in (("x", _LAYER_SOURCES["input"]), *_LAYER_SOURCES.items()):
        config = mlp_tables.first_of(launch) if label in ("x", "input") else launch
        absent = ("z_in", "parts_in", "gain", "shift", "normalised", "rstd") if label in ("x", "input") else ()
        absent += ("h_in", "h_out") if label == "layer" else ()
        yield _make(
            f"forward {kind} w{width} {label} keep", tiles.forward_tiles, kind, target, config, absent=absent,
            narrow=("h_in",) if label == "x" else (), work=(product, weight + 3 * slab), SOURCE=source,
            **_common(kind, width, launch, target),
        )  # fmt: skip
    launch = tiles_of(target.family, KINDS[kind], "backward", width)
    for label, begins in (("layer", False), ("block", True)):
        yield _make(
            f"backward {kind} w{width} {label}", tiles.backward_tiles, kind, target, launch, BEGINS=begins,
            work=(product, weight + 5 * slab), **_common(kind, width, launch, target),
        )  # fmt: skip


def _parameters_cells(kind: str, width: int, target: Target) -> Iterator[Cell]:
    size = 4 if KINDS[kind] != "half" else 2
    launch = tiles_of(target.family, KINDS[kind], "parameters", width)
    for label, begins in (("layer", False), ("stream", True)):
        count = DEPTH // PER_BLOCK * (1 if begins else PER_BLOCK - 1)
        read = BATCH * width * (size + (4 if begins else size))
        yield _make(
            f"parameters {kind} w{width} {label}", parameters.weight_gradients, kind, target, launch,
            absent=("gain", "shift") if begins else (), float32=("inputs",) if begins else (), BEGINS=begins,
            work=(2 * BATCH * width * width * count, count * (read + width * width * size)),
            **_common(kind, width, launch, target),
        )  # fmt: skip
