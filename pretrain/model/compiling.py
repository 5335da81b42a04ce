"""Fuses pure functions with torch.compile, if switched on for the process.

Only functions of tensors are compiled, never modules: ZeRO-3 gathers weights in module hooks.
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
    """`function`, compiled at its first call if compilation is on."""

    @functools.cache
    def compiled() -> Callable[P, T]:
        # Static sizes: inductor fails on some of these functions with symbolic sizes.
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> T:
        return (compiled() if _on else function)(*arguments, **keywords)

    return call
