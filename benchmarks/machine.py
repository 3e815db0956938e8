"""The machine and the software that numbers belong to."""

from __future__ import annotations

import os
import platform
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

import nsk
from nsk import _native


def describe(threads: int, argv: list[str]) -> dict[str, object]:
    """Everything that a reader needs to repeat or to doubt a number."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "isa": _native.isa(),
        "isas": list(_native.isas()),
        "compiler": _native.compiler(),
        "nsk": nsk.__version__,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "page_bytes": resource.getpagesize(),
        "transparent_hugepages": _hugepages(),
        "load_average": list(os.getloadavg()),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("NSK_", "OMP_", "MKL_", "GOMP_"))},
        "command": " ".join(["python -m benchmarks", *argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def line(machine: dict) -> str:
    """One line for people."""
    return (
        f"{machine['cpu']}, {machine['usable_cores']} cores, {machine['threads']} threads, {machine['isa']}; "
        f"torch {machine['torch']}, Python {machine['python']}; load {machine['load_average'][0]:.2f}; "
        f"{machine['started']}"
    )


def _cpu_model() -> str:
    try:
        facts = dict(
            (part.strip() for part in entry.split(":", 1))
            for entry in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
            if ":" in entry
        )
    except OSError:
        return platform.processor() or platform.machine()
    name = facts.get("model name") or platform.machine()
    if "cpu family" in facts:  # virtual machines often hide which generation they run on
        name += f" (family {facts['cpu family']}, model {facts.get('model')})"
    return name


def _hugepages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return f"unknown on {sys.platform}"
    return text[text.index("[") + 1 : text.index("]")]
