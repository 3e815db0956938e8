"""The correctness gate: no time is worth reporting for a wrong result.

Whole key/value heads, the first and the last of the batch, are computed again in float64 (the oracle) and op by op in
the case's own type (the baseline); results and gradients of the *timed* functions are held against the error budget.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.workload import Case, Verdict
from nsk.reference.budget import within_budget
from nsk.reference.gated_sdpa import gated_sdpa_reference
from nsk.reference.terms import sizes_of_terms
from nsk.spec.gated_sdpa import GatedSdpaCall

NAMES = ("out", "grad query", "grad key", "grad value", "grad gate")
LARGE = 1 << 24  # scores of one key/value head's group; beyond this only the last head is checked


class Gate:
    """Computes the truth when it is first asked, and keeps it for every arm of the case."""

    def __init__(self, case: Case, inputs) -> None:
        self._case, self._inputs = case, inputs
        self._truth: list[tuple] | None = None

    def __call__(self, results: list[Tensor]) -> Verdict:
        """Holds what an arm returned against the budget."""
        if self._truth is None:
            self._truth = [self._reference(*where) for where in self._places()]
        worst_used, worst_error, reasons = 0.0, None, []
        for (query_at, key_at), baselines, oracles, terms in self._truth:
            for i, (result, baseline, oracle, size) in enumerate(zip(results, baselines, oracles, terms, strict=True)):
                at = key_at if i in (2, 3) else query_at
                report = within_budget(result[at], baseline, oracle, terms=size)
                worst_used = max(worst_used, report.used)
                if report.baseline_rms_error > 0:
                    worst_error = max(worst_error or 0.0, report.rms_error / report.baseline_rms_error)
                reasons += [f"{NAMES[i]}: {reason}" for reason in report.reasons]
        return Verdict(worst_error, worst_used, tuple(reasons))

    def _places(self) -> list[tuple[int, int]]:
        a = self._case.shape
        last = (a.b - 1, a.hkv - 1)
        scores = (a.hq // a.hkv) * (max(a.lengths) ** 2 if a.lengths else a.sq * a.sk)
        return sorted({(0, 0), last}) if scores < LARGE else [last]

    def _reference(self, batch: int, head: int):
        a, x = self._case.shape, self._inputs
        group = a.hq // a.hkv
        query_at = (slice(batch, batch + 1), slice(head * group, (head + 1) * group))
        key_at = (slice(batch, batch + 1), slice(head, head + 1))
        if a.lengths:
            query_at, key_at = (slice(None), query_at[1]), (slice(None), key_at[1])
        cu = offsets(a.lengths, x.query.device)
        call = GatedSdpaCall(
            query=x.query[query_at].detach(),
            key=x.key[key_at].detach(),
            value=x.value[key_at].detach(),
            gate=None if x.gate is None else x.gate[query_at].detach(),
            attn_mask=None if x.mask is None else x.mask[query_at[0]],
            sink=None,
            is_causal=a.causal,
            bottom_right=False,
            window_left=-1 if a.window is None else a.window - 1,
            window_right=-1,
            softcap=0.0,
            scale=a.d**-0.5,
            cu_seqlens_q=cu,
            cu_seqlens_k=cu,
        )
        grad_out = None if x.grad_out is None else x.grad_out[query_at]
        exact = _double(call)
        oracle = _evaluate(exact, grad_out)
        incoming = torch.zeros_like(oracle[0]) if grad_out is None else grad_out.double()
        sizes = sizes_of_terms(exact, call.query.dtype, oracle[0], incoming, None)
        terms = [sizes[name] for name in ("out", "query", "key", "value", "gate") if name in sizes]
        return (query_at, key_at), _evaluate(call, grad_out), oracle, terms[: len(oracle)]


def offsets(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor | None:
    """Offsets of packed sequences; ``None`` for no packing."""
    if not lengths:
        return None
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _double(call: GatedSdpaCall) -> GatedSdpaCall:
    wide = {name: getattr(call, name) for name in ("query", "key", "value", "gate")}
    return replace(call, **{name: t.detach().double() for name, t in wide.items() if t is not None})


def _evaluate(call: GatedSdpaCall, grad_out: Tensor | None) -> list[Tensor]:
    if grad_out is None:
        with torch.no_grad():
            return [gated_sdpa_reference(call)[0]]
    inputs = [t.requires_grad_() for t in (call.query, call.key, call.value, call.gate) if t is not None]
    out, _ = gated_sdpa_reference(call)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]
