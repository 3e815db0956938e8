"""Runs one case through a backend, the same-type eager baseline and the float64 oracle, and compares all there is:
the output, lse and every gradient."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from cases import Case, Inputs, make_inputs
from torch import Tensor

import nsk
from nsk.reference.budget import BudgetReport, within_budget
from nsk.reference.gated_sdpa import gated_sdpa_reference
from nsk.spec.gated_sdpa import GatedSdpaCall

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A backend to test, and for the CPU the instruction set that it runs on."""

    backend: str
    isa: str = ""

    def __str__(self) -> str:
        return self.isa or self.backend

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with nsk.use_backend(self.backend), instruction_set(self.isa):
            yield


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Runs the CPU kernels on this instruction set (empty: as they are), then on the former one again."""
    if not name:
        yield
        return
    from nsk import _native

    before = _native.isa()
    _native.set_isa(name)
    try:
        yield
    finally:
        _native.set_isa(before)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every tensor that torch allocates without initialising it holds NaN: a value that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all(), "this torch does not poison its allocations"
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def differentiate(out: Tensor, lse: Tensor, inputs: Inputs) -> Results:
    """Output, lse and the gradients of the leaves, as ``out``, ``lse``, ``query``, ..."""
    results = {"out": out.detach(), "lse": lse.detach()}
    if names := inputs.leaves():
        outputs, incoming = [out], [inputs.grad_out]
        if inputs.grad_lse is not None:
            outputs, incoming = [out, lse], [inputs.grad_out, inputs.grad_lse]
        gradients = torch.autograd.grad(outputs, [inputs.tensors[n] for n in names], incoming)
        results |= dict(zip(names, gradients, strict=True))
    return results


def run(case: Case, inputs: Inputs) -> Results:
    """The public function, on whatever backend is active."""
    t = inputs.tensors
    with poisoned_allocations():
        out, lse = nsk.gated_sdpa(
            t["query"], t["key"], t["value"], t["gate"], attn_mask=t["attn_mask"], sink=t["sink"],
            return_lse=True, **case.options,
        )  # fmt: skip
        return differentiate(out, lse, inputs)


def as_call(case: Case, tensors: dict[str, Tensor | None], **varlen) -> GatedSdpaCall:
    """The normalised call that the reference takes."""
    left, right = case.window or (None, None)
    return GatedSdpaCall(
        **tensors,
        is_causal=bool(case.causal),
        bottom_right=case.options["causal_alignment"] == "bottom_right",
        window_left=-1 if left is None else left,
        window_right=-1 if right is None else right,
        softcap=case.softcap,
        scale=case.d**-0.5 if case.scale is None else case.scale,
        **varlen,
    )


def plain_copy(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Dense copies of the inputs, in float64 for the oracle (``dtype=None`` keeps the types, for the baseline)."""

    def copy(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        values = t.detach().clone(memory_format=torch.contiguous_format)
        if dtype is not None and t.is_floating_point():
            values = values.to(dtype)
        return values.requires_grad_(t.requires_grad)

    tensors = {name: copy(t) for name, t in inputs.tensors.items()}
    return Inputs(tensors, copy(inputs.grad_out), copy(inputs.grad_lse), inputs.needs)


def reference(case: Case, inputs: Inputs, dtype: torch.dtype | None = None, **varlen) -> Results:
    inputs = plain_copy(inputs, dtype)
    return differentiate(*gated_sdpa_reference(as_call(case, inputs.tensors, **varlen)), inputs)


@functools.lru_cache(maxsize=64)
def expected(case: Case) -> tuple[Results, Results, dict[str, float]]:
    """Baseline, oracle and the sizes of the terms of the gradients: computed once for all backends."""
    inputs = make_inputs(case)
    oracle = reference(case, inputs, torch.float64)
    return reference(case, inputs), oracle, cancelled_terms(inputs, oracle, case.scale or case.d**-0.5)


def cancelled_terms(inputs: Inputs, oracle: Results, scale: float) -> dict[str, float]:
    """Sizes of the terms of gradients that cancel to nothing.

    The scores' gradient is ``p (dP - delta)``. In a row with one key the two are equal, so where every row has at most
    one (or all but one have no weight) the gradients of query, key, mask and sink are zero in exact arithmetic, and
    no error can be measured against ``max|oracle|``. Their terms are of the size ``|dO| |v|``.
    """
    t = inputs.tensors
    if not oracle["out"].numel() or not t["value"].numel():
        return {}
    eps = torch.finfo(t["query"].dtype).eps
    per_row = inputs.grad_out.double().norm(dim=-1).max() * t["value"].detach().double().norm(dim=-1).max()
    if inputs.grad_lse is not None:
        per_row = per_row + inputs.grad_lse.abs().max()
    reach = {
        "query": abs(scale) * t["key"].detach().abs().max(),
        "key": abs(scale) * t["query"].detach().abs().max(),
        "attn_mask": 1.0,
        "sink": 1.0,
    }
    sizes = {name: float(per_row * size) for name, size in reach.items() if name in oracle}
    return {name: size for name, size in sizes.items() if oracle[name].abs().max() < eps * size}


def compare(results: Results, baseline: Results, oracle: Results, terms: dict[str, float]) -> dict[str, BudgetReport]:
    assert results.keys() == oracle.keys() == baseline.keys()
    return {
        name: within_budget(results[name], baseline[name], oracle[name], magnitude=terms.get(name)) for name in oracle
    }


def check(case: Case, target: Target) -> None:
    """Forward and all gradients of the case within the budget on the target."""
    baseline, oracle, terms = expected(case)
    inputs = make_inputs(case)
    with target.active():
        results = run(case, inputs)
    for name, report in compare(results, baseline, oracle, terms).items():
        report.check(f"{case} on {target}: {name}")
