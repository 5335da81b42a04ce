"""JSON that others wrote: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from typing import Any


def json_value(data: str | bytes) -> Any:
    """The value that the JSON text holds.

    Raises ValueError where it is none, and where it is nested more deeply than can be read, for
    which json itself raises RecursionError.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
