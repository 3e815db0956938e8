"""Calls of ``gated_sdpa`` to test: what a case is, how its tensors are made, and a seeded generator of random ones.

A case is plain data and its tensors follow from its seed alone, so a failing id is a complete reproduction:
``python -m pytest -k "<id>"``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

DIFFERENTIABLE = ("query", "key", "value", "gate", "attn_mask", "sink")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("dense", "transposed", "chunk", "padded", "stepped", "expanded")
_SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Case:
    """One dense call. ``mask_dims`` spells the mask's shape: ``"b1qk"`` is ``[B, 1, Sq, Sk]``."""

    seed: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    sq: int = 33
    sk: int = 47
    d: int = 32
    dv: int = 24
    gate: str = "elementwise"  # or "headwise", "none"
    gate_dtype: torch.dtype | None = None  # None: the query's
    gate_mean: float = 0.0
    mask: str = "none"  # or "bool", "float"
    mask_dims: str = "bhqk"
    mask_dtype: torch.dtype | None = None
    mask_layout: str = "dense"  # or "expanded" (stride 0, full shape), "strided" (no unit stride)
    dead_rows: bool = False
    causal: str = ""  # or "top_left", "bottom_right"
    bottom_right: bool = False  # alignment of a window without causality
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    sink: bool = False
    sink_dtype: torch.dtype | None = None
    scale: float | None = None
    layouts: tuple[str, ...] = ("dense",) * 5  # query, key, value, gate, grad_out
    needs: tuple[str, ...] = DIFFERENTIABLE
    grad_lse: bool = True

    def __str__(self) -> str:
        parts = [f"{self.seed:03d}", _SHORT[self.dtype], f"b{self.batch}h{self.heads}.{self.kv_heads}"]
        parts += [f"q{self.sq}k{self.sk}", f"d{self.d}.{self.dv}"]
        if self.gate != "none":
            parts.append(self.gate[:4] + _SHORT.get(self.gate_dtype, ""))
        if self.mask != "none":
            parts.append(f"{self.mask}{_SHORT.get(self.mask_dtype, '')}_{self.mask_dims}_{self.mask_layout}")
        if self.causal:
            parts.append(self.causal)
        if self.window is not None:
            parts.append("w" + "_".join("inf" if w is None else str(w) for w in self.window))
            parts[-1] += "_bottom" if self.bottom_right and not self.causal else ""
        parts += [f"cap{self.softcap:g}"] * (self.softcap > 0) + ["sink"] * self.sink + ["dead"] * self.dead_rows
        if self.scale is not None:
            parts.append(f"scale{self.scale:g}")
        if set(self.layouts) != {"dense"}:
            parts.append("-".join(layout[0] for layout in self.layouts))
        if self.needs != DIFFERENTIABLE:
            parts.append("needs" + "".join(n[0] for n in self.needs))
        return "-".join(parts + ["nolse"] * (not self.grad_lse))

    @property
    def options(self) -> dict:
        """The keyword options of the public function that are not tensors."""
        bottom_right = self.causal == "bottom_right" or self.bottom_right
        return dict(
            is_causal=bool(self.causal),
            causal_alignment="bottom_right" if bottom_right else "top_left",
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
        )


@dataclass
class Inputs:
    """The tensors of one call (absent ones are ``None``) and the gradients that flow into it."""

    tensors: dict[str, Tensor | None]
    grad_out: Tensor
    grad_lse: Tensor | None
    needs: tuple[str, ...] = field(default=())

    def leaves(self) -> list[str]:
        """Names of the tensors that ask for a gradient."""
        return [name for name in self.needs if self.tensors.get(name) is not None and self.tensors[name].requires_grad]


def lay_out(values: Tensor, layout: str, side: int = 0) -> Tensor:
    """The same values (``expanded``: those of the first batch entry) in memory of another arrangement. The gaps hold
    NaN. ``values`` is [B, H, S, D] or [B, H, S]."""
    b, h, s, *last = values.shape
    if layout == "dense":
        return values.contiguous()
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape)
    if layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    gap = float("nan")
    if layout == "chunk":  # half of a projection that holds [query | gate] for each head
        base = values.new_full((b, s, h, *(2 * x for x in last)), gap)
        view = base.transpose(1, 2)
        if last:
            view = view.chunk(2, -1)[side % 2] if last[0] else view
        return view.copy_(values)
    if layout == "padded":
        base = values.new_full((b + 1, h + 2, s + 3, *(x + 5 for x in last)), gap)
        view = base[1:, 1 : h + 1, 2 : s + 2]
        view = view[..., 3 : 3 + last[0]] if last else view
        return view.copy_(values)
    if layout == "stepped":
        base = values.new_full((b, 2 * h, 3 * s, *last), gap)
        return base[:, ::2, 1::3].copy_(values)
    if layout == "strided":  # no unit stride anywhere: headwise gates, masks and incoming gradients only
        base = values.new_full((*values.shape, 2), gap)
        return base[..., 1].copy_(values)
    raise ValueError(layout)


def make_mask(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    full = {"b": case.batch, "h": case.heads, "q": case.sq, "k": case.sk, "1": 1}
    shape = [full[letter] for letter in case.mask_dims]
    allowed = torch.rand(shape, generator=generator) < 0.7
    if case.dead_rows and len(shape) > 1:
        # Whole rows, and a tile's worth of leading keys in the others.
        allowed &= torch.rand([*shape[:-1], 1], generator=generator) < 0.6
    if case.mask == "bool":
        mask = allowed
    else:
        bias = torch.randn(shape, generator=generator, dtype=torch.float64)
        mask = bias.masked_fill(~allowed, -math.inf).to(case.mask_dtype or case.dtype)
    if case.mask_layout == "expanded":
        sizes = [case.batch, case.heads, case.sq, case.sk]
        return mask.expand(sizes)
    if case.mask_layout == "strided":
        base = mask.new_ones((*shape, 3))
        return base[..., 1].copy_(mask)
    return mask


def make_inputs(case: Case) -> Inputs:
    """Tensors of the case, in its layouts; those named in ``needs`` are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(case.seed * 7919 + 17)

    def normal(*shape: int, dtype: torch.dtype = case.dtype, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)

    c = case
    tensors: dict[str, Tensor | None] = {
        "query": lay_out(normal(c.batch, c.heads, c.sq, c.d), c.layouts[0], 0),
        "key": lay_out(normal(c.batch, c.kv_heads, c.sk, c.d), c.layouts[1], 0),
        "value": lay_out(normal(c.batch, c.kv_heads, c.sk, c.dv), c.layouts[2], 1),
        "gate": None,
        "attn_mask": make_mask(c, generator),
        "sink": normal(c.heads, dtype=c.sink_dtype or c.dtype) if c.sink else None,
    }
    if c.gate != "none":
        shape = (c.batch, c.heads, c.sq) + ((c.dv,) if c.gate == "elementwise" else ())
        values = normal(*shape, dtype=c.gate_dtype or c.dtype, mean=c.gate_mean)
        tensors["gate"] = lay_out(values, c.layouts[3], 1)
    for name, tensor in tensors.items():
        if tensor is not None:
            tensors[name] = tensor.detach().requires_grad_(name in c.needs and tensor.is_floating_point())
    lse_dtype = torch.float64 if c.dtype == torch.float64 else torch.float32
    grad_out = lay_out(normal(c.batch, c.heads, c.sq, c.dv), c.layouts[4])
    grad_lse = normal(c.batch, c.heads, c.sq, dtype=lse_dtype) if c.grad_lse else None
    return Inputs(tensors, grad_out, grad_lse, c.needs)


def _sizes(r: random.Random) -> dict[str, int]:
    """Small calls, calls that cross several tiles, wide heads and decode steps: each small enough for milliseconds."""
    family = r.choices(("small", "tiles", "wide", "decode"), (5, 3, 2, 2))[0]
    kv_heads = r.choice((1, 1, 2, 3))
    group = r.choice((1, 1, 2, 3, 4))
    small = lambda: r.choice((1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 48, 61, 64, 65, 79))  # noqa: E731
    if family == "small":
        sq, sk, d, dv = small(), small(), r.choice((1, 3, 8, 16, 17, 32, 40)), r.choice((1, 5, 8, 16, 24, 32))
        return dict(batch=r.choice((1, 2, 3)), kv_heads=kv_heads, heads=kv_heads * group, sq=sq, sk=sk, d=d, dv=dv)
    if family == "tiles":
        long = lambda: r.choice((97, 128, 131, 193, 257, 300, 389))  # noqa: E731
        d = r.choice((8, 16, 33, 64, 80))
        dv = r.choice((d, 16, 65))
        return dict(batch=1, kv_heads=r.choice((1, 2)), heads=2, sq=long(), sk=long(), d=d, dv=dv)
    if family == "wide":
        d, dv = r.choice((96, 127, 128, 192, 256, 511, 512)), r.choice((64, 128, 129, 256, 300, 512))
        return dict(batch=1, kv_heads=kv_heads, heads=kv_heads * min(group, 2), sq=small(), sk=small(), d=d, dv=dv)
    sq, sk = r.choice((1, 1, 1, 2, 3, 5)), r.choice((129, 500, 1021, 1500))
    d = r.choice((16, 64, 128))
    return dict(batch=r.choice((1, 2)), kv_heads=1, heads=group, sq=sq, sk=sk, d=d, dv=r.choice((d, 40)))


def random_case(seed: int) -> Case:
    """The case of this seed: every option is on in a fair share of the seeds, alone and with others."""
    r = random.Random(seed)
    sizes = _sizes(r)
    gate = r.choice(("elementwise", "elementwise", "headwise", "none"))
    mask = r.choices(("none", "bool", "float"), (5, 2, 3))[0]
    mask_dims = r.choice(("bhqk", "bhqk", "11qk", "qk", "b11k", "bh1k", "1hqk", "b1qk", "1hq1", "k", "1111"))
    causal = r.choice(("", "", "top_left", "bottom_right"))
    bound = lambda: r.choice((None, 0, 1, 4, 17, 64))  # noqa: E731
    window = r.choice((None, None, None, (bound(), bound())))
    dtype = r.choices(DTYPES, (4, 4, 2, 1))[0]
    half = dtype in (torch.bfloat16, torch.float16)
    either = lambda: r.choice((None, torch.float32)) if half else None  # noqa: E731
    layouts = tuple(r.choice(LAYOUTS) if r.random() < 0.5 else "dense" for _ in range(4))
    if gate == "headwise" and r.random() < 0.3:
        layouts = (*layouts[:3], "strided")
    layouts += (r.choice((*LAYOUTS, "strided")) if r.random() < 0.5 else "dense",)
    needs = DIFFERENTIABLE
    if r.random() < 0.25:
        needs = tuple(name for name in DIFFERENTIABLE if r.random() < 0.5) or ("query",)
    return Case(
        seed=seed,
        dtype=dtype,
        **sizes,
        gate=gate,
        gate_dtype=either(),
        gate_mean=r.choice((0.0, 0.0, -3.0)),
        mask=mask,
        mask_dims=mask_dims,
        mask_dtype=either(),
        mask_layout=r.choice(("dense", "dense", "expanded", "strided")),
        dead_rows=r.random() < 0.3,
        causal=causal,
        bottom_right=window is not None and r.random() < 0.5,
        window=window,
        softcap=r.choice((0.0, 0.0, 0.0, 2.0, 20.0)),
        sink=r.random() < 0.3,
        sink_dtype=either(),
        scale=r.choice((None, None, None, None, 0.0, -0.25, 0.7)),
        layouts=layouts,
        needs=needs,
        grad_lse=r.random() < 0.7,
    )
