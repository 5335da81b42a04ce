"""Cutting a text into parts that are encoded one by one, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

# A part without a place to cut is cut anyway at this length: that costs a token or two, and no
# text.
_LONGEST_PART = 1 << 20
_ANYWHERE = re.compile(r"(?<=\S)(?= \S)")


def parts(
    texts: Iterable[str], cut: Callable[[], re.Pattern[str] | None], least: int
) -> Iterator[str]:
    """Parts of the joined texts of `least` characters or a little more, cut where `cut` matches.

    A short text never calls `cut`, which may have to inspect all pieces.
    """
    held = ""
    for text in texts:
        held += text
        start = 0
        while len(held) - start > least:
            stop = _stop(held, start, cut(), least)
            if stop is None:
                break
            yield held[start:stop]
            start = stop
        held = held[start:]
    if held:
        yield held


def _stop(held: str, start: int, cut: re.Pattern[str] | None, least: int) -> int | None:
    """Where the part that begins at `start` ends; None: more of the text is needed."""
    end = start + _LONGEST_PART
    found = cut.search(held, start + least, end) if cut else None
    if found is None and len(held) > end:
        found = _ANYWHERE.search(held, start + least, end)
        return found.start() if found else end
    return found.start() if found else None
