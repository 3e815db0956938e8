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
    "no residual": ("rows", rows.forward_rows, "h += a", "h = a"),
    "no bias": ("rows", rows.forward_rows, "+ load_features(b, WIDTH, BLOCK_W)", ""),
    "no shift": ("rows", rows.forward_rows, "+ load_features(s, WIDTH, BLOCK_W)", ""),
    "no eps": ("rows", math.normalise, "/ WIDTH + eps", "/ WIDTH"),
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
    "slope without its second term": ("rows", math.through, "da * (s * (1.0 + n * (1.0 - s)))", "da * s"),
    "no gain in du": ("rows", rows.backward_rows, "du = dn * scale", "du = dn"),
    "no rstd in dz": ("rows", rows.backward_rows, "dz * r[:, None]", "dz"),
    "weight transposed in the chain": ("rows", rows.backward_rows, "w, False,", "w, True,"),
    "no mean of du": ("rows", rows.backward_rows, "du - tl.sum(du, 1)[:, None] / WIDTH", "du"),
    "no mean of du unit": ("rows", rows.backward_rows, "unit * (tl.sum(du * unit, 1)[:, None] / WIDTH)", "0.0"),
    "no residual gradient": ("rows", rows.backward_rows, "dh += da", "dh = da"),
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


OF_GROUPS = {
    "group 0's weights": ("rows", rows.forward_rows, "group * weight.group", "0 * weight.group"),
    "group 0's weights, wide": ("tiles", tiles.forward_tiles, "group * weight.group", "0 * weight.group"),
}
AGAIN = {
    "every block from the first one's input": ("rows", rows.forward_rows, "block * x_block", "0 * x_block"),
    "every block with the first one's layers": ("rows", rows.forward_rows, "before = block *", "before = 0 * block *"),
    "half of what goes into a block": ("rows", rows.forward_rows, "(h_out + at, h,", "(h_out + at, h * 0.5,"),
}
ALL = {name: (flaw, dict(eps=0.1)) for name, flaw in FLAWS.items()}
ALL |= {name: (flaw, dict(groups=2)) for name, flaw in OF_GROUPS.items()}
ALL |= {name: (flaw, dict(checkpoint="block")) for name, flaw in AGAIN.items()}


def case_of(options: dict):
    return small(bias_mean=1.0, blocks=2, **options)


@pytest.mark.parametrize(("flaw", "options"), ALL.values(), ids=ALL)
def test_flaw_is_found(flaw, options):
    kind, function, old, new = flaw
    with mutated(function, old, new):
        try:
            found = failures(case_of(options), kind)
        except Exception as error:
            if "OutOfBounds" not in repr(error) and not isinstance(error, OutOfBounds):
                raise
            found = [repr(error)]
    assert found


@pytest.mark.parametrize("options", [dict(eps=0.1), dict(groups=2), dict(checkpoint="block")], ids=str)
@pytest.mark.parametrize("kind", ["rows", "tiles"])
def test_unmutated(kind, options):
    assert not failures(case_of(options), kind)
