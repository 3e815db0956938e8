"""Launches gated attention: tensors become pointers with strides, options become what the kernels are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nsk.backends.triton.blocks import (
    BOOL_MASK,
    ELEMENTWISE,
    FLOAT_MASK,
    HEADWISE,
    NO_GATE,
    NO_MASK,
    Grid,
    Options,
    Rows,
    Sizes,
)
from nsk.backends.triton.gated_sdpa_attend import gated_sdpa_forward
from nsk.backends.triton.gated_sdpa_decode import gated_sdpa_decode, gated_sdpa_join
from nsk.backends.triton.gated_sdpa_dkdv import gated_sdpa_dkdv
from nsk.backends.triton.gated_sdpa_dq import gated_sdpa_dq
from nsk.backends.triton.gated_sdpa_mask_grad import gated_sdpa_mask_grad, gated_sdpa_norm
from nsk.backends.triton.gated_sdpa_rows import gated_sdpa_rows
from nsk.backends.triton.tables import Table, Tile
from nsk.spec.precision import tf32_allowed

MOST_ROWS = 256  # of a tile
GATES = {"none": NO_GATE.value, "elementwise": ELEMENTWISE.value, "headwise": HEADWISE.value}
MASKS = {"none": NO_MASK.value, "bool": BOOL_MASK.value, "float": FLOAT_MASK.value}


def rows_of(t: Tensor | None, packed: bool) -> Rows | None:
    """``[B, H, S, D]`` or ``[B, H, S]``; packed ``[S, H, D]`` or ``[S, H]``."""
    if t is None:
        return None
    s = t.stride()
    batch, head, row = (0, s[1], s[0]) if packed else s[:3]
    return Rows(t, batch, head, row, 0 if row * MOST_ROWS >= 1 << 31 else None)


def grid_of(mask: Tensor | None) -> Grid | None:
    """Broadcasts against [B, Hq, Sq, Sk] from the right: a dimension of size 1 has stride 0."""
    if mask is None:
        return None
    data = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return Grid(data, *(0,) * (4 - mask.ndim), *strides)


def power_of_two(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


@dataclass(frozen=True)
class Problem:
    """A call as the kernels take it."""

    q: Rows
    k: Rows
    v: Rows
    gate: Rows | None
    mask: Grid | None
    sink: Tensor | None
    sink_stride: int
    cu_q: Tensor | None
    cu_k: Tensor | None
    sizes: Sizes
    scale: float
    softcap: float
    options: Options  # but for the tile's

    def rows(self, t: Tensor | None) -> Rows | None:
        return rows_of(t, self.options.PACKED)

    def query_tiles(self, block: int) -> int:
        """Per head: of all batch entries, or the slots of all sequences."""
        return self._tiles(self.sizes.sq, block)

    def key_tiles(self, block: int) -> int:
        return self._tiles(self.sizes.sk, block)

    def _tiles(self, length: int, block: int) -> int:
        batch = self.sizes.batch
        return length // block + batch if self.options.PACKED else batch * triton.cdiv(length, block)

    def per_query(self) -> Rows:
        """Room for a float32 number per query; those of a head lie next to each other."""
        batch = 1 if self.options.PACKED else self.sizes.batch
        shape = (batch, self.sizes.heads, self.sizes.sq)
        return rows_of(torch.empty(shape, dtype=torch.float32, device=self.q.data.device), False)


def precision(dtype: torch.dtype) -> str:
    """float32 is exact unless torch was told otherwise."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def problem_of(call) -> Problem:
    q, k, v, mask = call.query, call.key, call.value, call.attn_mask
    packed = call.varlen
    heads, kv_heads = q.shape[1], k.shape[1]
    sq, sk = (q.shape[0], k.shape[0]) if packed else (q.shape[2], k.shape[2])
    batch = call.cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    # A bound beyond every key is no bound; dropping it keeps sums far from overflow.
    left, right = (-1 if bound > sq + sk else bound for bound in (call.window_left, call.window_right))
    right = 0 if call.is_causal else right
    options = Options(
        D=q.shape[-1],
        DV=v.shape[-1],
        BLOCK_D=power_of_two(q.shape[-1]),
        BLOCK_DV=power_of_two(v.shape[-1]),
        BLOCK_M=0,
        BLOCK_N=0,
        LEFT=left >= 0,
        RIGHT=right >= 0,
        MASK=MASKS["none" if mask is None else "bool" if mask.dtype == torch.bool else "float"],
        SOFTCAP=call.softcap > 0,
        SINK=call.sink is not None,
        GATE=GATES["none" if call.gate is None else "headwise" if call.headwise else "elementwise"],
        PACKED=packed,
        PRECISION=precision(q.dtype),
    )
    return Problem(
        rows_of(q, packed),
        rows_of(k, packed),
        rows_of(v, packed),
        rows_of(call.gate, packed),
        grid_of(mask),
        call.sink,
        0 if call.sink is None else call.sink.stride(0),
        call.cu_seqlens_q.contiguous() if packed else None,
        call.cu_seqlens_k.contiguous() if packed else None,
        Sizes(batch, heads, heads // kv_heads, sq, sk, int(call.bottom_right), max(left, 0), max(right, 0)),
        call.scale,
        call.softcap,
        options,
    )


def launch(kernel, programs: int, tile: Tile, *args) -> None:
    """Products and sums are fused as the compiler likes in every version of Triton: its default is about to change."""
    if programs:
        limit = {"maxnreg": tile.registers} if tile.registers else {}
        kernel[(programs,)](*args, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True, **limit)


def tiled(options: Options, tile: Tile) -> Options:
    return options._replace(BLOCK_M=tile.m, BLOCK_N=tile.n)


def of_rows(o: Options) -> Options:
    """What the row-wise pass of the backward depends on, lest it be compiled anew for the rest."""
    return o._replace(
        D=0, BLOCK_D=0, BLOCK_N=0, LEFT=False, RIGHT=False, MASK=0, SOFTCAP=False, PRECISION="", GRAD_K=False,
        GRAD_V=False,
    )  # fmt: skip


def of_products(o: Options) -> Options:
    """The same for the passes after it, which see of gate and sink only what it leaves."""
    return o._replace(GATE=0, SINK=False, HALF=False, GRAD_LSE=False, GRAD_GATE=False, GRAD_SINK=False)


def of_queries(o: Options) -> Options:
    """And for those that do not differ by what of the keys is wanted."""
    return of_products(o)._replace(GRAD_K=False, GRAD_V=False)


def forward(call, out: Tensor, lse: Tensor, table: Table) -> None:
    if out.numel() == 0:
        return
    if call.varlen and call.cu_seqlens_q.numel() == 1:  # rows without a sequence see nothing
        out.zero_()
        lse.fill_(-math.inf)
        return
    p = problem_of(call)
    tile, parts = decode_tile(p, table)
    if parts > 1:
        decode(p, out, lse, tile, table.join, parts)
        return
    tile = table.tile("forward", p.mask is not None)
    launch(
        gated_sdpa_forward, p.query_tiles(tile.m) * p.sizes.heads, tile,
        p.q, p.k, p.v, p.gate, p.mask, p.sink, p.sink_stride, p.rows(out), p.rows(lse),
        p.cu_q, p.cu_k, *p.sizes, p.scale, p.softcap, tiled(p.options, tile),
    )  # fmt: skip


def decode_tile(p: Problem, table: Table) -> tuple[Tile, int]:
    """The tile that holds all queries of a group, and into how many parts to split the keys; 1 where one launch over
    tiles of queries keeps the device as busy."""
    tile, s = table.decode, p.sizes
    rows = s.group * s.sq
    if p.options.PACKED or rows > tile.m:
        return tile, 1
    tile = tile._replace(m=power_of_two(rows))
    programs = s.batch * (s.heads // s.group)
    # Two programs a multiprocessor, and at least two blocks of keys for each.
    return tile, min(2 * table.multiprocessors // programs, triton.cdiv(s.sk, 2 * tile.n))


def decode(p: Problem, out: Tensor, lse: Tensor, tile: Tile, join: Tile, parts: int) -> None:
    s = p.sizes
    total = torch.empty(2, parts, *lse.shape, dtype=torch.float32, device=out.device)
    acc = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    launch(
        gated_sdpa_decode, parts * s.batch * (s.heads // s.group), tile,
        p.q, p.k, p.v, p.mask, acc, total[0], total[1], *s, parts, p.scale, p.softcap, tiled(p.options, tile),
    )  # fmt: skip
    join = join._replace(m=min(join.m, triton.next_power_of_2(s.sq)))
    launch(
        gated_sdpa_join, p.query_tiles(join.m) * s.heads, join,
        acc, total[0], total[1], p.gate, p.sink, p.sink_stride, p.rows(out), p.rows(lse), *s, parts,
        tiled(p.options, join),
    )  # fmt: skip


def key_passes(o: Options, table: Table) -> list[tuple[str, Options]]:
    """The launches for dK and dV: one for both, or one for each where the table has it so or one alone is wanted."""
    if o.GRAD_K and o.GRAD_V and table.dkdv:
        return [("dkdv", o)]
    passes = [("dk" if table.dk else "dkdv", o._replace(GRAD_V=False))] if o.GRAD_K else []
    return passes + ([("dv" if table.dv else "dkdv", o._replace(GRAD_K=False))] if o.GRAD_V else [])


def backward(call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads, table: Table) -> None:
    if out.numel() == 0 or call.key.numel() == 0 or (call.varlen and call.cu_seqlens_q.numel() == 1):
        for grad in grads.wanted():
            grad.zero_()
        return
    p = problem_of(call)
    elementwise = GATES["elementwise"] == p.options.GATE
    o = p.options._replace(
        WEIGHT=not elementwise and (GATES["none"] != p.options.GATE or p.options.SINK),
        LOW=MASKS["float"] == p.options.MASK,
        GRAD_LSE=grad_lse is not None,
        GRAD_K=grads.key is not None,
        GRAD_V=grads.value is not None,
        GRAD_GATE=grads.gate is not None,
        GRAD_SINK=grads.sink is not None,
    )
    norm, low = p.rows(lse), None
    if o.LOW:
        norm, low = p.per_query(), p.per_query()
        tile = table.tile("norm", True)
        launch(
            gated_sdpa_norm, p.query_tiles(tile.m) * p.sizes.heads, tile,
            p.q, p.k, p.mask, p.rows(lse), norm, low, *p.sizes, p.scale, p.softcap, tiled(of_queries(o), tile),
        )  # fmt: skip

    delta, weight = p.per_query(), p.per_query() if o.WEIGHT else None
    scaled = p.rows(torch.empty(out.shape, dtype=out.dtype, device=out.device)) if elementwise else None
    tile = table.rows
    per_head = p.query_tiles(tile.m)
    parts = None
    if o.GRAD_SINK:
        parts = torch.zeros(p.sizes.heads, per_head, dtype=torch.float32, device=out.device)
    launch(
        gated_sdpa_rows, per_head * p.sizes.heads, tile,
        p.rows(out), norm, low, p.rows(grad_out), p.rows(grad_lse), p.gate, p.sink, p.sink_stride,
        delta, weight, scaled, p.rows(grads.gate), parts, p.cu_q, p.cu_k, *p.sizes,
        of_rows(o)._replace(BLOCK_M=tile.m),
    )  # fmt: skip
    if parts is not None:
        grads.sink.copy_(parts.sum(1))

    d_out = scaled if elementwise else p.rows(grad_out)
    inputs = (p.q, p.k, p.v, p.mask, norm, low, delta, weight, d_out)
    call_of = (*p.sizes, p.scale, p.softcap)
    if grads.query is not None:
        tile = table.tile("dq", p.mask is not None)
        launch(
            gated_sdpa_dq, p.query_tiles(tile.m) * p.sizes.heads, tile,
            *inputs, p.rows(grads.query), p.cu_q, p.cu_k, *call_of, tiled(of_queries(o), tile),
        )  # fmt: skip
    for name, own in key_passes(of_products(o), table):
        tile = table.tile(name, p.mask is not None)
        launch(
            gated_sdpa_dkdv, p.key_tiles(tile.n) * (p.sizes.heads // p.sizes.group), tile,
            *inputs, p.rows(grads.key), p.rows(grads.value), p.cu_q, p.cu_k, *call_of, tiled(own, tile),
        )  # fmt: skip
    if (mask := grads.attn_mask) is not None:
        tile = table.mask_grad
        full = (p.sizes.batch, p.sizes.heads, p.sizes.sq, p.sizes.sk)
        shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        tiles = (shape[0], shape[1], triton.cdiv(shape[2], tile.m), triton.cdiv(shape[3], tile.n))
        kept = [own == of for own, of in zip(shape, full, strict=True)]
        own = tiled(of_queries(o), tile)
        launch(gated_sdpa_mask_grad, math.prod(tiles), tile, *inputs, grid_of(mask), *call_of, own, *kept)
