"""What launches of the CUDA kernels take at least on three devices: predicted by counting, nothing is measured.

A launch takes as long as the slowest of four roofs:

  products   its FLOPs at the rate of ``mma.sync``, on the multiprocessors that its blocks keep busy
  memory     what it reads and writes, each tensor once, at the device memory's bandwidth
  L2         what its blocks bring into shared memory, all together: other blocks' copies of the same tiles come from
             the second-level cache
  one SM     the same, of the multiprocessor with the most blocks
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nsk.backends.triton.targets import TARGETS, Target

# Assumptions, none from a data sheet. Clocks under load. The share of the peak that mma.sync reaches: all of it on
# sm_80, which has nothing faster; 63 % on sm_90, a published microbenchmark; on sm_100 nobody has said, so per
# multiprocessor and clock as on sm_90. Bytes per clock and multiprocessor from L2: 64 for one, 24 for each of all (5.5
# TB/s on an H100). Microseconds between the launches of a stream and of a graph, as published for an H100.
CLOCKS = {"sm_80": 1.41e9, "sm_90": 1.755e9, "sm_100": 1.85e9}
MMA_SYNC = {"sm_80": 1.0, "sm_90": 0.63, "sm_100": 0.31}
L2_OF_ONE, L2_OF_ALL = 64, 24
GAP_OF_STREAM, GAP_OF_GRAPH = 2.1, 1.3

ASSUMPTIONS = (
    "predictions, nothing is measured: a floor, the slowest of four roofs; latencies and barriers come on top",
    "  products: FLOPs at mma.sync's rate (of the data sheet's peak: "
    + ", ".join(f"{name} {share:.0%}" for name, share in MMA_SYNC.items())
    + "; sm_90 as published, sm_100 assumed) on the multiprocessors that have blocks",
    "  memory: each tensor once at the data sheet's bandwidth",
    f"  L2: what blocks copy to shared memory, at {L2_OF_ALL} bytes a clock and multiprocessor for all together (5.5 "
    f"TB/s on an H100); one SM: the busiest multiprocessor's share at {L2_OF_ONE} bytes a clock; both assumed",
    "  clocks, assumed: " + ", ".join(f"{TARGETS[name].device} {clock / 1e9} GHz" for name, clock in CLOCKS.items()),
    "  launches of the pass, here and eager's, derived and not profiled: residual_mlp has 3 a layer forward (product, "
    "LayerNorm, activation), 6 backward, 1 a block each way for the sum; gated_sdpa has fused attention (1 forward, 3 "
    "backward, 2 for decode), sigmoid and product with their 3 gradients",
    f"  gaps: eager's launches at {GAP_OF_STREAM} us each in a stream, {GAP_OF_GRAPH} us each in a CUDA graph "
    "(published for an H100, taken for all); here it is the few launches of the pass times the same",
)


@dataclass(frozen=True)
class Work:
    """One launch: FLOPs, bytes of device memory, bytes that blocks copy to shared memory, and how many blocks.

    launches, eager: of the whole pass that it is part of; 0 for those beside the pass's first.
    """

    name: str
    target: Target
    flops: int
    bytes: int
    streamed: int
    blocks: int
    launches: int = 0
    eager: int = 0

    def roofs(self) -> dict[str, float]:
        """Seconds, by what takes them."""
        target, clock = self.target, CLOCKS[self.target.name]
        units = target.multiprocessors
        waves = -(-self.blocks // units)
        return {
            "products": self.flops / (target.flops * MMA_SYNC[target.name] * min(1.0, self.blocks / units)),
            "memory": self.bytes / target.bandwidth,
            "L2": self.streamed / (L2_OF_ALL * units * clock),
            "one SM": self.streamed / self.blocks * waves / (L2_OF_ONE * clock),
        }


def works() -> Iterator[Work]:
    for name in CLOCKS:
        yield from _attention(TARGETS[name])
        for depth in (64, 1024):
            yield from _mlp(TARGETS[name], depth)


def _attention(target: Target) -> Iterator[Work]:
    """The shapes of Triton's cells, with heads of 128 and an elementwise gate in bf16."""
    from nsk.backends.triton.gated_sdpa_work import BATCH, HEADS, KV_HEADS, LENGTH, PRODUCTS

    d, tile, size = 128, 64, 2
    rows, row = BATCH * HEADS * LENGTH, d * size
    queries, keys, numbers = rows * row, BATCH * KV_HEADS * LENGTH * row, rows * 4
    # Each block of 64 rows takes two tensors' rows, of those that a causal mask lets it see: half of them and half a
    # tile. For dK and dV the rows are queries', four heads' of them for one of the keys.
    streamed = rows // tile * (LENGTH + tile) // 2 * 2 * row
    flops = {name: n * 2 * d * BATCH * HEADS * (LENGTH * (LENGTH + 1) // 2) for name, n in PRODUCTS.items()}
    shape = f"batch {BATCH}, {HEADS}/{KV_HEADS} heads of {d}, {LENGTH} causal"
    yield Work(
        f"gated_sdpa forward, {shape}", target, flops["forward"], 3 * queries + 2 * keys + numbers, streamed,
        rows // tile, 1, 3,
    )  # fmt: skip
    yield Work(
        f"gated_sdpa dq, {shape}", target, flops["dq"], 3 * queries + 2 * keys + 2 * numbers, streamed, rows // tile,
        3, 6,
    )  # fmt: skip
    yield Work(
        f"gated_sdpa dkdv, {shape}", target, flops["dkdv"], 2 * queries + 4 * keys + 2 * numbers, streamed,
        BATCH * KV_HEADS * LENGTH // tile,
    )  # fmt: skip
    heads = BATCH * KV_HEADS
    parts = min(2 * target.multiprocessors // heads, -(-LENGTH // 256))
    one = BATCH * HEADS
    yield Work(
        f"gated_sdpa decode, batch {BATCH}, {HEADS}/{KV_HEADS} heads of {d}, 1 query over {LENGTH}", target,
        4 * d * one * LENGTH, 2 * keys + one * row + parts * one * (d + 2) * 4, 2 * keys, heads * parts, 2, 4,
    )  # fmt: skip


def _mlp(target: Target, depth: int, batch: int = 512, width: int = 256, per_block: int = 4) -> Iterator[Work]:
    """bf16, of few rows: tiles of 16. Every tile streams all weights, forward once, backward twice."""
    size, tile, slab = 2, 16, batch * width
    product, weights = 2 * slab * width * depth, depth * width * (width + 3) * size
    tiles, blocks = batch // tile, depth // per_block
    shape = f"batch {batch}, width {width}, depth {depth}"
    stream = blocks * slab * 4  # what a forward keeps for its backward
    operands = 2 * depth * slab * size  # of dW: every layer's inputs and gradients
    partial = depth * tiles * 3 * width * 4
    yield Work(
        f"residual_mlp forward, {shape}", target, product, weights + 2 * slab * size + stream, tiles * weights, tiles,
        1, 3 * depth + blocks,
    )  # fmt: skip
    yield Work(
        f"residual_mlp backward, {shape}", target, 2 * product,
        weights + 2 * slab * size + stream + operands + partial, 2 * tiles * weights, tiles, 3, 6 * depth + blocks,
    )  # fmt: skip
    across = width // 64  # blocks take 64 x 64 of dW, so each row of either operand is read that often
    yield Work(
        f"residual_mlp weight_gradient, {shape}", target, product, operands + depth * width * width * size,
        across * operands, across * across * depth,
    )  # fmt: skip
