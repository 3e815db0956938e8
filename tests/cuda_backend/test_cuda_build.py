"""Every CUDA kernel compiles for its architecture, within what that architecture has: no spills, no more registers and
shared memory than there are, products on tensor cores, operands through ldmatrix and cp.async. The cells are those
that differ most: ``python -m benchmarks.aot --backend cuda`` compiles all. And what a build does without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness import HAS_TRITON

from benchmarks.aot.cuda import CudaReport, compile_all, problems, read, sizes, tool, unavailable
from benchmarks.aot.cuda_cells import NAMES, cuda_cells
from benchmarks.aot.cuda_table import lines, predicted

pytestmark = pytest.mark.cuda_build

ROOT = Path(__file__).parents[2]
CELLS = [cell for cell in cuda_cells() if cell.everyday]
compiles = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-")


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest) -> dict[str, CudaReport]:
    """What came out of the cells of this session's tests, one compilation per core at a time."""
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_cuda_cell"]
    return compile_all([item.callspec.params["cell"] for item in tests])


@compiles
@pytest.mark.timeout(1800)  # the first one waits for all
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name.replace(" ", "-"))
def test_cuda_cell(cell, reports):
    report = reports[cell.name]
    found = problems(cell, report)
    assert not found, f"{cell.name}: {'; '.join(found)}\n{report}"


def test_all_kernels_are_compiled():
    """For every architecture; by the tests too, but for those that only add up."""
    headers = (ROOT / "csrc" / "cuda").glob("*.cuh")
    pattern = r"__global__[^{]*?\b(\w+)\(const __grid_constant__"
    kernels = {name for header in headers for name in re.findall(pattern, header.read_text())}
    assert len(kernels) >= 13
    for target in NAMES:
        assert {cell.kernel.split("<")[0] for cell in cuda_cells() if cell.target.name == target} == kernels
    everyday = {cell.kernel.split("<")[0] for cell in CELLS}
    assert kernels - everyday == {"gated_sdpa_merge", "gated_sdpa_sink", "residual_mlp_vector_gradient"}


# A report of a kernel that passes, as the programs print it.
LOG = """
ptxas info    : Compiling entry function 'kernel' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 253 registers, used 1 barriers, 16 bytes smem
"""
SASS = "\t.text.kernel:\n" + "".join(
    f"        /*{16 * i:04x}*/                   {word} R0, R1 ;\n"
    for i, word in enumerate(["LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "HMMA.16816.F32.BF16", "FADD"] * 40)
)
SIZES = {"nsk_shared": 98337, "nsk_threads": 129}

FLAWS = {
    "spills": dict(log=LOG.replace("0 bytes stack", "8 bytes stack").replace("0 bytes spill", "4 bytes spill")),
    "local memory": dict(sass=SASS.replace("FADD", "STL.64")),
    "registers": dict(log=LOG.replace("253", "256")),
    "no tensor cores": dict(sass=SASS.replace("HMMA.16816.F32.BF16", "FFMA")),
    "no ldmatrix": dict(sass=SASS.replace("LDSM.16.M88.4", "LDS.128")),
    "no cp.async": dict(sass=SASS.replace("LDGSTS.E.BYPASS.128", "LDG.E.128")),
    "shared memory": dict(symbols=SIZES | {"nsk_shared": 227 * 1024 - 16 + 2}),
    "static shared memory": dict(log=LOG.replace("16 bytes smem", f"{227 * 1024 - 98335} bytes smem")),
    "a bare trap": dict(sass="        /*0000*/                   BPT.TRAP 0x1 ;\n"),
}


@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_flaws_are_found(flaw):
    cell = next(cell for cell in CELLS if cell.target.name == "sm_90" and cell.mma)
    good = dict(log=LOG, sass=SASS, symbols=SIZES)
    report = read(**good)
    assert (report.registers, report.shared, report.warps) == (253, 16 + 98336, 4)
    assert (report.mma, report.matrix_loads, report.asynchronous) == ({"HMMA": 40}, 40, 40)
    assert not problems(cell, report)
    flawed = read(**good | flaw)
    assert len(problems(cell, flawed)) >= 1
    text = "\n".join(lines({cell.name: flawed}, [cell]))
    assert f"FAILS    {cell.name}" in text
    assert "0 of 1 CUDA cells pass" in text


@compiles
def test_compilers_errors_are_found(monkeypatch):
    monkeypatch.setenv("NSK_AOT_CACHE", "off")
    cell = replace(CELLS[0], kernel="gated_sdpa_no_such_kernel<bf16>()")
    (report,) = compile_all([cell], 1).values()
    assert "error" in report.error
    assert problems(cell, report) == [f"does not compile: {report.error}"]


@compiles
def test_spills_of_a_real_kernel_are_found(monkeypatch, tmp_path):
    """One that is allowed too few registers, through all programs."""
    source, cubin = tmp_path / "spills.cu", tmp_path / "spills.cubin"
    source.write_text("""
        __global__ void __launch_bounds__(1024, 2) spills(float* p) {
          float x[64];
          for (int i = 0; i < 64; ++i) x[i] = p[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 64; ++i) p[(63 - i) * 1024 + threadIdx.x] = x[i] * x[(i + 7) % 64];
        }
        extern "C" __device__ unsigned char nsk_shared[1 + 1000], nsk_threads[1 + 1024];
    """)
    command = [tool("nvcc"), "-cubin", "-arch=sm_90", "-O3", "-Xptxas", "-v", str(source), "-o", str(cubin)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    sass = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    report = read(log, sass, sizes(cubin.read_bytes()))
    assert (report.shared, report.warps) == (1000, 32)
    assert report.registers <= 32
    assert report.spills > 0
    cell = replace(CELLS[0], mma=False, asynchronous=False)
    assert any("spills" in found for found in problems(cell, report))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")  # whose cells' shapes these are
def test_predictions_name_their_roof_and_are_called_so():
    from benchmarks.aot.cuda_predict import works

    found = list(works())
    assert {work.target.name for work in found} == {"sm_80", "sm_90", "sm_100"}
    for work in found:
        assert all(seconds > 0 for seconds in work.roofs().values()), work
    # Deep and narrow, the weights' way to the multiprocessors is what is slowest: 2048 clocks a layer on one of them.
    deep = next(
        w for w in found if w.target.name == "sm_90" and w.name.startswith("residual_mlp forward, batch 512, w")
    )
    roofs = deep.roofs()
    assert max(roofs, key=roofs.get) == "one SM"
    assert roofs["one SM"] == pytest.approx(64 * 2048 / 1.755e9, rel=0.02)
    text = "\n".join(predicted(found))
    assert "nothing is measured" in text
    assert text.count("residual_mlp forward") == 6


def program(monkeypatch, capsys) -> tuple[int, list[str]]:
    """The status and the lines of ``python -m benchmarks.aot`` for one kernel."""
    from benchmarks.aot.__main__ import main

    monkeypatch.setattr(sys, "argv", ["aot", "--backend", "cuda", "--target", "sm_90", "--match", "rows bf16"])
    return main(), capsys.readouterr().out.splitlines()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_program_says_that_there_is_no_compiler(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.aot.cuda.tool", lambda name: None)
    status, text = program(monkeypatch, capsys)
    assert status == 0
    assert text == ["CUDA C++ kernels", f"not compiled: {unavailable()}"]
    assert "needs nvcc" in text[1]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("registers", [255, 256])
def test_program_fails_with_a_cell(registers, monkeypatch, capsys):
    report = replace(read(LOG, SASS, SIZES), registers=registers)
    monkeypatch.setattr("benchmarks.aot.cuda.unavailable", str)
    monkeypatch.setattr("benchmarks.aot.cuda.compile_all", lambda cells, *_: {cell.name: report for cell in cells})
    status, text = program(monkeypatch, capsys)
    assert status == (registers > 255)
    assert text[-1] == f"{1 - status} of 1 CUDA cells pass"


def configure(build: Path, *, finds_programs: bool = True, **options: str) -> subprocess.CompletedProcess[str]:
    """A build of the Python module, configured as setup.py does; without ``finds_programs`` on a machine whose PATH and
    usual places have no nvcc."""
    import pybind11

    beside = Path(sys.executable).parent
    folders = [str(beside), *os.environ.get("PATH", "").split(os.pathsep)]
    programs = {name: shutil.which(name, path=os.pathsep.join(folders)) for name in ("cmake", "ninja", "g++")}
    assert all(programs.values()), programs
    options |= {
        "CMAKE_CXX_COMPILER": programs["g++"],
        "CMAKE_MAKE_PROGRAM": programs["ninja"],
        "NSK_BUILD_PYTHON": "ON",
        "PYTHON_EXECUTABLE": sys.executable,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    if not finds_programs:
        folders = [folder for folder in folders if not (Path(folder) / "nvcc").exists()]
        environment["PATH"] = os.pathsep.join(folders)
        # CMake looks for programs in this empty folder alone; it was told where its own are.
        empty = build / "empty"
        empty.mkdir(parents=True)
        options |= {"CMAKE_FIND_ROOT_PATH": str(empty), "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM": "ONLY"}
        for name in ("ar", "ranlib"):
            options[f"CMAKE_{name.upper()}"] = shutil.which(name) or name
    command = [programs["cmake"], "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def has_cuda(build: Path) -> bool:
    """Whether the build has the kernels' target, and, if not, what stands in for it."""
    text = (build / "build.ninja").read_text()
    has = "nsk_cuda_objects" in text
    assert has == ("gated_sdpa_forward_64x64_half.o" in text) == ("no_cuda.cpp" not in text)
    return has


def test_without_nvcc_on_says_so(tmp_path):
    done = configure(tmp_path, finds_programs=False, NSK_CUDA="on")
    assert done.returncode != 0
    assert "NSK_CUDA=on: found no nvcc on the path, in CUDA_HOME or in /usr/local/cuda." in " ".join(
        done.stderr.split()
    )


def test_without_nvcc_auto_builds_no_kernels(tmp_path):
    done = configure(tmp_path, finds_programs=False, NSK_CUDA="auto")
    assert done.returncode == 0, done.stderr
    assert not has_cuda(tmp_path)


def test_off_builds_no_kernels(tmp_path):
    """Though there may be an nvcc."""
    done = configure(tmp_path, NSK_CUDA="off")
    assert done.returncode == 0, done.stderr
    assert not has_cuda(tmp_path)
    assert "NSK_NVCC" not in (tmp_path / "CMakeCache.txt").read_text()


@compiles
def test_on_builds_the_kernels(tmp_path):
    done = configure(tmp_path, NSK_CUDA="on", NSK_CUDA_ARCHS="80", NSK_CUDA_HEAD_DIMS="64x64", NSK_CUDA_WIDTHS="64")
    assert done.returncode == 0, done.stderr
    assert has_cuda(tmp_path)
    assert "sm_80" in done.stdout
