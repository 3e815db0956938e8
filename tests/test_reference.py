"""The reference against torch's own attention, against numbers worked out by hand and against a loop over pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Inputs, make_inputs
from harness import as_call
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsk.reference.gated_sdpa import allowed_keys, gated_sdpa_reference
from nsk.reference.products import Scores, WeightedSum
from nsk.spec.gated_sdpa import GatedSdpaCall, bytes_moved, flops

INF, NAN = math.inf, math.nan
SMALL = dict(dtype=torch.float64, batch=2, heads=4, kv_heads=2, sq=5, sk=7, d=6, dv=3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call_of(case: Case) -> tuple[GatedSdpaCall, Inputs]:
    inputs = make_inputs(case)
    return as_call(case, inputs.tensors), inputs


# --- torch's attention -------------------------------------------------------------------------------------------

PLAIN = {
    "plain": dict(),
    "multi-head": dict(kv_heads=4),
    "multi-query": dict(kv_heads=1),
    "causal": dict(causal="top_left"),
    "causal, more queries": dict(causal="top_left", sq=9),
    "boolean mask": dict(mask="bool"),
    "boolean mask of keys": dict(mask="bool", mask_dims="b11k"),
    "float mask": dict(mask="float"),
    "float mask of heads": dict(mask="float", mask_dims="1hqk"),
    "scale": dict(scale=-0.7),
    "one query": dict(sq=1),
    "one of all": dict(sq=1, sk=1, d=1, dv=1),
}


@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
@pytest.mark.parametrize("name", PLAIN)
def test_against_torch(name: str, gate: str):
    """Output and gradients of ``F.scaled_dot_product_attention``, times the sigmoid of the gate."""
    case = Case(seed=200, gate=gate, **SMALL | PLAIN[name])
    call, inputs = call_of(case)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            call.query, call.key, call.value, attn_mask=call.attn_mask, is_causal=call.is_causal, scale=call.scale,
            enable_gqa=True,
        )  # fmt: skip
    if gate != "none":
        out = out * torch.sigmoid(call.gate[..., None] if gate == "headwise" else call.gate)
    ours, _ = gated_sdpa_reference(call)
    torch.testing.assert_close(ours, out, rtol=1e-12, atol=1e-12)
    leaves = [inputs.tensors[leaf] for leaf in inputs.leaves()]
    expected, got = (torch.autograd.grad(o, leaves, inputs.grad_out, allow_unused=True) for o in (out, ours))
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_lse_is_that_of_torch(name: str):
    call, _ = call_of(Case(seed=201, **SMALL | PLAIN[name]))
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    s = call.query @ key.mT * call.scale
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        s = s + call.attn_mask
    expected = torch.logsumexp(s.masked_fill(~allowed_keys(call), -INF), -1)
    torch.testing.assert_close(gated_sdpa_reference(call)[1], expected, rtol=1e-13, atol=1e-13)


# --- by hand -----------------------------------------------------------------------------------------------------


def tiny(**replaced) -> GatedSdpaCall:
    """One query, keys 0, ln 2 and ln 3, values 1, 10 and 100: the weights are 1/6, 2/6 and 3/6."""
    keys = torch.tensor([0.0, math.log(2), math.log(3)], dtype=torch.float64)[None, None, :, None]
    values = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)[None, None, :, None]
    good = dict(
        query=torch.ones(1, 1, 1, 1, dtype=torch.float64), key=keys, value=values, gate=None, attn_mask=None, sink=None,
        is_causal=False, bottom_right=False, window_left=-1, window_right=-1, softcap=0.0, scale=1.0,
    )  # fmt: skip
    return GatedSdpaCall(**good | replaced)


def number(x: float, *shape: int) -> Tensor:
    return torch.full(shape, x, dtype=torch.float64)


CAPPED = [math.exp(0.5 * math.tanh(s / 0.5)) for s in (0, math.log(2), math.log(3))]
BY_HAND: dict[str, tuple[dict, float, float]] = {  # replaced, out, the exponential of lse
    "weights": (dict(), (1 + 20 + 300) / 6, 6),
    "gate of 0": (dict(gate=number(0, 1, 1, 1, 1)), (1 + 20 + 300) / 12, 6),
    "gate of ln 3": (dict(gate=number(math.log(3), 1, 1, 1)), (1 + 20 + 300) / 6 * 3 / 4, 6),
    "gate of -1000": (dict(gate=number(-1000, 1, 1, 1)), 0, 6),
    "causal": (dict(is_causal=True), 1, 1),
    "bottom right": (dict(is_causal=True, bottom_right=True), (1 + 20 + 300) / 6, 6),
    "window": (dict(window_left=0, window_right=1), (1 + 20) / 3, 3),
    "window at the bottom": (dict(window_left=1, window_right=0, bottom_right=True), (20 + 300) / 5, 5),
    "boolean mask": (dict(attn_mask=torch.tensor([True, False, True])), (1 + 300) / 4, 4),
    "float mask": (dict(attn_mask=torch.tensor([math.log(6), -INF, 0], dtype=torch.float64)), (6 + 300) / 9, 9),
    "sink": (dict(sink=number(math.log(4), 1)), (1 + 20 + 300) / 10, 6),
    "sink of 0 and gate": (dict(sink=number(0, 1), gate=number(0, 1, 1, 1)), (1 + 20 + 300) / 14, 6),
    "sink of -inf": (dict(sink=number(-INF, 1)), (1 + 20 + 300) / 6, 6),
    "scale 0": (dict(scale=0.0), 111 / 3, 3),
    "scale -1": (dict(scale=-1.0), (1 + 10 / 2 + 100 / 3) / (11 / 6), 11 / 6),
    "softcap": (dict(softcap=0.5), (CAPPED[0] + 10 * CAPPED[1] + 100 * CAPPED[2]) / sum(CAPPED), sum(CAPPED)),
    "nothing allowed": (dict(attn_mask=torch.tensor(False)), 0, 0),
    "nothing allowed, sink": (dict(attn_mask=number(-INF, 3), sink=number(1, 1)), 0, 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str):
    replaced, out, total = BY_HAND[name]
    got, lse = gated_sdpa_reference(tiny(**replaced))
    assert got.item() == pytest.approx(out, rel=1e-13)
    assert lse.exp().item() == pytest.approx(total, rel=1e-13)


def pairs_one_by_one(call: GatedSdpaCall) -> tuple[Tensor, Tensor]:
    """The definition as a loop in Python numbers."""
    (b, hq, sq, _), (_, hkv, sk, dv) = call.query.shape, call.value.shape
    out, lse = number(0, b, hq, sq, dv), number(-INF, b, hq, sq)
    offset = sk - sq if call.bottom_right else 0
    mask = None if call.attn_mask is None else call.attn_mask.detach().expand(b, hq, sq, sk)
    for n, h, i in itertools.product(range(b), range(hq), range(sq)):
        weights: dict[int, float] = {}
        for j in range(sk):
            s = call.scale * float((call.query[n, h, i] @ call.key[n, h * hkv // hq, j]).detach())
            if call.softcap > 0:
                s = call.softcap * math.tanh(s / call.softcap)
            allowed = not (call.is_causal and j > i + offset)
            allowed &= call.window_left < 0 or j >= i + offset - call.window_left
            allowed &= call.window_right < 0 or j <= i + offset + call.window_right
            if mask is not None:
                bias = mask[n, h, i, j].item()
                allowed &= bias if mask.dtype == torch.bool else bias > -INF
                s += 0 if mask.dtype == torch.bool else bias
            if allowed:
                weights[j] = math.exp(s)
        if not weights:
            continue
        lse[n, h, i] = math.log(sum(weights.values()))
        denominator = sum(weights.values()) + (0 if call.sink is None else math.exp(call.sink[h].item()))
        for j, w in weights.items():
            out[n, h, i] += w / denominator * call.value[n, h * hkv // hq, j].detach()
        if call.gate is not None:
            out[n, h, i] *= torch.sigmoid(call.gate[n, h, i].detach())
    return out, lse


@pytest.mark.parametrize("causal", ["", "top_left", "bottom_right"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize(("sq", "sk"), [(5, 7), (7, 4), (1, 3)])
@pytest.mark.parametrize("window", [None, (1, 2), (0, None)])
def test_pair_by_pair(causal: str, mask: str, sq: int, sk: int, window: tuple | None):
    gate = {"none": "none", "bool": "headwise", "float": "elementwise"}[mask]
    options = dict(causal=causal, mask=mask, window=window, gate=gate, sq=sq, sk=sk, sink=mask != "bool")
    options |= dict(softcap=2.0 * (sq == 5), bottom_right=sq == 7, dead_rows=True)
    call, _ = call_of(Case(seed=202, **SMALL | options))
    for got, expected in zip(gated_sdpa_reference(call), pairs_one_by_one(call), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(mask="float", dead_rows=True, softcap=0.8),
        dict(causal="bottom_right", window=(1, None), sq=5, sk=3),
    ],
    ids=["plain", "mask and softcap", "dead rows"],
)
def test_gradcheck(gate: str, options: dict):
    """Finite differences, once and (of a call whose rows all live) twice."""
    sizes = dict(dtype=torch.float64, batch=1, heads=2, kv_heads=1, sq=3, sk=4, d=2, dv=2, sink=True)
    case = Case(seed=203, gate=gate, **sizes | options)
    inputs = make_inputs(case)
    names = inputs.leaves()
    leaves = [inputs.tensors[name] for name in names]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = gated_sdpa_reference(as_call(case, inputs.tensors | dict(zip(names, tensors, strict=True))))
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-5)
    if not options:
        assert torch.autograd.gradgradcheck(function, leaves, atol=1e-6, rtol=1e-4)


def test_dead_rows():
    """Output 0, lse -inf and no gradient, whatever the gate and the query hold."""
    case = Case(seed=204, sink=True, **SMALL)
    inputs = make_inputs(case)
    t = inputs.tensors
    allowed = torch.ones(case.sq, case.sk, dtype=torch.bool)
    allowed[2] = False
    with torch.no_grad():
        t["gate"][:, :, 2], t["query"][:, :, 2] = INF, NAN
    out, lse = gated_sdpa_reference(as_call(case, t | dict(attn_mask=allowed)))
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    assert (lse[:, :, 2] == -INF).all()
    assert lse[:, :, [0, 1, 3, 4]].isfinite().all()
    grads = torch.autograd.grad((out.sum(), lse.sum()), [t[name] for name in ("query", "key", "value", "gate", "sink")])
    assert all(grad.isfinite().all() for grad in grads)
    for grad in (grads[0], grads[3]):
        assert not grad[:, :, 2].any()
        assert grad[:, :, [0, 1, 3, 4]].any()


def test_all_rows_dead():
    for options in (dict(sk=0), dict(mask="float", mask_dims="1hq1")):
        call, inputs = call_of(Case(seed=205, sink=True, **SMALL | options))
        if call.attn_mask is not None:
            call.attn_mask = torch.full_like(call.attn_mask, -INF)
        out, lse = gated_sdpa_reference(call)
        assert not out.any()
        assert (lse == -INF).all()
        leaves = [call.query, call.key, call.value, call.gate, call.sink]
        for grad in torch.autograd.grad(out, leaves, inputs.grad_out):
            assert not grad.any()


# --- products ----------------------------------------------------------------------------------------------------


def products() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Left, right and which pairs may meet, for both products: pairs that may not meet have weight 0."""
    seen = normal(2, 3, 5, 6, seed=1) < 0.4
    seen[:, :, 1], seen[..., 2] = False, False  # a row and a column that meet nothing
    yield "scores", normal(2, 3, 5, 4, seed=2), normal(2, 3, 6, 4, seed=3), seen
    yield "sum", torch.where(seen, normal(2, 3, 5, 6, seed=4), 0), normal(2, 3, 6, 4, seed=5), seen


FUNCTIONS = {"scores": Scores, "sum": WeightedSum}
PRODUCTS = pytest.mark.parametrize(("name", "left", "right", "seen"), [*products()], ids=["scores", "sum"])


@PRODUCTS
def test_products_are_products(name: str, left: Tensor, right: Tensor, seen: Tensor):
    got = FUNCTIONS[name].apply(left, right, seen)
    expected = torch.where(seen, left @ right.mT, 0) if name == "scores" else left @ right
    assert torch.equal(got, expected)


@PRODUCTS
def test_products_have_the_right_gradients(name: str, left: Tensor, right: Tensor, seen: Tensor):
    """Of a weight that is 0 because its pair may not meet, too: it stays 0."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        return FUNCTIONS[name].apply(a if name == "scores" else torch.where(seen, a, 0), b, seen)

    leaves = [left.clone().requires_grad_(), right.clone().requires_grad_()]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@PRODUCTS
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["left", "right", "gradient"])
def test_pairs_that_may_not_meet(name: str, left: Tensor, right: Tensor, seen: Tensor, where: str, bad: float):
    """What is not finite reaches what may see it and changes no bit elsewhere: in the output and in both gradients."""

    def results(a: Tensor, b: Tensor, spoil: bool) -> list[Tensor]:
        a, b = a.clone(), b.clone()
        grad = normal(*(seen.shape if name == "scores" else (2, 3, 5, 4)), seed=6)
        if spoil and where == "right":
            b[:, :, 4] = bad
        elif spoil and where == "gradient":
            grad[:, :, 3] = bad
        elif spoil:  # a weight stays 0 where its pair may not meet
            a[:, :, 3] = bad if name == "scores" else torch.where(seen[:, :, 3], bad, 0)
        a.requires_grad_(), b.requires_grad_()
        out = FUNCTIONS[name].apply(a, b, seen)
        return [out.detach(), *torch.autograd.grad(out, (a, b), grad)]

    clean, spoilt = results(left, right, False), results(left, right, True)
    # Rows of the left and of the right that take part in a pair with what was spoilt.
    row, column = torch.zeros_like(seen[..., 0]), torch.zeros_like(seen[:, :, 0])
    if where == "right":
        row, column[:, :, 4] = seen[..., 4], True
    else:
        row[:, :, 3], column = True, seen[:, :, 3]
    for which, (was, now) in enumerate(zip(clean, spoilt, strict=True)):
        reached = column if which == 2 else row
        if was.shape == seen.shape:  # scores, and gradients of weights: pair by pair
            reached = seen & (row[..., None] if where != "right" else column[:, :, None])
        else:
            reached = reached[..., None].expand(was.shape)
        assert torch.equal(was[~reached], now[~reached]), which
    assert not all(torch.equal(was, now) for was, now in zip(clean, spoilt, strict=True))
    assert not spoilt[0][:, :, 1].any(), "a row that meets nothing"


# --- what a call costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (2, -1), (-1, 1), (3, 2), (100, 100)])
def test_flops_count_the_allowed_pairs(causal: bool, bottom_right: bool, window: tuple[int, int]):
    options = dict(is_causal=causal, bottom_right=bottom_right, window_left=window[0], window_right=window[1])
    packed_q, packed_k, total = [0], [0], 0
    for sq, sk in ((5, 7), (7, 5), (1, 9), (9, 1), (6, 6), (0, 3), (3, 0)):
        shapes = dict(query=number(0, 2, 4, sq, 6), key=number(0, 2, 2, sk, 6), value=number(0, 2, 2, sk, 3))
        call = tiny(**shapes, **options)
        pairs = int(allowed_keys(call).sum())  # over batch and heads
        assert flops(call) == 2 * pairs * (6 + 3)
        assert flops(call, backward=True) == 2 * pairs * (3 * 6 + 2 * 3)
        packed_q.append(packed_q[-1] + sq)
        packed_k.append(packed_k[-1] + sk)
        total += pairs // 2  # a packed call has no batch
    offsets = dict(cu_seqlens_q=torch.tensor(packed_q), cu_seqlens_k=torch.tensor(packed_k))
    rows = dict(query=number(0, 31, 4, 6), key=number(0, 31, 2, 6), value=number(0, 31, 2, 3))
    assert flops(tiny(**rows, **options, **offsets)) == 2 * total * (6 + 3)


def test_bytes_moved():
    query, key, value = number(0, 2, 4, 5, 6), number(0, 2, 2, 7, 6), number(0, 2, 2, 7, 3)
    half = dict(query=query.bfloat16(), key=key.bfloat16(), value=value.bfloat16())
    rows = 2 * 4 * 5
    inputs = rows * 6 + 2 * 2 * 7 * (6 + 3)
    assert bytes_moved(tiny(**half)) == 2 * (inputs + rows * 3) + 4 * rows
    everything = dict(gate=number(0, 2, 4, 5).bfloat16(), sink=number(0, 4).float(), attn_mask=torch.ones(5, 7) > 0)
    assert bytes_moved(tiny(**half, **everything)) == 2 * (inputs + rows * 3) + 4 * rows + 2 * rows + 4 * 4 + 5 * 7
    assert bytes_moved(tiny(query=query, key=key, value=value)) == 8 * (inputs + rows * 3) + 8 * rows
