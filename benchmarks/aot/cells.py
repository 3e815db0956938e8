"""All cells: what the kernels' modules say that their launch tables can choose."""

from __future__ import annotations

import importlib

from nsk.backends.triton.cells import Cell, Refusal

MODULES = ("nsk.backends.triton.gated_sdpa_cells", "nsk.backends.triton.residual_mlp_cells")


def all_cells() -> list[Cell]:
    """Every cell that the tables serve. Names are unique."""
    cells = [cell for name in MODULES for cell in importlib.import_module(name).aot_cells()]
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
    return cells


def all_refusals() -> list[Refusal]:
    """Every cell that they refuse, with its reason."""
    modules = (importlib.import_module(name) for name in MODULES)
    return [refusal for module in modules for refusal in getattr(module, "aot_refusals", list)()]


def selected(cells: list, *, op: str = "", target: str = "", match: str = "") -> list:
    """Cells of an op, for a target, whose name holds every word of ``match``."""
    words = match.split()
    return [
        cell
        for cell in cells
        if cell.name.startswith(op) and target in ("", cell.target.name) and all(w in cell.name.split() for w in words)
    ]
