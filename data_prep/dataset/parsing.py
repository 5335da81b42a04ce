"""What others wrote: JSON, of which whatever is wrong is a ValueError, and Git LFS pointers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

LFS_POINTER = rb"version https://git-lfs\.github\.com/spec/v\d+\n"
"""How the text begins that a clone has in place of a large file, as a regular expression."""
FETCH = "fetch the file that it stands for (git lfs pull)"
"""What to do with one."""


def pointer(data: bytes) -> str:
    """What to say of a file that begins so, where it is a Git LFS pointer; empty: it is none."""
    return f"is a Git LFS pointer; {FETCH}" if re.match(LFS_POINTER, data) else ""


def json_value(
    data: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value that the JSON text holds; `pairs` makes one of the keys and values of an object.

    An integer of more digits than Python reads is a float. Raises ValueError where it is none, and
    where it is nested more deeply than can be read, for which json itself raises RecursionError.
    """
    read = partial(json.loads, data, object_pairs_hook=pairs)
    try:
        try:
            return read()
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise
        except ValueError:
            return read(parse_int=_number)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)
