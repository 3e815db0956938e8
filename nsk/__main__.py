"""``python -m nsk``: what runs here, and why not more."""

from __future__ import annotations

import platform

import torch

import nsk


def report() -> str:
    lines = [
        f"nsk {nsk.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        f"GPUs: {torch.cuda.device_count() if torch.cuda.is_available() else 'none'}",
        "",
    ]
    for name, facts in nsk.backends().items():
        lines.append(f"{name}: {'usable' if facts['usable'] else 'not usable'}")
        lines += [f"  because {reason}" for reason in facts["reasons"]]
        lines += [f"  {key}: {value}" for key, value in facts.items() if key not in ("usable", "reasons")]
    q, x = torch.zeros(1, 1, 1, 64), torch.zeros(1, 64)
    mlp = (x.expand(1, 64, 64), x, x, x)
    lines += ["", "Calls on the CPU:", nsk.explain("gated_sdpa", q, q, q)]
    lines += [nsk.explain("residual_mlp", x, *mlp, layers_per_block=1)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
