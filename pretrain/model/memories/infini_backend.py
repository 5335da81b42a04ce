"""Chooses the kernels of the memory: PyTorch's, in float32 or with bf16 operands, or Triton's."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Literal

import torch

from pretrain.config.model import TRITON_MAX_HEAD
from pretrain.model.local_attention import KernelError
from pretrain.model.memories.infini_grad import MIXED, TORCH, Products

_log = logging.getLogger(__name__)


@functools.cache
def choose(
    setting: Literal["auto", "torch", "mixed", "triton"],
    device_type: str,
    dtype: torch.dtype,
    d_head: int,
) -> Products:
    """The kernels that `model.memory.kernel` names; `auto` logs its choice once.

    Raises KernelError if those that are requested cannot run.
    """
    if setting == "torch":
        return TORCH
    if setting == "auto":
        # The others have not run on a GPU: no measurement shows yet that they are faster.
        on_gpu = device_type == "cuda" and dtype == torch.bfloat16
        hint = (
            "; bf16 operands (model.memory.kernel=mixed) and Triton's kernels are not known to be "
            "faster yet, see tools/bench/gpu.py"
        )
        _log.info("memory: PyTorch%s", hint if on_gpu else "")
        return TORCH
    find = _obstacle if setting == "triton" else _mixed_obstacle
    if obstacle := find(device_type, dtype, d_head):
        raise KernelError(
            f"model.memory.kernel: {setting} was requested, but {obstacle}; set it to torch or auto"
        )
    if setting == "mixed":
        return MIXED
    from pretrain.model.memories.infini_triton import TRITON

    return TRITON


def _mixed_obstacle(device_type: str, dtype: torch.dtype, d_head: int) -> str | None:
    """Why bf16 operands with float32 sums cannot be multiplied here; None if they can."""
    if device_type != "cuda":
        return f"it needs a GPU and the model is on {device_type}"
    return None if dtype == torch.bfloat16 else f"it computes in bf16 and the model is in {dtype}"


def _obstacle(device_type: str, dtype: torch.dtype, d_head: int) -> str | None:
    """Why Triton's kernels cannot run here; None if they can."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error}); it comes with torch's CUDA build"
    if d_head > TRITON_MAX_HEAD:
        return f"they support heads of at most {TRITON_MAX_HEAD}, found model.d_head={d_head}"
    if triton.knobs.runtime.interpret:
        exact = dtype in (torch.bfloat16, torch.float32)
        return None if exact else f"they compute in bf16 or float32 and the model is in {dtype}"
    if device_type != "cuda":
        return f"they need a GPU and the model is on {device_type}"
    if dtype != torch.bfloat16:
        return f"they compute in bf16 and the model is in {dtype}"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"they need an Ampere GPU or later, found {torch.cuda.get_device_name()}"
    return None
