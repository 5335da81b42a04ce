"""Steps without torch's compiler, whose import is a third of the time that a rank takes to start.

torch imports it to exempt functions from compilation: an optimizer's when they are first called,
DeepSpeed's when they are defined. What is compiled here are functions of tensors alone
(pretrain/model/compiling.py), which call none of these. Activation checkpointing imports it too.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's AdamW, equal to the bit."""

    # Without what marks its begin and end for the compiler.
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def call_optimizers_as_they_are() -> None:
    """Have torch's optimizers call functions that it would exempt from compilation first."""
    for function in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
        plain = inspect.unwrap(function)
        vars(plain).setdefault("__dynamo_disable", plain)


@contextlib.contextmanager
def without_compiler(triton: bool) -> Iterator[None]:
    """Exempt nothing from compilation that is defined within, and hide Triton unless `triton`.

    On a CPU DeepSpeed would import Triton for kernels that need a GPU.
    """
    hidden = {} if triton else {"triton": sys.modules.get("triton")}
    exempted = [(torch, "_disable_dynamo"), (torch.compiler, "disable")]
    originals = [getattr(module, name) for module, name in exempted]
    for module, name in exempted:
        setattr(module, name, _as_it_is)
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for (module, name), original in zip(exempted, originals, strict=True):
            setattr(module, name, original)
        for name, found in hidden.items():
            del sys.modules[name]
            if found is not None:
                sys.modules[name] = found


def _as_it_is(function: Any = None, **settings: Any) -> Any:
    return _as_it_is if function is None else function  # a decorator, with or without settings
