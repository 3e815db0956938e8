"""Which gradients are computed, what forward keeps for them, how much memory that is, and who computes them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import Inputs
from harness import Target
from residual_mlp_cases import DIFFERENTIABLE, Case, make_inputs
from residual_mlp_harness import call, differentiate, run, same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nsk
from nsk.backends import get as backend_module

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.nsk
CASE = Case(seed=7, rows=(21,), width=20, blocks=3)
SUBSETS = [subset for n in range(1, 5) for subset in itertools.combinations(DIFFERENTIABLE, n)]
CHECKPOINTS = pytest.mark.parametrize("checkpoint", ["none", "block"])


class Calls(TorchDispatchMode):
    """Records what the two ops were told and what they returned."""

    def __init__(self):
        super().__init__()
        self.forward: list[tuple] = []
        self.backward: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is OPS.residual_mlp.default:
            self.forward.append((args[-2:], result))
        if func is OPS.residual_mlp_backward.default:
            self.backward.append((args[-1], result))
        return result


@CHECKPOINTS
@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
def test_only_what_was_asked_for_is_computed_and_has_the_same_bits(needs, checkpoint: str, target: Target):
    everything = replace(CASE, checkpoint=checkpoint)
    case = replace(everything, needs=needs)
    with Calls() as calls:
        some = run(case, make_inputs(case))
    ((flags, returned),) = calls.backward
    assert list(flags) == [name in needs for name in DIFFERENTIABLE]
    assert [grad.shape for grad in returned] == [some[name].shape for name in DIFFERENTIABLE if name in needs]
    if target.backend == "eager" and needs != ("x",):
        return  # torch's products may choose another order
    all_of_them = run(everything, make_inputs(everything))
    for name in some:
        assert torch.equal(some[name], all_of_them[name]), name


def test_nothing_is_kept_without_a_gradient(target: Target):
    without = replace(CASE, needs=())
    for case, grad in ((without, True), (CASE, False)):
        with Calls() as calls, torch.set_grad_enabled(grad):
            y = call(case, make_inputs(case).tensors)
        ((flags, (_, *kept, _)),) = calls.forward
        assert flags == (False, False)
        assert [t.shape for t in kept] == [(0,)] * 3
        assert not y.requires_grad


# Numbers: 32 rows (two strips of 16) of W = 20 for each of 3 blocks or 6 layers.
STREAM, NORMALISED, RSTD = 3 * 32 * 20, 6 * 32 * 20, 6 * 32


@pytest.mark.parametrize(
    ("checkpoint", "needs", "kept"),
    [
        ("none", DIFFERENTIABLE, (STREAM, NORMALISED, RSTD)),
        ("none", ("ln_bias",), (STREAM, NORMALISED, RSTD)),
        ("none", ("x",), (0, NORMALISED, RSTD)),  # as an actor's loss through a critic
        ("block", DIFFERENTIABLE, (STREAM, 0, 0)),
        ("block", ("x",), (STREAM, 0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept(checkpoint: str, needs: tuple, kept: tuple, dtype: torch.dtype, target: Target):
    case = replace(CASE, checkpoint=checkpoint, needs=needs, dtype=dtype)
    t = make_inputs(case).tensors
    saved: list[Tensor] = []
    with Calls() as calls, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call(case, t)
    ((_, (_, *given, served)),) = calls.forward
    assert tuple(x.numel() for x in given) == kept
    assert [x.dtype for x in given] == [torch.float32, dtype, torch.float32]
    # The inputs, what was kept, and a number that names the backend.
    assert sorted(x.numel() for x in saved) == sorted([*(x.numel() for x in t.values()), *kept, served.numel()])
    pointers = {x.data_ptr() for x in t.values()}
    assert pointers <= {x.data_ptr() for x in saved}


def test_a_checkpoint_keeps_a_twelfth(target: Target):
    """Four layers a block: one float32 row where autograd of plain torch keeps twelve."""
    case = replace(CASE, blocks=2, layers_per_block=4, rows=(64,), checkpoint="block")
    inputs = make_inputs(case)
    size = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal size
        if t.data_ptr() not in {x.data_ptr() for x in inputs.tensors.values()}:
            size += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(case, inputs.tensors)
    assert size <= case.blocks * 64 * case.width * 4 + 64


def test_saved_tensors_may_be_packed_elsewhere(target: Target):
    """Offloading hooks give backward other tensors of the same values."""
    for checkpoint in ("none", "block"):
        case = replace(CASE, checkpoint=checkpoint)
        expected = run(case, make_inputs(case))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
            moved = run(case, make_inputs(case))
        assert same(expected, moved)


def test_y_is_dense_and_gradients_are_their_inputs(target: Target):
    layouts = ("columns", "transposed", "padded", "stepped", "expanded", "columns")
    for rows in ((), (3,), (2, 5), (2, 0, 3)):
        for groups in (None, 2):
            case = replace(CASE, rows=rows, groups=groups, layouts=layouts)
            inputs = make_inputs(case)
            y = call(case, inputs.tensors)
            assert y.is_contiguous()
            assert (y.shape, y.dtype) == (inputs.tensors["x"].shape, torch.float32)
            y.backward(inputs.grad_out)
            for t in inputs.tensors.values():
                assert (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype)


@CHECKPOINTS
def test_no_rows_give_gradients_of_zero(checkpoint: str, target: Target):
    case = replace(CASE, rows=(0,), checkpoint=checkpoint)
    results = run(case, make_inputs(case))
    assert results["y"].shape == results["x"].shape == (0, 20)
    assert all(not t.any() and t.isfinite().all() for t in results.values())


def test_one_x_for_all_groups(target: Target):
    """Stride 0 over the groups, with the sum of the groups' gradients."""
    case = replace(CASE, groups=3)
    inputs = make_inputs(case)
    shared = inputs.tensors["x"].detach()[0].requires_grad_()
    tensors = inputs.tensors | dict(x=shared.expand(3, *shared.shape))
    (together,) = torch.autograd.grad(call(case, tensors), shared, inputs.grad_out)
    copies = shared.detach().repeat(3, 1, 1).requires_grad_()
    (apart,) = torch.autograd.grad(call(case, inputs.tensors | dict(x=copies)), copies, inputs.grad_out)
    assert torch.equal(together, apart.sum(0))


def test_incoming_gradient_of_stride_zero(target: Target):
    leaves = list(make_inputs(CASE).tensors.values())

    def gradients(reduce):
        return torch.autograd.grad(reduce(nsk.residual_mlp(*leaves, **CASE.options)), leaves)

    expanded = gradients(lambda y: y.sum())
    dense = gradients(lambda y: (y * torch.ones_like(y)).sum())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_gradients_accumulate_over_calls(target: Target):
    """Two calls with the same weights in one graph, and a gradient that is added to what is there."""
    inputs = make_inputs(CASE)
    t = inputs.tensors
    once = differentiate(call(CASE, t), inputs)
    (call(CASE, t) * inputs.grad_out + call(CASE, t) * inputs.grad_out).sum().backward()
    (call(CASE, t) * inputs.grad_out).sum().backward()
    for name in DIFFERENTIABLE:
        torch.testing.assert_close(t[name].grad, 3 * once[name], rtol=1e-5, atol=1e-5)


def test_backward_twice_through_one_graph(target: Target):
    inputs = make_inputs(CASE)
    y = call(CASE, inputs.tensors)
    leaves = list(inputs.tensors.values())
    first = torch.autograd.grad(y, leaves, inputs.grad_out, retain_graph=True)
    second = torch.autograd.grad(y, leaves, inputs.grad_out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@CHECKPOINTS
@pytest.mark.parametrize(("first", "then"), [("cpu", "eager"), ("eager", "cpu"), ("eager", "auto")])
def test_backward_runs_where_forward_ran(first: str, then: str, checkpoint: str, monkeypatch: pytest.MonkeyPatch):
    ran = []
    for name in ("cpu", "eager"):
        module = backend_module(name)
        for phase in ("forward", "backward"):
            function = getattr(module, f"residual_mlp_{phase}")
            monkeypatch.setattr(
                module, f"residual_mlp_{phase}",
                lambda *args, f=function, said=f"{name} {phase}": ran.append(said) or f(*args),
            )  # fmt: skip
    case = replace(CASE, checkpoint=checkpoint)
    inputs: Inputs = make_inputs(case)
    with nsk.use_backend(first):
        y = call(case, inputs.tensors)
    with nsk.use_backend(then):
        results = differentiate(y, inputs)
    assert ran == [f"{first} forward", f"{first} backward"]
    with nsk.use_backend(first):
        assert same(results, run(case, make_inputs(case)))
