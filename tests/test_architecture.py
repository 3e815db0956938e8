"""Holds the plan of the house against the code: imports point one way, files fit in a head."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["spec", "reference", "backends", "dispatch", "ops", "nn", "integrations"]


def layer(module: str) -> str | None:
    """The room of ``nsk.<room>...``; None for what is in none (errors, the package itself)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "nsk" and parts[1] in LAYERS else None


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(module: str, source: str) -> list[str]:
    """What ``module`` imports and must not."""
    own, bad = layer(module), []
    for name in imports(source):
        top, other = name.split(".")[0], layer(name)
        if top in ("tests", "benchmarks"):
            bad.append(name)
        if own is None or other is None:
            continue
        if LAYERS.index(other) > LAYERS.index(own):
            bad.append(name)
        if own == "backends" and module.count(".") >= 2:
            backend = module.split(".")[2]
            if other == "reference" and backend != "eager":
                bad.append(name)
            if other == "backends" and name.count(".") >= 2 and name.split(".")[2] != backend:
                bad.append(name)
    return sorted(set(bad))


def modules() -> list[tuple[str, Path]]:
    files = sorted((ROOT / "nsk").rglob("*.py"))
    return [(".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), f) for f in files]


@pytest.mark.parametrize(("module", "file"), modules(), ids=[name for name, _ in modules()])
def test_imports_point_one_way(module: str, file: Path):
    assert violations(module, file.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nsk.spec.gated_sdpa", "from nsk.ops import gated_sdpa"),
        ("nsk.reference.gated_sdpa", "import nsk.backends.cpu"),
        ("nsk.backends.cpu.gated_sdpa", "from nsk.backends import eager"),
        ("nsk.backends.cpu", "from nsk.reference.gated_sdpa import gated_sdpa_reference"),
        ("nsk.dispatch", "from nsk import nn"),
        ("nsk.nn.attention", "import tests.cases"),
    ],
)
def test_the_rule_bites(module: str, source: str):
    assert violations(module, source)


def test_setup_knows_no_torch():
    assert not {name.split(".")[0] for name in imports((ROOT / "setup.py").read_text())} & {
        "torch",
        "nsk",
        "triton",
    }


def test_files_fit_in_a_head():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    files = [ROOT / name for name in listed] or [f for part in ("nsk", "csrc") for f in (ROOT / part).rglob("*")]
    code = [f for f in files if f.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and f.is_file()]
    assert len(code) > 20
    assert {f.name: n for f in code if (n := len(f.read_text().splitlines())) > 400} == {}


def test_the_native_core_knows_no_torch_and_no_python():
    sources = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cpp", ".h") and f.parent.name != "bind"]
    assert sources
    for f in sources:
        included = [line for line in f.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in included if any(x in line for x in ("torch", "ATen", "c10", "Python.h", "pybind"))]
