"""Every launch that the tables promise compiles for its architecture, within what that architecture has: no spills, no
more registers and shared memory than there are, the matrix instructions that the tile is meant for, asynchronous
copies, and no kernel that is nothing but a trap. The cells are those that differ: ``python -m benchmarks.aot`` compiles
all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import HAS_TRITON

pytestmark = [pytest.mark.aot, pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")]

if HAS_TRITON:
    from benchmarks.aot.cells import all_cells, all_refusals
    from benchmarks.aot.check import problems
    from benchmarks.aot.compile import compile_all
    from benchmarks.aot.inspect import Report, overwritten, unfenced
    from benchmarks.aot.table import lines
    from nsk.backends.triton.targets import TARGETS

    CELLS = [cell for cell in all_cells() if cell.everyday]
else:
    CELLS = []


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest):
    """What came out of the cells of this session's tests, one compilation per core at a time."""
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_cell"]
    return compile_all([item.callspec.params["cell"] for item in tests])


@pytest.mark.timeout(1800)  # the first one waits for all
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name.replace(" ", "-"))
def test_cell(cell, reports):
    report = reports[cell.name]
    found = problems(cell, report)
    assert not found, f"{cell.name}: {'; '.join(found)}\n{report}"


def test_all_architectures_are_compiled_for():
    for op in ("gated_sdpa", "residual_mlp"):
        targets = {cell.target.family for cell in CELLS if cell.op == op}
        assert targets == {target.family for target in TARGETS.values()}, op


def test_refusals_say_why():
    for refusal in all_refusals():
        assert len(refusal.reason.split()) > 2, refusal


def good(cell) -> Report:
    mma = {cell.mma_kind or cell.target.mma: 8}
    return Report(registers=128, shared=1024, warps=4, instructions=900, mma=mma, asynchronous=4)


FLAWS = {
    "spills": dict(stack=8, spills=2),
    "registers": dict(registers=256),
    "shared memory": dict(shared=227 * 1024 + 1),
    "tensor memory": dict(tensor_memory=576),
    "a bare trap": dict(instructions=16, traps=1, mma={}),
    "another kind": dict(mma={"HMMA": 64}),
    "two kinds": dict(mma={"HGMMA": 8, "HMMA": 64}),
    "no tensor cores": dict(mma={}),
    "no asynchronous copies": dict(asynchronous=0),
    "no fence": dict(unfenced=4),
    "an operand in motion": dict(overwritten=1),
    "no kernel": dict(error="RuntimeError: PassManager::run failed"),
}


@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_flaws_are_found(flaw):
    """Each of these was seen to come out of a compilation that reported success."""
    cell = next(c for c in CELLS if c.target.name == "sm_90" and c.mma and not c.mma_kind and c.asynchronous)
    assert not problems(cell, good(cell))
    flawed = replace(good(cell), **flaw)
    assert problems(cell, flawed)
    text = "\n".join(lines({cell.name: flawed}, [cell], []))
    assert f"FAILS    {cell.name}" in text
    assert "0 of 1 cells pass" in text


WAIT, FENCE, PRODUCT = (
    "cp.async.wait_group 0;\n",
    "fence.proxy.async.shared::cta;\n",
    "wgmma.mma_async.sync.aligned ...\n",
)


@pytest.mark.parametrize(
    ("ptx", "count"),
    [
        (PRODUCT, 0),
        (WAIT + FENCE + PRODUCT * 2, 0),
        (WAIT + PRODUCT * 2, 2),
        (FENCE + WAIT + PRODUCT, 1),
        (PRODUCT + WAIT, 1),  # around a loop
        (FENCE + PRODUCT + WAIT, 0),
        (WAIT + FENCE + PRODUCT + WAIT + "tcgen05.mma.cta_group::1 ...", 1),
    ],
)
def test_a_missing_fence_is_seen(ptx, count):
    assert unfenced(ptx) == count


LOOP = """
  %t = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable>
  %w = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xbf16, #shared1, #smem, mutable>
    %t_1 = ttg.memdesc_index %t[%i] : ...
    %w_1 = ttg.memdesc_index %w[%i] : ...
    %w_2 = ttg.memdesc_trans %w_1 {{order = array<i32: 1, 0>}} : ...
    %z_1 = ttng.warp_group_dot %t_1, %w_2, %z {{isAsync = true}} : ...
    %z_2:3 = ttng.warp_group_dot_wait %z_1, %t_1, %w_2 {{pendings = {pendings} : i32}} : ...
"""


@pytest.mark.parametrize(("buffers", "pendings", "count"), [(1, 1, 1), (2, 1, 0), (1, 0, 0)])
def test_an_operand_that_is_overwritten_is_seen(buffers, pendings, count):
    assert overwritten(LOOP.format(buffers=buffers, pendings=pendings)) == count
