"""``python -m benchmarks.gpu``: both ops on a GPU, next to what a user would run there without nsk.

nsk itself takes part with the backend that it chooses, with Triton's kernels and with those in CUDA C++. Peers of gated
attention are PyTorch's attention in each of its kernels (flash, cuDNN, efficient) times the sigmoid, FlexAttention, and
torch.compile; of the residual MLP eager and torch.compile. The arms take turns, as in the CPU suite, and every result
is held against the same error budget before it is timed. Fractions are of the data sheet's dense peak.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

import nsk
from benchmarks import measure, suite, table, workload
from benchmarks.gated_sdpa.cases import Attention
from benchmarks.gated_sdpa.cases import make as attention
from benchmarks.residual_mlp.cases import Mlp
from benchmarks.residual_mlp.cases import make as mlp
from benchmarks.workload import OURS, Case
from nsk.backends.triton.targets import TARGETS, Target

ATTENTION = (
    Attention(4, 16, 4, 4096, 4096, 128, causal=True),
    Attention(4, 16, 16, 2048, 2048, 64, causal=True),
    Attention(2, 16, 2, 4096, 4096, 256, causal=True),
    Attention(4, 16, 4, 8192, 8192, 128, causal=True, window=1024),
)
PACKED = Attention(1, 16, 4, 0, 0, 128, causal=True, lengths=(4096, 1000, 300, 50, 700, 1, 2045))
DECODE = (Attention(8, 16, 2, 1, 16384, 128), Attention(64, 16, 2, 1, 4096, 128))
NETWORKS = (Mlp(2048), Mlp(16384), Mlp(2048, width=512, depth=16), Mlp(256, groups=8), Mlp(1))


def cases() -> list[Case]:
    """Every case, attention first."""
    gates = [replace(ATTENTION[0], gate=gate) for gate in ("headwise", None)]
    found = [attention(mode, "bf16", a) for mode in ("forward", "training") for a in (*ATTENTION, *gates, PACKED)]
    found += [attention(mode, short, ATTENTION[1]) for mode in ("forward", "training") for short in ("fp16", "fp32")]
    found += [attention("decode", "bf16", a) for a in DECODE]
    found += [mlp(mode, "bf16", m) for mode in ("forward", "training") for m in NETWORKS]
    found += [mlp("training", "bf16", Mlp(2048, depth=1024, checkpoint="block")), mlp("forward", "fp32", Mlp(2048))]
    return found


def target() -> Target | None:
    """The architecture of the current device, with the roofs of one that has it; ``None`` if there are no kernels."""
    if torch.version.hip:
        return TARGETS.get(torch.cuda.get_device_properties().gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability()
    return TARGETS.get(f"sm_{major}{minor}")


def peak(case: Case, roofs: Target) -> float:
    """What the case could do at most, in its unit of work a second. float32 is exact."""
    if case.bound == "memory":
        return roofs.bandwidth
    return roofs.fp32_flops if case.dtype == "float32" else roofs.flops


def run_case(
    case: Case,
    device: str,
    roofs: Target | None,
    effort: measure.Effort,
    settle: Callable | None,
    compiled: bool = True,
) -> dict:
    """One row of facts; ``compiled`` asks for the peers that torch.compile makes."""
    work = workload.module(case.op).prepare(case, compiled, device)
    work.arms |= {f"nsk {name}": nsk.use_backend(name)(work.arms[OURS]) for name in ("triton", "cuda")}
    verdicts = suite.warm_up(work, lambda _: None)
    row = {"name": case.name, "op": case.op, "status": "ok", "absent": work.absent}
    if verdicts[OURS].reasons:
        return row | {"status": "refused", "reasons": list(verdicts[OURS].reasons)}
    samples, _ = measure.interleave(work.arms, effort, settle=settle)
    row["arms"] = {
        name: asdict(measure.summary(seconds))
        | {"speedup": measure.paired_ratio(seconds, samples[OURS]), "error": verdicts[name].error}
        for name, seconds in samples.items()
    }
    row["rate"] = case.work / row["arms"][OURS]["median"]
    row["fraction"] = row["rate"] / peak(case, roofs) if roofs else None
    return row


def line(row: dict) -> str:
    """One row for people."""
    if row["status"] != "ok":
        return f"{row['name']:<64} REFUSED: {'; '.join(row['reasons'])}"
    ours = row["arms"][OURS]
    fraction = "-" if row["fraction"] is None else f"{row['fraction']:.1%}"
    peers = "  ".join(f"{name} {facts['speedup']:.2f}x" for name, facts in row["arms"].items() if name != OURS)
    return f"{row['name']:<64} {ours['median'] * 1e3:9.3f} ms  {fraction:>6} of peak  faster than: {peers}"


def main(argv: list[str]) -> int:
    """Returns 0, or 1 when a result was wrong, or 2 when there is no GPU."""
    p = argparse.ArgumentParser("python -m benchmarks.gpu", description="What nsk reaches on a GPU, next to its peers.")
    p.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="cases whose name contains one of these")
    p.add_argument("--seconds", type=float, default=2.0, metavar="S", help="time to measure a case (default: 2)")
    p.add_argument("--quick", action="store_true", help="leave out the peers that torch.compile makes")
    p.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no GPU", file=sys.stderr)
        return 2
    device, name = "cuda", torch.cuda.get_device_name()
    roofs = target()
    print(f"{name}; torch {torch.__version__}; roofs of {roofs.device if roofs else 'no known device'}")
    rows = []
    wanted = [case for case in cases() if any(text in case.name for text in args.only)]
    for case in tqdm(wanted, unit="case", disable=None):
        effort = measure.Effort(seconds=args.seconds, slice_seconds=0.01)
        rows.append(run_case(case, device, roofs, effort, torch.cuda.synchronize, not args.quick))
        tqdm.write(line(rows[-1]))
        if args.json:
            args.json.write_text(json.dumps({"gpu": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(table.absent_text(rows))
    return int(any(row["status"] == "refused" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
