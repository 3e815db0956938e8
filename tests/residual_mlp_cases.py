"""Calls of ``residual_mlp`` to test: what a case is, how its tensors are made, and a seeded generator of random ones.

A case is plain data and its tensors follow from its seed alone, so a failing id is a complete reproduction:
``python -m pytest -k "<id>"``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from cases import DTYPES, Inputs
from torch import Tensor

DIFFERENTIABLE = ("x", "weight", "bias", "ln_weight", "ln_bias")
ACTIVATIONS = ("silu", "relu", "gelu_tanh")
X_LAYOUTS = ("dense", "padded", "stepped", "columns", "transposed", "expanded")
PARAMETER_LAYOUTS = ("dense", "sliced", "padded", "stepped", "transposed", "expanded")
GRAD_LAYOUTS = (*X_LAYOUTS, "scalar")
_SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Case:
    """One call. ``rows`` are x's leading dimensions behind the group axis: ``(3, 4)`` is x ``[3, 4, W]``."""

    seed: int = 0
    dtype: torch.dtype = torch.float32  # the weight's
    x_dtype: torch.dtype | None = None  # None: the weight's
    bias_dtype: torch.dtype | None = None
    ln_weight_dtype: torch.dtype | None = None
    ln_bias_dtype: torch.dtype | None = None
    groups: int | None = None
    shared_x: bool = False  # one x for all groups, stride 0
    rows: tuple[int, ...] = (9,)
    width: int = 24
    blocks: int = 2
    layers_per_block: int = 2
    eps: float = 1e-6
    activation: str = "silu"
    checkpoint: str = "none"
    x_mean: float = 0.0
    bias_mean: float = 0.0
    gain: float = 1.0  # of weight and bias: a small one lets eps matter
    layouts: tuple[str, ...] = ("dense",) * 6  # x, weight, bias, ln_weight, ln_bias, grad_y
    needs: tuple[str, ...] = DIFFERENTIABLE

    def __str__(self) -> str:
        parts = [f"{self.seed:03d}", _SHORT[self.dtype], "x".join(map(str, self.rows)) or "row"]
        parts += [f"w{self.width}", f"{self.blocks}x{self.layers_per_block}", self.activation]
        if self.groups is not None:
            parts.append(f"g{self.groups}" + "shared" * self.shared_x)
        parts += ["block"] * (self.checkpoint == "block")
        if self.eps != 1e-6:
            parts.append(f"eps{self.eps:g}")
        if self.x_mean:
            parts.append(f"mean{self.x_mean:g}")
        if self.bias_mean:
            parts.append(f"bias{self.bias_mean:g}")
        if self.gain != 1:
            parts.append(f"gain{self.gain:g}")
        for name in ("x", "bias", "ln_weight", "ln_bias"):
            dtype = getattr(self, f"{name}_dtype") or self.dtype
            parts += [f"{name}_{_SHORT[dtype]}"] * (dtype != self.dtype)
        if set(self.layouts) != {"dense"}:
            parts.append("_".join(layout[:2] for layout in self.layouts))
        if self.needs != DIFFERENTIABLE:
            parts.append("needs_" + "_".join(self.needs))
        return "-".join(parts)

    @property
    def depth(self) -> int:
        return self.blocks * self.layers_per_block

    @property
    def batch(self) -> int:
        return math.prod(self.rows)

    @property
    def options(self) -> dict:
        """The keyword options of the public function."""
        names = ("eps", "layers_per_block", "activation", "checkpoint")
        return {name: getattr(self, name) for name in names}


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values (``expanded``: those of the first row or layer) in memory of another arrangement. The gaps hold
    NaN. ``values`` has at least one dimension; the last one is the features."""
    *outer, width = values.shape
    gap = float("nan")
    if layout == "expanded" and outer:
        return values[..., :1, :].contiguous().expand(values.shape)
    if layout == "columns":  # a stride of 2 between the features
        return values.new_full((*values.shape, 2), gap)[..., 1].copy_(values)
    if layout == "transposed" and outer:  # a weight as [in, out], a batch as columns
        return values.mT.contiguous().mT
    if layout == "padded":
        base = values.new_full((*(n + 2 for n in outer), width + 5), gap)
        return base[(*(slice(1, n + 1) for n in outer), slice(3, 3 + width))].copy_(values)
    if layout == "stepped" and outer:
        base = values.new_full((*(2 * n for n in outer), width), gap)
        return base[(*(slice(1, None, 2) for _ in outer), slice(None))].copy_(values)
    return values.contiguous()


def lay_out_parameter(values: Tensor, layout: str, inner: int) -> Tensor:
    """A parameter whose last ``inner`` dimensions belong to one layer: ``sliced`` takes some layers of a larger arena,
    ``stepped`` every second, ``expanded`` the first again and again."""
    layers = values.ndim - inner  # its dimension + 1: a group axis may come before
    if layout == "sliced":
        outer = values.shape[:layers]
        base = values.new_full((*(n + 3 for n in outer), *values.shape[layers:]), float("nan"))
        return base[tuple(slice(2, 2 + n) for n in outer)].copy_(values)
    if layout == "stepped":
        base = values.new_full((*values.shape[:layers], 2, *values.shape[layers:]), float("nan"))
        return base.select(layers, 0).copy_(values)
    if layout == "expanded":
        return values.narrow(layers - 1, 0, 1).contiguous().expand(values.shape)
    return lay_out(values, layout)


def make_inputs(case: Case) -> Inputs:
    """Tensors of the case, in its layouts; those named in ``needs`` are leaves that require a gradient."""
    generator = torch.Generator().manual_seed(case.seed * 6271 + 29)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean

    c = case
    group = () if c.groups is None else (c.groups,)
    parameter = (*group, c.depth, c.width)
    x_shape = (*c.rows, c.width) if c.shared_x else (*group, *c.rows, c.width)
    values = {
        "x": normal(*x_shape, mean=c.x_mean),
        "weight": normal(*parameter, c.width, std=c.width**-0.5) * c.gain,
        "bias": normal(*parameter, mean=c.bias_mean, std=0.3) * c.gain,
        "ln_weight": normal(*parameter, mean=1.0, std=0.3),
        "ln_bias": normal(*parameter, std=0.3),
    }
    tensors: dict[str, Tensor | None] = {}
    for (name, value), layout in zip(values.items(), c.layouts, strict=False):
        value = value.to(getattr(c, f"{name}_dtype", None) or c.dtype)
        if name == "x":
            tensors[name] = lay_out(value, layout)
            if c.shared_x:
                tensors[name] = tensors[name].expand(*group, *x_shape)
        else:
            tensors[name] = lay_out_parameter(value, layout, inner=2 if name == "weight" else 1)
        tensors[name] = tensors[name].detach().requires_grad_(name in c.needs)
    shape = (*group, *c.rows, c.width)
    grad = normal(*shape).to(c.x_dtype or c.dtype)
    if c.layouts[5] == "scalar":  # what out.sum().backward() sends
        grad = normal(1).to(grad.dtype)[0].expand(shape)
    return Inputs(tensors, lay_out(grad, c.layouts[5]) if c.layouts[5] != "scalar" else grad, None, c.needs)


def joined(case: Case, t: Tensor) -> Tensor:
    """A leading group axis in any case, and x's rows in one dimension: [G, B, W]."""
    return t.detach().reshape(1 if case.groups is None else case.groups, case.batch, case.width)


def grouped(case: Case, t: Tensor) -> Tensor:
    """A parameter with a leading group axis in any case: [G, L, W] or [G, L, W, W]."""
    return t.detach() if case.groups is not None else t.detach()[None]


ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100, 129, 200, 300)
WIDTHS = (1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 100, 128, 130, 200, 256)
WORK = 6_000_000  # multiply-adds of a forward: some milliseconds, on the slowest kernels too


def _sizes(r: random.Random) -> dict:
    """Rows, width and depth: mostly narrow, and as many rows and layers as the work allows."""
    width = r.choice(WIDTHS[:14] if r.random() < 0.7 else WIDTHS[14:])
    layers = r.choice((1, 2, 3, 4))
    groups = r.choice((None, None, None, 1, 2, 3))
    left = WORK // (width * width * (groups or 1) * layers)
    batch = r.choice([n for n in ROWS if n <= left] or [1])
    blocks = r.choice([n for n in range(1, 12 // layers + 1) if n <= max(left // batch, 1)])
    rows: tuple[int, ...] = (batch,)
    if r.random() < 0.3:
        rows = r.choice(((batch, 1), (1, batch), (2, max(batch // 2, 1)), (3, 1, max(batch // 3, 1))))
    elif batch == 1 and groups is None and r.random() < 0.5:
        rows = ()
    if r.random() < 0.03:
        rows = r.choice(((0,), (3, 0), (0, 2)))
    return dict(rows=rows, width=width, blocks=blocks, layers_per_block=layers, groups=groups)


def random_case(seed: int) -> Case:
    """The case of this seed: every option is on in a fair share of the seeds, alone and with others."""
    r = random.Random(seed)
    sizes = _sizes(r)
    dtype = r.choices(DTYPES, (4, 4, 2, 1))[0]
    either = lambda: r.choice((None, None, torch.float32))  # noqa: E731
    dtypes = {f"{name}_dtype": either() for name in ("x", "bias", "ln_weight", "ln_bias")}
    layouts = ["dense"] * 6
    if r.random() < 0.6:
        layouts = [r.choice(X_LAYOUTS), *(r.choice(PARAMETER_LAYOUTS) for _ in range(4)), r.choice(GRAD_LAYOUTS)]
        layouts = [layout if r.random() < 0.5 else "dense" for layout in layouts]
    needs = DIFFERENTIABLE
    if r.random() < 0.3:
        needs = tuple(name for name in DIFFERENTIABLE if r.random() < 0.5) or ("x",)
    return Case(
        seed=seed,
        dtype=dtype,
        **dtypes,
        **sizes,
        shared_x=sizes["groups"] is not None and r.random() < 0.4,
        eps=r.choice((1e-6, 1e-6, 1e-5, 1e-3, 0.1)),
        activation=r.choice(ACTIVATIONS),
        checkpoint=r.choice(("none", "block")),
        x_mean=r.choice((0.0, 0.0, 0.0, 3.0)),
        bias_mean=r.choice((0.0, 0.0, 0.0, 4.0)),
        gain=r.choice((1.0, 1.0, 1.0, 1.0 if dtype == torch.float16 else 3e-3)),  # float16 would overflow
        layouts=tuple(layouts),
        needs=needs,
    )
