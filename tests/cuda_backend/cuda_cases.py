"""Calls that the CUDA kernels serve: every option alone and with others, at head dimensions and widths of theirs."""

from __future__ import annotations

from dataclasses import replace

import tf32
import torch
from cases import Case, Inputs, make_inputs, random_case
from harness import Results, baseline_and_oracle, dense_reference, expected, terms_of
from residual_mlp_cases import Case as Mlp
from residual_mlp_cases import random_case as random_mlp

HALF = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32,)


def attention_cases(
    count: int, head_dims: tuple[tuple[int, int], ...], longest: int, dtypes: tuple[torch.dtype, ...] = HALF
) -> list[Case]:
    """The generator's calls in these types, at these head dimensions and of no more than ``longest`` rows."""
    found, seed = [], 1000
    while len(found) < count:
        case = random_case(seed)
        d, dv = head_dims[seed % len(head_dims)]
        seed += 1
        if case.dtype not in dtypes:
            dtype = dtypes[seed % len(dtypes)]
            case = replace(case, dtype=dtype, gate_dtype=None, sink_dtype=None, mask_dtype=None)
        sq, sk = min(case.sq, longest), min(case.sk, 2 * longest)
        found.append(replace(case, d=d, dv=dv, sq=sq, sk=sk))
    return found


def expected_of(case: Case) -> tuple[torch.dtype, tuple[Results, Results, Results]]:
    """The type whose precision the call has; baseline, oracle and the sizes of terms. Float32 is multiplied as TF32."""
    if case.dtype != torch.float32:
        return case.dtype, expected(case)
    inputs, reference = make_inputs(case), dense_reference(case)

    def run_baseline(inputs: Inputs, _: Results) -> Results:
        with tf32.Products():
            return reference(inputs)

    baseline, oracle = baseline_and_oracle(reference, inputs, run_baseline=run_baseline)
    return tf32.DTYPE, (baseline, oracle, terms_of(case, inputs, oracle))


def mlp_cases(count: int, widths: tuple[int, ...], longest: int, dtypes: tuple[torch.dtype, ...] = HALF) -> list[Mlp]:
    """The same of the residual MLP, with weights of these types."""
    found, seed = [], 1000
    while len(found) < count:
        case = random_mlp(seed)
        width = widths[seed % len(widths)]
        seed += 1
        if case.dtype not in dtypes:
            floats = dict.fromkeys(("x_dtype", "bias_dtype", "ln_weight_dtype", "ln_bias_dtype"))
            case = replace(case, dtype=dtypes[seed % len(dtypes)], **floats)
        rows = case.rows if case.batch <= longest else (longest,)
        found.append(replace(case, width=width, rows=rows, blocks=min(case.blocks, 2)))
    return found
