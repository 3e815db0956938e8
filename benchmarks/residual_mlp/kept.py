"""The memory that training needs between the forward and the backward: what a forward's graph holds on to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.residual_mlp import peers
from benchmarks.residual_mlp.inputs import by_layer, make_inputs
from benchmarks.workload import BASELINE, OURS, Case


def kept(case: Case) -> dict[str, int]:
    """Bytes that one forward saves for its backward, inputs and parameters not counted."""
    inputs = make_inputs(case)
    found = {}
    for name, checkpoint in ((OURS, "none"), (f"{OURS} block", "block")):
        function = peers.ours(replace(case.shape, checkpoint=checkpoint))
        found[name] = saved_bytes(function, inputs.x, *inputs.parameters)
    found[BASELINE] = saved_bytes(peers.eager(case.shape), inputs.x, *by_layer(inputs))
    return found


def saved_bytes(function: Callable[..., Tensor], *arguments: Tensor | list[Tensor]) -> int:
    """The sizes of the storages that ``function`` saves, each counted once; those of the arguments are not counted."""
    given = {t.untyped_storage().data_ptr() for a in arguments for t in ([a] if isinstance(a, Tensor) else a)}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t  # keeps the storage alive, and its address from being used again

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*arguments)
    return sum(size for at, size in sizes.items() if at not in given)
