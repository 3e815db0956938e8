"""The modules of residual MLPs: what they start from, what they take, and that they are the networks that they say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from harness import Target
from residual_mlp_cases import ACTIVATIONS
from torch import Tensor, nn
from torch.nn import functional as F

import nsk
from nsk.nn import ResidualMLP, ResidualMLPStack, layers_from_stack, residual_mlp_from_flax, stack_from_layers

pytestmark = pytest.mark.usefixtures("one_thread")

FUNCTIONS = {"silu": F.silu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def disturb(module: nn.Module) -> nn.Module:
    """Parameters that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def by_hand(model: ResidualMLP, x: Tensor) -> Tensor:
    """The network in plain torch, without its head."""
    act, stack = FUNCTIONS[model.stack.activation], model.stack
    normalise = lambda z, weight, bias: act(F.layer_norm(z, (stack.width,), weight, bias, stack.eps))  # noqa: E731
    h = normalise(F.linear(x, model.input.weight, model.input.bias), model.input_norm.weight, model.input_norm.bias)
    for first in range(0, stack.depth, stack.layers_per_block):
        t = h
        for i in range(first, first + stack.layers_per_block):
            t = normalise(F.linear(t, stack.weight[i], stack.bias[i]), stack.ln_weight[i], stack.ln_bias[i])
        h = h + t
    return h


# --- ResidualMLPStack --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_stack_starts_as_in_the_paper(groups: int | None):
    stack = ResidualMLPStack(64, 8, groups=groups)
    leading = (8,) if groups is None else (groups, 8)
    assert {name: tuple(p.shape) for name, p in stack.named_parameters()} == {
        "weight": (*leading, 64, 64), "bias": (*leading, 64), "ln_weight": (*leading, 64), "ln_bias": (*leading, 64)
    }  # fmt: skip
    assert stack.weight.abs().max() <= 1 / 8
    assert stack.weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
    assert not stack.bias.any()
    assert not stack.ln_bias.any()
    assert (stack.ln_weight == 1).all()
    assert (stack.groups, stack.depth, stack.width) == (groups, 8, 64)
    assert (stack.eps, stack.layers_per_block, stack.activation, stack.checkpoint) == (1e-6, 4, "silu", "none")
    if groups == 3:
        assert not torch.equal(stack.weight[0], stack.weight[1])


def test_a_stack_is_the_function_of_its_parameters(target: Target):
    stack = disturb(ResidualMLPStack(16, 6, layers_per_block=3, activation="relu", eps=1e-2, checkpoint="block"))
    x = normal(2, 5, 16)
    expected = nsk.residual_mlp(x, *stack.parameters(), layers_per_block=3, activation="relu", eps=1e-2)
    assert torch.equal(stack(x), expected)


def test_groups_are_stacks_of_their_own(target: Target):
    many, one = disturb(ResidualMLPStack(16, 8, groups=2)), ResidualMLPStack(16, 8)
    x = normal(2, 5, 16)
    y = many(x)
    for group in range(2):
        one.load_state_dict({name: t[group] for name, t in many.state_dict().items()})
        torch.testing.assert_close(one(x[group]), y[group])


def test_a_stack_says_what_it_is():
    text = repr(ResidualMLPStack(16, 8, groups=2, activation="relu", checkpoint="block"))
    for part in ("16", "depth=8", "groups=2", "layers_per_block=4", "relu", "1e-06", "block"):
        assert part in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_stack_of_another_type(dtype: torch.dtype, target: Target):
    stack = disturb(ResidualMLPStack(16, 8))
    x = normal(5, 16)
    expected = stack(x)
    y = stack.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    assert stack(x).dtype == torch.float32


# --- ResidualMLP -------------------------------------------------------------------------------------------------


def test_a_network_starts_as_in_the_paper():
    model = ResidualMLP(25, 64, 8, 100)
    for linear, bound in ((model.input, 1 / 5), (model.head, 1 / 8)):
        assert 0.97 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()
    assert (model.input_norm.weight == 1).all()
    assert not model.input_norm.bias.any()
    assert model.input_norm.eps == 1e-6
    assert list(model.state_dict()) == [
        "input.weight", "input.bias", "input_norm.weight", "input_norm.bias", "stack.weight", "stack.bias",
        "stack.ln_weight", "stack.ln_bias", "head.weight", "head.bias",
    ]  # fmt: skip
    disturb(model).reset_parameters()
    assert 0.97 / 8 < model.stack.weight.abs().max() <= 1 / 8
    assert model.input.weight.abs().max() <= 1 / 5
    assert not model.input.bias.any()
    assert not model.stack.bias.any()


def test_the_defaults_are_the_papers():
    model = ResidualMLP(4)
    assert (model.stack.width, model.stack.depth, model.stack.layers_per_block) == (256, 64, 4)
    assert model.head is None
    assert model.stack.activation == "silu"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_features", [None, 3])
def test_a_network_is_what_it_says(out_features: int | None, activation: str, target: Target):
    options = dict(layers_per_block=2, activation=activation, eps=1e-3, checkpoint="block")
    model = disturb(ResidualMLP(5, 16, 8, out_features, **options))
    for shape in ((7, 5), (2, 3, 5), (5,), (0, 5)):
        x = normal(*shape)
        expected = by_hand(model, x)
        if out_features is not None:
            expected = model.head(expected)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter(target: Target):
    model = disturb(ResidualMLP(5, 16, 8, 3))
    x = normal(7, 5)
    ours = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    theirs = torch.autograd.grad(model.head(by_hand(model, x)).square().sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
        assert a.any()


def offset_stream(model: ResidualMLP) -> ResidualMLP:
    """A stream of hundreds with differences of ones, as a thousand layers make it."""
    with torch.no_grad():
        model.input_norm.bias.fill_(300.0)
        model.head.weight -= model.head.weight.mean(-1, keepdim=True)
        model.head.bias.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_head_of_a_half_network_is_float32(dtype: torch.dtype, target: Target):
    """From a stream that was not rounded: with it rounded to bfloat16 the differences would be lost in steps of 2."""
    model = disturb(ResidualMLP(5, 32, 8, 4))
    model = offset_stream(model).to(dtype)
    x = normal(9, 5).to(dtype)
    y = model(x)
    assert y.dtype == torch.float32
    wide = copy.deepcopy(model).double()
    h = F.silu(model.input_norm(model.input(x)))  # in half, as the model's input layer is
    stream = wide.stack(h.double())
    expected = wide.head(stream)
    error = (y - expected).abs().max().item()
    rounded = wide.head(stream.to(dtype).double())
    assert error < 0.5 * (rounded - expected).abs().max().item()


def test_under_autocast_the_head_is_float32(target: Target):
    model = disturb(ResidualMLP(5, 32, 8, 4))
    x = normal(9, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert ResidualMLP(5, 32, 8)(x).dtype == torch.bfloat16
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model(x), rtol=0.1, atol=0.3)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_state_goes_from_model_to_model(tmp_path, target: Target):
    model = disturb(ResidualMLP(5, 16, 8, 3))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = ResidualMLP(5, 16, 8, 3)
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    x = normal(7, 5)
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(other)(x), model(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ResidualMLP(5, 16, 4, 3).load_state_dict(model.state_dict())


# --- bad arguments -----------------------------------------------------------------------------------------------

BAD_STACKS = [
    ("width", dict(width=0)), ("width", dict(width=4097)), ("width", dict(width=2.0)), ("width", dict(width=True)),
    ("depth", dict(depth=0)), ("depth", dict(depth=6)), ("depth", dict(depth=None)), ("depth", dict(depth=-4)),
    ("layers_per_block", dict(layers_per_block=0)), ("depth", dict(layers_per_block=3)),
    ("layers_per_block", dict(layers_per_block="4")), ("activation", dict(activation="gelu")),
    ("activation", dict(activation=None)), ("eps", dict(eps=-1e-6)), ("eps", dict(eps=float("nan"))),
    ("eps", dict(eps=math.inf)), ("eps", dict(eps=None)), ("checkpoint", dict(checkpoint="layer")),
    ("checkpoint", dict(checkpoint=True)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), BAD_STACKS)
def test_bad_options_are_named(name: str, options: dict):
    with pytest.raises(nsk.UnsupportedInput, match=f"^{name}: got .+; expected .+"):
        ResidualMLPStack(**dict(width=16, depth=8) | options)
    with pytest.raises(nsk.UnsupportedInput, match=f"^{name}: got .+; expected .+"):
        ResidualMLP(5, **dict(width=16, depth=8) | options)


@pytest.mark.parametrize("groups", [0, -1, 1.0, "2", True])
def test_bad_groups_are_named(groups: object):
    with pytest.raises(nsk.UnsupportedInput, match="^groups: got .+; expected .+"):
        ResidualMLPStack(16, 8, groups=groups)


def test_bad_sizes_and_inputs_are_named():
    for bad in (0, -1, None, 2.0):
        with pytest.raises(nsk.UnsupportedInput, match="^in_features: got"):
            ResidualMLP(bad, 16, 8)
    for bad in (0, -1, 2.0):
        with pytest.raises(nsk.UnsupportedInput, match="^out_features: got"):
            ResidualMLP(5, 16, 8, bad)
    model = ResidualMLP(5, 16, 8)
    for shape in ((7, 4), (7, 16), ()):
        with pytest.raises(nsk.UnsupportedInput, match=r"^x: got shape .+; expected \[\.\.\., 5\]"):
            model(torch.ones(shape))
    with pytest.raises(nsk.UnsupportedInput, match="^x: got"):
        ResidualMLPStack(16, 8, groups=2)(torch.ones(3, 5, 16))


# --- converters --------------------------------------------------------------------------------------------------


def layers(count: int = 8, width: int = 16, eps: float = 1e-4) -> tuple[list[nn.Linear], list[nn.LayerNorm]]:
    linears = [disturb(nn.Linear(width, width)) for _ in range(count)]
    norms = [disturb(nn.LayerNorm(width, eps=eps)) for _ in range(count)]
    return linears, norms


def test_a_stack_from_layers_is_the_layers(target: Target):
    linears, norms = layers()
    stack = stack_from_layers(linears, norms, layers_per_block=2, activation="gelu_tanh", checkpoint="block")
    assert (stack.eps, stack.layers_per_block, stack.checkpoint) == (1e-4, 2, "block")
    x = h = normal(7, 16)
    for first in range(0, 8, 2):
        t = h
        for linear, norm in zip(linears[first : first + 2], norms[first : first + 2], strict=True):
            t = FUNCTIONS["gelu_tanh"](norm(linear(t)))
        h = h + t
    torch.testing.assert_close(stack(x), h, rtol=1e-4, atol=1e-4)


def test_layers_and_back():
    linears, norms = layers()
    again_linears, again_norms = layers_from_stack(stack_from_layers(linears, norms))
    for before, after in zip([*linears, *norms], [*again_linears, *again_norms], strict=True):
        assert type(before) is type(after)
        assert torch.equal(before.weight, after.weight)
        assert torch.equal(before.bias, after.bias)
        assert before.weight.data_ptr() != after.weight.data_ptr()
    assert [norm.eps for norm in again_norms] == [1e-4] * 8
    stack = stack_from_layers(again_linears, again_norms)
    assert all(map(torch.equal, stack.parameters(), stack_from_layers(linears, norms).parameters()))


def test_absent_biases_and_scales():
    linears = [nn.Linear(16, 16, bias=False) for _ in range(4)]
    norms = [nn.LayerNorm(16, elementwise_affine=False) for _ in range(4)]
    stack = stack_from_layers(linears, norms)
    assert not stack.bias.any()
    assert not stack.ln_bias.any()
    assert (stack.ln_weight == 1).all()
    norms = [nn.LayerNorm(16, bias=False) for _ in range(4)]
    assert not stack_from_layers(linears, norms).ln_bias.any()


def test_layers_keep_their_type():
    linears, norms = layers(4)
    stack = stack_from_layers([linear.double() for linear in linears], [norm.double() for norm in norms])
    assert {p.dtype for p in stack.parameters()} == {torch.float64}
    assert all(linear.weight.dtype == torch.float64 for linear in layers_from_stack(stack)[0])


def test_bad_layers_are_named():
    linears, norms = layers(4)
    for name, a, b in (
        ("linears", [], []),
        ("linears", [nn.Linear(16, 8), *linears[1:]], norms),
        ("linears", [*linears[1:], nn.Linear(8, 8)], norms),
        ("linears", [nn.Conv1d(1, 1, 1), *linears[1:]], norms),
        ("norms", linears, norms[:3]),
        ("norms", linears, [*norms[:3], nn.LayerNorm(8)]),
        ("norms", linears, [*norms[:3], nn.LayerNorm(16, eps=0.1)]),
        ("norms", linears, [*norms[:3], nn.Identity()]),
        ("depth", linears[:3], norms[:3]),
    ):
        with pytest.raises(nsk.UnsupportedInput, match=f"^{name}: got .+; expected .+"):
            stack_from_layers(a, b)
    with pytest.raises(nsk.UnsupportedInput, match="^stack: got 2 groups; expected"):
        layers_from_stack(ResidualMLPStack(16, 8, groups=2))


def flax_parameters(depth: int = 4, width: int = 16, heads: tuple[int, ...] = (3,)) -> dict:
    sizes = [(5, width), *[(width, width)] * depth, *((width, out) for out in heads)]
    params = {
        f"Dense_{i}": {"kernel": normal(n, m, seed=i).numpy(), "bias": normal(m, seed=i).numpy()}
        for i, (n, m) in enumerate(sizes)
    }
    return params | {
        f"LayerNorm_{i}": {"scale": normal(width, seed=40 + i).numpy(), "bias": normal(width, seed=80 + i).numpy()}
        for i in range(depth + 1)
    }


def test_flax_kernels_are_turned():
    params = flax_parameters(depth=8, heads=(3, 2))
    model = residual_mlp_from_flax(params, layers_per_block=2)
    assert model.stack.depth == 8
    for i in range(8):
        assert torch.equal(model.stack.weight[i], torch.from_numpy(params[f"Dense_{i + 1}"]["kernel"]).T)
        assert torch.equal(model.stack.bias[i], torch.from_numpy(params[f"Dense_{i + 1}"]["bias"]))
        assert torch.equal(model.stack.ln_weight[i], torch.from_numpy(params[f"LayerNorm_{i + 1}"]["scale"]))
        assert torch.equal(model.stack.ln_bias[i], torch.from_numpy(params[f"LayerNorm_{i + 1}"]["bias"]))
    assert torch.equal(model.input.weight, torch.from_numpy(params["Dense_0"]["kernel"]).T)
    assert torch.equal(model.head.weight[3:], torch.from_numpy(params["Dense_10"]["kernel"]).T)
    assert torch.equal(model.head.bias[:3], torch.from_numpy(params["Dense_9"]["bias"]))


def without(params: dict, *names: str) -> dict:
    return {name: layer for name, layer in params.items() if name not in names}


@pytest.mark.parametrize(
    "broken",
    [
        lambda p: None,
        lambda p: {},
        lambda p: [p],
        lambda p: without(p, "Dense_2"),
        lambda p: without(p, "LayerNorm_1"),
        lambda p: p | {"Conv_0": {}},
        lambda p: p | {"Dense_1": {"kernel": p["Dense_1"]["kernel"]}},
        lambda p: p | {"Dense_1": p["Dense_0"]},
        lambda p: p | {"Dense_1": p["Dense_1"] | {"bias": p["Dense_1"]["bias"][:3]}},
        lambda p: p | {"LayerNorm_2": {"scale": p["Dense_5"]["bias"], "bias": p["Dense_5"]["bias"]}},
        lambda p: p | {"Dense_1": {"kernel": p["Dense_1"]["kernel"].astype(int), "bias": p["Dense_1"]["bias"]}},
        lambda p: p | {"Dense_1": {"kernel": p["Dense_1"]["kernel"][None], "bias": p["Dense_1"]["bias"]}},
    ],
)
def test_bad_flax_parameters_are_named(broken):
    with pytest.raises(nsk.UnsupportedInput, match="^params: got .+; expected .+"):
        residual_mlp_from_flax(broken(flax_parameters()))


def test_a_flax_network_of_another_depth_is_refused():
    with pytest.raises(nsk.UnsupportedInput, match="^depth: got 6; expected a multiple of layers_per_block"):
        residual_mlp_from_flax(flax_parameters(depth=6))
