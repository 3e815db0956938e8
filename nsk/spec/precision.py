"""What a user lets float32 products on a GPU cost in precision."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether float32 products may run on tensor cores, at a precision of 10 bits: torch's own switch, which is off."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
