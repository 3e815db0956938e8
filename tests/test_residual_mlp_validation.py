"""What no backend takes is refused by name, before anything is written; what is unusual and legal works."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from harness import Target, poisoned_allocations
from test_validation import each, nested, normal, refusal, spread
from torch import Tensor

import nsk
from nsk.reference.residual_mlp import residual_mlp_reference
from nsk.spec.residual_mlp import ACTIVATIONS, ResidualMlpCall

pytestmark = pytest.mark.usefixtures("one_thread")

G, B, L, W = 2, 5, 4, 8
INF, NAN = math.inf, math.nan


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest):
    with nsk.use_backend(request.param):
        yield request.param


def plain(**replaced) -> dict:
    """The arguments of a good call, but for those that a case replaces."""
    good = dict(x=normal(B, W), weight=normal(L, W, W), bias=normal(L, W), ln_weight=normal(L, W), ln_bias=normal(L, W))
    return good | replaced


def grouped(**replaced) -> dict:
    good = dict(
        x=normal(G, B, W), weight=normal(G, L, W, W), bias=normal(G, L, W), ln_weight=normal(G, L, W),
        ln_bias=normal(G, L, W),
    )  # fmt: skip
    return good | replaced


x, weight, bias, ln_weight, ln_bias = plain().values()
gx, gweight, gbias, *_ = grouped().values()
VECTOR = [
    bias[0], bias[None], bias[:3], bias[:, 1:], bias[:0], bias.T, bias.half(), bias.double(), bias.int(), bias > 0,
    bias.to("meta"), bias.to_sparse(), nested(L, W, W), torch.complex(bias, bias), bias.sum(), bias.numpy(), None, 0.0,
]  # fmt: skip

# For each argument: values that are refused beside the others of a good call.
PLAIN: dict[str, list] = {
    "x": [
        x.sum(), x[:, 1:], x[:, :0], normal(B, 1), normal(W, B), x.half(), x.double(), x.bfloat16(), x.int(), x > 0,
        x.to_sparse(), x.to_mkldnn(), nested(B, W, W), nested(B, W, W, layout=torch.jagged),
        torch.complex(x, x), x.numpy(), None, 1.0, [x],
    ],
    "weight": [
        weight[0], weight[None, None], weight[..., 1:], weight[:, 1:], weight[..., 0], weight.sum(), weight[:0],
        normal(L, W, 1), normal(L, 4097, 1), normal(L, 0, 0), weight.int(), weight > 0, torch.complex(weight, weight),
        weight.to(torch.float8_e4m3fn), weight.to("meta"), weight.to_sparse(), nested(L, W, W), weight.numpy(), None,
    ],
    "bias": VECTOR,
    "ln_weight": VECTOR,
    "ln_bias": VECTOR,
    "eps": [-1e-6, NAN, INF, -INF, None, True, "1e-6", 10**400, torch.tensor(1e-6), 1j],
    "layers_per_block": [0, 3, 5, 8, -1, -4, 2**70, None, True, 2.0, "2", torch.tensor(2)],
    "activation": ["gelu", "SiLU", "swish", "", None, 0, ["silu"], torch.nn.functional.silu],
    "checkpoint": ["blocks", "layer", "", None, True, False, 1, ["block"]],
}  # fmt: skip
GROUPED: dict[str, list] = {
    "x": [gx[0], gx[0, 0], gx[:1], normal(G + 1, B, W), normal(B, G, W), gx[..., 1:], gx.half()],
    "bias": [gbias[0], gbias[:1], gbias[:, :3], gbias[..., 1:], gbias.transpose(0, 1).contiguous(), gbias.half()],
    "ln_weight": [gbias[0], gbias[:, :0]],
    "ln_bias": [gbias[1], normal(G, L, W, 1)],
    "layers_per_block": [3],
}
# Refused for arguments that do not fit each other: the one that the message names, and what is replaced.
half = {name: t.half() for name, t in plain().items()}
TOGETHER: dict[str, tuple[str, dict]] = {
    "integers": ("weight", {name: t.int() for name, t in plain().items()}),
    "too wide": ("weight", dict(x=normal(1, 4097), weight=torch.empty(1, 1, 1).expand(1, 4097, 4097),
                                bias=normal(1, 4097), ln_weight=normal(1, 4097), ln_bias=normal(1, 4097))),
    "no features": ("weight", {name: t[..., :0] for name, t in plain(weight=weight[:, :0]).items()}),
    "no layers": ("weight", {name: t[:0] for name, t in plain(x=x).items() if name != "x"}),
    "another width": ("x", dict(x=normal(B, W + 1))),
    "bfloat16 beside float16": ("bias", half | dict(bias=bias.bfloat16())),
    "float64 beside float16": ("ln_bias", half | dict(ln_bias=ln_bias.double())),
    "x float64 beside float16": ("x", half | dict(x=x.double())),
    "x bfloat16 beside float32": ("x", dict(x=x.bfloat16())),
    "weight float64, float16 x": ("x", plain(x=x.half(), weight=weight.double())),
    "depth not a multiple": ("layers_per_block", dict(weight=normal(6, W, W), bias=normal(6, W),
                                                      ln_weight=normal(6, W), ln_bias=normal(6, W))),
    "x on meta": ("weight", dict(x=x.to("meta"))),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), each(PLAIN))
def test_refused(name: str, value: object, backend: str):
    refusal(name, nsk.residual_mlp, **plain(**{name: value}))
    refusal(name, nsk.explain, "residual_mlp", **plain(**{name: value}))


@pytest.mark.parametrize(("name", "value"), each(GROUPED))
def test_refused_with_groups(name: str, value: object, backend: str):
    refusal(name, nsk.residual_mlp, **grouped(**{name: value}))
    refusal(name, nsk.explain, "residual_mlp", **grouped(**{name: value}))


@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_refused_together(case: str, grad: bool, backend: str):
    name, replaced = TOGETHER[case]
    arguments = plain(**replaced)
    if grad and arguments["ln_weight"].is_floating_point():
        arguments["ln_weight"] = arguments["ln_weight"].detach().requires_grad_()
    refusal(name, nsk.residual_mlp, **arguments)
    refusal(name, nsk.explain, "residual_mlp", **arguments)


def test_the_message_says_what_was_given_and_what_is_taken(backend: str):
    for replaced, message in (
        (dict(x=normal(B, 9)), "x: got 9 columns; expected 8, the width of weight"),
        (
            dict(x=x.half(), weight=weight.bfloat16()),
            "x: got torch.float16; expected torch.bfloat16, as weight is, or torch.float32",
        ),
        (dict(layers_per_block=3), "layers_per_block: got 3; expected a divisor of the depth, 4 layers"),
        (dict(activation="gelu"), "activation: got 'gelu'; expected 'silu', 'relu' or 'gelu_tanh'"),
    ):
        with pytest.raises(nsk.UnsupportedInput, match=f"^{re.escape(message)}$"):
            nsk.residual_mlp(**plain(**replaced))


def test_misspelt_arguments_are_an_ordinary_error():
    with pytest.raises(TypeError):
        nsk.residual_mlp(**plain(), layer_per_block=4)
    with pytest.raises(TypeError):
        nsk.residual_mlp(*plain().values(), 1e-6)
    with pytest.raises(TypeError):
        nsk.explain("residual_mlp", x)


def test_a_refused_call_reads_and_writes_nothing(backend: str):
    """Not even where the refusal comes last."""
    arguments = {name: t.clone().requires_grad_() for name, t in plain().items()}
    before = {name: t.detach().clone() for name, t in arguments.items()}
    refusal("layers_per_block", nsk.residual_mlp, **arguments, layers_per_block=3)
    assert all(torch.equal(t, before[name]) and t.grad is None for name, t in arguments.items())


# --- unusual and legal -------------------------------------------------------------------------------------------

doubles = {name: t.double() for name, t in plain().items()}
LEGAL: dict[str, dict] = {
    "plain": plain(),
    "groups": grouped(),
    "a vector": plain(x=x[0]),
    "a vector in each group": grouped(x=gx[:, 0]),
    "many leading dimensions": plain(x=normal(2, 1, 3, 2, 1, W)),
    "leading dimensions with groups": grouped(x=normal(G, 2, 1, 3, W)),
    "no rows": plain(x=x[:0]),
    "no rows of several dimensions": plain(x=normal(2, 0, 3, W)),
    "no rows with groups": grouped(x=gx[:, :0]),
    "no groups": {name: t[:0] for name, t in grouped().items()},
    "one group": {name: t[:1] for name, t in grouped().items()},
    "one layer": plain(**{name: t[:1] for name, t in plain().items() if name != "x"}, layers_per_block=1),
    "one feature": {name: t[..., :1] for name, t in plain(weight=weight[:, :1]).items()},
    "eps 0": plain(eps=0),
    "eps an integer": plain(eps=1),
    "eps tiny": plain(eps=1e-300),
    "eps enormous": plain(eps=1e30),
    "float32 beside float64": plain(weight=weight.double()),
    "all float64 but x": plain(**doubles | dict(x=x)),
    "float32 beside bfloat16": plain(weight=weight.bfloat16()),
    "float32 beside float16": plain(weight=weight.half()),
    "x in half, parameters mixed": plain(x=x.bfloat16(), weight=weight.bfloat16(), ln_bias=ln_bias.bfloat16()),
    "x transposed": plain(x=normal(W, B).T),
    "x spread": plain(x=spread(x)),
    "x expanded": plain(x=x[:1].expand(B, W)),
    "x of one number": plain(x=torch.tensor(0.3).expand(B, W)),
    "x with overlapping rows": plain(x=normal(99).as_strided((B, W), (3, 1))),
    "x negated": plain(x=torch._neg_view(x)),
    "x shared by groups": grouped(x=x.expand(G, B, W)),
    "weight transposed": plain(weight=weight.mT),
    "weight spread": plain(weight=spread(weight)),
    "weight in an arena": plain(weight=normal(9, W + 1, W + 3)[2:6, 1:, 2:10]),
    "weight repeated": plain(weight=weight[:1].expand(L, W, W)),
    "weight of one number": plain(weight=torch.tensor(0.1).expand(L, W, W)),
    "weight negated": plain(weight=torch._neg_view(weight)),
    "weight shared by groups": grouped(weight=weight.expand(G, L, W, W)),
    "groups inside of layers": grouped(weight=normal(L, G, W, W).transpose(0, 1)),
    "vectors transposed": plain(bias=normal(W, L).T, ln_weight=normal(W, L).T, ln_bias=normal(W, L).T),
    "vectors of one number": plain(bias=torch.tensor(0.0).expand(L, W), ln_weight=torch.tensor(1.0).expand(L, W)),
    "vectors shared by layers": plain(bias=bias[:1].expand(L, W), ln_bias=ln_bias[0].expand(L, W)),
    "one tensor for three": plain(bias=bias, ln_weight=bias, ln_bias=bias),
    "parameters": {name: torch.nn.Parameter(t) for name, t in plain().items()},
    "all options": plain(eps=1e-3, layers_per_block=2, activation="gelu_tanh", checkpoint="block"),
}


def as_call(arguments: dict) -> ResidualMlpCall:
    a = dict(arguments)
    for name in ("x", "weight", "bias", "ln_weight", "ln_bias"):
        a[name] = a[name].detach().clone()
    group = a["weight"].shape[:-3]
    rows = a["x"].shape[len(group) : -1].numel()
    a["x"] = a["x"].reshape(*group, rows, a["x"].shape[-1])
    a["activation"] = ACTIVATIONS.index(a.get("activation", "silu"))
    a.pop("checkpoint", None)
    return ResidualMlpCall(**a)


@pytest.mark.parametrize("case", LEGAL)
def test_legal(case: str, target: Target):
    arguments = LEGAL[case]
    with poisoned_allocations():
        y = nsk.residual_mlp(**arguments)
    expected = residual_mlp_reference(as_call(arguments)).reshape(arguments["x"].shape)
    tolerance = 1e-4 if arguments["weight"].dtype in (torch.float32, torch.float64) else 5e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert (y.shape, y.dtype) == (arguments["x"].shape, arguments["x"].dtype)
    assert y.is_contiguous()


@pytest.mark.parametrize("case", LEGAL)
def test_legal_calls_are_explained(case: str):
    assert "cpu: serves the call" in nsk.explain("residual_mlp", **LEGAL[case])


@pytest.mark.parametrize("case", LEGAL)
def test_legal_calls_have_gradients(case: str, target: Target):
    """Each of its input's shape and type, and finite: nothing of the poison is left."""
    arguments = {name: t.detach().requires_grad_() if isinstance(t, Tensor) else t for name, t in LEGAL[case].items()}
    leaves = [t for t in arguments.values() if isinstance(t, Tensor)]
    with poisoned_allocations():
        grads = torch.autograd.grad(nsk.residual_mlp(**arguments).sum(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        assert grad.isfinite().all()


def test_the_widest(kernels: Target):
    """W = 4096, one layer, one row of zeros beside a row: 64 MiB of weights."""
    weight = torch.zeros(1, 4096, 4096)
    weight[0, :, 0] = torch.arange(4096.0)
    ones, zeros = torch.ones(1, 4096), torch.zeros(1, 4096)
    x = torch.zeros(2, 4096)
    x[1, 0] = 1.0
    y = nsk.residual_mlp(x, weight, zeros, ones, zeros, layers_per_block=1, activation="relu")
    expected = torch.nn.functional.layer_norm(torch.arange(4096.0), (4096,)).relu()
    expected[0] += 1
    torch.testing.assert_close(y, torch.stack((torch.zeros(4096), expected)))


def test_names_are_those_of_the_tests():
    """Every parametrised argument is one of the function's."""
    taken = set(inspect.signature(nsk.residual_mlp).parameters)
    assert set(PLAIN) == taken
    assert set(GROUPED) <= taken
