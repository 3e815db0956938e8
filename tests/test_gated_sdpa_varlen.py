"""Packed sequences against one dense call a sequence."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from cases import Case, Inputs
from harness import (
    Results,
    Target,
    as_call,
    baseline_and_oracle,
    compare,
    differentiate,
    plain_copy,
    poisoned_allocations,
)

import nsk
from nsk.reference.gated_sdpa import gated_sdpa_reference
from nsk.reference.terms import sizes_of_terms
from nsk.spec.gated_sdpa import GatedSdpaCall


@dataclass(frozen=True)
class Packed:
    """A packed call: the options of ``case`` (its sizes of batch and sequences do not count) for these lengths."""

    case: Case
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    def cu_seqlens(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for lengths in (self.lengths_q, self.lengths_k)
        )


LENGTHS = {
    "one": ((33,), (47,)),
    "several": ((5, 17, 64, 1), (9, 40, 64, 3)),
    "empty ones": ((0, 7, 0, 0, 21, 0), (3, 0, 0, 12, 30, 0)),
    "all empty": ((0, 0), (0, 0)),
    "no sequences": ((), ()),
    "no keys": ((4, 5), (0, 0)),
    "decode": ((1, 1, 1, 1), (300, 1, 77, 512)),
    "one long, many short": ((2, 3, 400, 1, 6), (2, 3, 400, 1, 6)),
    "more queries than keys": ((60, 31, 8), (20, 31, 90)),
}
OPTIONS = {
    "plain": dict(),
    "headwise": dict(gate="headwise"),
    "no gate": dict(gate="none"),
    "causal": dict(causal="top_left"),
    "bottom right": dict(causal="bottom_right", sink=True),
    "window": dict(window=(6, 2), bottom_right=True),
    "everything": dict(causal="bottom_right", window=(9, None), softcap=4.0, sink=True, scale=-0.4),
    "bf16": dict(dtype=torch.bfloat16, causal="bottom_right", gate_dtype=torch.float32, sink=True),
    "f16": dict(dtype=torch.float16, causal="top_left", gate="headwise"),
    "f64": dict(dtype=torch.float64, sink=True, softcap=2.0),
    "wide": dict(d=130, dv=257, heads=2, kv_heads=1),
}


def make_packed(packed: Packed, layout: str = "dense") -> Inputs:
    c = packed.case
    generator = torch.Generator().manual_seed(c.seed + 5)
    total_q, total_k = sum(packed.lengths_q), sum(packed.lengths_k)

    def normal(*shape: int, dtype: torch.dtype = c.dtype) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "dense" or len(shape) < 2:
            return values
        if layout == "head first":
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        base = torch.full((*shape[:-1], shape[-1] * 2), torch.nan, dtype=dtype)  # chunk
        return base[..., shape[-1] :].copy_(values) if len(shape) == 3 else base[..., : shape[-1]].copy_(values)

    tensors = {
        "query": normal(total_q, c.heads, c.d),
        "key": normal(total_k, c.kv_heads, c.d),
        "value": normal(total_k, c.kv_heads, c.dv),
        "gate": None,
        "attn_mask": None,
        "sink": normal(c.heads) if c.sink else None,
    }
    if c.gate != "none":
        shape = (total_q, c.heads, c.dv)[: 3 if c.gate == "elementwise" else 2]
        tensors["gate"] = normal(*shape, dtype=c.gate_dtype or c.dtype)
    tensors = {name: None if t is None else t.detach().requires_grad_(name in c.needs) for name, t in tensors.items()}
    lse_dtype = torch.float64 if c.dtype == torch.float64 else torch.float32
    return Inputs(tensors, normal(total_q, c.heads, c.dv), normal(total_q, c.heads, dtype=lse_dtype), c.needs)


def run_packed(packed: Packed, inputs: Inputs, **replaced) -> Results:
    t = inputs.tensors
    cu_q, cu_k = packed.cu_seqlens()
    options = dict(
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max(packed.lengths_q, default=0),
        max_seqlen_k=max(packed.lengths_k, default=0),
        sink=t["sink"],
        return_lse=True,
        **packed.case.options,
    )
    with poisoned_allocations():
        out, lse = nsk.gated_sdpa_varlen(t["query"], t["key"], t["value"], t["gate"], **options | replaced)
        return differentiate(out, lse, inputs)


def packed_call(packed: Packed, inputs: Inputs) -> GatedSdpaCall:
    cu_q, cu_k = packed.cu_seqlens()
    return as_call(packed.case, inputs.tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def one_by_one(packed: Packed, inputs: Inputs) -> Results:
    """The dense reference, a sequence at a time."""
    return differentiate(*gated_sdpa_reference(packed_call(packed, inputs)), inputs)


def terms_of_packed(packed: Packed, inputs: Inputs, oracle: Results) -> Results:
    exact = plain_copy(inputs, torch.float64)
    call = packed_call(packed, exact)
    return sizes_of_terms(call, packed.case.dtype, oracle["out"], exact.grad_out, exact.grad_lse)


def check_packed(packed: Packed, layout: str = "dense", **replaced) -> Results:
    inputs = make_packed(packed, layout)
    results = run_packed(packed, inputs, **replaced)
    baseline, oracle = baseline_and_oracle(functools.partial(one_by_one, packed), inputs)
    terms = terms_of_packed(packed, inputs, oracle)
    for name, report in compare(packed.case.dtype, results, baseline, oracle, terms).items():
        report.check(name)
    return results


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_is_one_dense_call_a_sequence(lengths: str, options: str, target: Target):
    check_packed(Packed(Case(seed=60, **OPTIONS[options]), *LENGTHS[lengths]))


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
@pytest.mark.parametrize("layout", ["head first", "chunk"])
def test_strided(layout: str, gate: str, target: Target):
    check_packed(Packed(Case(seed=61, gate=gate, causal="top_left"), *LENGTHS["several"]), layout)


@pytest.mark.parametrize("hint", [None, 0, 1, 3, 10_000])
def test_a_wrong_max_seqlen_is_harmless(hint: int | None, target: Target):
    packed = Packed(Case(seed=62, causal="bottom_right"), *LENGTHS["several"])
    check_packed(packed, max_seqlen_q=hint, max_seqlen_k=hint)


def test_a_sequence_does_not_see_its_neighbours(target: Target):
    """NaN in one sequence stays there."""
    packed = Packed(Case(seed=63), *LENGTHS["several"])
    clean = run_packed(packed, make_packed(packed))
    inputs = make_packed(packed)
    with torch.no_grad():
        inputs.tensors["key"][9:49] = torch.nan  # the second sequence: keys 9..49, queries 5..22
        inputs.tensors["value"][9:49] = torch.nan
    results = run_packed(packed, inputs)
    others = torch.cat([torch.arange(5), torch.arange(22, 87)])
    for name in ("out", "lse", "query", "gate"):
        assert torch.equal(results[name][others], clean[name][others]), name
        assert results[name][5:22].isnan().all(), name
    others = torch.cat([torch.arange(9), torch.arange(49, 116)])
    for name in ("key", "value"):
        assert torch.equal(results[name][others], clean[name][others]), name


BAD = {
    "decreases": [0, 30, 20, 87],
    "starts late": [1, 22, 86, 87],
    "starts before": [-1, 22, 86, 87],
    "ends early": [0, 5, 22, 86],
    "ends late": [0, 5, 22, 88],
    "goes beyond and returns": [0, 5000, 22, 87],
    "huge": [0, 2**31 - 1, 2**31 - 1, 87],
    "negative": [0, -5, 22, 87],
    "empty": [],
}


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_offsets_raise(bad: str, which: str, target: Target):
    packed = Packed(Case(seed=64), (5, 17, 65), (5, 17, 65))
    inputs = make_packed(packed)
    with pytest.raises(nsk.UnsupportedInput, match=which):
        run_packed(packed, inputs, **{which: torch.tensor(BAD[bad], dtype=torch.int32)})


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_offsets_of_another_type_or_number_raise(which: str, target: Target):
    packed = Packed(Case(seed=65), (5, 17, 65), (5, 17, 65))
    inputs = make_packed(packed)
    for wrong in (
        torch.tensor([0, 5, 22, 87]),
        torch.tensor([0.0, 5, 22, 87]),
        torch.tensor([[0, 5, 22, 87]], dtype=torch.int32),
        torch.tensor([0, 22, 87], dtype=torch.int32),
    ):
        with pytest.raises(nsk.UnsupportedInput):
            run_packed(packed, inputs, **{which: wrong})


def test_offsets_may_be_strided(target: Target):
    packed = Packed(Case(seed=66, causal="top_left"), *LENGTHS["several"])
    strided = {}
    for name, offsets in zip(("cu_seqlens_q", "cu_seqlens_k"), packed.cu_seqlens(), strict=True):
        base = torch.full((offsets.numel(), 2), -7, dtype=torch.int32)
        strided[name] = base[:, 1].copy_(offsets)
    check_packed(packed, **strided)
