"""Bar charts: rows of a name, a value and a bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

Number = TypeVar("Number", int, float)


class Bar(NamedTuple):
    """A row of a bar chart. `parts` are shares of the whole width, one per colour."""

    name: str
    value: str
    parts: list[float]


def bars(values: Mapping[str, Number], show: Callable[[Number], str]) -> list[Bar]:
    """A bar per value, in their order; the longest fills the width."""
    longest = max(values.values(), default=0) or 1
    return [Bar(name, show(value), [value / longest]) for name, value in values.items()]
