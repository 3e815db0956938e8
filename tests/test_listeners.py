"""Calls without gradients go past torch's dispatcher, unless somebody listens there; forward mode is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from harness import Target
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import nsk

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.nsk


@functools.cache  # the same tensors every time, which a trace takes for constants
def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attention(change: Callable[[Tensor], Tensor] = lambda t: t, call: Callable = nsk.gated_sdpa) -> Tensor:
    q, k, v, gate = (normal(*shape) for shape in ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), (2, 3, 5, 16)))
    return call(change(q), k, v, gate)


def packed_attention(change: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    q, k, v = (normal(9, 3, 16) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    return nsk.gated_sdpa_varlen(change(q), k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


def network(change: Callable[[Tensor], Tensor] = lambda t: t, call: Callable = nsk.residual_mlp) -> Tensor:
    x, weight, *vectors = (normal(*shape) for shape in ((9, 12), (4, 12, 12), (4, 12), (4, 12), (4, 12)))
    return call(change(x), weight, *vectors)


RUNS = {
    "attention": (attention, OPS.gated_sdpa.default),
    "packed": (packed_attention, OPS.gated_sdpa.default),
    "network": (network, OPS.residual_mlp.default),
}
each = pytest.mark.parametrize(("run", "op"), RUNS.values(), ids=RUNS)


class DispatchListener(TorchDispatchMode):
    """Which ops it heard of."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


class FunctionListener(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    heard: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def test_the_call_gives_what_the_op_gives(target: Target):
    options = (None, None, None, None, -1, -1, False, False, -1, -1, 0.0, None)
    assert torch.equal(attention(), attention(call=lambda *t: OPS.gated_sdpa(*t, *options)[0]))
    assert torch.equal(network(), network(call=lambda *t: OPS.residual_mlp(*t, 1e-6, 4, 0, False, False)[0]))


@each
@pytest.mark.parametrize("listener", [DispatchListener, FunctionListener])
def test_modes_hear_of_it(run: Callable, op, listener: type, target: Target):
    expected = run()
    with listener() as mode:
        assert torch.equal(run(), expected)
    assert op in mode.heard


@each
def test_a_subclass_hears_of_it(run: Callable, op, target: Target):
    Subclass.heard.clear()
    assert torch.equal(run(lambda t: t.as_subclass(Subclass)).as_subclass(Tensor), run())
    assert op in Subclass.heard


@each
def test_a_profiler_hears_of_it(run: Callable, op, target: Target):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert op.name() in [event.key for event in profile.key_averages()]


@each
def test_a_trace_holds_it(run: Callable, op, target: Target):
    """Not the values of the call that was traced."""
    traced = torch.jit.trace(lambda by: run(lambda t: t * by), torch.ones(()), check_trace=False)
    assert torch.equal(traced(torch.tensor(2.0)), run(lambda t: t * 2.0))
    assert not torch.equal(traced(torch.tensor(2.0)), run())


@each
def test_lazily_negated_tensors_are_negated(run: Callable, op, target: Target):
    assert torch.equal(run(lambda t: torch._neg_view(t)), run(lambda t: -t))


@each
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_raises(run: Callable, op, enabled: bool):
    with torch.set_grad_enabled(enabled), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        run(lambda t: forward_ad.make_dual(t, torch.ones_like(t)))
