"""What torch is told about the ops: schemas, fakes, autograd, compilation, export, torch.func, autocast, modes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from harness import Target
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nsk
import nsk.nn  # registers the cached op

OPS = torch.ops.nsk
NEEDS = ("111111", "100000", "011000", "000111", "000000")  # query, key, value, gate, attn_mask, sink


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 101 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def rows(sq: int = 9, sk: int = 11, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and gate."""
    shapes = ((2, 4, sq, 8), (2, 2, sk, 8), (2, 2, sk, 6), (2, 4, sq, 6))
    return [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def call(name: str) -> list:
    """What ``torch.ops.nsk.gated_sdpa`` takes."""
    q, k, v, gate = rows(dtype=torch.bfloat16 if name == "headwise" else torch.float32)
    mask = sink = cu_q = cu_k = None
    options: tuple = (-1, -1, False, False, -1, -1, 0.0, None)
    if name == "plain":
        gate = None
    elif name == "headwise":
        gate, options = gate[..., 0].float(), (-1, -1, True, False, -1, -1, 0.0, None)
    elif name == "everything":
        mask, sink = normal(1, 4, 9, 11), normal(4)
        mask[mask > 1] = -torch.inf
        options = (-1, -1, True, True, 4, 2, 3.0, -0.3)
    elif name == "strided":
        q, k, v, gate = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, gate))
        mask = normal(9, 11) < 0.7
    elif name == "packed":
        q, k, v, gate = (t[0].transpose(0, 1) for t in (q, k, v, gate))
        sink, cu_q, cu_k = normal(4), *(torch.tensor(c, dtype=torch.int32) for c in ([0, 3, 3, 9], [0, 4, 6, 11]))
        options = (6, 5, True, False, 2, -1, 0.0, None)
    return [q, k, v, gate, mask, sink, cu_q, cu_k, *options]


CALLS = ("plain", "headwise", "everything", "strided", "packed")


def backpropagate(function: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The function's result and the gradients of the sum of its squares."""
    inputs = leaves(tensors)
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out.double().square().sum(), inputs))


def same(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.library -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck_forward(name: str, grad: bool):
    args = call(name)
    for t in args[:6] if grad else ():
        if t is not None and t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(OPS.gated_sdpa.default, tuple(args))


@pytest.mark.parametrize("name", ["plain", "headwise", "everything"])
def test_opcheck_cached(name: str):
    query, key, value, gate, mask, sink, *_, causal, bottom_right, left, right, softcap, scale = call(name)
    caches = [torch.zeros(2, 2, 20, size, dtype=key.dtype) for size in (8, 6)]
    mask = None if mask is None else normal(1, 4, 9, 3 + 11)
    args = (query, *caches, key, value, 3, gate, mask, sink, causal, bottom_right, left, right, softcap, scale)
    torch.library.opcheck(OPS.gated_sdpa_cached.default, args)


@pytest.mark.parametrize(
    ("name", "needs"),
    [(name, NEEDS[0]) for name in CALLS] + [("everything", needs) for needs in NEEDS[1:]],
)
def test_opcheck_backward(name: str, needs: str):
    args = call(name)
    out, lse, ran = OPS.gated_sdpa(*args)
    wanted = [flag == "1" for flag in needs]
    wanted[4] &= args[4] is not None and args[4].is_floating_point()
    grad_lse = None if name == "plain" else torch.ones_like(lse)
    arguments = (torch.ones_like(out), grad_lse, out, lse, ran, *args, wanted)
    torch.library.opcheck(OPS.gated_sdpa_backward.default, arguments)
    grads = OPS.gated_sdpa_backward(*arguments)
    asked = [t for t, want in zip(args[:6], wanted, strict=True) if want and t is not None]
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in asked]


def test_a_direct_call_is_differentiable(target: Target):
    """With the gradients of the public function."""
    expected, got = (
        backpropagate(f, rows()) for f in (nsk.gated_sdpa, lambda *t: OPS.gated_sdpa(*t, *call("plain")[4:])[0])
    )
    assert same(expected, got)


BAD_DIRECT = {
    "key": lambda a: (a[0], a[1][..., :4].contiguous(), *a[2:]),
    "value": lambda a: (*a[:2], a[2].double(), *a[3:]),
    "gate": lambda a: (*a[:3], a[0][..., :2].contiguous(), *a[4:]),
    "attn_mask": lambda a: (*a[:4], torch.ones(5, 5), *a[5:]),
    "sink": lambda a: (*a[:5], torch.ones(5), *a[6:]),
    "cu_seqlens_k": lambda a: (*a[:6], torch.zeros(1, dtype=torch.int32), *a[7:]),
    "window": lambda a: (*a[:12], -2, *a[13:]),
    "softcap": lambda a: (*a[:14], -1.0, a[15]),
    "scale": lambda a: (*a[:15], float("nan")),
}


@pytest.mark.parametrize("name", BAD_DIRECT)
def test_a_direct_call_is_checked(name: str, target: Target):
    args = BAD_DIRECT[name](call("plain"))
    with pytest.raises(nsk.UnsupportedInput, match=rf"^{name}: got .+; expected "):
        OPS.gated_sdpa(*args)
    out, lse, ran = OPS.gated_sdpa(*call("plain"))
    with pytest.raises(nsk.UnsupportedInput, match=rf"^{name}: got .+; expected "):
        OPS.gated_sdpa_backward(out, None, out, lse, ran, *args, [True] * 3 + [False] * 3)


BAD_BACKWARD = {
    "grad_out": lambda a: (a[0][:, :2], *a[1:]),
    "grad_lse": lambda a: (a[0], a[3].double(), *a[2:]),
    "out": lambda a: (*a[:2], a[2][..., :3], *a[3:]),
    "lse": lambda a: (*a[:3], a[3][:1], *a[4:]),
    "served": lambda a: (*a[:4], torch.tensor(99, dtype=torch.int8), *a[5:]),
    "needs": lambda a: (*a[:-1], [True] * 3),
}


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_a_direct_backward_is_checked(name: str, target: Target):
    args = call("plain")
    out, lse, ran = OPS.gated_sdpa(*args)
    arguments = BAD_BACKWARD[name]((torch.ones_like(out), None, out, lse, ran, *args, [True] * 3 + [False] * 3))
    with pytest.raises(nsk.UnsupportedInput, match=rf"^{name}: got .+; expected "):
        OPS.gated_sdpa_backward(*arguments)


# --- torch.compile and torch.export ------------------------------------------------------------------------------


def gated_sine(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return nsk.gated_sdpa(q.cos(), k, v, gate, is_causal=True, causal_alignment="bottom_right", window=(5, None)).sin()


def test_compiled_once_for_all_lengths(target: Target):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gated_sine, fullgraph=True, dynamic=True, backend=counter)
    for sq, sk in ((9, 11), (20, 11), (33, 40), (5, 64), (12, 12), (7, 3)):
        expected, got = (backpropagate(f, rows(sq, sk)) for f in (gated_sine, compiled))
        assert same(expected, got), (sq, sk)
    assert counter.frame_count <= 2


def test_compiled_packed():
    """New offsets and totals take the same graph."""
    counter = CompileCounterWithBackend("aot_eager")

    def packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int) -> Tensor:
        out, lse = nsk.gated_sdpa_varlen(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest, is_causal=True, return_lse=True
        )
        return out * lse.exp()[..., None]

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((3, 0, 9, 2, 1, 5), (5, 7, 2, 4), (20, 30)):
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        q, k, v, _ = (t[0].transpose(0, 1) for t in rows(sum(lengths), sum(lengths)))
        rest = (offsets, offsets, max(lengths))
        assert torch.equal(compiled(q, k, v, *rest), packed(q, k, v, *rest))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("backend", ["inductor"] if shutil.which("g++") else ["aot_eager"])
def test_compiled_to_code(backend: str):
    compiled = torch.compile(gated_sine, fullgraph=True, dynamic=True, backend=backend)
    for sq in (9, 20):
        expected, got = (backpropagate(f, rows(sq)) for f in (gated_sine, compiled))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5)


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return nsk.gated_sdpa(q, k, v, gate, is_causal=True)


def test_exported_with_dynamic_lengths(target: Target):
    sq, sk = torch.export.Dim("sq", min=2, max=4096), torch.export.Dim("sk", min=2, max=4096)
    shapes = ({2: sq}, {2: sk}, {2: sk}, {2: sq})
    program = torch.export.export(Attend(), tuple(rows()), dynamic_shapes=shapes)
    assert [n.target for n in program.graph.nodes if "nsk" in str(n.target)] == [OPS.gated_sdpa.default]
    for lengths in ((9, 11), (2, 3), (50, 40)):
        assert torch.equal(program.module()(*rows(*lengths)), Attend()(*rows(*lengths)))


# --- second derivatives ------------------------------------------------------------------------------------------


def test_double_backward_raises(target: Target):
    inputs = leaves([*rows(), normal(9, 11), normal(4)])
    out = nsk.gated_sdpa(*inputs[:4], attn_mask=inputs[4], sink=inputs[5])
    grads = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    for grad, other in zip(grads, (*inputs[1:], inputs[0]), strict=True):
        with pytest.raises(RuntimeError, match=r"second derivative.*plain torch"):
            torch.autograd.grad(grad.sum(), other, retain_graph=True)


def test_create_graph_alone_does_not_raise(target: Target):
    q, k, v, gate = leaves(rows())
    plain = torch.autograd.grad(nsk.gated_sdpa(q, k, v, gate).sum(), (q, k, v, gate))
    graph = torch.autograd.grad(nsk.gated_sdpa(q, k, v, gate).sum(), (q, k, v, gate), create_graph=True)
    assert same(plain, graph)


def test_grad_of_grad_raises():
    q, k, v, gate = rows()
    once = torch.func.grad(lambda q: nsk.gated_sdpa(q, k, v, gate).square().sum())
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.func.grad(lambda q: once(q).square().sum())(q)


# --- torch.func --------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None = None) -> Tensor:
    out, lse = nsk.gated_sdpa(
        q, k, v, gate, attn_mask=mask, is_causal=True, causal_alignment="bottom_right", softcap=5.0, return_lse=True
    )
    return out + lse.masked_fill(lse == -torch.inf, 0)[..., None]


def loss(*tensors: Tensor) -> Tensor:
    return attend(*tensors).square().sum()


SHAPES = {
    "none": None,
    "full": (2, 4, 9, 11),
    "head": (1, 4, 9, 11),
    "batch": (2, 1, 1, 11),
    "2d": (9, 11),
    "1d": (11,),
}
VMAPS = [  # the mask's shape; in_dims of query, key, value, gate, mask
    ("none", (0, 0, 0, 0, None)), ("none", (0, None, None, None, None)), ("none", (None, 0, 0, None, None)),
    ("none", (None, None, None, 0, None)), ("none", (1, 2, 3, 4, None)), ("none", (-1, 4, -1, 4, None)),
    *((mask, dims) for mask in SHAPES if mask != "none"
      for dims in ((0, 0, 0, 0, None), (None, None, None, None, 0), (2, None, None, None, -1))),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "in_dims"), VMAPS)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_vmap_is_a_loop(grad: bool, mask: str, in_dims: tuple[int | None, ...], target: Target):
    inputs, function = [], attend
    if grad:
        function = torch.func.grad(loss, argnums=tuple(range(4 if mask == "none" else 5)))
    for i, (shape, dim) in enumerate(zip([*(t.shape for t in rows()), SHAPES[mask]], in_dims, strict=True)):
        t = None if shape is None else normal(*(() if dim is None else (3,)), *shape, seed=i, dtype=torch.float64)
        inputs.append(t if dim is None else t.movedim(0, dim))
    got = torch.func.vmap(function, in_dims)(*inputs)
    each = [
        function(*(t if d is None else t.select(d, n).contiguous() for t, d in zip(inputs, in_dims, strict=True)))
        for n in range(3)
    ]
    expected = tuple(map(torch.stack, zip(*each, strict=True))) if grad else torch.stack(each)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_func_grad_and_jacrev(target: Target):
    inputs = [t.double() for t in rows()]
    assert same(backpropagate(attend, inputs)[1:], torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs))
    first, *others = (t[:1, :, :2] for t in inputs)
    got = torch.func.jacrev(lambda q: attend(q, *others))(first)  # a batch of incoming gradients
    expected = torch.autograd.functional.jacobian(lambda q: attend(q, *others), first)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_nested_vmap_of_headwise_calls_with_a_sink(target: Target):
    _, k, v, gate = (t.double() for t in rows())
    many, sink, mask = normal(2, 3, 2, 4, 9, 8, dtype=torch.float64), normal(4), normal(9, 11) < 0.5
    function = lambda q: nsk.gated_sdpa(q, k, v, gate[..., 0], sink=sink.double(), attn_mask=mask)  # noqa: E731
    got = torch.func.vmap(torch.func.vmap(function))(many)
    torch.testing.assert_close(got.flatten(0, 1), torch.stack([function(q) for q in many.flatten(0, 1)]))


def test_vmap_over_nothing(target: Target):
    q, k, v, gate = rows()
    assert torch.func.vmap(lambda q: nsk.gated_sdpa(q, k, v, gate))(q.new_empty(0, *q.shape)).shape == (0, *gate.shape)


def test_vmap_names_the_alternative(target: Target):
    """On packed sequences, and on a sink that is mapped or asks for a gradient."""
    q, k, v, gate, _, sink, cu_q, cu_k, *_ = call("packed")
    with pytest.raises(nsk.UnsupportedInput, match="pack the mapped sequences"):
        torch.func.vmap(lambda q: nsk.gated_sdpa_varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k))(q[None])
    q, k, v, gate = rows()
    with pytest.raises(nsk.UnsupportedInput, match="sink.*into the heads"):
        torch.func.vmap(lambda sink: nsk.gated_sdpa(q, k, v, gate, sink=sink))(normal(3, 4))
    gradient = torch.func.grad(lambda sink, q: nsk.gated_sdpa(q, k, v, gate, sink=sink).sum())
    with pytest.raises(nsk.UnsupportedInput, match="sink.*into the heads"):
        torch.func.vmap(gradient, in_dims=(None, 0))(sink, q[None])


# --- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_casts_rows_and_gate(to: torch.dtype, target: Target):
    """As if the caller had cast them; the mask and the sink stay float32."""
    tensors, mask, sink = rows(), normal(9, 11), normal(4)
    options = dict(attn_mask=mask, sink=sink)

    def cast(*t: Tensor) -> Tensor:
        return nsk.gated_sdpa(*(x.to(to) for x in t), **options)

    def under_autocast(*t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=to):
            return nsk.gated_sdpa(*t, **options)

    expected, got = (backpropagate(f, tensors) for f in (cast, under_autocast))
    assert got[0].dtype == to
    assert {g.dtype for g in got[1:]} == {torch.float32}
    assert same(expected, got)


def test_autocast_leaves_float64(target: Target):
    tensors = [t.double() for t in rows()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = nsk.gated_sdpa(*tensors, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    assert torch.equal(out, nsk.gated_sdpa(*tensors))


# --- modes and tensors of other kinds ----------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """Sees every op and changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [lambda: FlopCounterMode(display=False), Watching], ids=["flops", "watching"])
def test_gradients_under_a_dispatch_mode(mode: Callable, target: Target):
    tensors = [*rows(), normal(9, 11), normal(4)]

    def function(*t: Tensor) -> Tensor:
        out, lse = nsk.gated_sdpa(*t[:4], attn_mask=t[4], sink=t[5], is_causal=True, return_lse=True)
        return out + lse[..., None]

    expected = backpropagate(function, tensors)
    with mode():
        got = backpropagate(function, tensors)
    assert same(expected, got)


def test_lazily_negated_tensors(target: Target):
    """The imaginary part of a conjugate is negated when it is read; so is the gradient that comes through it."""

    def function(q: Tensor, *rest: Tensor) -> Tensor:
        out = nsk.gated_sdpa(torch.complex(torch.zeros_like(q), q).conj().imag, *rest)
        return torch.complex(torch.zeros_like(out), out).conj().imag

    expected = backpropagate(lambda q, *rest: -nsk.gated_sdpa(-q, *rest), rows())
    assert same(expected, backpropagate(function, rows()))
