"""Anything a caller may pass to ``residual_mlp`` either gives the right numbers or raises ``UnsupportedInput``, and
touches nothing else.

Every tensor lies in memory of its own that ends with its last element (a sanitizer sees the first byte beyond), or
inside a larger buffer whose gaps hold NaN: a stray read shows in the results, a stray write in the buffer.

``NSK_FUZZ_EXAMPLES`` sets how many calls are drawn, ``NSK_FUZZ_SEED=random`` draws others than last time.
"""

from __future__ import annotations

import torch
from harness import Target, plain_copy, poisoned_allocations, threads
from hypothesis import given
from hypothesis import strategies as st
from residual_mlp_cases import (
    ACTIVATIONS,
    DIFFERENTIABLE,
    GRAD_LAYOUTS,
    PARAMETER_LAYOUTS,
    X_LAYOUTS,
    Case,
    make_inputs,
)
from residual_mlp_harness import reference, run
from test_fuzz import FLOATS, FUZZ, TARGETS, WILD_NUMBER, Guarded, agrees, wild_tensors
from torch import Tensor

import nsk

BATCH = st.one_of(st.integers(0, 20), st.integers(0, 70), st.sampled_from([127, 128, 129, 200]))
WIDTH = st.one_of(st.integers(1, 9), st.integers(1, 80), st.sampled_from([96, 127, 128, 130, 256, 257]))
MOST = 4_000_000  # multiply-adds of a forward


@st.composite
def cases(draw) -> Case:
    dtype, groups, width = draw(FLOATS), draw(st.sampled_from([None, None, None, 0, 1, 2, 3])), draw(WIDTH)
    own_or_f32 = st.sampled_from([None, None, torch.float32])
    left = MOST // width**2 // (groups or 1)
    layers_per_block = draw(st.integers(1, min(4, left)))
    blocks = draw(st.integers(1, min(4, left // layers_per_block)))
    batch = min(draw(BATCH), left // layers_per_block // blocks)
    rows = draw(st.sampled_from([(batch,), (batch,), (batch, 1), (1, batch), (2, (batch + 1) // 2), ()]))
    return Case(
        seed=draw(st.integers(0, 2**20)),
        dtype=dtype,
        x_dtype=draw(own_or_f32),
        bias_dtype=draw(own_or_f32),
        ln_weight_dtype=draw(own_or_f32),
        ln_bias_dtype=draw(own_or_f32),
        groups=groups,
        shared_x=groups is not None and draw(st.booleans()),
        rows=rows,
        width=width,
        blocks=blocks,
        layers_per_block=layers_per_block,
        eps=draw(st.sampled_from([1e-6, 1e-6, 1e-5, 0.1, 10.0])),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        checkpoint=draw(st.sampled_from(["none", "block"])),
        layouts=(
            draw(st.sampled_from(X_LAYOUTS)),
            *(draw(st.sampled_from(PARAMETER_LAYOUTS)) for _ in range(4)),
            draw(st.sampled_from(GRAD_LAYOUTS)),
        ),
        needs=tuple(sorted(draw(st.sets(st.sampled_from(DIFFERENTIABLE))), key=DIFFERENTIABLE.index)),
    )


def check(case: Case) -> None:
    """On the backend that is active."""
    inputs = make_inputs(case)
    guards = [Guarded.of(t) for t in (*inputs.tensors.values(), inputs.grad_out)]
    results = run(case, inputs)
    assert all(guard.untouched() for guard in guards)

    with threads(1):
        exact = reference(case, plain_copy(inputs, torch.float64))
    assert results.keys() == exact.keys()
    # A row with hardly any variance, which two or three features often have, is all rounding; relu's slope near 0 too.
    tame = case.width > 8 and (case.activation != "relu" or case.dtype == torch.float64)
    for name, t in results.items():
        like = inputs.tensors["x" if name == "y" else name]
        assert (t.shape, t.dtype) == (like.shape, like.dtype)
        assert t.isfinite().all(), name
        if tame or (name == "y" and case.width > 8):
            coarsest = max(t.dtype, case.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            assert agrees(t, exact[name], coarsest), name


@FUZZ
@given(case=cases(), target=TARGETS, count=st.sampled_from([1, 2, 3]))
def test_valid_calls_are_right_and_touch_nothing_else(case: Case, target: Target, count: int):
    with target.active(), threads(count):
        check(case)


WILD_INTEGER = st.one_of(st.integers(-3, 9), st.sampled_from([2**31, 2**62, 2**63, 2**70, 1.0, 2.5, "x", None, True]))
WILD_TEXT = st.sampled_from(["silu", "relu", "gelu_tanh", "gelu", "none", "block", "", None, 0, 2, True])


@FUZZ
@given(data=st.data(), target=TARGETS)
def test_wild_calls_return_or_raise_unsupported_input(data, target: Target):
    groups = data.draw(st.sampled_from([(), (), (), (0,), (1,), (2,)]))
    depth, width = data.draw(st.sampled_from([0, 1, 2, 3, 4, 4, 8])), data.draw(st.sampled_from([0, 1, 2, 3, 8]))
    rows = data.draw(st.sampled_from([(), (0,), (1,), (2,), (3, 2), (2, 0)]))

    def tensor(*fitting: int) -> Tensor:
        if data.draw(st.integers(0, 7)):
            return torch.ones(fitting)
        return data.draw(wild_tensors(len(fitting)))

    tensors = [
        tensor(*groups, *rows, width),
        tensor(*groups, depth, width, width),
        *(tensor(*groups, depth, width) for _ in range(3)),
    ]
    if data.draw(st.integers(0, 20)) == 0:
        tensors[data.draw(st.integers(0, 4))] = data.draw(st.sampled_from([None, 1.0, [1.0], "x"]))
    options = {}
    for name, values in dict(
        eps=WILD_NUMBER, layers_per_block=WILD_INTEGER, activation=WILD_TEXT, checkpoint=WILD_TEXT
    ).items():
        if data.draw(st.integers(0, 3)) == 0:
            options[name] = data.draw(values)
    with target.active():
        try:
            y = nsk.residual_mlp(*tensors, **options)
        except (nsk.UnsupportedInput, nsk.BackendUnavailable):
            return
    # What is accepted obeys the contract.
    x, weight, *vectors = tensors
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert weight.ndim in (3, 4)
    assert weight.shape[-1] == weight.shape[-2] == x.shape[-1] > 0
    assert all(t.shape == weight.shape[:-1] for t in vectors)
    assert all(t.dtype in (weight.dtype, torch.float32) for t in (x, *vectors))
    assert weight.ndim == 3 or x.shape[0] == weight.shape[0]
    assert weight.shape[-3] > 0
    assert weight.shape[-3] % options.get("layers_per_block", 4) == 0
    assert options.get("activation", "silu") in ACTIVATIONS
    assert options.get("checkpoint", "none") in ("none", "block")
    assert 0 <= options.get("eps", 1e-6) < float("inf")


@FUZZ
@given(data=st.data(), target=TARGETS)
def test_wild_backward_calls_return_or_raise_unsupported_input(data, target: Target):
    """The op itself: what is said to have been kept is checked before anything is read."""
    rows, width, depth = (data.draw(st.integers(1, 20)) for _ in range(3))
    shapes = ((rows, width), (depth, width, width), *((depth, width),) * 3)
    tensors = [torch.ones(shape) for shape in shapes]
    keep = data.draw(st.tuples(st.booleans(), st.booleans()))
    with target.active(), poisoned_allocations():
        y, *kept, served = torch.ops.nsk.residual_mlp(*tensors, 1e-2, 1, 0, *keep)
        arguments = [torch.ones_like(y), *tensors, *kept]
        for _ in range(data.draw(st.integers(0, 2))):
            i = data.draw(st.integers(0, len(arguments) - 1))
            others = [*arguments, *(t.double() for t in arguments), *(t[1:] for t in arguments if t.ndim)]
            arguments[i] = data.draw(st.one_of(st.sampled_from(others), wild_tensors(arguments[i].ndim)))
        options = (1e-2, data.draw(st.sampled_from([1, 1, 1, 2, 0])), data.draw(st.sampled_from([0, 0, 1, 2, 3])))
        needs = data.draw(st.lists(st.booleans(), min_size=5, max_size=5))
        try:
            grads = torch.ops.nsk.residual_mlp_backward(*arguments, served, *options, needs)
        except nsk.UnsupportedInput:
            return
    wanted = [t for t, need in zip(arguments[1:6], needs, strict=True) if need]
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in wanted]
