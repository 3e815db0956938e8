"""Writes what README.md generates and never types: ``python -m benchmarks.readme [results.json]``.

The support matrix is made by trying: each feature is called, forward and backward, on each backend. The numbers are
those of a run of the suite (``python -m benchmarks --json FILE``), kept beside this file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import nsk
from benchmarks import machine
from benchmarks.table import PEERS
from benchmarks.workload import OURS

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results.json"
BACKENDS = ("cpu", "eager", "triton", "cuda")


def _dense(dtype=torch.float32, d=16, dv=None, hkv=2, sk=24, **options) -> Callable[[], torch.Tensor]:
    """A call of 4 heads and 24 queries; ``gate`` and the masks of ``options`` are made from their names."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def call() -> torch.Tensor:
        made = dict(options)
        gate = made.pop("gate", None)
        if gate is not None:
            gate = leaf(1, 4, 24, dv or d) if gate == "elementwise" else leaf(1, 4, 24)
        if made.get("attn_mask") == "bool":
            made["attn_mask"] = torch.rand(1, 4, 24, sk) < 0.8
        elif made.get("attn_mask") == "float":
            made["attn_mask"] = leaf(4, 24, sk)
        if made.get("sink"):
            made["sink"] = leaf(4)
        return nsk.gated_sdpa(leaf(1, 4, 24, d), leaf(1, hkv, sk, d), leaf(1, hkv, sk, dv or d), gate, **made)

    return call


def _packed() -> torch.Tensor:
    q, k, v = (torch.randn(24, 4, 16, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 5, 5, 24], dtype=torch.int32)
    return nsk.gated_sdpa_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, is_causal=True)


def _lse() -> torch.Tensor:
    return _dense(return_lse=True)()[1]


FEATURES: dict[str, Callable[[], torch.Tensor]] = {
    "float32": _dense(torch.float32, gate="elementwise"),
    "bfloat16": _dense(torch.bfloat16, gate="elementwise"),
    "float16": _dense(torch.float16, gate="elementwise"),
    "float64": _dense(torch.float64, gate="elementwise"),
    "elementwise, headwise, no gate": lambda: sum(_dense(gate=g)().sum() for g in ("elementwise", "headwise", None)),
    "head dimensions 1 to 512, Dv apart": lambda: _dense(d=512, dv=1)().sum() + _dense(d=1, dv=67)().sum(),
    "GQA, MQA": lambda: _dense(hkv=2)() + _dense(hkv=1)(),
    "causal, top left and bottom right": lambda: (
        _dense(is_causal=True)() + _dense(sk=30, is_causal=True, causal_alignment="bottom_right")()
    ),
    "window": _dense(window=(5, 2)),
    "softcap": _dense(softcap=3.0),
    "boolean mask": _dense(attn_mask="bool"),
    "additive mask and its gradient": _dense(attn_mask="float"),
    "attention sink": _dense(sink=True),
    "differentiable logsumexp": _lse,
    "packed sequences": _packed,
    "decode (1 query, many keys)": _dense(sk=2000, hkv=1),
}


def support() -> str:
    """The matrix, as Markdown."""
    names = [name for name in BACKENDS if name in nsk.backends()]
    lines = ["| forward and backward | " + " | ".join(names) + " |", "|---|" + ":-:|" * len(names)]
    for feature, call in FEATURES.items():
        lines.append(f"| {feature} | " + " | ".join(_works(name, call) for name in names) + " |")
    return "\n".join(lines)


def _works(backend: str, call: Callable[[], torch.Tensor]) -> str:
    try:
        with nsk.use_backend(backend):
            call().sum().backward()
    except nsk.BackendUnavailable:
        return "no"
    return "yes"


def numbers(run: dict) -> str:
    """The rows that have an aim, and the run's own circumstances, as Markdown."""
    head = ["case", "time", "of the roof", "aim", *(f"vs {peer}" for peer in PEERS)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in run["rows"]:
        if row["status"] == "ok" and (row["target"] or row["bound"] == "memory" or row["dtype"] != "float32"):
            lines.append("| " + " | ".join(_number_cells(row)) + " |")
    roofs = "; ".join(f"{kind} {facts['best']:.1f} {facts['unit']}" for kind, facts in run["roofs"].items())
    facts = run["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"{machine.line(facts)}. Roofs of this run: {roofs}. `{facts['command']}`.",
            "A fraction is the median over rounds, each against the roof measured in the same round; a ratio says how",
            "many times faster nsk was than the peer in the same round.",
        ]
    )


def _number_cells(row: dict) -> list[str]:
    aim = f"{row['target']:.0%}" if row["target"] else ""
    milliseconds = row["arms"][OURS]["median"] * 1e3
    cells = [f"`{row['name']}`", f"{milliseconds:.2f} ms", f"{row['roof']['fraction_in_round']:.0%}", aim]
    return [*cells, *(f"{row['arms'][p]['speedup']:.2f}x" if p in row["arms"] else "" for p in PEERS)]


def fill(text: str, section: str, content: str) -> str:
    """``text`` with what stands between the section's markers replaced."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    assert pattern.search(text), f"README.md has no section {section}"
    return pattern.sub(lambda found: found[1] + content + "\n" + found[2], text)


def main(argv: list[str]) -> None:
    """Rewrites README.md."""
    run = json.loads(Path(argv[0] if argv else RESULTS).read_text())
    text = README.read_text()
    for section, content in (("support", support()), ("numbers", numbers(run))):
        text = fill(text, section, content)
    README.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
