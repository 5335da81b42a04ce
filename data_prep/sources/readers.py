"""Reading of input files by their format: what each is, and its records.

Every record is a document or a reject with its reason; of a group of files (`group_by`) the group
is a record, and each member that cannot be read is a reject.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

from data_prep.sources import compression, documents, parquet, storage, warc
from data_prep.sources.compression import DamageError
from data_prep.sources.documents import BadRecordError, LongDocument, RawDocument, Reject, Survey
from data_prep.sources.inputs import InputChangedError, InputFile


def survey(file: InputFile, cut_bytes: int) -> Survey:
    """Hash the file, measure it, find cuts about every `cut_bytes` of decompressed data."""
    status = storage.status(file.path)
    digest = hashlib.sha256()
    size, line, damage, last = 0, 1, "", b"\n"
    cuts = [(0, 1)]
    with storage.open_binary(file.path) as raw:

        def read(most: int) -> bytes:
            block = raw.read(most)
            digest.update(block)
            return block

        try:
            for block in compression.blocks(read, file.compression):
                if file.format == "jsonl":
                    while (target := cuts[-1][0] + cut_bytes) < size + len(block):
                        newline = block.find(b"\n", max(target - size, 0))
                        if newline < 0:
                            break
                        before = block.count(b"\n", 0, newline + 1)
                        cuts.append((size + newline + 1, line + before))
                    line += block.count(b"\n")
                size, last = size + len(block), block[-1:]
        except DamageError as error:
            damage = str(error)
        while read(compression.BLOCK_BYTES):
            pass
    records = line - (last == b"\n") if file.format == "jsonl" else 1
    if file.format == "parquet":
        size, records, cuts, damage = parquet.survey(file, cut_bytes)
    if damage == "damaged file":
        cuts = cuts[:1]
    if cuts[-1][0] >= size and len(cuts) > 1:
        cuts.pop()
    return Survey(status.bytes, status.version, digest.hexdigest(), size, cuts, damage, records)


def records(
    file: InputFile, found: Survey, start: tuple[int, int], stop: int
) -> Iterator[RawDocument | LongDocument | Reject]:
    """The records that begin at offsets from `start` = (offset, line) up to `stop`.

    Raises InputChangedError where the file is no longer the one that was surveyed, OSError where
    it cannot be read.
    """
    if storage.status(file.path) != found.status:
        raise InputChangedError(file.path)
    is_parquet = file.format == "parquet"
    if found.damage == "damaged file" or (is_parquet and found.damage):
        what = "footer cannot be read" if is_parquet else "compressed data fail their check"
        yield Reject(1, 0, found.damage, f"its {what}, so none of it is used", found.size)
    elif is_parquet:
        yield from parquet.records(file, start[0], stop)
    elif file.format == "warc":
        yield from warc.records(file, found)
    else:
        yield from documents.records(file, found, start, stop)


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
