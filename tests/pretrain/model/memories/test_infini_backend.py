"""The seam of the memory's kernels: which are taken, and what is said where they cannot run."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

from pretrain.model.memories import infini_backend
from pretrain.model.memories.infini_grad import MIXED, TORCH

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    infini_backend.choose.cache_clear()
    yield
    infini_backend.choose.cache_clear()


def test_auto_takes_pytorch_and_logs_once_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        taken = [infini_backend.choose("auto", "cuda", torch.bfloat16, 64) for _ in range(3)]
    assert taken == [TORCH] * 3
    (record,) = caplog.records
    assert "PyTorch" in record.getMessage() and "tools/bench/gpu.py" in record.getMessage()


@pytest.mark.parametrize(
    "asked",
    [("cpu", torch.bfloat16, 64), ("cuda", torch.float32, 64)],
)
def test_other_kernels_are_not_named_where_they_cannot_run(
    asked: tuple[str, torch.dtype, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert infini_backend.choose("auto", *asked) is TORCH
    assert caplog.messages == ["memory: PyTorch"]


def test_pytorch_asked_for_is_taken_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert infini_backend.choose("torch", "cuda", torch.bfloat16, 64) is TORCH
    assert not caplog.records


def test_bf16_operands_are_taken_on_a_gpu_and_refused_elsewhere() -> None:
    assert infini_backend.choose("mixed", "cuda", torch.bfloat16, 256) is MIXED
    for asked, obstacle in {
        ("cpu", torch.bfloat16, 64): "mixed was requested, but it needs a GPU and the model is on",
        ("cuda", torch.float32, 64): r"it computes in bf16 and the model is in torch\.float32",
    }.items():
        with pytest.raises(ValueError, match=f"{obstacle}.*set it to torch or auto"):
            infini_backend.choose("mixed", *asked)


@needs_triton
def test_triton_that_cannot_run_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importlib.import_module("triton")  # the interpreter is chosen for good at the first import
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for asked, obstacle in {
        ("cpu", torch.bfloat16, 64): "they need a GPU and the model is on cpu",
        ("cuda", torch.float32, 64): r"compute in bf16 and the model is in torch\.float32",
        ("cuda", torch.bfloat16, 160): r"at most 128, found model\.d_head=160",
    }.items():
        with pytest.raises(ValueError, match=f"{obstacle}; set it to torch or auto"):
            infini_backend.choose("triton", *asked)


@needs_triton
def test_the_interpreter_runs_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from pretrain.model.memories.infini_triton import TRITON

    assert infini_backend.choose("triton", "cpu", torch.float32, 64) is TRITON
    with pytest.raises(ValueError, match=r"bf16 or float32 and the model is in torch\.float64"):
        infini_backend.choose("triton", "cpu", torch.float64, 64)
