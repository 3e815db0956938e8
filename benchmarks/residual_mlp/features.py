"""What README.md's support matrix tries of deep residual MLPs."""

from __future__ import annotations

from collections.abc import Callable

import torch

import nsk


def _call(
    dtype=torch.float32, rest: torch.dtype | None = None, x: torch.dtype | None = None, groups=None, width=24, **options
) -> Callable[[], torch.Tensor]:
    """A call of 20 rows and 8 layers. ``rest`` is the type of bias, ln_weight and ln_bias, if not weight's."""
    trained = options.pop("trained", True)
    group = (groups,) if groups else ()

    def call() -> torch.Tensor:
        def leaf(*shape: int, of: torch.dtype | None, grad: bool = trained) -> torch.Tensor:
            return torch.randn(*group, *shape).to(of or dtype).requires_grad_(grad)

        small = [leaf(8, width, of=rest) for _ in range(3)]
        return nsk.residual_mlp(leaf(20, width, of=x, grad=True), leaf(8, width, width, of=None), *small, **options)

    return call


FEATURES: dict[str, Callable[[], torch.Tensor]] = {
    "float32": _call(torch.float32),
    "bfloat16": _call(torch.bfloat16),
    "float16": _call(torch.float16),
    "float64": _call(torch.float64),
    "half weights, the rest float32": lambda: sum(
        _call(half, torch.float32, torch.float32)().sum() for half in (torch.bfloat16, torch.float16)
    ),
    "any width": lambda: sum(_call(width=width)().sum() for width in (1, 67, 512)),
    "SiLU, ReLU, GELU (tanh)": lambda: sum(_call(activation=name)().sum() for name in ("silu", "relu", "gelu_tanh")),
    "1, 2, 8 layers a block": lambda: sum(_call(layers_per_block=n)().sum() for n in (1, 2, 8)),
    "independent networks in one call (groups)": _call(groups=3),
    'recomputing backward (`checkpoint="block"`)': _call(checkpoint="block"),
    "gradient of the input alone": _call(trained=False),
}
