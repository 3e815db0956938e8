"""What the CUDA backend says of its launches: the code that starts kernels answers, with no GPU and running nothing."""

from __future__ import annotations

import pytest
import tf32
import torch
from cases import Case, make_inputs
from cuda_cases import HALF, SINGLE, attention_cases
from emulated import HEAD_DIMS, Emulator, emulation
from harness import as_call

import nsk
from nsk.backends import cuda
from nsk.backends.cuda import gated_sdpa
from nsk.backends.cuda.machine import Launch, Machine
from nsk.ops.gated_sdpa import gated_sdpa_call
from nsk.ops.residual_mlp import residual_mlp_call
from nsk.spec.gated_sdpa import INPUTS

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.timeout(1500),  # the first one waits for the build
]

SMALL = 99 * 1024  # what a block may have on sm_86, 89 and 120


def machine(multiprocessors: int = 132, shared_bytes: int = 227 * 1024) -> Machine:
    """An H100, unless told otherwise; of its kernels those that the emulator has."""
    return Emulator(multiprocessors=multiprocessors, shared_bytes=shared_bytes)


def attention(*, query: tuple, key: tuple, dv: int | None = None, dtype=torch.bfloat16, **options):
    """A call on tensors of which there is one row."""
    row = torch.zeros(256, dtype=dtype)
    q, k, v = row[: query[-1]].expand(query), row[: key[-1]].expand(key), row[: dv or key[-1]]
    return gated_sdpa_call(dict(query=q, key=k, value=v.expand(*key[:-1], -1)) | options)


def names(found: list[Launch]) -> list[str]:
    return [launch.kernel.removeprefix("gated_sdpa_").removeprefix("residual_mlp_") for launch in found]


def test_attention():
    call = attention(query=(2, 4, 130, 64), key=(2, 2, 100, 64))
    (launch,) = cuda.launches("gated_sdpa", call, machine())
    assert launch == ("gated_sdpa_forward", (3 * 4 * 2, 1, 1), 128, 40992)
    assert str(launch) == "gated_sdpa_forward: 24 blocks of 128 threads with 40992 bytes"
    assert cuda.launches("gated_sdpa", attention(query=(2, 4, 0, 64), key=(2, 2, 9, 64)), machine()) == []


def test_a_decode_is_two_launches():
    call = attention(query=(1, 8, 1, 64), key=(1, 2, 8192, 64))
    decode, merge = cuda.launches("gated_sdpa", call, machine())
    assert names([decode, merge]) == ["decode", "merge"]
    assert decode.blocks == (2 * 32, 1, 1)  # two KV heads, whose keys are cut into 8192 / 256 parts
    assert names(cuda.launches("gated_sdpa", call, machine(multiprocessors=1))) == ["forward"]


def test_attentions_backward():
    more = dict(
        attn_mask=torch.zeros(40, 70).bfloat16(), sink=torch.zeros(4), gate=torch.zeros(1, 4, 40, 64).bfloat16()
    )
    call = attention(query=(1, 4, 40, 64), key=(1, 4, 70, 64), **more)
    found = names(cuda.launches("gated_sdpa", call, machine(), needs=INPUTS))
    assert found == ["forward", "norm", "rows", "dq", "dkdv", "mask_grad", "sink"]
    assert names(cuda.launches("gated_sdpa", call, machine(), needs=("query",))) == ["forward", "norm", "rows", "dq"]
    with tf32.allowed():  # in which the sums for keys and values of wide heads do not fit beside each other
        wide = attention(query=(1, 4, 40, 192), key=(1, 4, 70, 192), dv=128, dtype=torch.float32)
        found = names(cuda.launches("gated_sdpa", wide, machine(), needs=("key", "value")))
    assert found == ["forward", "rows", "dkdv", "dkdv"]


@pytest.mark.parametrize("case", attention_cases(40, HEAD_DIMS, 70, (*HALF, *SINGLE)), ids=str)
def test_launches_fit_into_the_smallest_gpu_and_what_is_refused_bounds_them(case: Case):
    inputs = make_inputs(case)
    call = as_call(case, inputs.tensors)
    sq, sk = call.query.shape[2], call.key.shape[2]
    bound = max(gated_sdpa._grids(call, sq, sk).values())
    with tf32.allowed():
        found = cuda.launches("gated_sdpa", call, machine(shared_bytes=SMALL), needs=inputs.leaves())
    assert found
    for launch in found:
        assert launch.shared_bytes <= SMALL
        assert launch.threads % 32 == 0
        assert launch.blocks[1:] == (1, 1)
        if launch.kernel not in ("gated_sdpa_merge", "gated_sdpa_sink"):  # of few rows, and of heads
            assert 0 < launch.blocks[0] <= bound


def mlp(batch: int, width: int = 128, dtype: torch.dtype = torch.bfloat16):
    weight, vector = torch.zeros(8, width, width, dtype=dtype), torch.zeros(8, width)
    x = torch.zeros(width, dtype=dtype).expand(batch, width)
    arguments = dict(x=x, weight=weight, bias=vector, ln_weight=vector, ln_bias=vector)
    return residual_mlp_call(arguments | dict(layers_per_block=4))


def test_residual_mlp():
    (launch,) = cuda.launches("residual_mlp", mlp(512), machine())
    assert launch.kernel == "residual_mlp_forward"
    assert launch.blocks == (32, 1, 1)  # tiles of 16 rows: those of 32 would leave more multiprocessors without one
    large, _, backward = cuda.launches("residual_mlp", mlp(132 * 64), machine(), needs=("x",))
    assert large.blocks == backward.blocks == (264, 1, 1)
    assert large.shared_bytes > launch.shared_bytes
    little = machine(shared_bytes=backward.shared_bytes - 1)
    *_, backward = cuda.launches("residual_mlp", mlp(132 * 64), little, needs=("x",))
    assert backward.blocks == (396, 1, 1)  # of 528 tiles of 16 rows, for three blocks a multiprocessor
    found = names(cuda.launches("residual_mlp", mlp(512), machine(), needs=("x", "weight", "bias")))
    assert found == ["forward", "backward", "weight_gradient", "vector_gradient"]
    # Nothing was kept for x alone: the forward is run again.
    assert names(cuda.launches("residual_mlp", mlp(512), machine(), needs=("x",))) == ["forward", "forward", "backward"]


def test_what_is_refused_has_no_launches():
    with pytest.raises(nsk.BackendUnavailable, match="head dimensions"):
        cuda.launches("gated_sdpa", attention(query=(1, 1, 9, 48), key=(1, 1, 9, 48)), machine())
    with pytest.raises(nsk.BackendUnavailable, match="keeps rows of width"):
        cuda.launches("residual_mlp", mlp(3, width=96), machine())


def test_they_are_explained():
    q = torch.zeros(1, 2, 100, 64).bfloat16()
    with emulation(Emulator()), nsk.use_backend("cuda"):
        lines = nsk.explain("gated_sdpa", q, q, q).splitlines()
    at = lines.index("  cuda: serves the call")
    assert lines[at + 1] == "    gated_sdpa_forward: 4 blocks of 128 threads with 40992 bytes"
