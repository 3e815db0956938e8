"""What the launch tables of gated attention promise: every tile that they hold, as a cell to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nsk.backends.triton.blocks import SIZES, Grid, Options, Rows
from nsk.backends.triton.cells import Cell
from nsk.backends.triton.gated_sdpa_attend import gated_sdpa_forward
from nsk.backends.triton.gated_sdpa_decode import gated_sdpa_decode
from nsk.backends.triton.gated_sdpa_dkdv import gated_sdpa_dkdv
from nsk.backends.triton.gated_sdpa_dq import gated_sdpa_dq
from nsk.backends.triton.gated_sdpa_launch import GATES, MASKS, of_products, of_queries, of_rows, power_of_two, tiled
from nsk.backends.triton.gated_sdpa_mask_grad import gated_sdpa_mask_grad
from nsk.backends.triton.gated_sdpa_rows import gated_sdpa_rows
from nsk.backends.triton.tables import BUCKETS, Table, Tile, table_of
from nsk.backends.triton.targets import TARGETS, Target

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
KERNELS = {
    "forward": gated_sdpa_forward,
    "dq": gated_sdpa_dq,
    "dkdv": gated_sdpa_dkdv,
    "rows": gated_sdpa_rows,
    "decode": gated_sdpa_decode,
    "mask_grad": gated_sdpa_mask_grad,
}


def options_of(dtype: torch.dtype, d: int, gate: str, *, causal=True, sink=False, mask="none", packed=False) -> Options:
    elementwise = gate == "elementwise"
    return Options(
        D=d, DV=d, BLOCK_D=power_of_two(d), BLOCK_DV=power_of_two(d), BLOCK_M=0, BLOCK_N=0, LEFT=False, RIGHT=causal,
        MASK=MASKS[mask], SOFTCAP=False, SINK=sink, GATE=GATES[gate], PACKED=packed, PRECISION="ieee",
        HALF=dtype != torch.float32, LOW=mask == "float", WEIGHT=not elementwise and (gate == "headwise" or sink),
        GRAD_LSE=False, GRAD_K=True, GRAD_V=True, GRAD_GATE=gate != "none", GRAD_SINK=sink,
    )  # fmt: skip


def signature_of(name: str, dtype: torch.dtype, o: Options) -> tuple[dict, dict, tuple[str, ...]]:
    """Types, constants and alignments of a kernel's arguments, as a launch with these options has them."""
    kernel, element = KERNELS[name], _TYPES[dtype]
    tile = Rows(element, "i32", "i32", "i32", "constexpr")
    column = Rows("*fp32", "i32", "i32", "i32", "constexpr")
    absent = {"cu_q", "cu_k"} if not o.PACKED else set()
    absent |= {"mask"} if MASKS["none"] == o.MASK else set()
    absent |= {"gate", "grad_gate"} if GATES["none"] == o.GATE else set()
    absent |= {"sink", "sink_parts"} if not o.SINK else set()
    absent |= {"weight"} if not o.WEIGHT else set()
    absent |= {"low"} if not o.LOW else set()
    absent |= {"scaled"} if GATES["elementwise"] != o.GATE else set()
    absent |= {"grad_lse"} if not o.GRAD_LSE else set()
    types = dict.fromkeys(("q", "k", "v", "out", "d_out", "grad_out", "grad_k", "grad_v", "scaled"), tile)
    types |= dict.fromkeys(("lse", "low", "delta", "weight", "grad_lse"), column)
    types |= dict.fromkeys(("gate", "grad_gate"), tile if GATES["elementwise"] == o.GATE else column)
    types |= dict(mask=Grid("*u8" if MASKS["bool"] == o.MASK else element, "i64", "i64", "i64", "i64"))
    types |= dict(grad=tile if name == "dq" else Grid(element, "i64", "i64", "i64", "i64"))
    types |= dict(sink=element, sink_stride="i32", sink_parts="*fp32", cu_q="*i32", cu_k="*i32", parts="i32")
    types |= dict(acc_out="*fp32", top_out="*fp32", total_out="*fp32")
    types |= dict.fromkeys(SIZES, "i32") | dict(scale="fp32", softcap="fp32")
    signature, constants, aligned = {}, {}, []
    for argument in kernel.arg_names:
        if argument in absent:
            signature[argument], constants[argument] = "constexpr", None
        elif argument == "o":
            signature[argument], constants[argument] = "constexpr", o
        elif argument.startswith("KEEP"):
            signature[argument], constants[argument] = "constexpr", argument != "KEEP_B"
        else:
            signature[argument] = types[argument]
            if isinstance(types[argument], Rows):
                aligned += [
                    f"{argument}.{field}" for field in Rows._fields if types[argument] is tile or field == "data"
                ]
    return signature, constants, tuple(aligned)


def _of_forward(o: Options) -> Options:
    return Options(*o[: Options._fields.index("HALF")])


def cell_of(target: Target, name: str, tile: Tile, dtype: torch.dtype, o: Options, label: str) -> Cell:
    reduced = {"rows": of_rows, "dq": of_queries, "mask_grad": of_queries, "dkdv": of_products}.get(name, _of_forward)
    o = tiled(reduced(o), tile)
    signature, constants, aligned = signature_of(name, dtype, o)
    single = dtype == torch.float32
    small = target.name in ("sm_90", "sm_100") and (tile.n if name == "dkdv" else tile.m) < 64
    return Cell(
        name=f"gated_sdpa {name} {str(dtype).removeprefix('torch.')} {label} {target}",
        kernel=KERNELS[name],
        signature=signature,
        constexprs=constants,
        target=target,
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=aligned,
        mma=name != "rows" and not (single and target.backend == "cuda"),
        mma_kind="HMMA" if small else "",
        asynchronous=tile.stages > 1 and target.name != "gfx942",
    )


def aot_cells() -> list[Cell]:
    return list(_cells())


def _cells() -> Iterator[Cell]:
    for target in TARGETS.values():
        for bucket in BUCKETS:
            yield from _of(target, bucket)


def _of(target: Target, d: int) -> Iterator[Cell]:
    dtype = torch.bfloat16
    table: Table = table_of(target.family, dtype, d, target.multiprocessors)
    for name in ("forward", "dq", "dkdv"):
        for gate in ("elementwise", "headwise", "none"):
            yield cell_of(target, name, getattr(table, name), dtype, options_of(dtype, d, gate), f"d{d} {gate} causal")
