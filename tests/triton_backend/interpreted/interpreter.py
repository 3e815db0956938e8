"""Triton's interpreter under watch: no access outside the tensors of a launch, every access counted, kernels mutated.

The interpreter reads and writes raw addresses, so an access out of bounds would pass unseen. Here the elements of every
tensor that a launch is given are registered, and only they: the gaps of a strided view are out of bounds too.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

EXACT = 1 << 24  # a view that spans more elements is registered as a whole


class OutOfBounds(AssertionError):
    """An access to something that is no element of a tensor that the kernel was given."""


@dataclass
class Region:
    """The elements of one tensor."""

    tensor: Tensor
    base: int
    size: int
    count: int
    elements: np.ndarray | None

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        at, rest = np.divmod(addresses.astype(np.int64) - self.base, self.size)
        inside = (at >= 0) & (at < self.count) & (rest == 0)
        return inside if self.elements is None or not inside.any() else inside & self.elements[np.where(inside, at, 0)]


def region_of(t: Tensor) -> Region:
    size = t.element_size()
    count = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    elements = None
    if count <= EXACT:
        elements = torch.zeros(count, dtype=torch.bool)
        if count:
            shape = [1 if s == 0 else n for n, s in zip(t.shape, t.stride(), strict=True)]
            elements.as_strided(shape, t.stride()).fill_(True)
        elements = elements.numpy()
    return Region(t, t.data_ptr(), size, count, elements)


def tensors_in(arguments) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)


@dataclass
class Watch:
    """What the kernels did: launches by kernel; elements read and written by the address of the tensor."""

    launches: Counter = field(default_factory=Counter)
    read: Counter = field(default_factory=Counter)
    written: Counter = field(default_factory=Counter)
    regions: list[Region] = field(default_factory=list)

    def reads(self, t: Tensor) -> int:
        return self.read[t.data_ptr()]

    def writes(self, t: Tensor) -> int:
        return self.written[t.data_ptr()]

    def access(self, pointers: np.ndarray, mask: np.ndarray, counter: Counter) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        if addresses.size == 0:
            return
        held = np.zeros(addresses.shape, bool)
        for region in self.regions:
            own = region.holds(addresses)
            if own.all():
                counter[region.base] += addresses.size
                return
            held |= own
        if not held.all():
            raise OutOfBounds(f"{(~held).sum()} of {held.size} addresses are in none of {len(self.regions)} tensors")


_watch: list[Watch] = []


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    _watch.append(Watch())
    try:
        yield _watch[-1]
    finally:
        _watch.pop()


def install() -> None:
    """Puts every interpreted access under watch. Calls between jit functions are made cheap besides: the interpreter
    patches triton.language anew for each of them."""
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    run = interpreter.InterpretedFunction.run

    def boolean(mask):
        """Triton 3.9 makes integers of a scalar's comparisons, and then refuses them as masks."""
        return mask if mask.data.dtype == bool else interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    def watched_load(pointers, mask, *rest):
        _watch[-1].access(pointers.data, mask.data, _watch[-1].read)
        return load(pointers, boolean(mask), *rest)

    def watched_store(pointers, value, mask, *rest):
        _watch[-1].access(pointers.data, mask.data, _watch[-1].written)
        return store(pointers, value, boolean(mask), *rest)

    def watched_run(self, *args, **kwargs):
        watch = _watch[-1]
        watch.launches[self.fn.__name__] += 1
        watch.regions = [region_of(t) for t in tensors_in((*args, *kwargs.values()))]
        return run(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def no_atomics(*_):
        raise AssertionError("an atomic operation: its order, and so the result, would be left to chance")

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw = builder.create_atomic_cas = no_atomics
    interpreter.InterpretedFunction.run = watched_run
    interpreter.InterpretedFunction.__call__ = call


@contextlib.contextmanager
def mutated(function, old: str, new: str) -> Iterator[None]:
    """Inside, the jit function's source has ``new`` in place of ``old``, which it must hold."""
    python = function.fn
    source = textwrap.dedent(inspect.getsource(python))
    source = source[source.index("def ") :]
    assert source.count(old) >= 1, f"{function.__name__} has no {old!r}"
    tree = interpreter.FunctionRewriter.ast_transformer.visit(ast.parse(source.replace(old, new)))
    ast.fix_missing_locations(tree)
    function.rewrite()  # puts the interpreter's names where the function's are
    found: dict = {}
    exec(compile(tree, f"<mutated {function.__name__}>", "exec"), python.__globals__, found)
    cache = interpreter.InterpretedFunction.rewritten_fn
    before, cache[python] = cache[python], found[python.__name__]
    try:
        yield
    finally:
        cache[python] = before
