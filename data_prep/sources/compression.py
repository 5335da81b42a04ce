"""Decompression in blocks of bounded size, whatever the data expand to.

A compressed file is a row of members (zstd: frames), each with its own check. One that is damaged
is left out, as is what is no member: reading continues at the next sound one, and `scan` says
where. NULs between and behind members are padding, as for gzip itself.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

import zstandard

from data_prep.sources import contents

BLOCK_BYTES = 1 << 18
# Four bytes of a zstd frame can expand to 128 KiB, and its decoder returns all that it can.
_ZSTD_BYTES = 1 << 9
# Bytes at which decoding is tried anew behind damage.
_STARTS = {
    "gzip": re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
}
_START_BYTES = 4
# Bytes that may be read in vain behind damage, in sizes of the file: each trial could cost all.
_MOST_IN_VAIN, _LEAST_IN_VAIN = 16, 1 << 24
# Enough for the header of a member.
_HEAD_BYTES = 512
_LARGEST_WINDOW = 1 << 31
_GIVEN_UP = "after so much damage they are not looked at further"

UNSUPPORTED = "unsupported file"
"""The reason of rejects for what is not damaged, but of a kind that is not read."""

Compression = Literal["gzip", "zstd"] | None


class DamageError(Exception):
    """The data end early ("truncated file", sound up to there) or are wrong ("damaged file")."""


class UnsupportedError(DamageError):
    """The data are of a kind that is not read, as the argument says, with what to do."""


Read = Callable[[int], bytes]
"""Reads at most so many bytes, none at the end."""


@dataclass(frozen=True)
class Gap:
    """Bytes [start, stop) of a compressed file that are left out; `why` they are.

    Of the data after decompression it lies at `offset`, in or before record `line`. `is_loss`: it
    began as a member does, or was not looked at, so data are missing there.
    """

    start: int
    stop: int
    offset: int
    line: int
    why: str
    is_loss: bool


class Sink(Protocol):
    """Takes the data of a scan. What came since the last `mark` may turn out to be damaged."""

    @property
    def is_full(self) -> bool:
        """Whether it needs no more data."""

    def mark(self) -> tuple[int, int]:
        """A member begins here: the offset after decompression, and the line."""

    def add(self, block: bytes) -> None:
        """Take the next data."""

    def undo(self) -> None:
        """Forget what came since the mark."""


def blocks(raw: BinaryIO, compression: Compression, gaps: Sequence[Gap] = ()) -> Iterator[bytes]:
    """The file's bytes from its place on, decompressed, without its gaps. Raises DamageError."""
    for _, block in pieces(raw, compression, gaps):
        yield block


def pieces(
    raw: BinaryIO, compression: Compression, gaps: Sequence[Gap] = ()
) -> Iterator[tuple[int, bytes]]:
    """(where its member begins in the file, block) for each block; no block is empty."""
    if compression is None:
        while block := raw.read(BLOCK_BYTES):
            yield 0, block
        return
    read = _without(raw, gaps)
    data, is_empty = read(BLOCK_BYTES), True
    while data:
        # tar and tape tools pad with NULs, which gzip's readers allow.
        if data := data.lstrip(b"\0"):
            place, is_empty = raw.tell() - len(data), False
            member = _member(read, data, compression)
            while True:
                try:
                    yield place, next(member)
                except StopIteration as end:
                    data = end.value
                    break
        data = data or read(BLOCK_BYTES)
    if is_empty and not gaps:
        raise DamageError("truncated file")


def scan(raw: BinaryIO, compression: Literal["gzip", "zstd"], sink: Sink) -> tuple[list[Gap], str]:
    """Read a file into the sink: its gaps, and "truncated file" where it ends early, or "".

    As much of it as the sink wants.
    Raises DamageError where nothing of it is sound, UnsupportedError where it is of another kind.
    """
    gaps: list[Gap] = []
    search = _Search(raw, compression)
    data, is_sound = raw.read(BLOCK_BYTES), False
    if not data:
        raise DamageError("truncated file")
    while data:
        if data := data.lstrip(b"\0"):
            start, head = raw.tell() - len(data), data[:_HEAD_BYTES]
            place = sink.mark()
            try:
                member = _member(raw.read, data, compression)
                data = _into(sink, member)
                is_sound = True
                if sink.is_full:
                    break
            except DamageError as error:
                why = _unsupported(head, compression, start)
                if why and not place[0]:
                    raise UnsupportedError(why) from None
                stop = search.next_sound(start + 1)
                why = why or ("" if stop is not None else search.given_up)
                if stop is None and not why and str(error) == "truncated file":
                    return gaps, str(error)
                sink.undo()
                stop = search.size if stop is None else stop
                gaps.append(_gap(start, stop, place, head, why, compression))
                raw.seek(stop)
                data = b""
        data = data or raw.read(BLOCK_BYTES)
    if not is_sound:
        raise DamageError("damaged file")
    return gaps, ""


def _into(sink: Sink, member: Generator[bytes, None, bytes]) -> bytes:
    """The rest of what was read of the member; of one that is left since the sink is full, none."""
    while not sink.is_full:
        try:
            sink.add(next(member))
        except StopIteration as end:
            rest: bytes = end.value
            return rest
    return b""


def _gap(
    start: int, stop: int, place: tuple[int, int], head: bytes, why: str, compression: str
) -> Gap:
    is_loss = why == _GIVEN_UP or bool(_STARTS[compression].match(head))
    what = "fail their check" if is_loss else f"are not {compression} data"
    lost = f"bytes {start:,} to {stop:,} of the compressed file are left out: "
    return Gap(start, stop, *place, lost + (why or f"they {what}"), is_loss)


class _Search:
    """Looks for sound members behind damage; `given_up` says so where too much was read in vain."""

    def __init__(self, raw: BinaryIO, compression: Literal["gzip", "zstd"]) -> None:
        self._raw, self._compression = raw, compression
        self.size, self.given_up = raw.seek(0, 2), ""
        self._left = _MOST_IN_VAIN * self.size + _LEAST_IN_VAIN
        raw.seek(0)

    def next_sound(self, start: int) -> int | None:
        """Where the next sound member begins, from `start` on; None where none is found."""
        data = b""
        self._raw.seek(start)
        while block := self._raw.read(BLOCK_BYTES):
            data += block
            at = self._raw.tell() - len(data)
            for found in _STARTS[self._compression].finditer(data):
                if self._left <= 0:
                    self.given_up = _GIVEN_UP
                    return None
                if self._is_sound(at + found.start()):
                    return at + found.start()
            self._raw.seek(at + len(data))
            data = data[1 - _START_BYTES :]
        return None

    def _is_sound(self, start: int) -> bool:
        """Whether a sound member begins here. If not, what was read is charged."""
        self._raw.seek(start)
        # Ever larger blocks, since most trials fail within the first.
        sizes = (min(_HEAD_BYTES << n, BLOCK_BYTES) for n in itertools.count())

        def read(most: int) -> bytes:
            return self._raw.read(min(next(sizes), most))

        try:
            for _ in _member(read, read(BLOCK_BYTES), self._compression):
                pass
        except DamageError:
            self._left -= self._raw.tell() - start
            return False
        return True


def _without(raw: BinaryIO, gaps: Sequence[Gap]) -> Read:
    """Reads the file from its place on, but not its gaps."""
    at = raw.tell()
    left = [gap for gap in gaps if gap.start >= at][::-1]

    def read(most: int) -> bytes:
        while left and raw.tell() == left[-1].start:
            raw.seek(left.pop().stop)
        return raw.read(min(most, left[-1].start - raw.tell()) if left else most)

    return read


def expansion(raw: BinaryIO, kind: Compression, least: int) -> float:
    """Bytes after decompression for each byte before, over the first `least` of these."""
    size = read = 0
    with contextlib.suppress(DamageError):
        for block in blocks(raw, kind):
            size, read = size + len(block), raw.tell()
            if read >= least:
                break
    return size / max(read, 1)


def _unsupported(head: bytes, compression: Literal["gzip", "zstd"], start: int = 0) -> str:
    """Why a member with this head, which begins at `start` of its file, is not read, or ""."""
    found = "" if start else contents.binary(head)
    if found and not found.startswith(compression):
        remedy = contents.remedy(found, "rename it")
        return f"it is {found}, not {compression} data as its name says; {remedy}"
    return _unsupported_gzip(head) if compression == "gzip" else _unsupported_zstd(head)


def _unsupported_gzip(head: bytes) -> str:
    if len(head) < 4 or head[:2] != b"\x1f\x8b" or (head[2] == 8 and head[3] < 0x20):
        return ""
    return (
        f"its gzip data are of method {head[2]}, flags {head[3]:#04x}, which are not read; "
        "compress it anew with gzip"
    )


def _unsupported_zstd(head: bytes) -> str:
    if re.match(rb"[\x22-\x27]\xb5\x2f\xfd", head):
        return "its zstd frames are older than version 0.8, which is not read; compress it anew"
    try:
        found = zstandard.get_frame_parameters(head)
    except zstandard.ZstdError:
        return ""
    if found.dict_id:
        return (
            f"its zstd frames need a dictionary (number {found.dict_id}), which is not read; "
            "decompress it (zstd -d -D DICTIONARY)"
        )
    if found.window_size > _LARGEST_WINDOW:
        return (
            f"its zstd frames need {found.window_size >> 20:,} MiB of memory, and have at most "
            f"{_LARGEST_WINDOW >> 20:,}; compress it anew with --long=31 or less"
        )
    return ""


def why_damaged(head: bytes, compression: Literal["gzip", "zstd"]) -> str:
    """Why a compressed file with this head holds nothing sound."""
    if _STARTS[compression].match(head):
        return "its compressed data fail their check, so none of it is used"
    return f"it is not {compression} data, as its name says: it begins with {head[:8]!r}"


def check_head(raw: BinaryIO, compression: Compression) -> None:
    """Raise UnsupportedError where the file begins as one that is not read."""
    if compression and (why := _unsupported(raw.read(_HEAD_BYTES), compression)):
        raise UnsupportedError(why)


def _member(
    read: Read, data: bytes, compression: Literal["gzip", "zstd"]
) -> Generator[bytes, None, bytes]:
    """The blocks of the member that begins with `data`; returns what was read beyond it."""
    return (_gzip_member if compression == "gzip" else _zstd_frame)(read, data)


def _gzip_member(read: Read, data: bytes) -> Generator[bytes, None, bytes]:
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
    decoder = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
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
