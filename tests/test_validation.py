"""What no backend takes is refused by name, before anything is written; what is unusual and legal works."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable

import pytest
import torch
from harness import Target, poisoned_allocations
from torch import Tensor

import nsk
from nsk.nn import KVCache
from nsk.reference.gated_sdpa import gated_sdpa_reference
from nsk.spec.gated_sdpa import GatedSdpaCall

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 7, 8, 6
INF, NAN = math.inf, math.nan


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest):
    with nsk.use_backend(request.param):
        yield request.param


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def dense(**replaced) -> dict:
    """The arguments of a good call, but for those that a case replaces."""
    good = dict(
        query=normal(B, HQ, SQ, D), key=normal(B, HKV, SK, D), value=normal(B, HKV, SK, DV), gate=normal(B, HQ, SQ, DV)
    )
    return good | replaced


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def packed(**replaced) -> dict:
    good = dict(
        query=normal(9, HQ, D), key=normal(11, HKV, D), value=normal(11, HKV, DV), gate=normal(9, HQ, DV),
        cu_seqlens_q=offsets(0, 3, 9), cu_seqlens_k=offsets(0, 4, 11),
    )  # fmt: skip
    return good | replaced


def nested(*shape: int, layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([normal(*shape[1:]) for _ in range(shape[0])], layout=layout)


def spread(t: Tensor) -> Tensor:
    """The same values with a stride of 2 in the last dimension."""
    return t.new_zeros(*t.shape, 2)[..., 0].copy_(t)


q, k, v, gate = dense().values()
q16, k16, v16 = (t.bfloat16() for t in (q, k, v))

k3, v3 = normal(B, 3, SK, D), normal(B, 3, SK, DV)
cu_q, cu_k = offsets(0, 3, 9), offsets(0, 4, 11)

# For each argument: values that are refused beside the others of a good call.
DENSE: dict[str, list] = {
    "query": [
        q[0], q[None], q.sum(), torch.complex(q, q), q.to(torch.float8_e4m3fn), spread(q), q.to_sparse(), q.to_mkldnn(),
        nested(B, HQ, SQ, D), nested(B, HQ, SQ, D, layout=torch.jagged), q.int(), [[1.0]], None,
    ],
    "key": [
        k[0], k[..., 1:], k[:1], k.double(), k.to("meta"), spread(k), k.to_sparse(), nested(B, HKV, SK, D),
        k.transpose(2, 3).contiguous().transpose(2, 3), k.numpy(),
    ],
    "value": [
        v[0], v[:1], v[:, :1], v[:, :, 1:], v[..., :0], normal(B, HKV, SK, 513), v16, v.to("meta"), spread(v),
        v[..., :1].expand(-1, -1, -1, DV), v.to_sparse(), nested(B, HKV, SK, DV), 1.0,
    ],
    "gate": [
        gate[0, 0], gate[None], normal(B, HQ, SQ, D), gate[..., :1], gate[:, :HKV], gate[:1], normal(B, HQ, SK, DV),
        normal(B, HQ, SK), normal(B, SQ, HQ), gate.double(), gate.half(), gate > 0, gate.int(), gate.to("meta"),
        spread(gate), gate[..., :1].expand(-1, -1, -1, DV), gate.to_sparse(), nested(B, HQ, SQ, DV), True,
    ],
    "attn_mask": [
        normal(SK, SQ), normal(B, HKV, SQ, SK), normal(B, SQ, SK), normal(SK - 1), normal(SQ, 0), normal(SQ, SK).half(),
        normal(1, B, HQ, SQ, SK), normal(1, 1, 1, 1, 1), torch.ones(SQ, SK).long(), torch.ones(SQ, SK).byte(),
        normal(SQ, SK).double(), normal(SQ, SK).to("meta"), normal(SQ, SK).to_sparse(), "causal",
    ],
    "sink": [
        normal(HKV), torch.tensor(1.0), normal(1), normal(1, HQ), normal(HQ).double(), normal(HQ).int(),
        normal(HQ).to("meta"), normal(HQ).to_sparse(), 0.0,
    ],
    "is_causal": [1, None, "yes", torch.tensor(True)],
    "causal_alignment": ["left_top", "TOP_LEFT", None, ["top_left"]],
    "window": [
        (-1, 0), (None, -3), (1.0, 0), (INF, INF), (True, False), (1, 2, 3), (1,), (), 4, "12", torch.tensor([1, 2]),
        (torch.tensor(1), torch.tensor(2)),
    ],
    "softcap": [-1.0, NAN, INF, -INF, None, True, "20", 10**400],
    "scale": [NAN, INF, -INF, "0.5", True, 1j, torch.tensor(0.5), -(10**400)],
}  # fmt: skip
PACKED: dict[str, list] = {
    "query": [q, q[0, 0], spread(normal(9, HQ, D)), nested(9, HQ, D), normal(9, HQ, 513), normal(9, HQ, D).int()],
    "key": [k, normal(11, HKV, D + 1), normal(11, HKV, D).double()],
    "value": [v, normal(12, HKV, DV), normal(11, 1, DV)],
    "gate": [normal(HQ, 9, DV), normal(9, HQ, DV + 1), normal(10, HQ)],
    "sink": [normal(HKV)],
    "cu_seqlens_q": [
        None, [0, 3, 9], cu_q.long(), cu_q.sum().int(), cu_q[None], cu_q[:0], cu_q.to("meta"), cu_q.to_sparse(),
    ],
    "cu_seqlens_k": [None, (0, 4, 11), cu_k.long(), cu_k.float(), cu_k[:, None], offsets(0, 11), cu_k.to("meta")],
    "max_seqlen_q": [-1, 6.0, "6"],
    "max_seqlen_k": [-1, True, torch.tensor(7)],
    "window": [(-2, 0)],
    "softcap": [NAN],
    "scale": [INF],
    "is_causal": [0],
}  # fmt: skip
# Refused for two arguments that do not fit each other: the one that the message names, and what is replaced.
TOGETHER: dict[str, tuple[str, dict]] = {
    "another batch": ("key", dict(key=k[:1], value=v[:1])),
    "heads that do not divide": ("key", dict(key=k3, value=v3)),
    "more KV heads than heads": ("key", dict(key=normal(B, 8, SK, D), value=normal(B, 8, SK, DV))),
    "no KV heads": ("key", dict(key=k[:, :0], value=v[:, :0])),
    "no heads": ("key", dict(query=q[:, :0], gate=gate[:, :0])),
    "no heads at all": ("key", dict(query=q[:, :0], key=k[:, :0], value=v[:, :0], gate=gate[:, :0])),
    "head_dim 0": ("query", dict(query=q[..., :0], key=k[..., :0])),
    "head_dim 513": ("query", dict(query=normal(B, HQ, SQ, 513), key=normal(B, HKV, SK, 513))),
    "integers": ("query", dict(query=q.int(), key=k.int(), value=v.int())),
    "query bfloat16": ("key", dict(query=q16)),
    "query on meta": ("key", dict(query=q.to("meta"))),
    "float16 gate beside bfloat16": ("gate", dict(query=q16, key=k16, value=v16, gate=gate.half())),
}
# Refused where the values are read: inside the op, not by explain().
OFFSETS: list[tuple[str, Tensor, Tensor]] = [
    ("cu_seqlens_q", offsets(0, 5, 3, 9), offsets(0, 4, 5, 11)),
    ("cu_seqlens_k", offsets(0, 3, 5, 9), offsets(0, 8, 5, 11)),
    *(("cu_seqlens_q", offsets(*wrong), cu_k) for wrong in ((1, 3, 9), (-1, 3, 9), (0, 3, 8), (0, 3, 10), (0, 99, 9))),
    *(("cu_seqlens_k", cu_q, offsets(*wrong)) for wrong in ((1, 4, 11), (-1, 4, 11), (0, 4, 10), (0, 4, 12))),
    ("cu_seqlens_q", offsets(0), offsets(0)),
    ("cu_seqlens_q", offsets(*[7] * 40), offsets(*[0] * 40)),
]


def label(x: object) -> str:
    if not isinstance(x, Tensor):
        return repr(x)[:24]
    kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.") if x.layout != torch.strided else ""
    shape = "" if x.is_nested else "x".join(map(str, x.shape))
    return " ".join(filter(None, (str(x.dtype).removeprefix("torch."), shape, kind, x.device.type[:4])))


def each(table: dict[str, list]) -> list:
    return [pytest.param(name, x, id=f"{name} {label(x)}") for name, values in table.items() for x in values]


def refusal(name: str, function: Callable, *args, **arguments) -> None:
    with pytest.raises(nsk.UnsupportedInput) as caught:
        function(*args, **arguments)
    assert re.match(rf"{name}: got .+; expected .+", str(caught.value), re.DOTALL), str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("name", "value"), each(DENSE))
def test_refused(name: str, value: object, backend: str):
    refusal(name, nsk.gated_sdpa, **dense(**{name: value}))
    refusal(name, nsk.explain, "gated_sdpa", **dense(**{name: value}))


@pytest.mark.parametrize(("name", "value"), each(PACKED))
def test_refused_packed(name: str, value: object, backend: str):
    refusal(name, nsk.gated_sdpa_varlen, **packed(**{name: value}))
    refusal(name, nsk.explain, "gated_sdpa_varlen", **packed(**{name: value}))


@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_refused_together(case: str, grad: bool, backend: str):
    name, replaced = TOGETHER[case]
    arguments = dense(**replaced)
    if grad and arguments["gate"].is_floating_point():
        arguments["gate"] = arguments["gate"].detach().requires_grad_()
    refusal(name, nsk.gated_sdpa, **arguments)
    refusal(name, nsk.explain, "gated_sdpa", **arguments)


@pytest.mark.parametrize(("name", "cu_seqlens_q", "cu_seqlens_k"), OFFSETS)
def test_refused_offsets(name: str, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, backend: str):
    refusal(name, nsk.gated_sdpa_varlen, **packed(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k))


def test_a_mask_for_packed_sequences(backend: str):
    """There is no such argument, and the op refuses it."""
    with pytest.raises(TypeError, match="attn_mask"):
        nsk.gated_sdpa_varlen(**packed(), attn_mask=normal(9, 11))
    a = packed()
    tensors = (a["query"], a["key"], a["value"], None, normal(9, 11), None, cu_q, cu_k)
    refusal("attn_mask", torch.ops.nsk.gated_sdpa, *tensors, -1, -1, False, False, -1, -1, 0.0, None)


def test_the_message_says_what_was_given_and_what_is_taken(backend: str):
    for replaced, message in (
        (dict(key=normal(B, HKV, SK, 9)), "key: got shape [2, 2, 7, 9]; expected 8 columns, as query has"),
        (dict(value=v16), "value: got torch.bfloat16; expected torch.float32, as query is"),
        (dict(sink=normal(2)), "sink: got shape [2]; expected [Hq] = [4], one logit per query head"),
    ):
        with pytest.raises(nsk.UnsupportedInput, match=f"^{re.escape(message)}$"):
            nsk.gated_sdpa(**dense(**replaced))


def test_misspelt_arguments_are_an_ordinary_error():
    with pytest.raises(TypeError):
        nsk.gated_sdpa(q, k, v, causal=True)
    with pytest.raises(TypeError):
        nsk.explain("gated_sdpa", q, k)
    refusal("op", nsk.explain, "gated_spda", q, k, v)


# --- a refused call writes nothing -------------------------------------------------------------------------------


def test_bad_offsets_in_backward_write_nothing(backend: str):
    """Offsets may change between the two; the gradients' memory is then refused, not overrun."""
    *tensors, cu, cu_keys = packed().values()
    tensors = (*tensors, None, None, cu, cu_keys)
    options = (-1, -1, False, False, -1, -1, 0.0, None)
    out, lse, ran = torch.ops.nsk.gated_sdpa(*tensors, *options)
    cu[1] = 10_000
    refusal(
        "cu_seqlens_q", torch.ops.nsk.gated_sdpa_backward, out, None, out, lse, ran, *tensors, *options,
        [True] * 4 + [False] * 2,
    )  # fmt: skip


BAD_APPENDS = {
    "another head_dim": dict(key=normal(B, HKV, 3, D + 1)),
    "another type": dict(key=normal(B, HKV, 3, D).double()),
    "values of another batch": dict(value=normal(1, HKV, 3, D)),
    "too many": dict(key=normal(B, HKV, 30, D), value=normal(B, HKV, 30, D)),
    "a mask of another length": dict(attn_mask=normal(3, 3)),
    "a gate of another width": dict(gate=normal(B, HQ, 3, D + 1)),
    "a bad option": dict(scale=NAN),
    "a query of another type": dict(query=normal(B, HQ, 3, D).double()),
}


@pytest.mark.parametrize("case", BAD_APPENDS)
def test_a_refused_append_writes_nothing(case: str, backend: str):
    cache = KVCache(B, 8, HKV, D, dtype=torch.float32, device="cpu")
    good = dict(query=normal(B, HQ, 3, D), key=normal(B, HKV, 3, D), value=normal(B, HKV, 3, D))
    cache.attend(**good)
    keys, values = cache.key.clone(), cache.value.clone()
    with pytest.raises(nsk.UnsupportedInput):
        cache.attend(**good | BAD_APPENDS[case])
    assert cache.length == 3
    assert torch.equal(cache.key, keys)
    assert torch.equal(cache.value, values)


@pytest.mark.parametrize("name", ["query", "key", "value", "gate", "attn_mask", "sink"])
def test_appending_under_grad_is_refused(name: str, backend: str):
    cache = KVCache(B, 8, HKV, D, dtype=torch.float32, device="cpu")
    tensors = dict(
        query=normal(B, HQ, 3, D), key=normal(B, HKV, 3, D), value=normal(B, HKV, 3, D), gate=normal(B, HQ, 3),
        attn_mask=normal(3, 3), sink=normal(HQ),
    )  # fmt: skip
    tensors[name].requires_grad_()
    with pytest.raises(nsk.UnsupportedInput, match="no_grad"):
        cache.attend(**tensors)
    assert cache.length == 0
    assert not cache.key.any()
    with torch.no_grad():
        assert not cache.attend(**tensors).requires_grad


# --- unusual and legal -------------------------------------------------------------------------------------------


LEGAL_VALUES: dict[str, list] = {
    "scale": [0, -0.5, 2, 1e30, 1e-300],
    "softcap": [3, 1e30, -0.0],
    "window": [[1, 2], (None, None), (0, 0), (2**40, 2**62), (3, None)],
    "gate": [
        None, gate[..., 0], normal(B, SQ, HQ).transpose(1, 2), torch.tensor(0.3).expand(B, HQ, SQ),
        normal(B, HQ, 1, DV).expand(-1, -1, SQ, -1), torch._neg_view(gate),
    ],
    "attn_mask": [
        torch.tensor([0.5]), torch.tensor(True), torch.tensor(False), normal(SK), normal(1, 1, 1, 1),
        normal(SQ, 1).expand(B, HQ, SQ, SK), (normal(SK, SQ) < 0.5).T, spread(normal(B, 1, SQ, SK)),
    ],
    "sink": [normal(HQ, 3)[:, 1], torch.tensor(0.3).expand(HQ), torch.full((HQ,), -INF), torch.nn.Parameter(normal(4))],
    "key": [torch._neg_view(k), k[:, :1].expand(-1, HKV, -1, -1), normal(99).as_strided(k.shape, (9, 5, 1, 1))],
}  # fmt: skip
no_q, no_k, no_v, no_gate = q[:, :, :0], k[:, :, :0], v[:, :, :0], gate[:, :, :0]
bottom = dict(is_causal=True, causal_alignment="bottom_right")
float32 = dict(gate=gate, attn_mask=normal(SQ, SK), sink=normal(HQ))
LEGAL: dict[str, dict] = {
    f"{name} {label(x)} {i}": {name: x} for name, xs in LEGAL_VALUES.items() for i, x in enumerate(xs)
}
LEGAL |= {
    "empty batch": dict(query=q[:0], key=k[:0], value=v[:0], gate=gate[:0]),
    "no queries": dict(query=no_q, gate=no_gate, attn_mask=normal(0, SK)),
    "no keys": dict(key=no_k, value=no_v, sink=normal(HQ)),
    "no keys, bottom right": dict(key=no_k, value=no_v, window=(0, 0), **bottom),
    "nothing at all": dict(query=no_q, key=no_k, value=no_v, gate=no_gate),
    "scale 0 with softcap": dict(scale=0.0, softcap=2),
    "window huge, bottom right": dict(window=(2**62, 2**63 - 1), **bottom),
    "window and causality": dict(window=(1, 3), is_causal=True),
    "alignment without causality": dict(causal_alignment="bottom_right"),
    "expanded": dict(query=q[:1].expand(B, -1, -1, -1), value=normal(B, HKV, 1, DV).expand(-1, -1, SK, -1)),
    "one column": dict(  # a last dimension of size 1 has no stride to speak of
        query=normal(B, HQ, SQ, 3)[..., 1:2], key=normal(B, HKV, SK, 5)[..., ::5], value=normal(B, HKV, SK, 1),
        gate=normal(B, HQ, 2, SQ).transpose(2, 3)[..., :1],
    ),
    "512 columns": dict(query=normal(B, HQ, SQ, 512), key=normal(B, HKV, SK, 512)),
    "512 columns of values": dict(value=normal(B, HKV, SK, 512), gate=None),
    "one of all": dict(query=q[:, :1, :1], key=k[:, :1, :1], value=v[:, :1, :1], gate=gate[:, :1, :1]),
    "float32 beside float64": dict(query=q.double(), key=k.double(), value=v.double(), **float32),
    "float32 beside bfloat16": dict(query=q16, key=k16, value=v16, **float32),
    "float32 beside float16": dict(query=q.half(), key=k.half(), value=v.half(), **float32),
}  # fmt: skip


def as_call(**arguments) -> GatedSdpaCall:
    a = dict(gate=None, attn_mask=None, sink=None, is_causal=False, softcap=0.0) | arguments
    left, right = a.pop("window", None) or (None, None)
    a["scale"] = a["query"].shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
    return GatedSdpaCall(
        bottom_right=a.pop("causal_alignment", "top_left") == "bottom_right",
        window_left=-1 if left is None else left,
        window_right=-1 if right is None else right,
        **a,
    )


@pytest.mark.parametrize("case", LEGAL)
def test_legal(case: str, target: Target):
    arguments = dense(**LEGAL[case])
    with poisoned_allocations():
        out, lse = nsk.gated_sdpa(**arguments, return_lse=True)
    plain = {name: t.detach().clone() if isinstance(t, Tensor) else t for name, t in arguments.items()}
    expected_out, expected_lse = gated_sdpa_reference(as_call(**plain))
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(out.dtype, 2e-2)
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=tolerance, atol=tolerance)
    assert out.dtype == arguments["query"].dtype


@pytest.mark.parametrize("case", LEGAL)
def test_legal_calls_are_explained(case: str):
    assert "cpu: serves the call" in nsk.explain("gated_sdpa", **dense(**LEGAL[case]))


@pytest.mark.parametrize("case", LEGAL)
def test_legal_calls_have_gradients(case: str, target: Target):
    """Each of its input's shape and type, and finite: nothing of the poison is left."""
    arguments = {
        name: t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in dense(**LEGAL[case]).items()
    }
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    with poisoned_allocations():
        out, lse = nsk.gated_sdpa(**arguments, return_lse=True)
        grads = torch.autograd.grad((out.sum(), lse.sum()), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        assert grad.isfinite().all()


@pytest.mark.parametrize("bound", [2**63, 2**70])
def test_a_window_beyond_int64_is_unbounded_or_refused(bound: int, backend: str):
    with contextlib.suppress(nsk.UnsupportedInput):
        assert torch.equal(nsk.gated_sdpa(**dense(), window=(bound, bound)), nsk.gated_sdpa(**dense()))


@pytest.mark.parametrize(
    "replaced",
    [
        dict(query=normal(9, HQ, D)[:0], gate=None, cu_seqlens_q=offsets(0, 0, 0)),
        dict(key=normal(11, HKV, D)[:0], value=normal(11, HKV, DV)[:0], cu_seqlens_k=offsets(0, 0, 0)),
        dict(max_seqlen_q=0, max_seqlen_k=2**40),
        dict(cu_seqlens_q=offsets(0, 0, 9), cu_seqlens_k=offsets(0, 11, 11)),
        dict(cu_seqlens_q=offsets(0, 3, 9, 7)[:3]),
        dict(gate=normal(9, HQ)),
        dict(gate=normal(HQ, 9).T, window=[0, None], scale=-1),
    ],
    ids=["no queries", "no keys", "hints", "empty sequences", "a view", "headwise", "headwise strided"],
)
def test_legal_packed(replaced: dict, target: Target):
    arguments = packed(**replaced)
    out, lse = nsk.gated_sdpa_varlen(**arguments, return_lse=True)
    expected_out, expected_lse = gated_sdpa_reference(as_call(**arguments | dict(max_seqlen_q=-1, max_seqlen_k=-1)))
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    assert "cpu: " in nsk.explain("gated_sdpa_varlen", **arguments)
