"""The networks that the suite times, and those whose saved memory it counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.workload import MEMORY, Case

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LAYERS_PER_BLOCK = 4


@dataclass(frozen=True, slots=True)
class Mlp:
    """A call's sizes and options. ``groups`` are independent networks of one call."""

    rows: int
    width: int = 256
    depth: int = 64
    groups: int | None = None
    checkpoint: str = "none"
    input_only: bool = False  # only x has a gradient: an actor's loss through a critic

    @property
    def label(self) -> str:
        words = [f"{self.width}x{self.depth}", f"B{self.rows}"]
        words += [f"G{self.groups}"] if self.groups else []
        words += ["block"] if self.checkpoint == "block" else []
        words += ["dx"] if self.input_only else []
        return "/".join(words)


def useful_flops(m: Mlp, mode: str) -> float:
    """``2 G B W W L`` forward, and as much again for each of the two gradients (x's and the weight's) of training.
    What a checkpoint recomputes does not count."""
    passes = 1 if mode == "forward" else 2 if m.input_only else 3
    return 2.0 * (m.groups or 1) * m.rows * m.width**2 * m.depth * passes


def make(mode: str, short: str, m: Mlp, **facts) -> Case:
    """A case, named by what it does."""
    return Case(
        name=f"residual_mlp/{mode}/{short}/{m.label}",
        op="residual_mlp",
        mode=mode,
        dtype=DTYPES[short],
        shape=m,
        work=0.0 if mode == MEMORY else useful_flops(m, mode),
        **facts,
    )


BATCHES = (Mlp(256), Mlp(512), Mlp(2048))
WIDE = (Mlp(512, width=512, depth=16), Mlp(512, width=1024, depth=16))
# What to reach of the roof, in fp32 and bf16.
AIMS = [
    ("forward", BATCHES, (0.83, 0.75)),
    ("training", BATCHES, (0.75, 0.67)),
    ("training", tuple(replace(m, checkpoint="block") for m in BATCHES), (0.62, 0.56)),
    ("forward", WIDE, (0.78, 0.68)),
    ("training", WIDE, (0.70, 0.60)),
]
# Few rows: some of the roof, and never slower than any peer.
FEW = {Mlp(16): (0.40, None), Mlp(64): (0.65, 0.60)}
NOT_SLOWER = {"eager": 1.0, "compiled": 1.0, "jax": 1.0}
# A rollout's single row reads the weights for a product each: no fraction of the roof, but far ahead of the peers.
ROLLOUT = Mlp(1)
ROLLOUT_FASTER = {"eager": 5.0, "compiled": 3.0}
CRITIC = Mlp(256, input_only=True)
TWINS = Mlp(256, groups=3)
DEPTHS = (4, 16, 64, 256, 1024)

KEPT = tuple(Mlp(512, depth=depth) for depth in (64, 256, 1024))
KEPT_AIM = {1024: {"nsk block": 160e6}}  # bytes

_QUICK = {
    ("forward", "fp32", BATCHES[0]), ("forward", "bf16", BATCHES[0]), ("training", "fp32", BATCHES[0]),
    ("training", "bf16", BATCHES[0]), ("training", "fp32", replace(BATCHES[0], checkpoint="block")),
    ("forward", "fp32", ROLLOUT),
}  # fmt: skip
_QUICK_COMPILED = {("forward", "fp32", BATCHES[0]), ("forward", "fp32", ROLLOUT)}


def cases() -> list[Case]:
    """Every case, the ones with a target first."""
    plan: list[tuple[str, str, Mlp, dict]] = []
    for mode, networks, targets in AIMS:
        for short, target in zip(DTYPES, targets, strict=True):
            plan += [(mode, short, m, {"target": target}) for m in networks]
    for m, targets in FEW.items():
        for short, target in zip(DTYPES, targets, strict=True):
            plan.append(("forward", short, m, {"target": target, "faster": NOT_SLOWER}))
    plan += [("forward", short, ROLLOUT, {"faster": ROLLOUT_FASTER}) for short in DTYPES]
    plan.append(("training", "fp32", CRITIC, {"shown": True}))
    plan += [(mode, "fp32", TWINS, {"shown": True}) for mode in ("forward", "training")]
    for mode in ("forward", "training"):
        plan += [(mode, "fp32", Mlp(256, depth=depth), {"shown": True}) for depth in DEPTHS]

    found = {}
    for mode, short, m, facts in plan:
        key = (mode, short, m)
        facts |= {"quick": key in _QUICK, "quick_compiled": key in _QUICK_COMPILED}
        if short == "fp32" and m == Mlp(256, depth=m.depth):
            facts |= {"series": f"residual_mlp/{mode}/fp32/256xL/B256", "size": m.depth}
        found.setdefault(key, make(mode, short, m, **facts))
    return [*found.values(), *map(_kept, KEPT)]


def _kept(m: Mlp) -> Case:
    series = f"residual_mlp/{MEMORY}/fp32/256xL/B{m.rows}"
    return make(MEMORY, "fp32", m, series=series, size=m.depth, keeps=KEPT_AIM.get(m.depth, {}))
