"""What the launch tables are chosen by: which architecture a device is, and which Triton there is."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
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


@functools.cache
def triton_version() -> str | None:
    """Triton's, without importing it; ``None`` where there is none."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # a mere folder of that name has no origin
        return None
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "of an unknown version"


def version_numbers() -> tuple[int, ...]:
    """Major and minor of Triton's version, ``(0,)`` if they are unknown."""
    parts = (triton_version() or "").split(".")[:2]
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else (0,)


def stages_of(family: str, stages: int, version: tuple[int, ...]) -> int:
    """How many stages a product's loop may have. The matrix instructions of sm_90 and sm_100 read shared memory through
    the asynchronous proxy, for which what cp.async wrote has to be fenced. Triton before 3.9 leaves that fence out (on
    an H100 results changed from run to run): there the loops copy through registers, in one stage."""
    return 1 if family in ("sm_90", "sm_100") and (0,) < version < (3, 9) else stages
