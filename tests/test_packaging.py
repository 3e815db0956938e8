"""What the package promises before any of its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import nsk

ROOT = Path(__file__).parent.parent


def test_metadata():
    facts = metadata.metadata("nsk-kernels")
    assert facts["Version"] == nsk.__version__
    requirements = [r for r in metadata.requires("nsk-kernels") if "extra ==" not in r]
    assert requirements == ["torch>=2.10"]
    assert {"test", "bench"} <= set(facts.get_all("Provides-Extra"))
    assert "Apache-2.0" in (facts["License-Expression"] or facts["License"])


def test_the_native_module_knows_no_torch():
    from nsk import _native

    binary = Path(_native.__file__).read_bytes()
    assert b"libtorch" not in binary
    assert b"libc10" not in binary


@pytest.mark.parametrize("wish", ["", "no-such-compiler"])
def test_without_a_compiler_the_message_says_what_to_install(wish, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path)}
    if wish:
        environment["CXX"] = wish
    folders = ["--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "apt-get install g++" in done.stderr
    assert wish in done.stderr


def test_setup_imports_no_torch():
    assert not re.search(r"^\s*(import|from) torch", (ROOT / "setup.py").read_text(), re.MULTILINE)


def test_readme_has_two_commands():
    """Each is one line that makes its own virtual environment."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"<!-- (?:bench|test)-command:begin -->\n```\n(.*?)\n```\n", text, re.DOTALL)
    assert len(commands) == 2
    assert all(command.count("\n") == 0 and command.startswith("python3 -m venv .venv && ") for command in commands)
