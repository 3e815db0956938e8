"""Which backend serves a call, what is said about it, and that the backward follows the forward."""

from __future__ import annotations

import contextvars
import logging
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import nsk
from nsk import dispatch
from nsk.backends import NAMES, why_unavailable
from nsk.backends import get as backend_module

ROOT = Path(__file__).parent.parent


def attend(*tensors: Tensor) -> Tensor:
    return nsk.gated_sdpa(*tensors, is_causal=True)


def inputs(*, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 2, 5, 8, generator=generator).requires_grad_(grad) for _ in range(4)]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran, in order: ``"cpu forward"``, ``"eager backward"``, ..."""
    calls: list[str] = []

    def spy(module: ModuleType, phase: str) -> None:
        function = getattr(module, f"gated_sdpa_{phase}")

        def recorded(*args) -> None:
            calls.append(f"{module.NAME} {phase}")
            function(*args)

        monkeypatch.setattr(module, f"gated_sdpa_{phase}", recorded)

    for name in NAMES:
        for phase in ("forward", "backward"):
            spy(backend_module(name), phase)
    return calls


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_said", set())


# --- use_backend -------------------------------------------------------------------------------------------------


def test_use_backend_nests_and_restores(served: list[str]):
    assert dispatch.requested() == "auto"
    with nsk.use_backend("eager"):
        attend(*inputs())
        with nsk.use_backend("cpu"):
            attend(*inputs())
            with nsk.use_backend("auto"):
                attend(*inputs())
            assert dispatch.requested() == "cpu"
        attend(*inputs())
    attend(*inputs())
    assert served == ["eager forward", "cpu forward", "cpu forward", "eager forward", "cpu forward"]


def test_use_backend_is_restored_after_an_exception():
    with pytest.raises(ZeroDivisionError), nsk.use_backend("eager"), nsk.use_backend("cpu"):
        raise ZeroDivisionError
    assert dispatch.requested() == "auto"


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None, 0])
def test_an_unknown_name_is_refused(name: object):
    with (
        pytest.raises(
            nsk.UnsupportedInput, match="^backend: got .+; expected 'auto' or one of cpu, triton, cuda, eager"
        ),
        nsk.use_backend(name),
    ):
        pass
    assert dispatch.requested() == "auto"


def test_a_new_thread_starts_from_auto():
    """The choice belongs to the thread that made it; a copied context takes it along."""
    seen: dict[str, str] = {}

    def look(key: str) -> None:
        seen[key] = dispatch.requested()

    with nsk.use_backend("eager"):
        workers = [
            threading.Thread(target=look, args=("new",)),
            threading.Thread(target=contextvars.copy_context().run, args=(look, "copied")),
        ]
        for worker in workers:
            worker.start()
            worker.join()
    assert seen == {"new": "auto", "copied": "eager"}


def test_threads_do_not_disturb_each_other():
    barrier = threading.Barrier(2, timeout=60)
    seen: dict[str, str] = {}

    def work(name: str) -> None:
        with nsk.use_backend(name):
            barrier.wait()
            seen[name] = dispatch.requested()
            barrier.wait()

    workers = [threading.Thread(target=work, args=(name,)) for name in ("cpu", "eager")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert seen == {"cpu": "cpu", "eager": "eager"}


def test_use_backend_as_a_decorator(served: list[str]):
    nsk.use_backend("eager")(attend)(*inputs())
    assert served == ["eager forward"]


# --- explicit requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if why_unavailable(name)])
def test_an_explicit_backend_that_is_absent_raises(name: str, served: list[str]):
    with nsk.use_backend(name), pytest.raises(nsk.BackendUnavailable, match=f"backend '{name}'") as caught:
        attend(*inputs())
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.backend == name
    assert caught.value.reasons == nsk.backends()[name]["reasons"] == why_unavailable(name)
    assert all(reason in str(caught.value) for reason in caught.value.reasons)
    assert served == []


def test_an_explicit_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch, served: list[str]):
    """Neither where it cannot run nor where it does not take this very call."""
    cpu = backend_module("cpu")
    with nsk.use_backend("cpu"):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "unavailable", lambda: ["was taken out", "for a test"])
            with pytest.raises(nsk.BackendUnavailable, match="was taken out; for a test") as caught:
                attend(*inputs())
            assert caught.value.reasons == ["was taken out", "for a test"]
        monkeypatch.setattr(cpu, "unsupported", lambda op, call: [f"has no {op} of {call.query.shape[2]} rows"])
        with pytest.raises(nsk.BackendUnavailable) as caught:
            attend(*inputs())
    assert caught.value.reasons == ["has no gated_sdpa of 5 rows"]
    assert served == []


def test_backward_does_not_fall_back(monkeypatch: pytest.MonkeyPatch):
    loss = attend(*inputs(grad=True)).sum()
    monkeypatch.setattr(backend_module("cpu"), "unavailable", lambda: ["left in between"])
    with pytest.raises(nsk.BackendUnavailable, match="left in between"):
        loss.backward()


# --- auto --------------------------------------------------------------------------------------------------------


def warned(*tensors: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attend(*tensors)
    return [str(w.message) for w in caught]


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("where", ["unavailable", "unsupported"])
def test_auto_warns_once_per_reason(where: str, monkeypatch: pytest.MonkeyPatch, served: list[str]):
    reasons = ["has lost its first reason", "has lost its second reason"]
    monkeypatch.setattr(backend_module("cpu"), where, lambda *_: list(reasons))
    said = warned(*inputs())
    assert [text for text in said if "the cpu backend" in text] == [
        f"gated_sdpa runs in eager torch, without a kernel: the cpu backend {reason}" for reason in reasons
    ]
    assert warned(*inputs()) == []
    reasons.append("has lost a third one")
    assert len(warned(*inputs())) == 1
    assert served == ["eager forward"] * 3


@pytest.mark.usefixtures("nothing_said")
def test_eager_on_request_is_silent():
    with nsk.use_backend("eager"):
        assert warned(*inputs()) == []


@pytest.mark.usefixtures("nothing_said")
def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture, served: list[str]):
    with caplog.at_level(logging.INFO, logger="nsk"):
        for _ in range(3):
            assert warned(*inputs()) == []
    assert [record.getMessage() for record in caplog.records] == ["gated_sdpa runs on the cpu backend"]
    assert served == ["cpu forward"] * 3


@pytest.mark.usefixtures("nothing_said")
def test_input_outside_the_spec_is_not_a_reason_to_fall_back():
    q, k, v, _ = inputs()
    for name in ("auto", "cpu", "eager"):
        with nsk.use_backend(name), pytest.raises(nsk.UnsupportedInput):
            nsk.gated_sdpa(q, k.double(), v)
    assert dispatch._said == set()


# --- the backward runs where the forward ran ---------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [("eager", "cpu"), ("cpu", "eager"), ("eager", "auto")])
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_backward_runs_where_forward_ran(first: str, then: str, compiled: bool, served: list[str]):
    torch._dynamo.reset()
    function = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    with nsk.use_backend(first):
        loss = function(*inputs(grad=True)).sum()
    with nsk.use_backend(then):
        loss.backward()
    assert served == [f"{first} forward", f"{first} backward"]


def test_a_graph_holds_no_choice(served: list[str]):
    """One compiled function serves each request, without compiling anew."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for name in ("cpu", "eager", "cpu"):
        with nsk.use_backend(name):
            loss = compiled(*inputs(grad=True)).sum()
        loss.backward()
    assert served == [f"{name} {phase}" for name in ("cpu", "eager", "cpu") for phase in ("forward", "backward")]
    assert counter.frame_count == 1


def test_backward_in_another_thread(served: list[str]):
    with nsk.use_backend("eager"):
        loss = attend(*inputs(grad=True)).sum()
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    assert served == ["eager forward", "eager backward"]


def test_backward_of_a_direct_call(served: list[str]):
    with nsk.use_backend("eager"):
        tensors = (*inputs(grad=True), None, None, None, None)
        out, *_ = torch.ops.nsk.gated_sdpa(*tensors, -1, -1, True, False, -1, -1, 0.0, None)
    out.sum().backward()
    assert served == ["eager forward", "eager backward"]


def test_two_forwards_and_one_backward(served: list[str]):
    """Each part of a graph keeps its own backend."""
    tensors = inputs(grad=True)
    with nsk.use_backend("eager"):
        first = attend(*tensors)
    second = attend(first, *tensors[1:])
    second.sum().backward()
    assert served == ["eager forward", "cpu forward", "cpu backward", "eager backward"]


# --- what is said ------------------------------------------------------------------------------------------------


def test_backends():
    found = nsk.backends()
    assert tuple(found) == NAMES == ("cpu", "triton", "cuda", "eager")
    for name, facts in found.items():
        assert facts["usable"] is (not facts["reasons"])
        if name in ("cpu", "eager"):  # the others depend on the machine
            assert facts["usable"]
        assert all(isinstance(reason, str) and reason for reason in facts["reasons"])
    assert found["cpu"]["isa"] in found["cpu"]["usable isas"].split(", ")
    assert found["cpu"]["threads"] == str(torch.get_num_threads())
    assert found["eager"]["torch"] == torch.__version__


def test_backends_is_a_copy():
    nsk.backends()["triton"]["reasons"].clear()
    assert nsk.backends()["triton"]["reasons"]


def test_backends_without_the_native_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend_module("cpu"), "_load", lambda: (None, "has no native module"))
    assert nsk.backends()["cpu"] == {"usable": False, "reasons": ["has no native module"]}


EXPLAINED = {
    "auto": ["cpu: serves the call", "eager: could, if none before it did"],
    "cpu": ["cpu: serves the call", "eager: could, but use_backend('cpu') asks for another"],
    "eager": ["cpu: could, but use_backend('eager') asks for another", "eager: serves the call"],
    "cuda": [f"{name}: could, but use_backend('cuda') asks for another" for name in ("cpu", "eager")],
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain(name: str, served: list[str]):
    with nsk.use_backend(name):
        text = nsk.explain("gated_sdpa", *inputs(), is_causal=True, return_lse=True)
    lines = [f"gated_sdpa (requested: {name})", *EXPLAINED[name]]
    found = [line.strip() for line in text.splitlines()]
    assert [line for line in found if not line.startswith(("triton: no, ", "cuda: no, "))] == lines
    assert len(found) > len(lines)
    assert served == []


def test_explain_gives_every_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend_module("cpu"), "unsupported", lambda op, call: ["is tired", "and old"])
    lines = [line.strip() for line in nsk.explain("gated_sdpa", *inputs()).splitlines()]
    lines = [line for line in lines if not line.startswith(("triton", "cuda"))]
    assert lines[1:4] == ["cpu: no, is tired", "cpu: no, and old", "eager: serves the call"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_explain_says_why_a_gpus_backend_does_not_serve_a_cpu_tensor(name: str):
    lines = [line.strip() for line in nsk.explain("gated_sdpa", *inputs()).splitlines()]
    reasons = [line for line in lines if line.startswith(f"{name}: no, ")]
    assert reasons
    assert any("GPU" in line for line in reasons)


def test_explain_packed():
    q = torch.zeros(3, 2, 8)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    text = nsk.explain("gated_sdpa_varlen", q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=3)
    assert "cpu: serves the call" in text
    with pytest.raises(nsk.UnsupportedInput, match="^op: got 'sdpa'; expected 'gated_sdpa' or 'gated_sdpa_varlen'"):
        nsk.explain("sdpa", q, q, q)


# --- python -m nsk and NSK_CPU_ISA -------------------------------------------------------------------------------


def python(*arguments: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "NSK_CPU_ISA"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if isa is None else {"NSK_CPU_ISA": isa})
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_python_m_nsk():
    done = python("-m", "nsk")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"nsk {nsk.__version__}, torch {torch.__version__}")
    isas = nsk.backends()["cpu"]["usable isas"].split(", ")
    assert f"  isa: {isas[0]}" in lines
    for name, facts in nsk.backends().items():
        assert f"{name}: {'usable' if facts['usable'] else 'not usable'}" in lines
        assert all(f"  because {reason}" in lines for reason in facts["reasons"])
    assert "  cpu: serves the call" in lines


def test_an_unknown_isa_makes_the_cpu_unavailable():
    script = """
import torch, warnings, nsk
q = torch.zeros(1, 1, 2, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    nsk.gated_sdpa(q, q, q)
print(*(w.message for w in caught))
print(nsk.backends()["cpu"])
try:
    with nsk.use_backend("cpu"):
        nsk.gated_sdpa(q, q, q)
except nsk.BackendUnavailable as error:
    print(error.reasons)
"""
    done = python("-c", script, isa="nonsense")
    assert done.returncode == 0, done.stderr
    warning, facts, reasons = done.stdout.splitlines()
    said = "was told NSK_CPU_ISA=nonsense, which is not usable here; usable: "
    assert warning.startswith(f"gated_sdpa runs in eager torch, without a kernel: the cpu backend {said}")
    assert facts.startswith(f"{{'usable': False, 'reasons': ['{said}")
    assert reasons.startswith(f"['{said}")
    assert "portable" in reasons


def test_a_known_isa_is_obeyed():
    script = "import nsk; print(nsk.backends()['cpu']['isa'])"
    assert python("-c", script, isa="portable").stdout.strip() == "portable"
