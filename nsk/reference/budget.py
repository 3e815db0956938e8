"""How wrong may a kernel be? No more than twice as wrong as plain PyTorch in the same type.

Three values of one tensor are compared: the kernel's ``result``, the ``baseline`` (the eager reference in the inputs'
own type) and the ``oracle`` (the reference in float64 on the same, already rounded, inputs). A fixed tolerance either
fails honest rounding or passes a sign error; the baseline's own error is the yardstick that scales with the type, the
length of the sums and the values. The few-eps slack is what rounding one number, or adding it up in another order, may
cost where the baseline happens to be exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RATIO = 2.0
SLACK = 4.0


class BudgetExceeded(AssertionError):
    """A result that is further from the oracle than its budget allows."""


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """The errors of one tensor, what was allowed, and every reason why the result fails (none when it passes)."""

    max_error: float
    max_allowed: float
    baseline_max_error: float
    rms_error: float
    rms_allowed: float
    baseline_rms_error: float
    reasons: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.reasons

    @property
    def used(self) -> float:
        """The share of the budget that the result used up, of max or RMS, whichever is larger; 1 is the limit."""
        shares = ((self.max_error, self.max_allowed), (self.rms_error, self.rms_allowed))
        return max(0.0 if error == 0 else error / allowed if allowed else float("inf") for error, allowed in shares)

    def check(self, name: str = "result") -> BudgetReport:
        """Raises :class:`BudgetExceeded` with the reasons, or returns the report."""
        if self.reasons:
            raise BudgetExceeded(f"{name}: " + "; ".join(self.reasons))
        return self


def within_budget(
    result: Tensor,
    baseline: Tensor,
    oracle: Tensor,
    *,
    inputs: torch.dtype | None = None,
    terms: Tensor | None = None,
) -> BudgetReport:
    """Holds ``result`` against its budget; look at ``.ok`` or call ``.check(name)``.

    Args:
        result: the kernel's tensor, any floating type.
        baseline: the same tensor computed by eager PyTorch in the same type.
        oracle: the same tensor in float64.
        inputs: the coarsest type that took part, where that is not the tensor's own (a float32 gate's gradient in a
            call on bfloat16); eps is that type's.
        terms: the sizes of the terms that each value sums up. Where they are larger than the oracle, as in a sum that
            cancels to nothing (the query's gradient of a row with a single key), they replace it in the slack, since
            no summation is more accurate than its terms.

    Passes when shape and type agree with the baseline, NaN and infinities stand exactly where the oracle has them,
    ``max error <= 2 x baseline's + 4 eps max|oracle|`` and ``RMS error <= 2 x baseline's + slack x RMS(oracle)``,
    where the slack is one rounding to the type and four in the accumulator's (float32 for half types): a few percent
    of RMS would hide a flaw in bfloat16.

    >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> within_budget(exact.float(), exact.float(), exact).ok
    True
    >>> within_budget(-exact.float(), exact.float(), exact).ok
    False
    """
    if result.shape != oracle.shape or result.dtype != baseline.dtype:
        given, expected = f"{result.dtype} {tuple(result.shape)}", f"{baseline.dtype} {tuple(oracle.shape)}"
        nan = float("nan")
        return BudgetReport(nan, nan, nan, nan, nan, nan, (f"got {given}, expected {expected}",))

    reasons = []
    eps = torch.finfo(baseline.dtype).eps
    if inputs is not None:
        eps = max(eps, torch.finfo(inputs).eps)
    accumulator_eps = min(eps, torch.finfo(torch.float32).eps)
    result, baseline, oracle = (t.detach().to(torch.float64) for t in (result, baseline, oracle))
    finite = oracle.isfinite()
    # Positions where the oracle has NaN or an infinity must hold the very same; all others a finite number.
    same = torch.where(oracle.isnan(), result.isnan(), result == oracle)
    wrong = torch.where(finite, ~result.isfinite(), ~same)
    if count := int(wrong.sum()):
        where = tuple(wrong.nonzero()[0].tolist())
        reasons.append(
            f"{count} of {wrong.numel()} values non-finite where the oracle is not, or the reverse "
            f"(first at {where}: {result[where].item()}, oracle {oracle[where].item()})"
        )

    exact = torch.where(finite, oracle, 0)
    peak, rms = _max_and_rms(exact)
    if terms is not None:
        peak, rms = map(max, (peak, rms), _max_and_rms(terms.to(torch.float64)))
    max_error, rms_error = _max_and_rms(torch.where(finite & result.isfinite(), result - oracle, 0))
    baseline_max, baseline_rms = _max_and_rms(torch.where(finite & baseline.isfinite(), baseline - oracle, 0))
    max_allowed = RATIO * baseline_max + SLACK * eps * peak
    rms_allowed = RATIO * baseline_rms + (eps + SLACK * accumulator_eps) * rms
    if max_error > max_allowed:
        reasons.append(f"max error {max_error:.3e} > {max_allowed:.3e} (baseline's {baseline_max:.3e})")
    if rms_error > rms_allowed:
        reasons.append(f"RMS error {rms_error:.3e} > {rms_allowed:.3e} (baseline's {baseline_rms:.3e})")
    return BudgetReport(max_error, max_allowed, baseline_max, rms_error, rms_allowed, baseline_rms, tuple(reasons))


def _max_and_rms(t: Tensor) -> tuple[float, float]:
    if t.numel() == 0:
        return 0.0, 0.0
    return t.abs().max().item(), t.square().mean().sqrt().item()
