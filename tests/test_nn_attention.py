"""GatedAttention against Qwen3NextAttention of Hugging Face transformers, and against attention written by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

import nsk
from nsk.nn import GatedAttention, KVCache, RotaryEmbedding
from nsk.reference.budget import within_budget

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, ROTARY = 48, 4, 2, 32, 8


def pair(dtype: torch.dtype) -> tuple[Qwen3NextAttention, GatedAttention]:
    """The Hugging Face module with random weights, and ours with its state dict."""
    config = Qwen3NextConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        partial_rotary_factor=ROTARY / HEAD_DIM, attn_implementation="eager", num_hidden_layers=4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Qwen3NextAttention(config, layer_idx=3).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = theirs.to(dtype)
    ours = GatedAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, qk_norm="rms_zero_centered").to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def angles(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = RotaryEmbedding(ROTARY)(torch.arange(length))
    return cos.to(dtype), sin.to(dtype)


def causal(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((length, length), -torch.inf, dtype=dtype).triu(1)[None, None]


def their_output(module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    cos, sin = angles(x.shape[1], x.dtype)
    mask = causal(x.shape[1], x.dtype) if mask is None else mask
    return module(x, position_embeddings=(cos[None], sin[None]), attention_mask=mask)[0]


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """The Hugging Face module computes norm and softmax in float32 whatever its type; for an oracle it must not."""
    to_float, softmax = torch.Tensor.float, F.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else to_float(t))
        patch.setattr(F, "softmax", lambda t, dim, dtype=None: softmax(t, dim))
        yield


def baseline_and_oracle(dtype: torch.dtype, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    theirs, _ = pair(dtype)
    wide = copy.deepcopy(theirs).double()
    with torch.no_grad():
        baseline = their_output(theirs, x, mask)
        with float64_throughout():
            return baseline, their_output(wide, x.double(), None if mask is None else mask.double())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
def test_prefill_agrees_with_transformers(dtype):
    x = torch.randn(2, 23, HIDDEN).to(dtype)
    _, ours = pair(dtype)
    with torch.no_grad():
        result = ours(x, position_embeddings=angles(23, dtype))
    within_budget(result, *baseline_and_oracle(dtype, x)).check("prefill")


@DTYPES
@pytest.mark.parametrize("chunk", [1, 4, 23])
def test_cached_decode_agrees_with_transformers(dtype, chunk):
    x = torch.randn(2, 23, HIDDEN).to(dtype)
    _, ours = pair(dtype)
    cos, sin = angles(23, dtype)
    cache = KVCache(2, 30, KV_HEADS, HEAD_DIM, dtype=dtype, device="cpu")
    parts = []
    with torch.no_grad():
        for i in range(0, 23, chunk):
            rows = slice(i, i + chunk)
            parts.append(ours(x[:, rows], position_embeddings=(cos[rows], sin[rows]), cache=cache))
    assert cache.length == 23
    within_budget(torch.cat(parts, 1), *baseline_and_oracle(dtype, x)).check("decode")


@DTYPES
def test_padding_masks_agree_with_transformers(dtype):
    x = torch.randn(2, 11, HIDDEN).to(dtype)
    mask = causal(11, dtype).repeat(2, 1, 1, 1)
    mask[0, ..., 7:] = -torch.inf  # the first sequence has 7 positions
    _, ours = pair(dtype)
    with torch.no_grad():
        result = ours(x, position_embeddings=angles(11, dtype), attn_mask=mask, is_causal=False)
    within_budget(result, *baseline_and_oracle(dtype, x, mask)).check("padded")


def test_gradients_of_all_parameters_agree_with_transformers():
    theirs, ours = pair(torch.float64)
    x = torch.randn(2, 17, HIDDEN, dtype=torch.float64)
    grad = torch.randn_like(x)
    with float64_throughout():
        their_output(theirs, x).backward(grad)
    ours(x, position_embeddings=angles(17, torch.float64)).backward(grad)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("gate", ["elementwise", "headwise", None])
@pytest.mark.parametrize("qk_norm", ["rms", None])
def test_against_attention_by_hand(gate, qk_norm):
    torch.manual_seed(1)
    module = GatedAttention(
        40, 4, 1, 16, gate=gate, qk_norm=qk_norm, bias=True, sliding_window=5, softcap=3.0, sink=True
    ).double()
    torch.nn.init.normal_(module.sinks)
    x = torch.randn(2, 12, 40, dtype=torch.float64)

    gate_dim = {"elementwise": 16, "headwise": 1, None: 0}[gate]
    heads = module.q_proj(x).view(2, 12, 4, 16 + gate_dim)
    q, logits = heads[..., :16], heads[..., 16:]
    k, v = (proj(x).view(2, 12, 1, 16) for proj in (module.k_proj, module.v_proj))
    if qk_norm:
        q, k = (F.rms_norm(t, (16,), norm.weight, 1e-6) for t, norm in ((q, module.q_norm), (k, module.k_norm)))
    s = 3 * torch.tanh(torch.einsum("bihd,bjgd->bhij", q, k) / 4 / 3)
    distance = torch.arange(12)[:, None] - torch.arange(12)[None]
    s = s.masked_fill((distance < 0) | (distance >= 5), -torch.inf)
    s = torch.cat((s, module.sinks.view(1, 4, 1, 1).expand(2, 4, 12, 1)), -1)
    out = torch.einsum("bhij,bjgd->bihd", s.softmax(-1)[..., :-1], v)
    if gate is not None:
        out = out * torch.sigmoid(logits)
    torch.testing.assert_close(module(x), module.o_proj(out.flatten(2)), rtol=1e-10, atol=1e-10)


def test_cache_refuses_before_it_writes():
    module = GatedAttention(32, 2)
    cache = KVCache(1, 4, 2, 16, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        module(torch.randn(1, 3, 32), cache=cache)
        before = cache.key.clone()
        with pytest.raises(nsk.UnsupportedInput, match="2 positions with 3 of 4 filled"):
            module(torch.randn(1, 2, 32), cache=cache)
        with pytest.raises(nsk.UnsupportedInput, match="key: got shape"):
            module(torch.randn(2, 1, 32), cache=cache)
        with pytest.raises(nsk.UnsupportedInput, match=r"key: got torch\.float64"):
            copy.deepcopy(module).double()(torch.randn(1, 1, 32).double(), cache=cache)
    with pytest.raises(nsk.UnsupportedInput, match="require a gradient"):
        module(torch.randn(1, 1, 32), cache=cache)
    assert cache.length == 3
    assert torch.equal(cache.key, before)
    cache.reset()
    assert cache.length == 0


def test_a_compiled_decode_step_compiles_once():
    _, module = pair(torch.float32)
    cache = KVCache(1, 30, KV_HEADS, HEAD_DIM, dtype=torch.float32, device="cpu")
    x = torch.randn(1, 30, HIDDEN)
    cos, sin = angles(30, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda x, cos, sin: module(x, position_embeddings=(cos, sin), cache=cache),
        fullgraph=True,
        backend=counter,
    )
    with torch.no_grad():
        parts = [step(x[:, i : i + 1], cos[i : i + 1], sin[i : i + 1]) for i in range(30)]
        whole = module(x, position_embeddings=(cos, sin))
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_nothing_is_copied_on_the_way():
    """Query and gate reach the op as views of one projection, and its output becomes the next projection's input."""
    module = GatedAttention(64, 4, 2)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(torch.randn(2, 9, 64))
    names = {event.name for event in profile.events()}
    assert "nsk::gated_sdpa" in names
    assert not names & {"aten::copy_", "aten::contiguous", "aten::clone", "aten::cat"}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "num_kv_heads"),
        ({"num_heads": 3}, "head_dim"),
        ({"num_heads": 4, "gate": "sometimes"}, "gate"),
        ({"num_heads": 4, "qk_norm": "layer"}, "qk_norm"),
        ({"num_heads": 4, "sliding_window": 0}, "sliding_window"),
    ],
)
def test_bad_options_are_named(arguments, name):
    with pytest.raises(nsk.UnsupportedInput, match=f"^{name}: got"):
        GatedAttention(64, **arguments)


def test_bad_inputs_are_named():
    module = GatedAttention(64, 4)
    with pytest.raises(nsk.UnsupportedInput, match="^x: got shape"):
        module(torch.randn(2, 64))
    with pytest.raises(nsk.UnsupportedInput, match="^position_embeddings: got cos"):
        module(torch.randn(2, 3, 64), position_embeddings=(torch.ones(4, 8), torch.ones(4, 8)))
    with pytest.raises(nsk.UnsupportedInput, match="^rotary_dim: got 7"):
        RotaryEmbedding(7)


def test_autocast_and_state():
    module = GatedAttention(64, 4, 2, sink=True, qk_norm="rms")
    x = torch.randn(2, 5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    other = GatedAttention(64, 4, 2, sink=True, qk_norm="rms")
    other.load_state_dict(module.state_dict())
    assert torch.equal(copy.deepcopy(other)(x), module(x))
