"""The same network in JAX: one jitted scan over the residual blocks, whose body is compiled once at any depth."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.residual_mlp.cases import LAYERS_PER_BLOCK
from benchmarks.residual_mlp.inputs import EPS, Inputs
from benchmarks.workload import Case


def why_absent() -> str | None:
    """Why there is no such peer here."""
    return None if importlib.util.find_spec("jax") else "jax is not installed"


def arm(case: Case, inputs: Inputs) -> Callable[[], list]:
    """The forward, or the forward with all gradients, returned when it is done."""
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # XLA's threads: its first use reads it
    import jax

    one = jax.vmap(_network) if case.shape.groups else _network

    def forward(x, parameters):
        return [one(x, parameters)]

    def training(x, parameters, grad_y):
        if case.shape.input_only:
            y, pull = jax.vjp(lambda x: one(x, parameters), x)
            return [y, *pull(grad_y)]
        y, pull = jax.vjp(one, x, parameters)
        grad_x, grads = pull(grad_y)
        return [y, grad_x, *grads]

    arguments = [_array(inputs.x), tuple(_array(_by_block(t, case.shape.groups)) for t in inputs.parameters)]
    if case.mode == "training":
        arguments.append(_array(inputs.grad_y))
    function = jax.jit(training if case.mode == "training" else forward)
    return lambda: jax.block_until_ready(function(*arguments))


def _network(x, parameters):
    """x [B, W] and parameters [N, layers per block, ...] of N residual blocks."""
    import jax
    import jax.numpy as jnp

    def block(h, of_block):
        t = h.astype(x.dtype)
        for i in range(LAYERS_PER_BLOCK):
            weight, bias, gain, shift = (p[i] for p in of_block)
            z = (jax.lax.dot_general(t, weight, (((1,), (1,)), ((), ()))) + bias).astype(jnp.float32)
            z = z - z.mean(-1, keepdims=True)
            z = z * jax.lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + EPS)
            t = jax.nn.silu((z * gain + shift).astype(x.dtype))
        return h + t, None

    h, _ = jax.lax.scan(block, x.astype(jnp.float32), parameters)
    return h.astype(x.dtype)


def _by_block(t: Tensor, groups: int | None) -> Tensor:
    return t.unflatten(1 if groups else 0, (-1, LAYERS_PER_BLOCK))


def _array(t: Tensor):
    import jax.numpy as jnp

    return jnp.asarray(t.detach().float().numpy(), dtype=str(t.dtype).removeprefix("torch."))
