"""The bytes that tokens spell, many tokens at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SPACE = "\u2581"
"""How SentencePiece, and what was converted from it, writes a space."""

# Tokens that are turned into bytes at a time: what this needs stays in the cache.
_SPELLED = 1 << 15


class Spelling:
    """Turns many ids into bytes at once: a gather over all pieces laid end to end."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._length = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._first = np.cumsum(self._length) - self._length
        self._flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __call__(self, ids: Sequence[int] | np.ndarray, strip: bool) -> bytes:
        """The bytes of `ids`; `strip`: without the space that encoding prefixed."""
        plain = np.asarray(ids, dtype=np.int64)
        parts = (
            self._spell(plain[start : start + _SPELLED]) for start in range(0, len(plain), _SPELLED)
        )
        joined = b"".join(parts)
        return joined[1:] if strip and joined[:1] == b" " else joined

    def _spell(self, ids: np.ndarray) -> bytes:
        lengths = self._length[ids]
        # Where each token's bytes begin in `flat`, less where they go, then counted on from there.
        shift = self._first[ids] - (np.cumsum(lengths) - lengths)
        places = np.repeat(shift, lengths) + np.arange(lengths.sum())
        spelled: bytes = self._flat[places].tobytes()
        return spelled


def is_utf8(piece: bytes) -> bool:
    """Whether the bytes are whole characters."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
