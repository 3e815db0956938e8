"""The library that the ops are defined in: ``torch.ops.nsk``."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("nsk", "DEF")
