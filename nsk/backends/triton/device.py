"""Which architecture a device is: the launch tables' key."""

from __future__ import annotations

import functools
import os

import torch

from nsk.backends.triton.targets import family_of

# Triton runs kernels in numpy, on CPU tensors, when this is set before it is imported. Tests use it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def family(device: torch.device) -> str | None:
    """The family of a device, ``None`` if there are no kernels for it. The interpreter stands in for an sm_80."""
    if device.type == "cpu":
        return "sm_80" if INTERPRETED else None
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return family_of("hip", torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return family_of("cuda", major * 10 + minor)


def tf32_allowed() -> bool:
    """Whether the user lets float32 products run on tensor cores, at a precision of 10 bits."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
