"""Reads what a compiled kernel uses from its machine code: registers, spills, shared memory, instructions.

NVIDIA: the cubin through the disassemblers that Triton's wheel carries. AMD: the assembly that Triton keeps.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

# Matrix instructions by the kind a cell names. On AMD there is one kind.
_SASS_MMA = {"HGMMA": r"\bHGMMA\b", "UTC": r"\bUTC\w*MMA\b", "HMMA": r"\bHMMA\b"}
_SASS_ASYNC = r"\bLDGSTS\b|\bUTMALDG\b|\bUBLKCP\b"
_AMD_ASYNC = r"buffer_load_\w+ .*\blds\b|global_load_lds_\w+"


@dataclass
class Report:
    """What came out of one cell. ``error`` says why nothing did."""

    registers: int = 0  # of one thread, on AMD vector registers of both kinds
    stack: int = 0  # bytes of local memory per thread
    spills: int = 0  # instructions that load or store local memory; on AMD spilled registers
    shared: int = 0  # bytes
    tensor_memory: int = 0  # columns, sm_100
    warps: int = 0
    instructions: int = 0
    mma: dict[str, int] = field(default_factory=dict)
    asynchronous: int = 0
    global_loads: int = 0
    traps: int = 0
    overwritten: int = 0  # operands of matrix instructions in a buffer that is filled again before they are done
    unfenced: int = 0  # matrix instructions that read what cp.async wrote through a proxy that does not see it yet
    seconds: float = 0.0
    error: str = ""


def inspect(compiled, backend: str) -> Report:
    """The report of what ``triton.compile`` gave."""
    report = _inspect_cubin(compiled.asm["cubin"]) if backend == "cuda" else _inspect_amd(compiled.asm["amdgcn"])
    if backend == "cuda":
        report.unfenced = unfenced(compiled.asm["ptx"])
        report.overwritten = overwritten(compiled.asm["ttgir"])
    report.shared = compiled.metadata.shared
    report.warps = compiled.metadata.num_warps
    report.tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return report


def unfenced(ptx: str) -> int:
    """Instructions of the asynchronous proxy (wgmma, tcgen05) that follow a wait for cp.async with no fence between the
    proxies after it. The text is read twice, as what ends a loop also comes before its beginning."""
    pattern = r"\b(?:(cp\.async\.wait)|(fence\.proxy\.async)|wgmma\.mma_async|tcgen05\.mma)"
    count, waited = 0, False
    for _ in range(2):
        count = 0
        for wait, fence in re.findall(pattern, ptx):
            count += waited and not wait and not fence
            waited = bool(wait) or (waited and not fence)
    return count


def overwritten(ttgir: str) -> int:
    """Products in a loop that go on (a wait for others, not for them) while asynchronous copies fill the only buffer of
    one of their operands for the next turn."""
    single = set(re.findall(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<1x[^>]*mutable>", ttgir))
    views = re.findall(r"(%\S+) = ttg\.memdesc_(?:index|trans|subslice) (%[^\s\[{]+)", ttgir)
    for view, of in views:
        if of in single:
            single.add(view)
    count, last = 0, ()
    for line in ttgir.splitlines():
        if found := re.search(r"= ttng\.warp_group_dot (%[^\s,]+), (%[^\s,]+),", line):
            last = found.groups()
        elif found := re.search(r"ttng\.warp_group_dot_wait .*\{pendings = (\d+)", line):
            count += int(found[1]) > 0 and any(operand in single for operand in last)
            last = ()
    return count


def _tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _inspect_cubin(cubin: bytes) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([_tool(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    code = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    text = "\n".join(code)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=count(r"\b(?:LDL|STL)\b"),
        instructions=len(code),
        mma={kind: n for kind, pattern in _SASS_MMA.items() if (n := count(pattern))},
        asynchronous=count(_SASS_ASYNC),
        global_loads=count(r"\bLDG\b"),
        traps=count(r"\bBPT\.TRAP\b"),
    )


def _inspect_amd(assembly: str) -> Report:
    def fact(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    code = re.findall(r"^\s+[a-z]\w+(?: .*)?$", assembly, re.MULTILINE)
    text = "\n".join(code)
    mma = len(re.findall(r"\bv_mfma_", text))
    return Report(
        registers=fact("vgpr_count"),
        stack=fact("private_segment_fixed_size"),
        spills=fact("vgpr_spill_count"),
        instructions=len(code),
        mma={"v_mfma": mma} if mma else {},
        asynchronous=len(re.findall(_AMD_ASYNC, text)),
        global_loads=len(re.findall(r"\b(?:global|buffer)_load_", text)),
        traps=len(re.findall(r"\bs_trap\b", text)),
    )
