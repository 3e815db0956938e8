"""Builds the native module with CMake and Ninja. Knows no torch and looks for no GPU.

Environment: CXX (the compiler); NSK_CUDA (on, off, or auto: if NSK_CUDA_ARCHS is set and there is nvcc); of the CUDA
kernels, which take long to compile, NSK_CUDA_ARCHS ("80;90"), NSK_CUDA_HEAD_DIMS ("64x64;128x128") and NSK_CUDA_WIDTHS
("64;256"); NSK_SANITIZE (address,undefined); NSK_BUILD_FOLDER (a CMake folder that stays, unlike pip's).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

NO_COMPILER = """
nsk builds C++ kernels and found no C++ compiler{tried}. Install one and run the same command again:
    Debian, Ubuntu:   apt-get install g++
    Fedora, RHEL:     dnf install gcc-c++
    conda:            conda install gxx
or name one: CXX=/path/to/g++ (GCC 11 or newer, or Clang 15 or newer).
"""


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first usual name on the path."""
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["g++", "clang++", "c++"]:
        if path := shutil.which(name):
            return path
    sys.exit(NO_COMPILER.format(tried=f" (CXX={wish} is no program here)" if wish else ""))


def program(name: str) -> str:
    """CMake or Ninja: as a build requirement of this package, else on the path."""
    beside_python = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside_python) if beside_python.exists() else name)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(os.environ.get("NSK_BUILD_FOLDER") or Path(self.build_temp) / "cmake").resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": compiler,
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "PYTHON_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        for name in ("NSK_CUDA", "NSK_CUDA_ARCHS", "NSK_CUDA_HEAD_DIMS", "NSK_CUDA_WIDTHS", "NSK_SANITIZE"):
            if name in os.environ:
                options[name] = os.environ[name]
        cmake = program("cmake")
        configure = [
            cmake,
            "-S",
            ROOT,
            "-B",
            build,
            "-G",
            "Ninja",
            *(f"-D{k}={v}" for k, v in options.items()),
        ]
        subprocess.run(list(map(str, configure)), check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--target", "_native", "-j", jobs], check=True)


setup(ext_modules=[Extension("nsk._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
