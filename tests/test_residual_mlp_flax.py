"""The paper's network as its own code writes it, in flax: the same output and the same gradients."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from harness import Target

import nsk

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax", reason="needs jax and flax")
linen = pytest.importorskip("flax.linen", reason="needs jax and flax")
jnp = jax.numpy

WIDTH, IN, OUT, ROWS = 40, 11, 7, 33


class Encoder(linen.Module):
    """An input layer, blocks of four layers, a head: as scaling-crl's ``SA_encoder``, ``G_encoder`` and ``Actor``."""

    depth: int
    heads: tuple[int, ...] = (OUT,)
    activation: str = "silu"

    @linen.compact
    def __call__(self, x):
        act = {"silu": linen.swish, "relu": linen.relu, "gelu_tanh": lambda x: linen.gelu(x, approximate=True)}
        normalise = lambda x: act[self.activation](linen.LayerNorm()(x))  # noqa: E731
        x = normalise(linen.Dense(WIDTH)(x))
        for _ in range(self.depth // 4):
            identity = x
            for _ in range(4):
                x = normalise(linen.Dense(WIDTH)(x))
            x = x + identity
        return jnp.concatenate([linen.Dense(out)(x) for out in self.heads], -1) if self.heads else x


def network(depth: int, heads: tuple[int, ...] = (OUT,), activation: str = "silu"):
    """The flax module, parameters that are all random, an input, and a weight for each output."""
    generator = np.random.default_rng(depth)
    normal = lambda *shape: generator.standard_normal(shape).astype(np.float32)  # noqa: E731
    module = Encoder(depth, heads, activation)
    x = normal(ROWS, IN)
    params = module.init(jax.random.PRNGKey(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * normal(*p.shape), params)
    return module, params, x, normal(ROWS, sum(heads) or WIDTH)


def close(ours: torch.Tensor, theirs, depth: int) -> None:
    """flax computes the variance in one pass, so its own error is the larger one."""
    theirs = torch.from_numpy(np.array(theirs))
    size = theirs.abs().max().item()
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=3e-5 * size * depth**0.5)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu_tanh"])
@pytest.mark.parametrize("depth", [4, 8, 64])
def test_output_and_gradients_are_those_of_flax(depth: int, activation: str, target: Target):
    module, params, x, weights = network(depth, activation=activation)
    if activation == "relu" and depth > 8:
        depth = 10_000  # on the way through 64 layers some relu's argument is 0 but for rounding
    mlp = nsk.nn.residual_mlp_from_flax(params, activation=activation)
    inputs = torch.from_numpy(x).requires_grad_()
    y = mlp(inputs)
    close(y, module.apply({"params": params}, x), depth)

    (y * torch.from_numpy(weights)).sum().backward()
    loss = lambda params, x: (module.apply({"params": params}, x) * weights).sum()  # noqa: E731
    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, x)
    close(inputs.grad, of_x, depth)
    # The gradients, as the parameters, in the layout of the module.
    like = nsk.nn.residual_mlp_from_flax(of_params, activation=activation)
    for (name, ours), theirs in zip(mlp.named_parameters(), like.parameters(), strict=True):
        assert ours.grad.shape == theirs.shape, name
        close(ours.grad, theirs.detach(), depth)


def test_an_actors_heads_become_one(target: Target):
    """Mean and log_std, in that order."""
    module, params, x, _ = network(4, heads=(3, 5))
    y = nsk.nn.residual_mlp_from_flax(params)(torch.from_numpy(x))
    assert y.shape == (ROWS, 8)
    close(y, module.apply({"params": params}, x), 4)


def test_without_a_head_and_under_params(target: Target):
    module, params, x, _ = network(8, heads=())
    mlp = nsk.nn.residual_mlp_from_flax({"params": params}, checkpoint="block")
    assert mlp.head is None
    assert mlp.stack.checkpoint == "block"
    close(mlp(torch.from_numpy(x)), module.apply({"params": params}, x), 8)


def test_the_initialisation_is_the_papers():
    """variance_scaling(1/3, "fan_in", "uniform") and zeros: the same range and spread of the weights."""
    module = linen.Dense(256, kernel_init=jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))
    theirs = np.array(module.init(jax.random.PRNGKey(1), np.zeros((1, 256), np.float32))["params"]["kernel"])
    ours = nsk.nn.ResidualMLPStack(256, 4).weight.detach()
    assert abs(theirs).max() == pytest.approx(ours.abs().max().item(), rel=0.01)
    assert theirs.std() == pytest.approx(ours.std().item(), rel=0.02)


def test_conversion_copies():
    _, params, x, _ = network(4)
    mlp = nsk.nn.residual_mlp_from_flax(params)
    before = mlp(torch.from_numpy(x)).detach()
    with torch.no_grad():
        mlp.stack.weight.zero_()
    again = nsk.nn.residual_mlp_from_flax(params)
    assert torch.equal(again(torch.from_numpy(x)), before)
