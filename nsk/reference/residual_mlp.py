"""The deep residual MLP by its definition, in plain torch.

    t_0 = h;   t_l = act(LayerNorm(t_{l-1} w_l^T + b_l)),  l = 1 .. layers_per_block;   h <- h + t

for one block after the other. Source: *1000 Layer Networks for Self-Supervised RL* (arXiv 2503.14858), figure 2.

In float64 it is the oracle of every test. In the inputs' own types it is what a user would write without nsk who keeps
the residual stream and LayerNorm in float32: products in weight's type, activations in the type of ``z``.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from nsk.spec.residual_mlp import ResidualMlpCall

# In the order of nsk.spec.residual_mlp.ACTIVATIONS.
_ACTIVATIONS = (F.silu, F.relu, functools.partial(F.gelu, approximate="tanh"))


def residual_mlp_reference(call: ResidualMlpCall) -> Tensor:
    """``y``, of x's shape and type; differentiable by autograd."""
    act, accumulate = _ACTIVATIONS[call.activation], call.accumulate
    h = call.x.to(accumulate)
    # Unbound, since the gradient of an index is as large as all layers together.
    weights = call.weight.unbind(-3)
    # [W] -> [1, W], [G, W] -> [G, 1, W]: the same for all rows of a network
    vectors = [p.unsqueeze(-2).unbind(-3) for p in (call.bias, call.ln_weight, call.ln_bias)]
    for first in range(0, call.depth, call.layers_per_block):
        t = h
        for layer in range(first, first + call.layers_per_block):
            w, b, gain, shift = (p[layer] for p in (weights, *vectors))
            z = t.to(w.dtype) @ w.mT + b
            n = F.layer_norm(z.to(accumulate), (call.width,), eps=call.eps) * gain.to(accumulate) + shift.to(accumulate)
            t = act(n.to(z.dtype))
        h = h + t
    return h.to(call.x.dtype)
