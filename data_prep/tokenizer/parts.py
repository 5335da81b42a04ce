"""Cutting a text into parts that are processed one by one, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

# A part without a place to cut is cut anyway at this length: that costs a token or two, no text.
_LONGEST_PART = 1 << 20
_ANYWHERE = re.compile(r"(?<=\S)(?= \S)")


def cut(texts: Iterable[str], least: int, stop: Callable[[str, int], int | None]) -> Iterator[str]:
    """Parts of the joined texts; only where more than `least` characters are left, one is cut off.

    `stop` gives the end of the part that begins at a place of a text; None: more text is needed.
    """
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > least and (end := stop(held, start)) is not None:
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def part_end(held: str, start: int, place: re.Pattern[str] | None, least: int) -> int | None:
    """The end of a part of `least` characters or a little more, where `place` matches."""
    end = start + _LONGEST_PART
    found = place.search(held, start + least, end) if place else None
    if found is None and len(held) > end:
        found = _ANYWHERE.search(held, start + least, end)
        return found.start() if found else end
    return found.start() if found else None
