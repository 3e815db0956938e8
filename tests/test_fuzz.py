"""Anything a caller may pass either gives the right numbers or raises ``UnsupportedInput``, and touches nothing else.

Every tensor lies in memory of its own that ends with its last element (a sanitizer sees the first byte beyond), or
inside a larger buffer whose gaps hold NaN: a stray read shows in the results, a stray write in the buffer.

``NSK_FUZZ_EXAMPLES`` sets how many calls are drawn, ``NSK_FUZZ_SEED=random`` draws others than last time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from cases import Case, lay_out, make_inputs
from harness import CPU, Target, dense_reference, plain_copy, poisoned_allocations, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import nsk

FUZZ = settings(
    max_examples=int(os.environ.get("NSK_FUZZ_EXAMPLES", "200")),
    derandomize=os.environ.get("NSK_FUZZ_SEED") != "random",
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TARGETS = st.sampled_from([*CPU, Target("eager")])
SIZE = st.one_of(st.integers(0, 9), st.integers(0, 70), st.sampled_from([127, 128, 129, 200, 257]))
WIDTH = st.one_of(st.integers(1, 9), st.integers(1, 80), st.sampled_from([127, 128, 256, 511, 512]))
BOUND = st.one_of(st.none(), st.integers(0, 70), st.sampled_from([0, 2**31, 2**62]))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
LAYOUTS = st.sampled_from(["dense", "transposed", "chunk", "padded", "stepped", "expanded"])
LOOSE = {torch.float32: 2e-3, torch.bfloat16: 0.12, torch.float16: 2e-2, torch.float64: 1e-9}


@dataclass
class Guarded:
    """A tensor and the whole memory in which it lies, as it was before the call."""

    tensor: Tensor
    before: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Guarded:
        return cls(tensor, cls._bytes(tensor).clone())

    @staticmethod
    def _bytes(tensor: Tensor) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())

    def untouched(self) -> bool:
        return torch.equal(self._bytes(self.tensor), self.before)


@st.composite
def cases(draw) -> Case:
    kv_heads = draw(st.integers(1, 3))
    dtype = draw(FLOATS)
    own_or_f32 = st.sampled_from([None, torch.float32]) if dtype != torch.float64 else st.none()
    sizes = dict(sq=draw(SIZE), sk=draw(SIZE), d=draw(WIDTH), dv=draw(WIDTH))
    return Case(
        seed=draw(st.integers(0, 2**20)),
        dtype=dtype,
        batch=draw(st.integers(0, 3)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        **sizes,
        gate=draw(st.sampled_from(["elementwise", "headwise", "none"])),
        gate_dtype=draw(own_or_f32),
        mask=draw(st.sampled_from(["none", "bool", "float"])),
        mask_dims=draw(st.sampled_from(["bhqk", "b1qk", "1hqk", "qk", "b11k", "bhq1", "k", "1", "1111"])),
        mask_dtype=draw(own_or_f32),
        mask_layout=draw(st.sampled_from(["dense", "expanded", "strided"])),
        dead_rows=draw(st.booleans()),
        causal=draw(st.sampled_from(["", "top_left", "bottom_right"])),
        bottom_right=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.tuples(BOUND, BOUND))),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.5, 30.0])),
        sink=draw(st.booleans()),
        sink_dtype=draw(own_or_f32),
        scale=draw(st.sampled_from([None, None, 0.0, -0.5, 1.0, 1e-30, 1e30])),
        layouts=tuple(draw(LAYOUTS) for _ in range(5)),
        needs=tuple(draw(st.sets(st.sampled_from(["query", "key", "value", "gate", "attn_mask", "sink"])))),
        grad_lse=draw(st.booleans()),
    )


def agrees(result: Tensor, oracle: Tensor, dtype: torch.dtype) -> bool:
    """Finite where the oracle is, and near it. Exact proof is elsewhere; this finds garbage."""
    finite = oracle.isfinite()
    if not result.double()[finite].isfinite().all():
        return False
    size = oracle[finite].abs().max().item() if finite.any() else 0.0
    error = (result.double() - oracle)[finite].abs().max().item() if finite.any() else 0.0
    return error <= LOOSE[dtype] * (1 + size)


def check(case: Case) -> None:
    """On the backend that is active."""
    inputs = make_inputs(case)
    everything = [*inputs.tensors.values(), inputs.grad_out, inputs.grad_lse]
    guards = [Guarded.of(t) for t in everything if t is not None]
    t = inputs.tensors
    results = run(case, inputs)
    assert all(guard.untouched() for guard in guards)

    exact = dense_reference(case)(plain_copy(inputs, torch.float64))
    assert torch.equal(results["lse"] == -torch.inf, exact["lse"] == -torch.inf)
    if abs(case.scale or 0) <= 1:  # an enormous scale makes one rounding of a score decide which key wins
        for name in results:
            assert results[name].shape == (t[name] if name in t else exact[name]).shape
            assert agrees(results[name], exact[name], case.dtype), name


@FUZZ
@given(case=cases(), target=TARGETS)
def test_valid_calls_are_right_and_touch_nothing_else(case: Case, target: Target):
    with target.active():
        check(case)


@st.composite
def wild_tensors(draw, rank: int | None = None) -> Tensor:
    """Any small tensor: often of a shape that fits, sometimes of none."""
    rank = draw(st.integers(0, 5)) if rank is None or draw(st.integers(0, 9)) == 0 else rank
    shape = [draw(st.sampled_from([0, 1, 1, 2, 2, 2, 3, 4, 8])) for _ in range(rank)]
    dtype = draw(st.sampled_from([*[torch.float32] * 12, torch.bfloat16, torch.float64, torch.bool, torch.int64]))
    if draw(st.integers(0, 30)) == 0:
        dtype = draw(st.sampled_from([torch.complex64, torch.int8, torch.uint8]))
    tensor = torch.ones(shape, dtype=dtype)
    if rank and draw(st.integers(0, 5)) == 0:
        tensor = draw(
            st.sampled_from([tensor.transpose(0, -1), tensor.expand(shape), tensor[..., ::2], tensor[..., :1]])
        )
    if rank == 4 and draw(st.integers(0, 5)) == 0 and tensor.dtype.is_floating_point:
        tensor = lay_out(tensor, draw(LAYOUTS))
    if draw(st.integers(0, 40)) == 0:
        tensor = tensor.to("meta")
    return tensor


WILD_NUMBER = st.sampled_from([0.0, 1.0, -1.0, 2, 1e30, float("nan"), float("inf"), -float("inf"), "a", None])
WILD_BOUND = st.one_of(st.none(), st.integers(-3, 5), st.sampled_from([2**40, 2**63, 1.5, "x"]))


@FUZZ
@given(data=st.data(), target=TARGETS)
def test_wild_calls_return_or_raise_unsupported_input(data, target: Target):
    shape = [data.draw(st.sampled_from([0, 1, 2, 3])) for _ in range(4)]
    shape[3] = max(shape[3], 1)

    def tensor(fitting: tuple[int, ...] | list[int]) -> Tensor:
        if data.draw(st.integers(0, 5)):
            return torch.ones(list(fitting))
        return data.draw(wild_tensors(len(fitting)))

    options = {}
    for name, values in dict(
        attn_mask=st.one_of(st.none(), wild_tensors(4), wild_tensors(2)),
        is_causal=st.sampled_from([True, False, None, 1]),
        causal_alignment=st.sampled_from(["top_left", "bottom_right", "bottom_right", "middle", None, 1]),
        window=st.one_of(st.none(), st.tuples(WILD_BOUND, WILD_BOUND), st.just(3), st.just((1,)), st.just("ab")),
        softcap=WILD_NUMBER,
        scale=WILD_NUMBER,
        sink=st.one_of(st.none(), wild_tensors(1), st.just(1.0)),
        return_lse=st.booleans(),
    ).items():
        if data.draw(st.integers(0, 3)) == 0:
            options[name] = data.draw(values)
    q, k, v = (tensor(shape) for _ in range(3))
    gate = data.draw(st.one_of(st.none(), st.just(shape), st.just(shape[:3])))
    gate = None if gate is None else tensor(gate)
    if data.draw(st.integers(0, 20)) == 0:
        q = data.draw(st.sampled_from([None, 1.0, [1.0], "q"]))
    with target.active():
        try:
            results = nsk.gated_sdpa(q, k, v, gate, **options)
        except (nsk.UnsupportedInput, nsk.BackendUnavailable):
            return
    out, *_ = results if isinstance(results, tuple) else (results,)
    # What is accepted obeys the contract.
    assert q.ndim == k.ndim == v.ndim == 4
    assert q.dtype == k.dtype == v.dtype
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.dtype == q.dtype
    assert q.shape[1] % max(k.shape[1], 1) == 0
    assert k.shape[:3] == v.shape[:3]
    assert q.shape[3] == k.shape[3]


@FUZZ
@given(data=st.data(), target=TARGETS)
def test_wild_offsets_return_or_raise_unsupported_input(data, target: Target):
    """Packed calls: offsets of any values never lead outside the tensors."""
    total_q, total_k = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    number = data.draw(st.integers(0, 5))

    def offsets(total: int) -> Tensor:
        kind = data.draw(st.sampled_from(["valid", "valid", "any", "huge"]))
        if kind == "valid" and number:
            inner = sorted(data.draw(st.lists(st.integers(0, total), min_size=number - 1, max_size=number - 1)))
            values = [0, *inner, total]
        else:
            reach = st.integers(-5, 45) if kind != "huge" else st.integers(-(2**31), 2**31 - 1)
            values = data.draw(st.lists(reach, min_size=0, max_size=6))
        return torch.tensor(values, dtype=torch.int32)

    d, dv = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    q, k, v, gate = (
        torch.randn(s).requires_grad_() for s in ((total_q, 4, d), (total_k, 2, d), (total_k, 2, dv), (total_q, 4, dv))
    )
    cu_q, cu_k = offsets(total_q), offsets(total_k)
    hints = [data.draw(st.one_of(st.none(), st.integers(0, 100), st.just(2**31 - 1))) for _ in range(2)]
    valid = all(
        c.numel() > 1 and c[0] == 0 and c[-1] == total and bool((c.diff() >= 0).all())
        for c, total in ((cu_q, total_q), (cu_k, total_k))
    ) and cu_q.numel() == cu_k.numel()  # fmt: skip
    with target.active(), poisoned_allocations():
        try:
            out = nsk.gated_sdpa_varlen(
                q, k, v, gate, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
                max_seqlen_q=hints[0], max_seqlen_k=hints[1], is_causal=data.draw(st.booleans()),
            )  # fmt: skip
        except nsk.UnsupportedInput:
            # No sequences at all ([0]) are the one other valid call.
            assert not valid
            return
        out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, gate))
    empty = total_q == total_k == 0 and cu_q.tolist() == cu_k.tolist() == [0]
    assert valid or empty
