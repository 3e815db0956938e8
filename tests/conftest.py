"""What every test shares: the backends and instruction sets that this machine has, one thread count, and a rule that
nothing is skipped in silence."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch
from harness import ALL, CPU, Target

# A skip for any other reason fails the run: a test that quietly stops running is no test.
ALLOWED_SKIPS = (
    r"needs a GPU",
    r"needs Triton",
    r"needs nvcc",
    r"needs os\.fork",
    r"needs /proc",
    r"needs jax and flax",
)


@pytest.fixture(autouse=True, scope="session")
def _fresh_compilations() -> Iterator[None]:
    """torch's cache of compiled graphs does not see when an op's outputs get another shape: a graph of an earlier state
    of this code would come back."""
    folder = tempfile.mkdtemp(prefix="nsk-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=ALL, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend that runs on this machine; active for the whole test."""
    with request.param.active():
        yield request.param


@pytest.fixture(params=CPU, ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The CPU kernels on each instruction set; active for the whole test."""
    with request.param.active():
        yield request.param


@pytest.fixture(autouse=True)
def _same_thread_count() -> Iterator[None]:
    """Tests may change the number of threads; the next one starts from the same again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> None:
    """For tests of many small calls, where a second thread costs more than it does; others test thread counts."""
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    return "nsk targets: " + ", ".join(map(str, ALL))


_unexpected_skips: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS):
            _unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS):
            _unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected_skips:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for skip in _unexpected_skips:
        terminalreporter.write_line(f"UNEXPECTED SKIP {skip}", red=True)
