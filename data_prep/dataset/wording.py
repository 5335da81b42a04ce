"""Parts of messages: counts, and hints at what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def counted(count: int, one: str, many: str = "") -> str:
    """A count with its noun: `1 rank`, `2,000 ranks`; `many` where the plural is not `one` + s."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def meant(name: str, known: Iterable[str], prefix: str = "") -> str:
    """What may have been meant by an unknown name: the nearest known one, or any of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names) or 'none'}"


def any_of(choices: Sequence[object]) -> str:
    """`a, b or c`."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last
