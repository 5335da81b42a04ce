"""A file that is read from blocks as they are made."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any


class BlockReader(io.RawIOBase):
    """The blocks, none of which is empty, as one readable file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._block, self._at = blocks, memoryview(b""), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes that were read."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the current block reaches; 0 at the end."""
        block = self._block or memoryview(next(self._blocks, b""))
        size = min(len(buffer), len(block))
        buffer[:size] = block[:size]
        self._block, self._at = block[size:], self._at + size
        return size
