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

_SHAPES = 2**16
"""Shapes of a function that are compiled at most: all that a run has, of which AutoCompressors have
one for each number of segments whose summaries are held. After eight torch would call the function
as it is written, which rounds otherwise, and a resumed run meets its shapes in another order."""

_on = False


def switch(on: bool) -> None:
    """Compile the functions marked `fused` from their next call on, or call them as written."""
    global _on
    _on = on


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """A block in which nothing is compiled, since it has many shapes that do not come again."""
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, compiled at its first call if compilation is on, for each shape anew."""

    @functools.cache
    def compiled() -> Callable[P, T]:
        # Static sizes: inductor fails on some of these functions with symbolic sizes.
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> T:
        if not _on:
            return function(*arguments, **keywords)
        _raise_limits()
        return compiled()(*arguments, **keywords)

    return call


def _raise_limits() -> None:
    """Let this thread compile every shape. torch's settings are a thread's own, and on a GPU the
    backward is computed by another than the forward."""
    import torch._dynamo.config as limits  # it takes a second, for runs that compile alone

    if limits.recompile_limit != _SHAPES:
        limits.recompile_limit = limits.accumulated_recompile_limit = _SHAPES
