"""Where the kernels run. The launches above it know a machine by this: the functions of the kernels, how many
multiprocessors and how much shared memory there is, and what a call is told of the place it runs in. The tests have
another one, which runs the same kernels in an emulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsk.spec.precision import tf32_allowed

ALIGNMENT = 16  # bytes, of rows that are copied in pieces

Tensors = Sequence[Tensor | None]


class Launch(NamedTuple):
    """One launch of a call: the blocks of a grid's axes, the threads of a block and its bytes of shared memory."""

    kernel: str
    blocks: tuple[int, int, int]
    threads: int
    shared_bytes: int

    def __str__(self) -> str:
        blocks = " x ".join(map(str, self.blocks)).removesuffix(" x 1").removesuffix(" x 1")
        return f"{self.kernel}: {blocks} blocks of {self.threads} threads with {self.shared_bytes} bytes"


class Machine:
    """What launches depend on, of a GPU that need not be here."""

    def __init__(self, kernels: ModuleType, multiprocessors: int, shared_bytes: int) -> None:
        self.kernels = kernels
        self.multiprocessors = multiprocessors
        self.shared_bytes = shared_bytes  # that a block may have

    def count(self, function: Callable[..., int], *args: Any) -> int:
        """What a call of this needs of scratch, in bytes."""
        return function(self._place(0), *args)

    def launches(self, function: Callable[..., tuple[int, list]], *args: Any) -> list[Launch]:
        """What a call launches."""
        status, found = function(self._place(0), *args)
        assert status == 0, f"status {status} of a call that is not refused"
        return [Launch(kernel, tuple(blocks), threads, shared) for kernel, blocks, threads, shared in found]

    def _place(self, stream: int) -> Any:
        return self.kernels.Device(stream, self.multiprocessors, self.shared_bytes)


class Gpu(Machine):
    """One NVIDIA GPU."""

    def __init__(self, kernels: ModuleType, device: torch.device) -> None:
        found = torch.cuda.get_device_properties(device)
        super().__init__(kernels, found.multi_processor_count, found.shared_memory_per_block_optin)
        self.device = device
        self.architecture = found.major * 10 + found.minor
        self.name = found.name

    def reasons(self) -> list[str]:
        """Why none of the kernels runs on it: they were compiled for others. Machine code runs on its own generation,
        from its own number on; what was compiled last is there as intermediate code too, for all that come after."""
        built = [int(arch) for arch in self.kernels.architectures().split(",")]
        own = any(arch // 10 == self.architecture // 10 and arch <= self.architecture for arch in built)
        if own or built[-1] <= self.architecture:
            return []
        names = ", ".join(f"sm_{arch}" for arch in built)
        return [f"was compiled for {names}, and {self.device} is an sm_{self.architecture} ({self.name})"]

    def run(self, function: Callable[..., int], inputs: Tensors, outputs: Tensors, *args: Any) -> None:
        """Queues the launches of a call. ``inputs`` and ``outputs`` are all tensors that it may touch.

        Raises:
            RuntimeError: a launch failed: which, and CUDA's word for it.
        """
        with torch.cuda.device(self.device):
            status = function(self._place(torch.cuda.current_stream(self.device).cuda_stream), *args)
        if status == 0:
            return
        if status == 5:  # NSK_LAUNCH_FAILED
            raise RuntimeError(f"nsk: a CUDA launch failed: {self.kernels.failure()}")
        raise RuntimeError(f"nsk: the CUDA kernels refused the call (status {status})")


def reasons_of_type(dtype: torch.dtype, op: str) -> list[str]:
    """Reasons against inputs of a type: products run on tensor cores, which have none that are exact in float32."""
    if dtype in (torch.bfloat16, torch.float16):
        return []
    if dtype == torch.float32:
        switch = 'torch.backends.cuda.matmul.fp32_precision = "tf32"'
        return [] if tf32_allowed() else [f"multiplies float32 only as TF32, which {switch} allows"]
    return [f"has no {str(dtype).removeprefix('torch.')} kernels for {op}, only bfloat16, float16 and float32 as TF32"]


def stand_in(t: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of this shape beside ``t`` that takes no memory: for questions about calls."""
    return torch.empty(1, dtype=dtype or t.dtype, device=t.device).expand(shape)


def aligned(t: Tensor | None, bytes_of_rows: int = ALIGNMENT) -> Tensor | None:
    """``t``, or a dense copy of it if its last stride is not 1 or a row does not begin at such a multiple."""
    if t is None or t.numel() == 0:
        return t
    size = t.element_size()
    if t.is_contiguous() and t.data_ptr() % bytes_of_rows == 0 and t.shape[-1] * size % bytes_of_rows == 0:
        return t
    strides = [stride * size for stride, length in zip(t.stride()[:-1], t.shape[:-1], strict=True) if length > 1]
    if (t.stride(-1) != 1 and t.shape[-1] > 1) or any(n % bytes_of_rows for n in (t.data_ptr(), *strides)):
        # A dense tensor too may begin anywhere.
        return torch.empty(t.shape, dtype=t.dtype, device=t.device).copy_(t)
    return t
