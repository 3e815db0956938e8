"""README.md's support matrix, made by trying: each feature is called, forward and backward, on each backend.

The Triton backend's column is what its kernels do in Triton's interpreter, on CPU tensors. Whether Triton interprets is
decided when it is imported, so that column comes from a process of its own: ``python -m benchmarks.support``, which
prints it as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import nsk
from benchmarks import workload
from benchmarks.workload import OPS

BACKENDS = ("cpu", "eager", "triton")  # cuda serves what README.md says beside the matrix
INTERPRETED = "triton"  # the backend that is tried in an interpreter
NOTE = (
    "¹ The kernels run in Triton's interpreter, on the CPU, and compile ahead of time for sm_80 to sm_120, gfx942 and\n"
    "gfx950. What has run on a GPU is said below."
)


def matrix() -> str:
    """The matrix, as Markdown."""
    lines = ["| forward and backward | " + " | ".join(BACKENDS) + " |", "|---|" + ":-:|" * len(BACKENDS)]
    for op in OPS:
        lines.append(f"| **`nsk.{op}`** |" + " |" * len(BACKENDS))
        for feature in workload.module(op).FEATURES:
            lines.append(f"| {feature} | " + " | ".join(_cell(name, op, feature) for name in BACKENDS) + " |")
    return "\n".join([*lines, "", NOTE])


def _cell(backend: str, op: str, feature: str) -> str:
    if backend == INTERPRETED:
        return "yes ¹" if interpreted()[op][feature] else "no"
    return "yes" if works(backend, workload.module(op).FEATURES[feature]) else "no"


def works(backend: str, call: Callable[[], torch.Tensor]) -> bool:
    """Whether the backend serves a feature's call and its backward."""
    try:
        with nsk.use_backend(backend):
            call().sum().backward()
    except nsk.BackendUnavailable:
        return False
    return True


@functools.cache
def interpreted() -> dict[str, dict[str, bool]]:
    """What the interpreted backend serves, by op and feature."""
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-m", "benchmarks.support"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main() -> None:
    reasons = nsk.backends()[INTERPRETED]["reasons"]
    if reasons:
        sys.exit(f"the {INTERPRETED} backend {'; '.join(reasons)}")
    tried = {op: {name: works(INTERPRETED, call) for name, call in workload.module(op).FEATURES.items()} for op in OPS}
    print(json.dumps(tried))


if __name__ == "__main__":
    main()
