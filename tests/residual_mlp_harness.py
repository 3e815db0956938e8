"""Runs one case of ``residual_mlp`` through a backend, the same-type eager baseline and the float64 oracle, and
compares the output and every gradient."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace

import tf32
import torch
from cases import Inputs
from harness import Results, Target, baseline_and_oracle, plain_copy, poisoned_allocations, threads
from residual_mlp_cases import ACTIVATIONS, Case, make_inputs
from residual_mlp_terms import sizes_of_terms
from torch import Tensor

import nsk
from nsk.reference.budget import BudgetReport, within_budget
from nsk.reference.residual_mlp import residual_mlp_reference
from nsk.spec.residual_mlp import ResidualMlpCall


def call(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The public function, on whatever backend is active."""
    return nsk.residual_mlp(*tensors.values(), **case.options)


def differentiate(y: Tensor, inputs: Inputs) -> Results:
    """The output and the gradients of the leaves, as ``y``, ``x``, ``weight``, ..."""
    results = {"y": y.detach()}
    if names := inputs.leaves():
        gradients = torch.autograd.grad(y, [inputs.tensors[name] for name in names], inputs.grad_out)
        results |= dict(zip(names, gradients, strict=True))
    return results


def run(case: Case, inputs: Inputs) -> Results:
    with poisoned_allocations():
        return differentiate(call(case, inputs.tensors), inputs)


def reference(case: Case, inputs: Inputs) -> Results:
    """The reference's results, differentiated by autograd."""
    t = inputs.tensors
    group = () if case.groups is None else (case.groups,)
    rows = t["x"].reshape(*group, case.batch, case.width)
    y = residual_mlp_reference(
        ResidualMlpCall(
            rows, t["weight"], t["bias"], t["ln_weight"], t["ln_bias"], case.eps, case.layers_per_block,
            ACTIVATIONS.index(case.activation),
        )
    )  # fmt: skip
    return differentiate(y.reshape(t["x"].shape), inputs)


def nudged(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """The same call on numbers that are off by up to half an ulp: all rounding falls otherwise."""

    def nudge(t: Tensor) -> Tensor:
        eps = torch.finfo(t.dtype).eps
        off = t.detach() * (1 + eps * (torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.5))
        return off.to(t.dtype).requires_grad_(t.requires_grad)

    return replace(inputs, tensors={name: nudge(t) for name, t in inputs.tensors.items()})


def unluckiest(case: Case, inputs: Inputs, oracle: Results) -> Results:
    """The reference in the inputs' own types; beside it on inputs that are off by half an ulp, and for each value the
    one that is furthest from the oracle. One run alone may be exact by luck: in narrow networks, where a single row
    with hardly any variance decides, and in half types in those only."""
    worst = reference(case, inputs)
    generator = torch.Generator().manual_seed(case.seed)
    half = case.dtype in (torch.bfloat16, torch.float16)
    for _ in range(8 if case.width <= 16 else 0 if half else 3):
        for name, t in reference(case, nudged(inputs, generator)).items():
            further = (t.double() - oracle[name]).abs() > (worst[name].double() - oracle[name]).abs()
            worst[name] = torch.where(further, t, worst[name])
    return worst


def judge(case: Case, inputs: Inputs) -> tuple[Results, Results, Results]:
    """Baseline, oracle and the sizes of the terms of a call on these inputs."""
    exact = plain_copy(inputs, torch.float64)
    with threads(1):  # small tensors
        baseline, oracle = baseline_and_oracle(
            functools.partial(reference, case), inputs, case.dtype, functools.partial(unluckiest, case)
        )
        terms = sizes_of_terms(case, exact)
    if case.dtype == torch.float64:  # the oracle itself is off by as much as a result may be
        baseline = {name: t + (t - oracle[name]) for name, t in baseline.items()}
    types = {"y": inputs.tensors["x"].dtype} | {name: t.dtype for name, t in inputs.tensors.items()}
    return {name: t.to(types[name]) for name, t in baseline.items()}, oracle, terms


def expected(case: Case, as_tf32: bool = False) -> tuple[Results, Results, Results]:
    """What the case's results are judged by: computed once for all backends and both checkpoints. ``as_tf32``: those of
    kernels that multiply float32 as TF32."""
    return _expected(replace(case, checkpoint="none"), as_tf32)


@functools.lru_cache(maxsize=1024)
def _expected(case: Case, as_tf32: bool) -> tuple[Results, Results, Results]:
    with tf32.Products() if as_tf32 else contextlib.nullcontext():
        return judge(case, make_inputs(case))


def compare(
    case: Case, results: Results, baseline: Results, oracle: Results, terms: Results, as_tf32: bool = False
) -> dict[str, BudgetReport]:
    """A report for each result."""
    assert results.keys() == oracle.keys() == baseline.keys()
    reports = {}
    for name in oracle:
        # Products are in the weight's type; the stream, and so y, need not be.
        inputs = None if name == "y" else tf32.DTYPE if as_tf32 else case.dtype
        reports[name] = within_budget(results[name], baseline[name], oracle[name], inputs=inputs, terms=terms.get(name))
    return reports


def check(case: Case, target: Target) -> None:
    """Forward and all gradients of the case within the budget on the target."""
    with target.active():
        results = run(case, make_inputs(case))
    for name, report in compare(case, results, *expected(case)).items():
        report.check(f"{case} on {target}: {name}")


def same(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
