"""The paper's network as its own code writes it, in flax: the same output and the same gradients."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch
from harness import Target

import nsk

pytestmark = pytest.mark.usefixtures("one_thread")

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
    """The flax module, parameters that are all random, and an input."""
    generator = np.random.default_rng(depth)
    normal = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
    module = Encoder(depth, heads, activation)
    x = normal(ROWS, IN)
    params = jax.tree.map(np.array, module.init(jax.random.PRNGKey(0), x)["params"])
    return module, jax.tree.map(lambda p: p + np.float32(0.1) * normal(*p.shape), params), x


def weights(*shape: int) -> np.ndarray:
    """What each output counts in the loss."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@functools.cache
def theirs(depth: int, activation: str):
    """The output, and the gradients of the parameters and of the input."""
    module, params, x = network(depth, activation=activation)

    def loss(params, x):
        y = module.apply({"params": params}, x)
        return (y * weights(*y.shape)).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return jax.tree.map(np.array, (y, *gradients))


def close(ours: torch.Tensor, expected: np.ndarray, depth: int) -> None:
    """flax computes the variance in one pass, so its own error is the larger one."""
    size = float(abs(expected).max())
    atol = 3e-5 * size * depth**0.5
    torch.testing.assert_close(ours.detach(), torch.from_numpy(np.array(expected)), rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    ("depth", "activation"), [(4, "silu"), (4, "relu"), (8, "gelu_tanh"), (8, "silu"), (32, "silu")]
)
def test_output_and_gradients_are_those_of_flax(depth: int, activation: str, target: Target):
    _, params, x = network(depth, activation=activation)
    output, of_params, of_x = theirs(depth, activation)
    mlp = nsk.nn.residual_mlp_from_flax(params, activation=activation)
    inputs = torch.from_numpy(x).requires_grad_()
    y = mlp(inputs)
    close(y, output, depth)

    (y * torch.from_numpy(weights(*y.shape))).sum().backward()
    close(inputs.grad, of_x, depth)
    # The gradients, as the parameters, in the layout of the module.
    like = nsk.nn.residual_mlp_from_flax(of_params, activation=activation)
    for (name, ours), expected in zip(mlp.named_parameters(), like.parameters(), strict=True):
        assert ours.grad.shape == expected.shape, name
        close(ours.grad, expected.detach().numpy(), depth)


def test_an_actors_heads_become_one(target: Target):
    """Mean and log_std, in that order."""
    module, params, x = network(4, heads=(3, 5))
    y = nsk.nn.residual_mlp_from_flax(params)(torch.from_numpy(x))
    assert y.shape == (ROWS, 8)
    close(y, module.apply({"params": params}, x), 4)


def test_without_a_head_and_under_params(target: Target):
    module, params, x = network(8, heads=())
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
    _, params, x = network(4)
    mlp = nsk.nn.residual_mlp_from_flax(params)
    before = mlp(torch.from_numpy(x)).detach()
    with torch.no_grad():
        mlp.stack.weight.zero_()
    again = nsk.nn.residual_mlp_from_flax(params)
    assert torch.equal(again(torch.from_numpy(x)), before)
