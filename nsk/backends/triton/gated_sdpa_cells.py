"""What the launch tables of gated attention promise: every tile that they hold, as a cell to compile ahead of time, for
calls as training and decoding make them: dense tensors whose rows are multiples of 16 elements apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from nsk.backends.triton.blocks import SIZES, Grid, Options, Rows
from nsk.backends.triton.cells import Cell, Refusal
from nsk.backends.triton.device import version_numbers
from nsk.backends.triton.gated_sdpa_attend import gated_sdpa_forward
from nsk.backends.triton.gated_sdpa_decode import gated_sdpa_decode, gated_sdpa_join
from nsk.backends.triton.gated_sdpa_dkdv import gated_sdpa_dkdv
from nsk.backends.triton.gated_sdpa_dq import gated_sdpa_dq
from nsk.backends.triton.gated_sdpa_launch import GATES, MASKS, of_products, of_queries, of_rows, power_of_two
from nsk.backends.triton.gated_sdpa_mask_grad import gated_sdpa_mask_grad, gated_sdpa_norm
from nsk.backends.triton.gated_sdpa_rows import gated_sdpa_rows
from nsk.backends.triton.gated_sdpa_work import WORKLOAD, work_of
from nsk.backends.triton.tables import MAX_HEAD_DIM, OF_KEYS, Table, Tile, table_of
from nsk.backends.triton.targets import TARGETS, Target

KERNELS = {
    "forward": gated_sdpa_forward,
    "decode": gated_sdpa_decode,
    "join": gated_sdpa_join,
    "norm": gated_sdpa_norm,
    "rows": gated_sdpa_rows,
    "dq": gated_sdpa_dq,
    "dkdv": gated_sdpa_dkdv,
    "dk": gated_sdpa_dkdv,
    "dv": gated_sdpa_dkdv,
    "mask_grad": gated_sdpa_mask_grad,
}
WITHOUT_PRODUCTS = ("join", "rows")
DIMS = (64, 80, 128, 256)


class Kind(NamedTuple):
    """A type, and how exact its products are."""

    dtype: torch.dtype
    pointer: str
    precision: str = "ieee"


KINDS = {
    "bf16": Kind(torch.bfloat16, "*bf16"),
    "fp16": Kind(torch.float16, "*fp16"),
    "fp32": Kind(torch.float32, "*fp32"),
    "tf32": Kind(torch.float32, "*fp32", "tf32"),
}


def aot_cells() -> list[Cell]:
    return [cell for target in TARGETS.values() for kind in KINDS for cell in _cells(target, kind)]


def aot_refusals() -> list[Refusal]:
    return [
        Refusal(f"gated_sdpa {what} {target}", target, reason)
        for target in TARGETS.values()
        for what, reason in (
            ("float64", "has no float64 kernels for gated_sdpa (the cpu and eager backends have)"),
            ("d512", f"serves head dimensions up to {MAX_HEAD_DIM}: sums of 512 columns leave registers for no tile"),
        )
    ]


def options_of(kind: Kind, d: int, gate: str = "elementwise", mask: str = "none", **given: bool) -> Options:
    """Of a causal call with the gradients of all its inputs, in the forward's and the backward's options alike."""
    elementwise, sink = gate == "elementwise", given.get("SINK", False)
    block = power_of_two(d)
    options = dict(
        D=d, DV=d, BLOCK_D=block, BLOCK_DV=block, BLOCK_M=0, BLOCK_N=0, LEFT=False, RIGHT=True, MASK=MASKS[mask],
        SOFTCAP=False, SINK=False, GATE=GATES[gate], PACKED=False, PRECISION=kind.precision,
        HALF=kind.dtype != torch.float32, LOW=mask == "float", WEIGHT=not elementwise and (gate == "headwise" or sink),
        GRAD_K=True, GRAD_V=True, GRAD_GATE=gate != "none", GRAD_SINK=sink,
    )  # fmt: skip
    return Options(**options | given)


def _own(name: str, o: Options, tile: Tile) -> Options:
    """What the launch of a pass compiles for, of all options."""
    if name in ("forward", "decode", "join"):
        o = Options(*o[: Options._fields.index("HALF")])
    elif name == "rows":
        return of_rows(o)._replace(BLOCK_M=tile.m)
    elif name in OF_KEYS:
        o = of_products(o)._replace(GRAD_K="k" in name, GRAD_V="v" in name)
    else:
        o = of_queries(o)
    return o._replace(BLOCK_M=tile.m, BLOCK_N=tile.n)


def arguments_of(name: str, kind: Kind, o: Options) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Types, constants and alignments of a kernel's arguments, as a launch with these options has them."""
    element, packed = kind.pointer, o.PACKED
    tile = Rows(element, "i32", "i32", "i32", "constexpr"), Rows(None, None, None, None, None), 4
    # A number per query: those of a head lie next to each other, but in packed tensors and headwise gates.
    column = Rows("*fp32", "i32", "i32", "constexpr", "constexpr"), Rows(None, None, None, 1, None), 3
    spread = Rows("*fp32", "i32", "i32", "i32", "constexpr"), Rows(None, None, None, None, None), 4
    logit = spread[0]._replace(data=element), *spread[1:]
    cells = "*u8" if MASKS["bool"] == o.MASK else element
    grid = Grid(cells, "i32", "i32", "i32", "constexpr"), Grid(None, None, None, None, 1), 4

    elementwise, headwise, absent = GATES["elementwise"] == o.GATE, GATES["headwise"] == o.GATE, (None, None, 0)
    gate = tile if elementwise else logit if headwise else absent
    tuples = dict.fromkeys(("q", "k", "v", "out", "d_out", "grad_out", "grad_k", "grad_v"), tile)
    tuples |= dict.fromkeys(("lse", "grad_lse"), spread if packed else column)
    tuples |= dict.fromkeys(("delta", "high"), column)
    tuples |= dict(gate=gate, grad_gate=gate, scaled=tile if elementwise else absent)
    tuples |= dict(low=column if o.LOW or name == "norm" else absent, weight=column if o.WEIGHT else absent)
    tuples |= dict(mask=grid if MASKS["none"] != o.MASK else absent, grad=grid if name == "mask_grad" else tile)
    tuples |= {} if o.GRAD_LSE or name != "rows" else dict(grad_lse=absent)
    plain = dict(sink_stride="i32", parts="i32", scale="fp32", softcap="fp32") | dict.fromkeys(SIZES, "i32")
    plain |= dict.fromkeys(("acc_out", "top_out", "total_out", "acc_in", "top_in", "total_in"), "*fp32")
    plain |= dict(sink=element, sink_parts="*fp32") if o.SINK else {}
    plain |= dict(cu_q="*i32", cu_k="*i32") if packed else {}

    types, constants, aligned = {}, {}, []
    for argument in KERNELS[name].arg_names:
        types[argument] = plain.get(argument, "constexpr")
        if argument in tuples and tuples[argument] is not absent:
            types[argument], constants[argument], known = tuples[argument]
            aligned += [f"{argument}.{field}" for field in types[argument]._fields[:known]]
        elif types[argument] == "constexpr":
            kept = {"KEEP_B": False, "KEEP_H": True, "KEEP_Q": True, "KEEP_K": True}
            constants[argument] = o if argument == "o" else kept.get(argument)
        elif types[argument].startswith("*"):
            aligned.append(argument)
    return types, constants, tuple(aligned)


def cell_of(
    target: Target, name: str, label: str, tile: Tile, kind: str, o: Options, table: Table, everyday: bool = False
) -> Cell:
    """The cell of one pass; ``label`` is what tells it from others of its pass, type and head dimension."""
    k = KINDS[kind]
    o = _own(name, o, tile)
    types, constants, aligned = arguments_of(name, k, o)
    exact = k.dtype == torch.float32 and k.precision == "ieee"
    products = name not in WITHOUT_PRODUCTS
    flops, size = work_of(name, o, k.dtype.itemsize, table)
    return Cell(
        name=f"gated_sdpa {name} {kind} {label} {target}",
        kernel=KERNELS[name],
        signature=types,
        constexprs=constants,
        target=target,
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=aligned,
        options=dict(maxnreg=tile.registers) if tile.registers else {},
        mma=products and not (exact and target.backend == "cuda"),
        mma_kind=_warps_own(target, name, tile),
        asynchronous=products and tile.stages > 1 and target.name != "gfx942",  # which has none
        everyday=everyday,
        roof="fp32_flops" if exact else "tf32_flops" if k.precision == "tf32" else "flops",
        workload=WORKLOAD if size else "",
        flops=flops,
        bytes=size,
    )


def _warps_own(target: Target, name: str, tile: Tile) -> str:
    """Tiles of fewer than 64 rows go to the warps' own matrix instructions."""
    rows = tile.n if name in OF_KEYS else tile.m
    return "HMMA" if target.name in ("sm_90", "sm_100") and rows < 64 else ""


# Beyond causality: what changes the code of the passes in its own way, and of which.
PRODUCTS = ("forward", "dq", "dkdv", "dk", "dv")
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sink": (dict(SINK=True), ("forward", "rows")),
    "lse": (dict(GRAD_LSE=True), ("rows",)),
    "window softcap": (dict(LEFT=True, SOFTCAP=True), PRODUCTS),
    "bool": (dict(mask="bool"), PRODUCTS),
    "float": (dict(mask="float"), PRODUCTS),
    "packed": (dict(PACKED=True), (*PRODUCTS, "rows")),
}
SEES_GATE = ("forward", "join", "rows")


def _cells(target: Target, kind: str) -> Iterator[Cell]:
    k = KINDS[kind]
    if k.precision == "tf32" and target.backend == "hip":
        return  # torch has it on NVIDIA's devices only
    for d in DIMS:
        table = table_of(target.family, k.dtype, d, target.multiprocessors, k.precision == "tf32", version_numbers())
        for name in KERNELS:
            if not _tile(table, name) or not _differs(kind, name, d):
                continue
            gates = ("elementwise",) if name in ("decode", "norm") else ("elementwise", "headwise")
            gates += ("none",) if name in SEES_GATE else ()
            for gate in gates if kind == "bf16" and d != 80 else gates[:1]:
                o = options_of(k, d, gate, "float" if name in ("norm", "mask_grad") else "none")
                for label, tile in _tiles(table, name):
                    label = f"d{d} {gate} causal{label}"
                    yield cell_of(target, name, label, tile, kind, o, table, _everyday(target, kind, name, d, label))
        for option, (given, names) in OPTIONS.items():
            if d == 80 or not (option == "bool" or (kind == "bf16" and d == 128)) or kind == "fp16":
                continue  # a mask has tiles of its own in every type and dimension
            for name in names:
                if getattr(table, name):
                    tile = table.tile(name, "mask" in given)
                    label, o = f"d{d} elementwise causal {option}", options_of(k, d, **given)
                    everyday = target.name == "sm_90" and name != "rows" and kind == "bf16" and d == 128
                    everyday |= target.name == "gfx942" and option == "window softcap"
                    yield cell_of(target, name, label, tile, kind, o, table, everyday)


def _differs(kind: str, name: str, d: int) -> bool:
    """Both half types compile alike, and float32 with and without tensor cores but for the products."""
    if kind == "bf16":
        return True
    if kind == "fp32":
        return d != 80 or name in PRODUCTS
    return d != 80 and name in (*PRODUCTS, "decode")


def _tile(table: Table, name: str) -> Tile | None:
    return table.tile(name, name == "norm")


def _tiles(table: Table, name: str) -> Iterator[tuple[str, Tile]]:
    """All tiles that a launch may choose, with what to call them where there are several."""
    tile = _tile(table, name)
    if name not in ("decode", "join"):
        yield "", tile
        return
    rows = 16 if name == "decode" else 1
    while rows <= tile.m:
        yield f" m{rows}", tile._replace(m=rows)
        rows *= 2 if name == "decode" else 16


def _everyday(target: Target, kind: str, name: str, d: int, label: str) -> bool:
    """The tests' share. sm_86 and sm_89 compile to the same, and so do both half types."""
    if target.name == "sm_89":
        return False
    if name in PRODUCTS:
        gate = "elementwise" if name == "forward" or kind != "bf16" else "headwise"
        dims = (128,) if kind == "fp32" and target.name in ("sm_80", "sm_120", "gfx942") else ()
        return gate in label and d in ((64, 128, 256) if kind == "bf16" else dims)
    if name == "decode":
        return kind == "bf16" and d == 128 and "m16" in label
    return kind == "bf16" and d == 128 and "elementwise" in label and target.name in ("sm_90", "gfx942")
