"""Runs each file of ``interpreted/`` in a process of its own: whether Triton interprets its kernels is decided when it
is imported. As many run at a time as there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import HAS_TRITON

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).parent.glob("interpreted/test_*.py"))


def run(file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[Path, Future]]:
    """Of the files of this session's tests."""
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_in_the_interpreter"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {file: pool.submit(run, file) for file in (item.callspec.params["file"] for item in items)}


@pytest.mark.interpret
@pytest.mark.timeout(1800)  # the first one starts them all
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path, runs: dict[Path, Future]):
    done = runs[file].result()
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
