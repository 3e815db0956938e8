"""The deep residual MLP's Triton kernels against the float64 oracle, with the error budget of every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mlp import KINDS, TRITON, failures, in_both, launched_as, results_of, small
from residual_mlp_cases import Case, make_inputs, random_case
from residual_mlp_harness import call, run, same

from nsk.backends.triton import residual_mlp
from nsk.ops.residual_mlp import residual_mlp_call
from nsk.spec.residual_mlp import allocate_forward

OPTIONS = {
    "plain": dict(),
    "relu": dict(activation="relu", blocks=1),
    "gelu": dict(activation="gelu_tanh", layers_per_block=3),
    "checkpoint": dict(checkpoint="block", blocks=3),
    "one layer a block": dict(layers_per_block=1, blocks=3),
    "one layer": dict(layers_per_block=1, blocks=1, checkpoint="block"),
    "whole tiles": dict(rows=(32,), width=32),
    "one row": dict(rows=()),
    "width 1": dict(width=1, eps=0.1),
    "width 17": dict(width=17, rows=(3, 1, 7)),
    "no rows": dict(rows=(0,)),
    "groups": dict(groups=2, checkpoint="block"),
    "shared x": dict(groups=3, shared_x=True, rows=(5,)),
    "eps": dict(eps=0.1, gain=3e-3),
    "large mean": dict(bias_mean=4.0, x_mean=3.0),
    "float32 around": {f"{name}_dtype": torch.float32 for name in ("x", "bias", "ln_weight", "ln_bias")},
    "float32 bias": dict(bias_dtype=torch.float32, groups=2),
    "layouts": dict(layouts=("padded", "sliced", "stepped", "padded", "expanded", "stepped"), groups=2),
    "transposed": dict(layouts=("transposed", "transposed", "expanded", "stepped", "dense", "transposed")),
    "scalar gradient": dict(layouts=("columns", "stepped", "dense", "dense", "sliced", "scalar")),
    "only x": dict(needs=("x",)),
    "only x, checkpoint": dict(needs=("x",), checkpoint="block"),
    "only weight": dict(needs=("weight",)),
    "only vectors": dict(needs=("bias", "ln_bias"), checkpoint="block"),
    "no gradient": dict(needs=()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, kind):
    for case in in_both(options):
        assert not failures(case, kind), str(case)


def _random(count: int):
    for seed in range(10_000):
        case = random_case(seed)
        work = case.batch * case.width**2 * case.depth * (case.groups or 1)
        if case.dtype in (torch.float32, torch.float16) and case.width <= 65 and case.batch <= 65 and work < 600_000:
            yield case
            count -= 1
            if not count:
                return


@pytest.mark.parametrize("case", list(_random(12)), ids=str)
def test_random_cases(case):
    assert not failures(case, ("rows", "tiles")[case.seed % 2])


def test_the_tables_own_tiles():
    """What a user's call launches: a narrow network, and one too wide for a row tile."""
    for sizes in (dict(width=100, rows=(70,), blocks=1), dict(width=257, rows=(3,), blocks=1)):
        case = small(**sizes)
        with TRITON.active():
            inputs = make_inputs(case)
            y = call(case, inputs.tensors)
            with launched_as("tiles"):
                other = call(case, inputs.tensors)
        torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits(kind):
    """Twice the same; computed again or kept; in one pass of the backward or in several."""
    case = small(rows=(17,), width=20, blocks=3, groups=2 if kind == "rows" else None)
    kept = results_of(case, kind)
    assert same(kept, results_of(case, kind))
    again = replace(case, checkpoint="block")
    for blocks in (None, 1, 2):
        assert same(kept, results_of(again, kind, blocks))
    assert same(kept, results_of(case, kind, 2))


def test_a_network_of_its_own():
    """A group's results are those of the network alone."""
    case = small(groups=3)
    together, inputs = results_of(case, "rows"), make_inputs(case)
    with TRITON.active(), launched_as("rows"):
        for i in range(3):
            alone = call(small(), {name: t.detach()[i] for name, t in inputs.tensors.items()})
            assert torch.equal(alone, together["y"][i])


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_launches(watch, checkpoint):
    """At most three launches a block in training, in however many passes, and far fewer in one."""
    blocks = 4
    case = small(blocks=blocks, layers_per_block=4, width=8, checkpoint=checkpoint)
    results_of(case, "rows", blocks_per_pass=2)
    assert watch.launches.total() <= 3 * blocks, watch.launches
    watch.launches.clear()
    results_of(case, "rows")
    assert watch.launches.total() <= 6, watch.launches


def test_launches_of_a_deep_network(watch):
    """1024 layers, as the tables launch them: one launch for inference, and for training not one more per block."""
    case = Case(rows=(2,), width=16, blocks=256, layers_per_block=4, needs=("x", "ln_bias"))
    with torch.no_grad(), TRITON.active():
        y = call(case, make_inputs(case).tensors)
    assert y.isfinite().all()
    assert dict(watch.launches) == {"forward_rows": 1}
    watch.launches.clear()
    with TRITON.active():
        results = run(case, make_inputs(case))
    assert torch.equal(results["y"], y)
    assert dict(watch.launches) == {"forward_rows": 1, "backward_rows": 1, "vector_gradients": 1}
    watch.launches.clear()
    results_of(small(rows=(2,), width=8, blocks=32, layers_per_block=2), "rows")  # all parameters' gradients
    expected = {"forward_rows": 1, "backward_rows": 1, "weight_gradients": 2, "vector_gradients": 1}
    assert dict(watch.launches) == expected


def test_launches_of_a_wide_network(watch):
    """One per layer and one more; forward and backward alike."""
    case = small(rows=(5,), width=24, blocks=2)
    results_of(case, "tiles")
    assert watch.launches["forward_tiles"] == watch.launches["backward_tiles"] == case.depth + 1


@pytest.mark.parametrize("keep", [False, True])
def test_bytes(watch, keep):
    """The forward reads x once and every program the parameters once; it writes y once, and what is kept."""
    case = small(rows=(48,), width=32, needs=())
    mlp = residual_mlp_call({**make_inputs(case).tensors, **case.options})
    y, kept = allocate_forward(mlp, keep, keep)
    with launched_as("rows"):
        residual_mlp.forward(mlp, y, kept)
    parameters = (mlp.weight, mlp.bias, mlp.ln_weight, mlp.ln_bias)
    assert watch.read.total() == mlp.x.numel() + 48 // 16 * sum(t.numel() for t in parameters)
    assert watch.reads(mlp.x) == mlp.x.numel()
    assert watch.written.total() == y.numel() + sum(t.numel() for t in kept.tensors())


@pytest.mark.parametrize("kind", KINDS)
def test_far_addresses(kind):
    """Rows, layers and groups that lie more than 2^31 elements apart."""
    far = 2**31 + 64

    def spread(t: torch.Tensor) -> torch.Tensor:
        room = torch.empty(
            1 + sum((n - 1) * s for n, s in zip(t.shape[:1], (far,), strict=True)) + t[0].numel(), dtype=t.dtype
        )
        return room.as_strided(t.shape, (far, *t.stride()[1:])).copy_(t)

    case = small(groups=2, rows=(3,), blocks=1)
    inputs = make_inputs(case)
    near = {name: t.detach() for name, t in inputs.tensors.items()}
    apart = {name: spread(t) for name, t in near.items()}
    rows = spread(near["x"][0])  # three rows
    with TRITON.active(), launched_as(kind):
        assert torch.equal(call(case, apart), call(case, near))
        one = {name: t[0] for name, t in near.items()}
        assert torch.equal(call(small(rows=(3,), blocks=1), one | {"x": rows}), call(small(rows=(3,), blocks=1), one))
