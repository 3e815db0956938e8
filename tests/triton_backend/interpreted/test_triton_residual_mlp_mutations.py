"""Broken variants of the deep residual MLP's kernels must be found: a budget, or a guard, that cannot bite is none."""

from __future__ import annotations

import pytest
from interpreter import OutOfBounds, mutated
from mlp import failures, small

from nsk.backends.triton import residual_mlp_math as math
from nsk.backends.triton import residual_mlp_parameters as parameters
from nsk.backends.triton import residual_mlp_rows as rows
from nsk.backends.triton import residual_mlp_tiles as tiles

# kind of kernels, function, what stands there, what shall
FLAWS = {
    "no residual": ("rows", rows.forward_rows, "a += tl.load(h_p + at, mask=here, other=0.0)", "a += 0.0"),
    "blocks end a layer late": (
        "rows",
        rows.forward_rows,
        "(layer + 1) % layers_per_block",
        "layer % layers_per_block",
    ),
    "rows beyond the batch": ("rows", rows.forward_rows, "row < rows - first", "row < rows"),
    "features beyond the width": ("rows", math.inside, "tl.arange(0, BLOCK_W) < WIDTH", "tl.arange(0, BLOCK_W) >= 0"),
    "variance about 0": ("rows", math.normalise, "inside(z - mean[:, None], WIDTH, BLOCK_W)", "z"),
    "statistics over the tile": ("rows", math.normalise, "tl.sum(z, 1) / WIDTH", "tl.sum(z, 1) / BLOCK_W"),
    "weight not transposed": ("rows", rows.forward_rows, "multiply(t, w, True", "multiply(t, w, False"),
    "a chunk twice": ("rows", math.multiply, "chunk * COLUMNS", "0 * COLUMNS"),
    "slope without its second term": ("rows", math.slope, "s * (1.0 + n * (1.0 - s))", "s"),
    "no mean of du": ("rows", rows.backward_rows, "du - tl.sum(du, 1)[:, None] / WIDTH", "du"),
    "no mean of du unit": ("rows", rows.backward_rows, "unit * (tl.sum(du * unit, 1)[:, None] / WIDTH)", "0.0"),
    "no residual gradient": ("rows", rows.backward_rows, "da += tl.load(dh_p + at, mask=here, other=0.0)", "da += 0.0"),
    "gain's and shift's swapped": ("rows", rows.backward_rows, "dn * unit, dn", "dn, dn * unit"),
    "rows of the last tile left out": ("rows", parameters.weight_gradients, "range(0, rows,", "range(0, rows - 16,"),
    "products crosswise": (
        "rows",
        parameters.weight_gradients,
        "out[:, None] * WIDTH + into[None, :]",
        "out[:, None] + into[None, :] * WIDTH",
    ),
    "the last share left out": ("rows", parameters._add_up, "start + share < shares", "start + share < shares - 1"),
    "no Chan": ("tiles", tiles._row_statistics, "count * off * off", "0.0"),
    "tiles' means unweighted": ("tiles", tiles._row_statistics, "(count / WIDTH)", "(1.0 / 2)"),
    "no residual, wide": ("tiles", tiles.forward_tiles, "t += tl.load(h_p", "t += 0.0 * tl.load(h_p"),
    "no residual gradient, wide": ("tiles", tiles.backward_tiles, "da += dh", "da += 0.0"),
    "no mean of du, wide": ("tiles", tiles.backward_tiles, "du - du_mean[:, None]", "du"),
    "no mean of du unit, wide": ("tiles", tiles.backward_tiles, "unit * du_unit_mean[:, None]", "0.0"),
    "rows beyond the batch, wide": ("tiles", tiles.forward_tiles, "row < rows - first", "row < rows"),
    "every tile writes": (
        "tiles",
        tiles.backward_tiles,
        "k < tl.where(tile == 0, WIDTH, 0)",
        "k < tl.where(tile == 99, WIDTH, 0)",
    ),
}


@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_flaw_is_found(flaw):
    kind, function, old, new = flaw
    case = small(bias_mean=1.0, blocks=2)
    with mutated(function, old, new):
        try:
            found = failures(case, kind)
        except Exception as error:
            if "OutOfBounds" not in repr(error) and not isinstance(error, OutOfBounds):
                raise
            found = [repr(error)]
    assert found


def test_unmutated():
    for kind in ("rows", "tiles"):
        assert not failures(small(bias_mean=1.0, blocks=2), kind)
