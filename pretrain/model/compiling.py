"""Fuses pure functions with torch.compile, if switched on for the process.

Only functions of tensors are compiled, never modules: ZeRO-3 gathers weights in module hooks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_on = False


def switch(on: bool) -> None:
    """Compile the functions marked `fused` from their next call on, or call them as written."""
    global _on
    _on = on


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """A block in which nothing is compiled, so that its shapes take no place from those of
    training, of which only so many are kept."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


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
