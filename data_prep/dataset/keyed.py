"""Orders and random choices that depend on a seed and names alone, on every machine."""

from __future__ import annotations

import hashlib


def keyed(seed: int, *names: str) -> bytes:
    """16 bytes of a hash of names keyed by the seed."""
    text = "\0".join(names).encode()
    return hashlib.blake2b(text, digest_size=16, key=str(seed).encode()).digest()
