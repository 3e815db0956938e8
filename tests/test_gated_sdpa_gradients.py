"""Which gradients are computed, where they live, what backward keeps and how much memory it all takes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from cases import DIFFERENTIABLE, LAYOUTS, Case, make_inputs
from harness import Target, run
from torch.utils._python_dispatch import TorchDispatchMode

import nsk

EVERYTHING = Case(seed=7, mask="float", mask_dims="1hqk", sink=True, softcap=9.0, causal="bottom_right")


def with_needs(case: Case, *needs: str) -> Case:
    return Case(**{name: getattr(case, name) for name in Case.__dataclass_fields__} | {"needs": needs})


class BackwardOutputs(TorchDispatchMode):
    """Records what the backward ops return."""

    def __init__(self):
        super().__init__()
        self.returned: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.nsk.gated_sdpa_backward.default:
            self.returned.append(tuple(result))
        return result


@pytest.mark.parametrize(
    "needs",
    [
        *itertools.combinations(DIFFERENTIABLE, 1),
        ("query", "gate"),
        ("key", "value"),
        ("gate", "sink"),
        ("attn_mask", "value"),
        ("query", "attn_mask", "sink"),
    ],
    ids="+".join,
)
def test_only_what_was_asked_for_is_computed_and_has_the_same_bits(needs, target: Target):
    everything = run(EVERYTHING, make_inputs(EVERYTHING))
    case = with_needs(EVERYTHING, *needs)
    with BackwardOutputs() as recorded:
        some = run(case, make_inputs(case))
    assert set(some) == {"out", "lse", *needs}
    for name in some:
        assert torch.equal(some[name], everything[name]), name
    (returned,) = recorded.returned
    assert [grad.shape for grad in returned] == [some[name].shape for name in DIFFERENTIABLE if name in needs]


def test_no_gradient_asked_for_means_no_graph(target: Target):
    case = with_needs(EVERYTHING)
    t = make_inputs(case).tensors
    out, lse = nsk.gated_sdpa(t["query"], t["key"], t["value"], t["gate"], return_lse=True)
    assert not out.requires_grad
    assert not lse.requires_grad


def test_gradient_of_lse_alone(target: Target):
    """Values and gate do not reach lse: their gradients are zero, the others those of logsumexp."""
    t = make_inputs(EVERYTHING).tensors
    _, lse = nsk.gated_sdpa(t["query"], t["key"], t["value"], t["gate"], return_lse=True)
    query, key, value, gate = torch.autograd.grad(
        lse.sum(), [t[n] for n in ("query", "key", "value", "gate")], allow_unused=True
    )
    assert value is None or not value.any()
    assert gate is None or not gate.any()
    q, k = (t[n].detach().double().requires_grad_() for n in ("query", "key"))
    scores = q @ k.repeat_interleave(2, 1).mT * EVERYTHING.d**-0.5
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), [q, k])
    torch.testing.assert_close(query.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(key.double(), expected[1], rtol=1e-4, atol=1e-5)


def test_incoming_gradient_of_stride_zero(target: Target):
    t = make_inputs(EVERYTHING).tensors
    leaves = [t[n] for n in ("query", "key", "value", "gate")]

    def gradients(reduce):
        return torch.autograd.grad(reduce(nsk.gated_sdpa(*leaves, is_causal=True)), leaves)

    expanded = gradients(lambda out: out.sum())
    dense = gradients(lambda out: (out * torch.ones_like(out)).sum())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_follow_the_dimension_order_of_their_input(layout: str, target: Target):
    case = Case(seed=3, layouts=(layout,) * 5)
    inputs = make_inputs(case)
    t = inputs.tensors
    out = nsk.gated_sdpa(t["query"], t["key"], t["value"], t["gate"])
    out.backward(inputs.grad_out)
    assert out.shape == (case.batch, case.heads, case.sq, case.dv)
    assert out.dtype == case.dtype
    assert out.stride(-1) == 1
    for name in ("query", "key", "value", "gate"):
        assert t[name].grad.shape == t[name].shape
        assert t[name].grad.dtype == t[name].dtype
    if layout in ("transposed", "chunk"):
        assert out.transpose(1, 2).is_contiguous()
    if layout == "dense":
        assert out.is_contiguous()


def test_saved_for_backward_are_inputs_and_results_only(target: Target):
    inputs = make_inputs(EVERYTHING)
    t = inputs.tensors
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = nsk.gated_sdpa(
            t["query"], t["key"], t["value"], t["gate"], attn_mask=t["attn_mask"], sink=t["sink"],
            return_lse=True, **EVERYTHING.options,
        )  # fmt: skip
    known = {x.data_ptr(): name for name, x in {**t, "out": out, "lse": lse}.items()}
    # All but a scalar that names the backend.
    assert sorted(known.get(x.data_ptr(), f"{x.dtype} {tuple(x.shape)}") for x in saved) == sorted(
        [*known.values(), "torch.int8 ()"]
    )


def test_saved_tensors_may_be_packed_elsewhere(target: Target):
    """Offloading hooks give backward other tensors of the same values."""
    expected = run(EVERYTHING, make_inputs(EVERYTHING))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        moved = run(EVERYTHING, make_inputs(EVERYTHING))
    assert all(torch.equal(moved[name], expected[name]) for name in expected)


_PEAK = """
import json, resource, sys
import torch, nsk
S, D = 16384, 16
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def call(s):
    q, k, v, g = (torch.randn(1, 1, s, D, requires_grad=True) for _ in range(4))
    with nsk.use_backend("cpu"):
        mask = (torch.arange(s) % 7 > 0)[None, None, None, :]
        out = nsk.gated_sdpa(q, k, v, g, attn_mask=mask, is_causal=True, window=(4096, 0))
        out.sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
call(300)
before = peak()
call(S)
print(json.dumps(dict(grown=peak() - before, matrix=S * S * 4)))
"""


def test_nothing_of_size_queries_times_keys_is_allocated():
    """A byte for each pair of query and key would be 256 MiB here; a float 1 GiB."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["grown"] < report["matrix"] / 16, report
