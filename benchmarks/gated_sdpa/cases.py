"""The shapes of gated attention that the suite times."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.workload import Case

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Attention:
    """A call's sizes and options. ``lengths`` (packed sequences) replaces ``b``, ``sq`` and ``sk``."""

    b: int
    hq: int
    hkv: int
    sq: int
    sk: int
    d: int
    causal: bool = False
    gate: str | None = "elementwise"
    window: int | None = None  # keys a query sees, its own included; causal
    mask: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        sizes = f"{sum(self.lengths)}packed" if self.lengths else f"{self.sq}x{self.sk}"
        words = [f"{self.b}x{self.hq}:{self.hkv}x{sizes}x{self.d}"]
        words.append(f"window{self.window}" if self.window else "causal" if self.causal else "full")
        if self.mask:
            words.append("mask")
        if self.gate != "elementwise":
            words.append("headwise" if self.gate else "nogate")
        return "/".join(words)


def useful_flops(a: Attention, mode: str) -> float:
    """``4 B H Sq Sk D`` forward, x3.5 with the backward, halved when causal, as in the FlashAttention papers. A window
    counts the pairs inside it; a mask, whose content no kernel knows, counts as if it allowed everything."""
    if a.window:
        pairs = sum(min(i + 1, a.window) for i in range(a.sq))
    else:
        pairs = sum(n * n for n in a.lengths) if a.lengths else a.sq * a.sk
        pairs *= 0.5 if a.causal else 1
    return 4.0 * a.b * a.hq * pairs * a.d * (3.5 if mode == "training" else 1)


def kv_bytes(a: Attention, dtype: str) -> float:
    """What a decode step has to read: K and V, once."""
    return 2.0 * a.b * a.hkv * a.sk * a.d * BYTES[dtype]


def make(mode: str, short: str, a: Attention, **facts) -> Case:
    """A case, named by what it does."""
    dtype = DTYPES[short]
    memory = mode == "decode"
    return Case(
        name=f"{mode}/{short}/{a.label}",
        op="gated_sdpa",
        mode=mode,
        dtype=dtype,
        shape=a,
        work=kv_bytes(a, dtype) if memory else useful_flops(a, mode),
        bound="memory" if memory else "compute",
        **facts,
    )


def _self(b: int, hq: int, hkv: int, s: int, d: int, **options) -> Attention:
    return Attention(b, hq, hkv, s, s, d, **options)


BASE = _self(1, 8, 8, 1024, 64, causal=True)
LARGE = (
    BASE,
    _self(1, 8, 2, 1024, 128, causal=True),
    _self(1, 4, 4, 4096, 64, causal=True),
    _self(1, 16, 2, 1024, 256, causal=True),
)
SMALL = (_self(8, 8, 8, 256, 64), _self(2, 6, 3, 500, 80, causal=True))
DECODE = (Attention(4, 16, 2, 1, 8192, 128), Attention(1, 16, 2, 1, 16384, 256))
TARGETS = {  # of the roof: forward and training, in fp32 and bf16
    LARGE: {
        ("forward", "fp32"): 0.82,
        ("forward", "bf16"): 0.74,
        ("training", "fp32"): 0.78,
        ("training", "bf16"): 0.70,
    },
    SMALL: {
        ("forward", "fp32"): 0.70,
        ("forward", "bf16"): 0.60,
        ("training", "fp32"): 0.65,
        ("training", "bf16"): 0.55,
    },
}
DECODE_TARGET = 0.60
ODD = Attention(1, 4, 4, 333, 777, 67)
PACKED = _self(1, 8, 2, 0, 128, causal=True, lengths=(1000, 300, 50, 700, 1, 997))
WINDOW = _self(1, 8, 8, 4096, 64, causal=True, window=512)
LONG_HEAD = _self(1, 1, 1, 4096, 128, causal=True)
MQA = _self(1, 8, 1, 1024, 128, causal=True)
MASKED = _self(2, 8, 8, 512, 64, mask=True)
SCALING = (256, 512, 1024, 2048, 4096)

# --quick: each row of the table, each mode and dtype, in as few cases as that takes.
_QUICK = {
    ("forward", "fp32", BASE), ("forward", "bf16", BASE), ("training", "fp32", BASE), ("training", "bf16", BASE),
    ("forward", "fp32", LARGE[1]), ("forward", "fp32", LARGE[3]), ("forward", "fp32", SMALL[0]),
    ("training", "fp32", SMALL[1]), ("decode", "fp32", DECODE[1]), ("decode", "bf16", DECODE[1]),
    ("forward", "fp16", BASE), ("forward", "fp32", PACKED),
}  # fmt: skip
_QUICK_COMPILED = {("forward", "fp32", BASE), ("training", "fp32", BASE), ("decode", "fp32", DECODE[1])}


def cases() -> list[Case]:
    """Every case, the ones with a target first."""
    plan: list[tuple[str, str, Attention, float | None]] = []
    for shapes, targets in TARGETS.items():
        plan += [(mode, short, a, target) for (mode, short), target in targets.items() for a in shapes]
    plan += [("decode", short, a, DECODE_TARGET) for short in ("fp32", "bf16") for a in DECODE]
    plan += [("forward", short, ODD, None) for short in ("fp32", "bf16")]
    plan += [(mode, "fp16", BASE, None) for mode in ("forward", "training")] + [("decode", "fp16", DECODE[1], None)]
    for a in (PACKED, WINDOW, LONG_HEAD):
        plan += [("forward", "fp32", a, None), ("forward", "bf16", a, None), ("training", "fp32", a, None)]
    for a in (MQA, MASKED, replace(BASE, gate="headwise"), replace(BASE, gate=None)):
        plan += [("forward", "fp32", a, None), ("training", "fp32", a, None)]
    found = {}
    for mode, short, a, target in plan:
        key = (mode, short, a)
        facts = {"target": target, "quick": key in _QUICK, "quick_compiled": key in _QUICK_COMPILED}
        if mode == "forward" and a == BASE:
            facts |= {"series": f"forward/{short}/1x8:8xSx64/causal", "size": a.sq}
        found[key] = make(mode, short, a, **facts)
    for short in ("fp32", "bf16"):
        for s in SCALING:
            key = ("forward", short, replace(BASE, sq=s, sk=s))
            series = f"forward/{short}/1x8:8xSx64/causal"
            found.setdefault(key, make(*key, series=series, size=s))
    return list(found.values())
