"""Files that are whole or absent: written under a temporary name, synced, renamed.

A rename alone survives a killed process; it survives a power loss only if the file's bytes and the
directory's entry were synced first, so both are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_READ_BYTES = 4 << 20


def sha256_of(path: Path) -> str:
    """Hex sha256 of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_directory(directory: Path) -> None:
    """Make the directory's entries (names just created, renamed or removed) durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes `path`'s place, durably, when the block ends without an exception.

    The temporary name is `path` with `.tmp` appended; what an earlier, killed writer left under it
    is overwritten. One writer per path.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write the whole file durably."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON durably: sorted keys, so that equal values give equal bytes.

    Without indent it takes a fifth of the time: for what programs alone read.
    """
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())
