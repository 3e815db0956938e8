"""Runs one case through a backend, the same-type eager baseline and the float64 oracle, and compares all there is:
the output, lse and every gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from cases import Case, Inputs, make_inputs
from torch import Tensor

import nsk
from nsk.backends.triton.device import triton_version
from nsk.reference.budget import BudgetReport, within_budget
from nsk.reference.gated_sdpa import gated_sdpa_reference
from nsk.reference.terms import sizes_of_terms
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


def cpu_targets() -> list[Target]:
    """The native backend on every instruction set that this processor has. A missing native module is an error that
    every test shows, never a reason to skip."""
    try:
        from nsk import _native
    except ImportError:
        return [Target("cpu")]
    return [Target("cpu", isa) for isa in _native.isas()]


HAS_TRITON = triton_version() is not None
CPU = cpu_targets()
ALL = [*CPU, Target("eager")]


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
        incoming = {out: inputs.grad_out, lse: inputs.grad_lse}
        # Plain autograd knows when lse depends on none of the leaves (they are gate and sink), a fused op does not.
        outputs = [o for o, grad in incoming.items() if grad is not None and o.requires_grad]
        leaves = [inputs.tensors[name] for name in names]
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        if outputs:
            grads = [incoming[o] for o in outputs]
            gradients = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
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


def baseline_and_oracle(
    run_reference: Callable[[Inputs], Results],
    inputs: Inputs,
    dtype: torch.dtype | None = None,
    run_baseline: Callable[[Inputs, Results], Results] | None = None,
) -> tuple[Results, Results]:
    """The reference in the inputs' own types, and in float64.

    For float64 inputs the two are one and say nothing about how far off an honest float64 result may be. There the
    baseline is the oracle plus the errors that the same call makes in float32, scaled down by the types' precision.
    ``dtype`` is the call's type (``None``: the query's); ``run_baseline`` may choose the baseline in sight of the
    oracle.
    """
    run_baseline = run_baseline or (lambda inputs, _: run_reference(inputs))
    oracle = run_reference(plain_copy(inputs, torch.float64))
    if (dtype or inputs.tensors["query"].dtype) != torch.float64:
        return run_baseline(plain_copy(inputs), oracle), oracle
    single = plain_copy(inputs, torch.float32)
    exact = run_reference(plain_copy(single, torch.float64))
    rounded = run_baseline(single, exact)
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    errors = {name: (rounded[name].double() - exact[name]) * finer for name in oracle}
    return {name: oracle[name] + errors[name].nan_to_num(0, 0, 0) for name in oracle}, oracle


def dense_reference(case: Case) -> Callable[[Inputs], Results]:
    return lambda inputs: differentiate(*gated_sdpa_reference(as_call(case, inputs.tensors)), inputs)


@functools.lru_cache(maxsize=512)
def expected(case: Case) -> tuple[Results, Results, Results]:
    """Baseline, oracle and the sizes of the terms: computed once for all backends."""
    inputs = make_inputs(case)
    baseline, oracle = baseline_and_oracle(dense_reference(case), inputs)
    return baseline, oracle, terms_of(case, inputs, oracle)


def terms_of(case: Case, inputs: Inputs, oracle: Results) -> Results:
    """The sizes of the terms of a dense call's results."""
    exact = plain_copy(inputs, torch.float64)
    return sizes_of_terms(as_call(case, exact.tensors), case.dtype, oracle["out"], exact.grad_out, exact.grad_lse)


def compare(
    dtype: torch.dtype, results: Results, baseline: Results, oracle: Results, terms: Results | None = None
) -> dict[str, BudgetReport]:
    """A report for each result of a call on inputs of this type."""
    assert results.keys() == oracle.keys() == baseline.keys()
    reports = {}
    for name in oracle:
        # Gradients come from the saved output, which is rounded to the type; lse never is.
        inputs = None if name == "lse" else dtype
        size = (terms or {}).get(name)
        reports[name] = within_budget(results[name], baseline[name], oracle[name], inputs=inputs, terms=size)
    return reports


def check(case: Case, target: Target) -> None:
    """Forward and all gradients of the case within the budget on the target."""
    baseline, oracle, terms = expected(case)
    inputs = make_inputs(case)
    with target.active():
        results = run(case, inputs)
    for name, report in compare(case.dtype, results, baseline, oracle, terms).items():
        report.check(f"{case} on {target}: {name}")


def to_gpu(t: Tensor | None) -> Tensor | None:
    """The same values in the same layout on the GPU, a leaf again."""
    if t is None:
        return None
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    moved = t.detach().as_strided((span,), (1,)).cuda().as_strided(t.shape, t.stride())
    return moved.requires_grad_(t.requires_grad)


def on_gpu(inputs: Inputs) -> Inputs:
    """All of a call's tensors on the GPU, of either op."""
    tensors = {name: to_gpu(t) for name, t in inputs.tensors.items()}
    grad_lse = to_gpu(inputs.grad_lse)
    return dataclasses.replace(inputs, tensors=tensors, grad_out=to_gpu(inputs.grad_out), grad_lse=grad_lse)
