"""What torch is told about the ops: schemas, fakes, autograd, compilation, export, torch.func, autocast, modes."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from harness import Target
from residual_mlp_cases import DIFFERENTIABLE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nsk

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.nsk
L, W = 4, 12
NEEDS = ("11111", "10000", "01000", "00111", "00000")  # x, weight, bias, ln_weight, ln_bias
KEEPS = {"none": (True, True), "block": (True, False), "x": (False, True)}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 101 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def network(rows: int = 9, groups: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x and the parameters."""
    shapes = ((rows, W), (L, W, W), (L, W), (L, W), (L, W))
    return [normal(*groups, *shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def call(name: str) -> list:
    """What ``torch.ops.nsk.residual_mlp`` takes, without what is to be kept."""
    if name == "groups":
        return [*network(9, (2,)), 1e-6, 4, 0]
    if name == "half":
        x, weight, *vectors = network(dtype=torch.bfloat16)
        return [x.float(), weight, *(t.float() for t in vectors), 1e-5, 1, 2]
    if name == "strided":
        x, weight, *vectors = network()
        return [x.T.contiguous().T, weight.mT, *(t.T.contiguous().T for t in vectors), 1e-6, 2, 1]
    if name == "no rows":
        return [*network(0), 1e-6, 2, 0]
    return [*network(20), 1e-6, 2, 0]


CALLS = ("plain", "groups", "half", "strided", "no rows")


def backpropagate(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The function's result and the gradients of the sum of its squares."""
    inputs = leaves(tensors)
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out.double().square().sum(), inputs))


def stack(*tensors: Tensor) -> Tensor:
    return nsk.residual_mlp(*tensors, layers_per_block=2, eps=1e-2)


def same(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.library -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [(False, False), *KEEPS.values()], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_forward(name: str, keep: tuple[bool, bool]):
    torch.library.opcheck(OPS.residual_mlp.default, (*call(name), *keep))


@pytest.mark.parametrize("keep", ["none", "block"])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_forward_with_gradients(name: str, keep: str):
    args = call(name)
    args[:5] = [t.requires_grad_() for t in args[:5]]
    torch.library.opcheck(OPS.residual_mlp.default, (*args, *KEEPS[keep]))


@pytest.mark.parametrize(
    ("name", "keep", "needs"),
    [
        *itertools.product(CALLS, ("none", "block"), NEEDS[:1]),
        *(("plain", "none", needs) for needs in NEEDS[1:]),
        ("plain", "x", "10000"),
    ],
)
def test_opcheck_backward(name: str, keep: str, needs: str):
    args = call(name)
    y, *kept = OPS.residual_mlp(*args, *KEEPS[keep])
    wanted = [flag == "1" for flag in needs]
    arguments = (torch.ones_like(y), *args[:5], *kept, *args[5:], wanted)
    # What is kept belongs to the backend: strips of other numbers than those of the forward mean nothing to it.
    torch.library.opcheck(OPS.residual_mlp_backward.default, arguments)
    grads = OPS.residual_mlp_backward(*arguments)
    asked = [t for t, want in zip(args[:5], wanted, strict=True) if want]
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in asked]


@pytest.mark.parametrize("keep", ["none", "block"])
def test_a_direct_call_is_differentiable(keep: str, target: Target):
    """With the gradients of the public function."""
    expected, got = (
        backpropagate(f, network())
        for f in (
            lambda *t: nsk.residual_mlp(*t, layers_per_block=2, checkpoint=keep),
            lambda *t: OPS.residual_mlp(*t, 1e-6, 2, 0, *KEEPS[keep])[0],
        )
    )
    assert same(expected, got)


def test_a_direct_call_that_keeps_nothing_has_no_gradient(target: Target):
    tensors = leaves(network())
    y = OPS.residual_mlp(*tensors, 1e-6, 2, 0, False, False)[0]
    with pytest.raises(nsk.UnsupportedInput, match=r"^stream: got nothing kept; expected "):
        torch.autograd.grad(y.sum(), tensors)
    y = OPS.residual_mlp(*tensors, 1e-6, 2, 0, False, True)[0]
    with pytest.raises(nsk.UnsupportedInput, match=r"^stream: got nothing kept; expected "):
        torch.autograd.grad(y.sum(), tensors)


def replaced(index: int, value) -> Callable[[list], list]:
    return lambda a: [*a[:index], value(a[index]) if callable(value) else value, *a[index + 1 :]]


BAD_DIRECT = {
    "x": (replaced(0, lambda t: t[..., :5]), replaced(0, lambda t: t[None]), replaced(0, lambda t: t.double())),
    "weight": (replaced(1, lambda t: t[:, 1:]), replaced(1, lambda t: t.int()), replaced(1, lambda t: t[0])),
    "bias": (replaced(2, lambda t: t[1:]), replaced(2, lambda t: t.half())),
    "ln_weight": (replaced(3, lambda t: t[..., 1:]),),
    "ln_bias": (replaced(4, lambda t: t[0]),),
    "eps": (replaced(5, -1.0), replaced(5, float("nan")), replaced(5, float("inf"))),
    "layers_per_block": (replaced(6, 0), replaced(6, 3), replaced(6, -2), replaced(6, 2**62)),
    "activation": (replaced(7, 3), replaced(7, -1)),
}


@pytest.mark.parametrize("name", BAD_DIRECT)
def test_a_direct_call_is_checked(name: str, target: Target):
    y, *kept = OPS.residual_mlp(*call("plain"), True, True)
    for bad in BAD_DIRECT[name]:
        args = bad(call("plain"))
        with pytest.raises(nsk.UnsupportedInput, match=rf"^{name}: got .+; expected "):
            OPS.residual_mlp(*args, True, True)
        with pytest.raises(nsk.UnsupportedInput, match=rf"^{name}: got .+; expected "):
            OPS.residual_mlp_backward(y, *args[:5], *kept, *args[5:], [True] * 5)


BAD_BACKWARD = {
    "grad_y": (replaced(0, lambda t: t[:2]), replaced(0, lambda t: t.double()), replaced(0, lambda t: t[None])),
    "stream": (
        replaced(6, lambda t: t[:, :1]), replaced(6, lambda t: t.double()), replaced(6, lambda t: t[..., :15]),
        replaced(6, lambda t: t[0]), replaced(6, torch.empty(0)),
    ),
    "normalised": (replaced(7, lambda t: t[:, 1:]), replaced(7, lambda t: t.half()), replaced(7, lambda t: t[..., 0])),
    "rstd": (replaced(8, lambda t: t[..., :20]), replaced(8, lambda t: t.double()), replaced(8, torch.empty(0))),
    "served": (replaced(9, torch.tensor(99, dtype=torch.int8)), replaced(9, torch.tensor(-1, dtype=torch.int8))),
    "needs": (replaced(13, [True] * 4), replaced(13, []), replaced(13, [True] * 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_a_direct_backward_is_checked(name: str, target: Target):
    args = call("plain")
    y, *kept = OPS.residual_mlp(*args, True, True)
    arguments = [torch.ones_like(y), *args[:5], *kept, *args[5:], [True] * 5]
    for bad in BAD_BACKWARD[name]:
        with pytest.raises(nsk.UnsupportedInput, match=rf"^{name}: got .+; expected "):
            OPS.residual_mlp_backward(*bad(arguments))


def test_what_was_kept_may_lie_anywhere(target: Target):
    """Strips that are not dense are made so."""
    args = call("plain")
    y, *kept = OPS.residual_mlp(*args, True, True)
    rest = [*args[5:], [True] * 5]
    expected = OPS.residual_mlp_backward(y, *args[:5], *kept, *rest)
    spread = [t if t.ndim < 2 else t.mT.contiguous().mT for t in kept]
    assert same(expected, OPS.residual_mlp_backward(y, *args[:5], *spread, *rest))


# --- torch.compile and torch.export ------------------------------------------------------------------------------


def curled(*tensors: Tensor) -> Tensor:
    x, *parameters = tensors
    return nsk.residual_mlp(x.cos(), *parameters, layers_per_block=2).sin()


def curled_again(*tensors: Tensor) -> Tensor:
    x, *parameters = tensors
    return nsk.residual_mlp(x.cos(), *parameters, layers_per_block=2, checkpoint="block").sin()


@pytest.mark.parametrize("function", [curled, curled_again])
def test_compiled_once_for_all_batches(function, target: Target):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (9, 20, 33, 5, 16, 100, 17):
        expected, got = (backpropagate(f, network(rows)) for f in (function, compiled))
        assert same(expected, got), rows
    assert counter.frame_count <= 2


def test_compiled_without_gradients(target: Target):
    compiled = torch.compile(curled, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (9, 20, 3):
            assert torch.equal(compiled(*network(rows)), curled(*network(rows)))


def test_compiled_with_groups_and_leading_dimensions():
    def function(*tensors: Tensor) -> Tensor:
        return nsk.residual_mlp(*tensors, layers_per_block=2, activation="relu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _, *parameters = network(1, (3,))
    for shape in ((3, 2, 5, W), (3, W)):
        tensors = [normal(*shape), *parameters]
        assert same(backpropagate(function, tensors), backpropagate(compiled, tensors))


@pytest.mark.parametrize("backend", ["inductor"] if shutil.which("g++") else ["aot_eager"])
def test_compiled_to_code(backend: str):
    compiled = torch.compile(curled, fullgraph=True, dynamic=True, backend=backend)
    for rows in (9, 20):
        expected, got = (backpropagate(f, network(rows)) for f in (curled, compiled))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_compiled_training_step_of_a_module(target: Target):
    torch.manual_seed(0)
    module = nsk.nn.ResidualMLP(5, 16, 8, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = normal(7, 5)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    got = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_exported_with_dynamic_batch(target: Target):
    module = nsk.nn.ResidualMLPStack(W, L, layers_per_block=2)
    x, *parameters = network()
    with torch.no_grad():
        for own, value in zip(module.parameters(), parameters, strict=True):
            own.copy_(value)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
    assert [n.target for n in program.graph.nodes if "nsk" in str(n.target)] == [OPS.residual_mlp.default]
    for count in (9, 2, 70):
        torch.testing.assert_close(program.module()(normal(count, W)), module(normal(count, W)), rtol=1e-5, atol=1e-5)


# --- second derivatives ------------------------------------------------------------------------------------------


def test_double_backward_raises(target: Target):
    inputs = leaves(network())
    grads = torch.autograd.grad(nsk.residual_mlp(*inputs).square().sum(), inputs, create_graph=True)
    for grad, other in zip(grads, (*inputs[1:], inputs[0]), strict=True):
        with pytest.raises(RuntimeError, match=r"residual_mlp.*second derivative.*plain torch"):
            torch.autograd.grad(grad.sum(), other, retain_graph=True)


def test_create_graph_alone_does_not_raise(target: Target):
    inputs = leaves(network())
    plain, graph = (
        torch.autograd.grad(nsk.residual_mlp(*inputs).sum(), inputs, create_graph=create) for create in (False, True)
    )
    assert same(plain, graph)


def test_grad_of_grad_raises():
    x, *parameters = network()
    once = torch.func.grad(lambda x: nsk.residual_mlp(x, *parameters).square().sum())
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda x: once(x).square().sum())(x)


def test_forward_mode_raises():
    x, *parameters = network()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)).requires_grad_()
        with pytest.raises(RuntimeError):
            nsk.residual_mlp(dual, *parameters)


# --- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_and_weight(to: torch.dtype, target: Target):
    """As if the caller had cast them; biases and LayerNorm's parameters stay float32."""
    tensors = network()

    def cast(x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
        return nsk.residual_mlp(x.to(to), weight.to(to), *vectors)

    def under_autocast(*t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=to):
            return nsk.residual_mlp(*t)

    expected, got = (backpropagate(f, tensors) for f in (cast, under_autocast))
    assert got[0].dtype == to
    assert {g.dtype for g in got[1:]} == {torch.float32}
    assert same(expected, got)


def test_autocast_leaves_float64(target: Target):
    tensors = network(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nsk.residual_mlp(*tensors)
    assert y.dtype == torch.float64
    assert torch.equal(y, nsk.residual_mlp(*tensors))


# --- modes and tensors of other kinds ----------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """Sees every op and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [lambda: FlopCounterMode(display=False), Watching], ids=["flops", "watching"])
def test_gradients_under_a_dispatch_mode(mode: Callable, target: Target):
    expected = backpropagate(stack, network())
    with mode():
        got = backpropagate(stack, network())
    assert same(expected, got)


def test_lazily_negated_tensors(target: Target):
    """The imaginary part of a conjugate is negated when it is read; so is the gradient that comes through it."""

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        y = stack(torch.complex(torch.zeros_like(x), x).conj().imag, *rest)
        return torch.complex(torch.zeros_like(y), y).conj().imag

    expected = backpropagate(lambda x, *rest: -stack(-x, *rest), network())
    assert same(expected, backpropagate(function, network()))


def test_inference_mode(target: Target):
    with torch.inference_mode():
        y = stack(*network())
    assert y.is_inference()
    assert torch.equal(y.clone(), stack(*network()))


def test_fake_tensors_agree_with_real_ones():
    with torch._subclasses.FakeTensorMode() as mode:
        for name in CALLS:
            args = call(name)
            fake = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in args]
            for keep in KEEPS.values():
                for a, b in zip(OPS.residual_mlp(*args, *keep), OPS.residual_mlp(*fake, *keep), strict=True):
                    assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_arguments_are_named_like_the_reference():
    schema = str(OPS.residual_mlp.default._schema)
    assert [name for name in DIFFERENTIABLE if f"Tensor {name}" not in schema] == []
