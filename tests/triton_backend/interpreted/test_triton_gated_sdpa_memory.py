"""What the attention kernels move: within bounds, at any address, once."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
import torch
from attention import SMALL, TRITON, small, tiles
from cases import make_inputs
from harness import as_call, poisoned_allocations
from interpreter import mutated
from triton.runtime.errors import InterpreterError

from nsk.backends.triton import blocks, gated_sdpa_launch
from nsk.spec import gated_sdpa as spec


def call_of(case):
    inputs = make_inputs(case)
    return as_call(case, {name: None if t is None else t.detach() for name, t in inputs.tensors.items()}), inputs


@pytest.mark.parametrize(
    ("function", "old", "new", "width"),
    [
        (blocks.load_tile, "mask=i < left", "mask=i < left + 1", 16),
        (blocks.load_tile, "mask=(i < left) & (d < WIDTH)", "mask=i < left", 12),
        (blocks.load_tile, "mask=(i < left) & (d < WIDTH)", "mask=(i < left + 1) & (d < WIDTH)", 12),
        (blocks.offset_of, "* t.row", "* 1", 12),
    ],
)
def test_the_guard_bites(function, old: str, new: str, width: int):
    """Reading one row or column too many, or the gaps of a strided view, fails."""
    call, _ = call_of(small(sq=17, d=width, dv=width, layouts=("padded",) * 5))
    out, lse = spec.allocate_forward(call)
    with mutated(function, old, new), pytest.raises(InterpreterError, match="OutOfBounds"):
        gated_sdpa_launch.forward(call, out, lse, SMALL)


# Strides that put some rows of a small tensor beyond 2^31 elements, as a product of two 32-bit numbers would not reach.
ROOM = 5 << 30


@pytest.fixture(scope="module")
def far() -> torch.Tensor:
    """Memory of which only what is touched exists."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, 2 * ROOM, flags=flags), dtype=torch.float16)


@pytest.mark.parametrize("dimension", ["batch", "head", "row"])
def test_addresses_beyond_32_bits(dimension: str, far: torch.Tensor):
    case = small(dtype=torch.float16, sq=19, sk=21, batch=2, heads=2, kv_heads=2, mask="float", causal="top_left")
    call, inputs = call_of(case)
    grad_out = inputs.grad_out

    def run(place):
        call.query, call.key, call.value, call.gate, call.attn_mask = (
            place(getattr(dense, name), n) for n, name in enumerate(("query", "key", "value", "gate", "attn_mask"))
        )
        out, lse = spec.allocate_forward(dense)
        out = place(out, 5)
        grads = spec.allocate_gradients(dense, [True] * 5 + [False])
        for n, name in enumerate(("query", "key", "value", "gate", "attn_mask")):
            setattr(grads, name, place(getattr(grads, name), 6 + n))
        gated_sdpa_launch.forward(call, out, lse, SMALL)
        gated_sdpa_launch.backward(call, out, lse, place(grad_out, 11), None, grads, SMALL)
        return [t.clone() for t in (out, lse, *grads.wanted())]

    dense = SimpleNamespace(**{name: getattr(call, name) for name in call.__dataclass_fields__})
    for name in ("varlen", "headwise", "device", "accumulate"):
        setattr(dense, name, getattr(call, name))
    near = run(lambda t, n: t)

    def beyond(t: torch.Tensor, n: int) -> torch.Tensor:
        strides = list(t.contiguous().stride())
        axis = ("batch", "head", "row").index(dimension)
        strides[axis] = (1 << 31) // (t.shape[axis] - 1) + 4096
        return far.as_strided(t.shape, strides, n << 18).copy_(t)

    for a, b in zip(near, run(beyond), strict=True):
        assert torch.equal(a, b)


def test_forward_moves_everything_once(watch):
    """q, gate, out and lse once; keys and values once for every tile of queries and query head."""
    case = small(sq=32, sk=64, d=16, dv=16, batch=2, heads=2, kv_heads=2)
    call, _ = call_of(case)
    out, lse = spec.allocate_forward(call)
    table = SMALL._replace(forward=SMALL.forward._replace(m=32))
    gated_sdpa_launch.forward(call, out, lse, table)
    assert watch.launches == {"gated_sdpa_forward": 1}
    for t in (call.query, call.key, call.value, call.gate):
        assert watch.reads(t) == t.numel()
    assert (watch.writes(out), watch.writes(lse)) == (out.numel(), lse.numel())
    assert sum(watch.read.values()) + sum(watch.written.values()) == sum(
        t.numel() for t in (call.query, call.key, call.value, call.gate, out, lse)
    )


def test_blocks_that_no_query_sees_are_not_read(watch):
    case = small(sq=64, sk=64, d=16, dv=16, heads=1, causal="top_left", gate="none")
    call, _ = call_of(case)
    out, lse = spec.allocate_forward(call)
    gated_sdpa_launch.forward(call, out, lse, SMALL)
    # Tiles of 16 queries see 1, 1, 2 and 2 blocks of 32 keys.
    assert watch.reads(call.key) == watch.reads(call.value) == 6 * 32 * 16


@pytest.mark.parametrize(("gate", "elements"), [("elementwise", 5), ("headwise", 2), ("none", 2)])
def test_what_the_rows_of_the_backward_move(gate: str, elements: int, watch):
    """In units of B Hq Sq Dv: dOut, out and gate read, dO and dGate written; headwise dOut and out. A few numbers a
    query come on top."""
    case = small(sq=32, sk=32, d=16, dv=64, gate=gate)
    call, inputs = call_of(case)
    out, lse = spec.allocate_forward(call)
    gated_sdpa_launch.forward(call, out, lse, SMALL)
    grads = spec.allocate_gradients(call, [False, False, False, True, False, False])
    watch.read.clear(), watch.written.clear(), watch.launches.clear()
    gated_sdpa_launch.backward(call, out, lse, inputs.grad_out, None, grads, SMALL)
    assert watch.launches == {"gated_sdpa_rows": 1}
    moved = sum(watch.read.values()) + sum(watch.written.values())
    assert elements * out.numel() <= moved <= elements * out.numel() + 5 * lse.numel()


def test_launches(watch):
    """One forward; three backward, the mask's gradient apart."""
    for options, backward in (
        (dict(), {"gated_sdpa_rows": 1, "gated_sdpa_dq": 1, "gated_sdpa_dkdv": 1}),
        (dict(sink=True, gate="headwise"), {"gated_sdpa_rows": 1, "gated_sdpa_dq": 1, "gated_sdpa_dkdv": 1}),
    ):
        call, inputs = call_of(small(**options))
        out, lse = spec.allocate_forward(call)
        grads = spec.allocate_gradients(call, [True, True, True, True, False, True])
        watch.launches.clear()
        gated_sdpa_launch.forward(call, out, lse, SMALL)
        gated_sdpa_launch.backward(call, out, lse, inputs.grad_out, None, grads, SMALL)
        assert watch.launches == {"gated_sdpa_forward": 1} | backward


def test_every_output_is_written():
    """Allocations are poisoned with NaN: what a kernel leaves out shows."""
    case = small(mask="float", mask_dims="b1qk", sink=True, causal="bottom_right", sq=40, sk=23)
    call, inputs = call_of(case)
    with poisoned_allocations(), TRITON.active(), tiles(SMALL):
        out, lse = spec.allocate_forward(call)
        grads = spec.allocate_gradients(call, [True] * 6)
        assert all(t.isnan().all() for t in (out, lse, *grads.wanted()))
        gated_sdpa_launch.forward(call, out, lse, SMALL)
        gated_sdpa_launch.backward(call, out, lse, inputs.grad_out, inputs.grad_lse, grads, SMALL)
    assert not any(t.isnan().any() for t in (out, lse, *grads.wanted()))
