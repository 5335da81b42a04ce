"""Fusing of pure functions by torch.compile, switched on for a process.

Only functions of tensors are compiled, never modules: ZeRO-3 gathers weights in modules' hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_on = False


def switch(on: bool) -> None:
    """Compile the functions marked `fused` from their next call on, or call them as written."""
    global _on
    _on = on


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, compiled at its first call where compiling is on."""

    @functools.cache
    def compiled() -> Callable[P, T]:
        # Sizes as they are: inductor fails on some of these functions with symbols for sizes.
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> T:
        return (compiled() if _on else function)(*arguments, **keywords)

    return call
