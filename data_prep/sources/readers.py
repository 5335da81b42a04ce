"""Reading of input files by their format: what each is, and its records.

Every record is a document or a reject with its reason; of a group of files (`group_by`) the group
is a record, and each member that cannot be read is a reject.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from data_prep.config import SourceConfig
from data_prep.sources import compression, contents, documents, inputs, parquet, storage, warc
from data_prep.sources.compression import UNSUPPORTED, DamageError, Gap, UnsupportedError
from data_prep.sources.documents import BadRecordError, LongDocument, RawDocument, Reject, Survey
from data_prep.sources.inputs import InputChangedError, InputFile

KEYED = ("jsonl", "parquet")
"""Formats whose records have keys or columns."""

# What a setting's key or column is to hold, where it holds none of it.
_MEANT = {"text_field": "no text", "id_field": "no id (a text or a whole number)"}
# Records by which it is judged whether a file holds texts; where they are long, the fewest that are
# enough among so many bytes.
_FIRST_RECORDS, _TELLING, _LONG_HEAD_BYTES = 100, 4, 8 << 20


class _Counted:
    """Counts the data of a file, and finds cuts about every `cut_bytes` where they are lines.

    Of lines it takes `most`; None: all.
    """

    def __init__(self, file: InputFile, cut_bytes: int, most: int | None) -> None:
        self._most = most
        self._is_lines, self._cut_bytes = file.format == "jsonl", cut_bytes
        self._is_warc, self._pages, self._heads = file.format == "warc", 0, 0
        self.size, self.line, self.cuts, self.last = 0, 1, [(0, 1)], b"\n"
        self._marked = (0, 1, 1, b"\n")

    @property
    def records(self) -> int:
        """Lines, where they are records; of an archive some that it has at least."""
        if self._is_lines:
            return self.line - (self.last == b"\n")
        # Texts may hold the words of a head, too.
        return max(self._heads // 2, 1)

    @property
    def is_full(self) -> bool:
        """Whether all lines that are wanted are there."""
        return self._is_lines and self._most is not None and self.line > self._most

    @property
    def is_pages(self) -> bool:
        """Whether more records are web pages than plain text; a few are missed between blocks."""
        return self._pages > 0

    def mark(self) -> tuple[int, int]:
        self._marked = (self.size, self.line, len(self.cuts), self.last)
        return self.size, self.line

    def undo(self) -> None:
        self.size, self.line, count, self.last = self._marked
        del self.cuts[count:]

    def add(self, block: bytes) -> None:
        if self._is_lines:
            block = self._wanted(block)
            while (target := self.cuts[-1][0] + self._cut_bytes) < self.size + len(block):
                newline = block.find(b"\n", max(target - self.size, 0))
                if newline < 0:
                    break
                before = block.count(b"\n", 0, newline + 1)
                self.cuts.append((self.size + newline + 1, self.line + before))
            self.line += block.count(b"\n")
        elif self._is_warc:
            names = block.lower()  # of any case, as for the reader
            pages = names.count(b"warc-type: response") + names.count(b"warc-type: resource")
            texts = names.count(b"warc-type: conversion")
            self._pages, self._heads = self._pages + pages - texts, self._heads + pages + texts
        self.size, self.last = self.size + len(block), block[-1:]

    def _wanted(self, block: bytes) -> bytes:
        """The block up to the last line that is wanted."""
        if self._most is None or self.line + block.count(b"\n") <= self._most:
            return block
        end = 0
        for _ in range(self._most + 1 - self.line):
            end = block.index(b"\n", end) + 1
        return block[:end]


class _Hashed:
    """A file whose bytes are hashed, each once, as far as it is read."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._done, self.digest = raw, 0, hashlib.sha256()
        self.seek, self.tell = raw.seek, raw.tell

    def read(self, most: int) -> bytes:
        block = self._raw.read(most)
        # Behind bytes that were passed over, `finish` reads on.
        if 0 < (new := self.tell() - self._done) <= len(block):
            self.digest.update(block[-new:])
            self._done += new
        return block

    def finish(self) -> str:
        """The hash of the whole file."""
        self.seek(self._done)
        while self.read(compression.BLOCK_BYTES):
            pass
        return self.digest.hexdigest()


def survey(file: InputFile, cut_bytes: int, most: int | None = None) -> Survey:
    """Hash the file, measure it, find cuts about every `cut_bytes` of decompressed data.

    `most`: so many records are wanted, the first. Where the rest need not be read for these, it is
    not, nor is the file hashed.
    """
    status = storage.status(file.path)
    counted, damage, detail = _Counted(file, cut_bytes, most), "", ""
    is_hashed = most is None or file.format != "parquet"
    gaps: list[Gap] = []
    with storage.open_binary(file.path) as raw:
        read: Any = _Hashed(raw)
        try:
            if file.compression:
                gaps, damage = compression.scan(read, file.compression, counted)
            elif is_hashed:
                for block in compression.blocks(read, None):
                    counted.add(block)
                    if counted.is_full:
                        break
        except UnsupportedError as error:
            damage, detail = UNSUPPORTED, str(error)
        except DamageError as error:
            damage = str(error)
            raw.seek(0)
            head = raw.read(contents.HEAD_BYTES)
            detail = compression.why_damaged(head, file.compression or "gzip")
        digest = read.finish() if is_hashed and not counted.is_full else ""
    size, records, cuts = counted.size, counted.records, counted.cuts
    if file.format == "parquet":
        size, records, cuts, damage, detail = parquet.survey(file, cut_bytes)
    elif damage in ("damaged file", UNSUPPORTED):
        size, cuts = status.bytes, cuts[:1]
    if cuts[-1][0] >= size and len(cuts) > 1:
        cuts.pop()
    place = (status.bytes, status.version, digest)
    return Survey(*place, size, cuts, damage, records, detail, gaps, counted.is_pages)


def records(
    file: InputFile, found: Survey, start: tuple[int, int], stop: int
) -> Iterator[RawDocument | LongDocument | Reject]:
    """The records that begin at offsets from `start` = (offset, line) up to `stop`.

    Raises InputChangedError where the file is no longer the one that was surveyed, OSError where
    it cannot be read.
    """
    if storage.status(file.path) != found.status:
        raise InputChangedError(file.path)
    if found.is_lost or (file.format == "parquet" and found.damage):
        yield Reject(1, 0, found.damage, found.detail, found.size)
    elif file.format == "parquet":
        yield from parquet.records(file, start[0], stop)
    elif file.format == "warc":
        yield from warc.records(file, found)
    else:
        yield from documents.records(file, found, start, stop)


def without_texts(files: Sequence[InputFile]) -> str:
    """Why the files with keys or columns of a source hold no text, or no id that is set; or "".

    Some of them are looked into: one that holds both, or may hold them, is enough.
    """
    found = ""
    keyed = [file for file in files if file.format in KEYED and file.listed.bytes]
    for file in inputs.looked_into(keyed):
        if not (why := missing_field(file)):
            return ""
        found = found or why
    return found


def missing_field(file: InputFile) -> str:
    """Which setting names no text of the file's first records, or no id, and what those have; "":
    all are there, or that is not known.
    """
    config = file.config
    try:
        if file.format == "jsonl":
            found = _first_objects(file)
            if found == []:
                return (
                    f"{file.path} has no JSON object in its first lines, of which each is to be one"
                )
            keys = [*dict.fromkeys(key for one in found or () for key in one)]
            kinds = _unusable(found or [], config)
        else:
            keys = parquet.columns(file) if file.format == "parquet" else []
            kinds = parquet.unusable(file) if file.format == "parquet" else {}
    except (OSError, DamageError):
        return ""
    names = ["prompt_field", "answer_field"] if config.has_pairs else ["text_field"]
    if config.id_field != SourceConfig.id_field:
        names.append("id_field")  # by default an id may be missing, or be no id
    absent = [name for name in names if keys and getattr(config, name) not in keys]
    if absent:
        wanted = " and ".join(f"{name} is {getattr(config, name)!r}" for name in absent)
        return f"{wanted}, but {file.path} has {inputs.listed(keys)}"
    wrong = [
        f"{name} is {getattr(config, name)!r}, which in {file.path} is {_MEANT[name]}, but "
        f"{kinds[name]}"
        for name in names
        if name in kinds
    ]
    return "; ".join(wrong)


def _first_objects(file: InputFile) -> list[dict[str, Any]] | None:
    """The first objects of JSON lines; None where those that are whole are too few to tell."""
    heads = ((contents.HEAD_BYTES, _FIRST_RECORDS), (_LONG_HEAD_BYTES, _TELLING))
    for least, enough in heads:
        head = inputs.first_bytes(file, least=least)
        found = contents.objects(head, _FIRST_RECORDS)
        is_whole = len(head) < least and bool(head.strip())
        if is_whole or len(found) >= enough or head.count(b"\n") > 2 * _FIRST_RECORDS:
            return found
    return None


def _unusable(found: list[dict[str, Any]], config: SourceConfig) -> dict[str, str]:
    """What the objects have under `text_field` and `id_field` where none has a text, or an id."""
    fits = {"id_field": _is_id}
    if not config.has_pairs:
        fits["text_field"] = lambda value: isinstance(value, str)
    wrong = {}
    for name, is_fit in fits.items():
        values = [one[key] for one in found if (key := getattr(config, name)) in one]
        if values and not any(map(is_fit, values)):
            wrong[name] = " or ".join(sorted(set(map(_kind, values))))
    return wrong


def _is_id(value: Any) -> bool:
    return bool(documents.identifier(value, ""))


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def group(
    files: Sequence[InputFile], surveys: Sequence[Survey]
) -> Iterator[tuple[int, RawDocument | LongDocument | Reject]]:
    """The group's members as one document, and a reject for each that cannot be read.

    Each comes with the number of its file; the document with that of its first member. Raises as
    `records` does.
    """
    kept: list[tuple[InputFile, Survey]] = []
    texts: list[str] = []
    first = size = read = 0
    for index, (file, found) in enumerate(zip(files, surveys, strict=True)):
        for record in records(file, found, (0, 1), found.size):
            sound = _checked(record)
            if isinstance(sound, Reject):
                yield index, sound
                continue
            first = first if kept else index
            read += sound.read
            size += sound.read + (len(file.config.group_separator.encode()) if kept else 0)
            kept.append((file, found))
            # The members of a group that is too large to be held are read again, one by one.
            if isinstance(sound, RawDocument) and size <= file.held_bytes:
                texts.append(sound.text)
            else:
                texts.clear()
    if not kept:
        return
    file, separator = files[first], files[first].config.group_separator
    if size <= file.held_bytes:
        yield first, RawDocument(file.group, 1, 0, read, separator.join(texts))
    elif size <= file.config.max_record_bytes:
        yield first, LongDocument(file.group, 1, 0, read, partial(_joined, kept, separator))
    else:
        detail = f"the group: {size} bytes; max_record_bytes is {file.config.max_record_bytes}"
        yield first, Reject(1, 0, "record too large", detail, read)


def _checked(record: RawDocument | LongDocument | Reject) -> RawDocument | LongDocument | Reject:
    """The record, or a reject if it is a long one that cannot be read to its end."""
    if isinstance(record, LongDocument):
        try:
            deque(record.open(), maxlen=0)
        except BadRecordError as bad:
            return bad.at(1, 0, record.read)
    return record


def _joined(members: list[tuple[InputFile, Survey]], separator: str) -> Iterator[str]:
    for index, (file, found) in enumerate(members):
        if index:
            yield separator
        yield from documents.text_of(file, found)
