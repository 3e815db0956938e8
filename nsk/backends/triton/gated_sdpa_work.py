"""FLOPs and bytes of the passes of gated attention, for one stated workload."""

from __future__ import annotations

from nsk.backends.triton.blocks import Options
from nsk.backends.triton.gated_sdpa_launch import GATES, MASKS
from nsk.backends.triton.tables import Table

BATCH, HEADS, KV_HEADS, LENGTH = 4, 16, 4, 4096
WORKLOAD = (
    f"gated_sdpa: batch {BATCH}, {HEADS} query and {KV_HEADS} KV heads, {LENGTH} queries and keys, causal; decode and "
    f"join: 1 query over {LENGTH} keys"
)
# Products of a tile of queries with one of keys, of 2 * D FLOPs a pair.
PRODUCTS = {"forward": 2, "dq": 3, "dkdv": 4, "dk": 3, "dv": 2}


def work_of(name: str, o: Options, size: int, table: Table) -> tuple[int, int]:
    """FLOPs, and bytes moved if each tensor is read or written once; ``size`` is that of an element in bytes. Zeros
    where the workload says nothing of the options."""
    if o.LEFT or o.SOFTCAP or o.PACKED or MASKS["none"] != o.MASK:
        return 0, 0
    rows = BATCH * HEADS * LENGTH
    queries, keys, column = rows * o.DV * size, BATCH * KV_HEADS * LENGTH * o.DV * size, 4 * rows
    gate = {GATES["none"]: 0, GATES["elementwise"]: rows * o.DV, GATES["headwise"]: rows}[o.GATE] * size
    if name in PRODUCTS:
        flops = PRODUCTS[name] * 2 * o.D * BATCH * HEADS * (LENGTH * (LENGTH + 1) // 2)
        factors = column * (2 + o.WEIGHT)  # lse, delta, weight
        moved = {
            "forward": 2 * queries + 2 * keys + gate + column,
            "dq": 3 * queries + 2 * keys + factors,
            "dkdv": 2 * queries + 4 * keys + factors,
            "dk": 2 * queries + 3 * keys + factors,
            "dv": 2 * queries + 2 * keys + factors,
        }
        return flops, moved[name]
    if name == "rows":
        scaled = queries if GATES["elementwise"] == o.GATE else 0
        return 0, 2 * queries + 2 * gate + scaled + column * (2 + o.WEIGHT)
    one = BATCH * HEADS  # rows of a decode
    programs = BATCH * KV_HEADS
    parts = min(2 * table.multiprocessors // programs, -(-LENGTH // (2 * table.decode.n)))
    partial = 4 * parts * one * (o.DV + 2)
    if name == "decode":
        return 4 * o.D * one * LENGTH, 2 * keys + one * o.D * size + partial
    if name == "join":
        return 0, partial + one * (o.DV * size + 4) + gate // LENGTH
    return 0, 0
