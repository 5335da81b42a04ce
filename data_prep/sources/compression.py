"""Decompression in blocks of bounded size, whatever the data expand to."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import BinaryIO, Literal

import zstandard

BLOCK_BYTES = 1 << 18
# Four bytes of a zstd frame can expand to 128 KiB, and its decoder returns all that it can.
_ZSTD_BYTES = 1 << 9

Compression = Literal["gzip", "zstd"] | None


class DamageError(Exception):
    """The data end early ("truncated file", sound up to there) or are wrong ("damaged file")."""


Read = Callable[[int], bytes]
"""Reads at most so many bytes, none at the end."""


def blocks(read: Read, compression: Compression) -> Iterator[bytes]:
    """The file's bytes, decompressed, in blocks that are not empty. Raises DamageError."""
    if compression is None:
        while block := read(BLOCK_BYTES):
            yield block
        return
    member = _gzip_member if compression == "gzip" else _zstd_frame
    data = read(BLOCK_BYTES)
    if not data:
        raise DamageError("truncated file")
    while data:
        data = yield from member(read, data)
        data = data or read(BLOCK_BYTES)
        # tar and tape tools pad with NULs, which gzip's readers allow.
        while data and not data.strip(b"\0"):
            data = read(BLOCK_BYTES)


def expansion(raw: BinaryIO, kind: Compression, least: int) -> float:
    """Bytes after decompression for each byte before, over the first `least` of these."""
    size = read = 0
    with contextlib.suppress(DamageError):
        for block in blocks(raw.read, kind):
            size, read = size + len(block), raw.tell()
            if read >= least:
                break
    return size / max(read, 1)


def _gzip_member(read: Read, data: bytes) -> Generator[bytes, None, bytes]:
    """One gzip member; returns what was read beyond it."""
    decoder = zlib.decompressobj(31)
    while True:
        try:
            block = decoder.decompress(data, BLOCK_BYTES)
        except zlib.error:
            raise DamageError("damaged file") from None
        if block:
            yield block
        if decoder.eof:
            return decoder.unused_data
        data = decoder.unconsumed_tail
        if not data:
            data = read(BLOCK_BYTES)
            if not data:
                raise DamageError("truncated file")


def _zstd_frame(read: Read, data: bytes) -> Generator[bytes, None, bytes]:
    """One zstd frame; returns what was read beyond it."""
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    while True:
        for first in range(0, len(data), _ZSTD_BYTES):
            try:
                block = decoder.decompress(data[first : first + _ZSTD_BYTES])
            except zstandard.ZstdError:
                raise DamageError("damaged file") from None
            for start in range(0, len(block), BLOCK_BYTES):
                yield block[start : start + BLOCK_BYTES]
            if decoder.eof:
                return decoder.unused_data + data[first + _ZSTD_BYTES :]
        data = read(BLOCK_BYTES)
        if not data:
            raise DamageError("truncated file")
