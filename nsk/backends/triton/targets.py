"""Facts about the GPU architectures that the kernels are written for.

``Target`` says how much one program may use and which instructions it is to find; the launch tables choose by
``family``. Sources: CUDA C++ Programming Guide, table of technical specifications per compute capability; the CDNA 3
and 4 instruction set manuals; the vendors' data sheets for the roofs (dense, without sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One architecture.

    family: the key of the launch tables. sm_86 and sm_89 compile to the same code and share one.
    shared: bytes of shared memory (LDS) that one program may use.
    registers: 32-bit registers that one thread may use before it spills. On AMD a wave of a program with 4 waves has
        512, of one with 8 has 256.
    multiprocessor_*: what all programs on one multiprocessor share, for the occupancy.
    mma: the matrix instruction to expect, as a prefix of its name in the machine code.
    flops: peak dense FLOP/s of half types with float32 sums; tf32_flops and fp32_flops likewise.
    bandwidth: bytes per second of the device memory.
    device: of which device these roofs are.
    """

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str  # as Triton's GPUTarget takes it
    family: str
    warp: int
    shared: int
    registers: int
    multiprocessor_shared: int
    multiprocessor_registers: int  # of 32 bits
    multiprocessor_warps: int
    mma: str
    device: str
    multiprocessors: int
    flops: float
    tf32_flops: float
    fp32_flops: float
    bandwidth: float

    def __str__(self) -> str:
        return self.name


def _nvidia(name, arch, family, shared, sm_shared, warps, mma, device, sms, flops, tf32, fp32, bandwidth) -> Target:
    return Target(
        name, "cuda", arch, family, 32, shared * KIB, 255, sm_shared * KIB, 65536, warps, mma, device, sms,
        flops * 1e12, tf32 * 1e12, fp32 * 1e12, bandwidth * 1e9,
    )  # fmt: skip


def _amd(name, family, shared, mma, device, cus, flops, tf32, fp32, bandwidth) -> Target:
    # 512 vector registers per lane of each of four SIMDs, 8 waves each.
    return Target(
        name, "hip", name, family, 64, shared * KIB, 512, shared * KIB, 4 * 512 * 64, 32, mma, device, cus,
        flops * 1e12, tf32 * 1e12, fp32 * 1e12, bandwidth * 1e9,
    )  # fmt: skip


TARGETS = {
    t.name: t
    for t in (
        #               family, KiB: program, SM; warps;    roofs of   SMs; TFLOP/s half, tf32, fp32; GB/s
        _nvidia("sm_80", 80, "sm_80", 163, 164, 64, "HMMA", "A100 SXM 80 GB", 108, 312, 156, 19.5, 2039),
        _nvidia("sm_86", 86, "sm_86", 99, 100, 48, "HMMA", "RTX A6000", 84, 154.8, 77.4, 38.7, 768),
        _nvidia("sm_89", 89, "sm_86", 99, 100, 48, "HMMA", "L40S", 142, 362, 183, 91.6, 864),
        _nvidia("sm_90", 90, "sm_90", 227, 228, 64, "HGMMA", "H100 SXM", 132, 989.4, 494.7, 66.9, 3352),
        _nvidia("sm_100", 100, "sm_100", 227, 228, 64, "UTC", "B200", 148, 2250, 1125, 75, 8000),
        _nvidia("sm_120", 120, "sm_120", 99, 100, 48, "HMMA", "RTX PRO 6000", 188, 503.8, 251.9, 125, 1792),
        _amd("gfx942", "gfx942", 64, "v_mfma", "MI300X", 304, 1307.4, 653.7, 163.4, 5300),
        _amd("gfx950", "gfx950", 160, "v_mfma", "MI355X", 256, 2516.6, 0, 157.3, 8000),
    )
}

# Compute capabilities that run a family's kernels without having been compiled for by name.
_CUDA_FAMILIES = {80: "sm_80", 86: "sm_86", 87: "sm_80", 89: "sm_86", 90: "sm_90", 100: "sm_100", 103: "sm_100"}
_CUDA_FAMILIES |= {120: "sm_120", 121: "sm_120"}

FAMILIES = tuple(dict.fromkeys(t.family for t in TARGETS.values()))


def family_of(backend: str, arch: int | str) -> str | None:
    """The launch tables' key for an architecture (``"cuda", 90`` or ``"hip", "gfx942:sramecc+"``), ``None`` if there is
    none."""
    if backend == "cuda":
        return _CUDA_FAMILIES.get(int(arch))
    name = str(arch).split(":")[0]
    return TARGETS[name].family if name in TARGETS else None


def example(family: str) -> Target:
    """The first target of a family: its limits hold for all."""
    return next(t for t in TARGETS.values() if t.family == family)
