"""Flaws in the attention kernels: masks, rescaling, gate, gradients. Tests that cannot see them are none."""

from __future__ import annotations

import functools

import pytest
from attention import SMALL, failures, small
from cases import Case
from interpreter import mutated

from nsk.backends.triton import blocks, gated_sdpa_attend, gated_sdpa_decode, gated_sdpa_dkdv, gated_sdpa_dq
from nsk.backends.triton import gated_sdpa_mask_grad as mask_grad
from nsk.backends.triton import gated_sdpa_rows as rows

CAUSAL = dict(causal="top_left", sq=40, sk=40)
WINDOW = dict(window=(7, 3), sq=50, sk=50)
FLAWS = {
    "causal off by one": (blocks.visible, "gap <= place.right", "gap <= place.right + 1", CAUSAL),
    "window's right bound off by one": (blocks.visible, "gap <= place.right", "gap < place.right", WINDOW),
    "window's left bound off by one": (blocks.visible, "gap >= -place.left", "gap > -place.left", WINDOW),
    "last keys not masked": (blocks.visible, "(j < place.sk) & (i < place.sq)", "i < place.sq", dict(sk=37)),
    "boolean mask ignored": (blocks.visible, "!= 0)", "!= 7)", dict(mask="bool")),
    "float mask's -inf allowed": (blocks.visible, "(bias != -INFINITY)", "True", dict(mask="float", mask_dims="b1q1",
                                                                                    dead_rows=True, seed=3)),
    "mask of the transpose": (blocks.visible, "i) * mask.row + wide(j) * mask.column", "j) * mask.row + wide(i) * "
                              "mask.column", dict(mask="float", sq=33, sk=33)),
    "an edge taken for whole": (blocks.keys_of, "low + place.right + 1", "high + place.right + 1", CAUSAL),
    "a whole window too wide": (blocks.keys_of, "tl.maximum(high - place.left, 0)", "tl.maximum(low - place.left, 0)",
                                dict(window=(20, None), sq=80, sk=80)),
    "last block of keys skipped": (blocks.keys_of, "tl.maximum(high + place.right + 1, 0)",
                                   "tl.maximum(low + place.right + 1, 0)", dict(causal="top_left", sq=64, sk=64)),
    "first block of queries skipped": (blocks.queries_of, "begin = tl.maximum(low - place.right, 0)",
                                       "begin = tl.maximum(high - place.right, 0)", CAUSAL),
    "a whole block of queries too early": (blocks.queries_of, "tl.maximum(high - place.right, 0)",
                                           "tl.maximum(low - place.right, 0)", CAUSAL),
    "top-left for bottom-right": (blocks.place_of, "(sk - sq) * sizes.bottom_right", "(sk - sq) * 0",
                                  dict(causal="bottom_right")),
    "softcap missing": (blocks.score, "t * (place.softcap * unit_of(o.MASK))", "dots * (place.scale * unit_of(o.MASK))",
                        dict(softcap=2.0)),
    "rescale of the total missing": (gated_sdpa_attend.softmax_step, "total * rescale", "total", dict(sk=100)),
    "rescale of the output missing": (gated_sdpa_attend.attend, "acc * rescale[:, None]", "acc", dict(sk=100)),
    "wrong KV head": (gated_sdpa_attend.gated_sdpa_forward, "place.head // sizes.group", "place.head % 2",
                      dict(heads=4, kv_heads=2)),
    "gate dropped": (gated_sdpa_attend.normalise, "out = out * sigmoid(gate)", "out = out * 1.0", dict()),
    "gate's sign flipped": (gated_sdpa_attend.normalise, "factor * sigmoid(gate)", "factor * sigmoid(-gate)",
                            dict(gate="headwise")),
    "sink ignored": (gated_sdpa_attend.normalise, "exponential(sink - pivot, o.MASK)", "0.0", dict(sink=True)),
    "lse in base 2": (gated_sdpa_attend.normalise, "(top + tl.log2(total)) * LN2", "top + tl.log2(total)", dict()),
    "delta missing in dQ": (gated_sdpa_dq.dq_of, "(dp - delta[:, None])", "dp", dict()),
    "softcap's derivative missing in dQ": (gated_sdpa_dq.dq_of, "ds * (1.0 - t * t)", "ds", dict(softcap=2.0)),
    "scale missing in dQ": (gated_sdpa_dq.gated_sdpa_dq, "acc * place.scale", "acc", dict()),
    "weight missing in dV": (gated_sdpa_dkdv.dkdv_of, "weighted = p * factor[None, :]", "weighted = p",
                             dict(gate="headwise")),
    "group not summed": (gated_sdpa_dkdv.dkdv_of, "place.head * group + n // blocks", "place.head * group", dict()),
    "last query block of each head skipped": (gated_sdpa_dkdv.dkdv_of, "blocks = count_of(span, EDGES)",
                                              "blocks = tl.maximum(count_of(span, EDGES) - 1, 0)", dict(sq=40)),
    "gate missing in dO": (rows.gated_sdpa_rows, "(dy * opened)", "(dy)", dict()),
    "gate's derivative missing": (rows.gated_sdpa_rows, "dy * y * sigmoid(-logits)", "dy * y", dict()),
    "headwise derivative missing": (rows.gated_sdpa_rows, "total * sigmoid(-logits)", "total", dict(gate="headwise")),
    "gradient of lse ignored": (rows.gated_sdpa_rows, "change -= ", "change += 0 * ", dict()),
    "delta not shared with the sink": (rows.gated_sdpa_rows, "change = share * total", "change = 1.0 * total",
                                       dict(sink=True)),
    "sink's gradient flipped": (rows.gated_sdpa_rows, "-lost", "lost", dict(sink=True)),
    "mask's gradient of one batch entry": (mask_grad.gated_sdpa_mask_grad, "own_batch + n // all_heads", "own_batch",
                                           dict(mask="float", mask_dims="1hqk", batch=2)),
}  # fmt: skip
DECODE_FLAWS = {
    "parts not rescaled": (gated_sdpa_decode.gated_sdpa_join, "acc_part * new[:, None]", "acc_part"),
    "last part skipped": (gated_sdpa_decode.gated_sdpa_join, "tl.range(0, parts)", "tl.range(0, parts - 1)"),
    "parts overlap": (gated_sdpa_decode.part_of, "(part + 1) * blocks", "(part + 2) * blocks"),
    "neighbour's query": (gated_sdpa_decode.gated_sdpa_decode, "r // sizes.sq,", "(r + 1) // sizes.sq,"),
}


@functools.cache
def sound(case: Case) -> bool:
    """Whether the case passes as long as nothing is broken."""
    return failures(case) == []


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_caught(flaw: str):
    function, old, new, options = FLAWS[flaw]
    case = small(**dict(seed=70) | options)
    assert sound(case)
    with mutated(function, old, new):
        assert failures(case) != []


@pytest.mark.parametrize("flaw", DECODE_FLAWS)
def test_a_flaw_of_the_decode_is_caught(flaw: str):
    table = SMALL._replace(multiprocessors=4)
    case = small(seed=71, sq=2, sk=130, needs=())
    assert failures(case, table) == []
    with mutated(*DECODE_FLAWS[flaw]):
        assert failures(case, table) != []
