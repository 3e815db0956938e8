"""The correctness gate: no time is worth reporting for a wrong result.

The whole result of the *timed* function, and in training every gradient, is held against the error budget: the float64
oracle and the baseline in the case's own type are the reference, run in full, block by block. Its backward recomputes
one block at a time, so that even the deepest network's needs seconds and little memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.residual_mlp.cases import LAYERS_PER_BLOCK
from benchmarks.residual_mlp.inputs import EPS, Inputs
from benchmarks.workload import Case, Verdict
from nsk.reference.budget import within_budget
from nsk.reference.residual_mlp import residual_mlp_reference
from nsk.spec.residual_mlp import ACTIVATIONS, ResidualMlpCall

NAMES = ("y", "grad x", "grad weight", "grad bias", "grad ln_weight", "grad ln_bias")


class Gate:
    """Computes the truth when it is first asked, and keeps it for every arm of the case."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._truth: tuple[list[Tensor], list[Tensor]] | None = None

    def __call__(self, results: list) -> Verdict:
        """Holds what an arm returned against the budget."""
        if self._truth is None:
            self._truth = tuple(evaluate(self._inputs, wide) for wide in (False, True))
        baselines, oracles = self._truth
        worst_used, worst_error, reasons = 0.0, None, []
        for name, result, baseline, oracle in zip(NAMES, gathered(results, oracles), baselines, oracles, strict=False):
            report = within_budget(result, baseline, oracle)
            worst_used = max(worst_used, report.used)
            if report.baseline_rms_error > 0:
                worst_error = max(worst_error or 0.0, report.rms_error / report.baseline_rms_error)
            reasons += [f"{name}: {reason}" for reason in report.reasons]
        return Verdict(worst_error, worst_used, tuple(reasons))


def gathered(results: list, like: list[Tensor]) -> list[Tensor]:
    """An arm's results in the shapes of ``like``: gradients of single layers stacked, JAX's arrays as tensors."""
    tensors = [t if isinstance(t, Tensor) else _tensor(t) for t in results]
    if len(tensors) > len(like):  # y, x's gradient, and as many of each kind as there are layers
        kinds, rest = len(like) - 2, tensors[2:]
        layers = len(rest) // kinds
        tensors[2:] = [torch.stack(rest[k * layers : (k + 1) * layers]) for k in range(kinds)]
    return [t.reshape(shaped.shape) for t, shaped in zip(tensors, like, strict=True)]


def _tensor(array) -> Tensor:
    return torch.from_numpy(np.array(array.astype("float32"))).to(getattr(torch, array.dtype.name))


def evaluate(inputs: Inputs, wide: bool) -> list[Tensor]:
    """``y`` and the gradients of what has one, by the reference: in float64, or in the inputs' own types."""

    def typed(t: Tensor) -> Tensor:
        return t.detach().double() if wide else t.detach()

    x, axis = typed(inputs.x), inputs.layer_axis
    blocks = list(zip(*(typed(t).split(LAYERS_PER_BLOCK, axis) for t in inputs.parameters), strict=True))
    h = x.to(torch.float64 if wide else torch.float32)
    stream = []
    with torch.no_grad():
        for block in blocks:
            stream.append(h)
            h = _block(h, block)
    results = [h.to(x.dtype)]
    if inputs.grad_y is None:
        return results

    trained = inputs.parameters[0].requires_grad
    grad, grads = inputs.grad_y.to(h.dtype), []
    while stream:
        h, block = (t.pop() for t in (stream, blocks))
        h, *leaves = (t.detach().requires_grad_() for t in (h, *block))
        grad, *of_block = torch.autograd.grad(_block(h, leaves), [h, *leaves] if trained else [h], grad)
        grads.append(of_block)
    kinds = zip(*reversed(grads), strict=True)
    return [*results, grad.to(x.dtype), *(torch.cat(kind, axis) for kind in kinds)]


def _block(h: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """One residual block on the stream, in the stream's type."""
    return residual_mlp_reference(ResidualMlpCall(h, *parameters, EPS, LAYERS_PER_BLOCK, ACTIVATIONS.index("silu")))
