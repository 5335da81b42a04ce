"""Parquet: each row is a document or a reject; row groups are the units that can be cut.

A row's `line` is its number from 1, its offset that of its row group: the sum of the sizes, before
compression, of the groups before. Pages that carry a checksum are checked against it. Memory is
bounded by the larger of _BATCH_BYTES and one row group, after decompression.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources import contents, documents, storage
from data_prep.sources.compression import UNSUPPORTED, DamageError, UnsupportedError
from data_prep.sources.documents import BadRecordError, RawDocument, Reject
from data_prep.sources.inputs import InputFile

_MAGIC, _ENCRYPTED = b"PAR1", b"PARE"
_START_BYTES = 512
_BUFFER_BYTES = 4 << 20
_BATCH_BYTES = 256 << 20
_BATCH_ROWS = 1024
# The values of a dictionary in Arrow have 31 bits of length together.
_MOST_SHARED = 1 << 31


class _Group(NamedTuple):
    """A row group: its number, where it begins (offset, first line), its bytes and its rows."""

    number: int
    offset: int
    line: int
    span: int
    rows: int


def survey(file: InputFile, cut_bytes: int) -> tuple[int, int, list[tuple[int, int]], str, str]:
    """The size, number of records, cuts, damage and detail of documents.Survey."""
    try:
        with _opened(file) as opened:
            groups = opened.groups
    except DamageError as error:
        size = storage.status(file.path).bytes
        return size, 1, [(0, 1)], *_why_lost(file, size, error)
    cuts = [(0, 1)]
    for group in groups:
        if group.offset - cuts[-1][0] >= cut_bytes:
            cuts.append((group.offset, group.line))
    rows = sum(group.rows for group in groups)
    return sum(group.span for group in groups), rows, cuts, "", ""


def columns(file: InputFile) -> list[str]:
    """The names of its columns. Raises DamageError."""
    with _opened(file) as opened:
        return [str(name) for name in opened.plain.schema_arrow.names]


def unusable(file: InputFile) -> dict[str, str]:
    """The types of the columns of texts and of ids that hold none, by `text_field` and `id_field`.

    Raises DamageError.
    """
    with _opened(file) as opened:
        text = _type(opened.plain, file.config.text_field)
        id = _type(opened.plain, file.config.id_field)
        fits = {
            "text_field": (text, text is None or _is_text(text)),
            "id_field": (id, id is None or _is_id(id)),
        }
        return {setting: str(kind) for setting, (kind, is_fit) in fits.items() if not is_fit}


def _why_lost(file: InputFile, size: int, error: DamageError) -> tuple[str, str]:
    """Damage and detail of a file that Arrow cannot open."""
    with storage.open_binary(file.path, _START_BYTES) as raw:
        head = raw.read(_START_BYTES)
        raw.seek(max(size - len(_MAGIC), 0))
        tail = raw.read(len(_MAGIC)) if size > 2 * len(_MAGIC) else b""
    if _ENCRYPTED in (head[: len(_MAGIC)], tail):
        return UNSUPPORTED, "it is encrypted, which is not read; write it anew without encryption"
    other = contents.binary(head)
    if other and head[: len(_MAGIC)] != _MAGIC:
        remedy = contents.remedy(other, "rename it")
        return UNSUPPORTED, f"it is {other}, not parquet as its name or `format` says; {remedy}"
    if head and _MAGIC not in (head[: len(_MAGIC)], tail):
        is_none = (
            f"it is no parquet file, as its name or `format` says: it begins with {head[:8]!r}"
        )
        return UNSUPPORTED, f"{is_none}; rename it, or set `format`"
    if isinstance(error, UnsupportedError):
        return UNSUPPORTED, f"Arrow does not read it: {error}"
    damage = "damaged file" if tail == _MAGIC else "truncated file"
    return damage, f"its footer cannot be read, so none of it is used: {error}"


def records(file: InputFile, start: int, stop: int) -> Iterator[RawDocument | Reject]:
    """The rows of the row groups that begin at offsets from `start` up to `stop`."""
    try:
        with _opened(file) as opened:
            for group in opened.groups:
                if start <= group.offset < stop:
                    yield from _rows(file, opened, group)
    except DamageError as error:
        yield Reject(1, 0, _reason(error), str(error), stop)


class _Opened(NamedTuple):
    """A file, its row groups, and why its schema holds no texts.

    `shared` holds a value that is repeated once, whatever rows are read together; `plain` each of
    them, in the encodings that Arrow cannot read in the other way.
    """

    plain: pq.ParquetFile
    shared: pq.ParquetFile
    groups: list[_Group]
    bad: BadRecordError | None


@contextlib.contextmanager
def _opened(file: InputFile) -> Iterator[_Opened]:
    """The file as it can be read. Raises DamageError."""
    # Arrow reads local files by itself; of remote ones every read of its buffer is one request.
    source = storage.open_binary(file.path, 0) if storage.is_url(file.path) else str(file.path)
    options: dict[str, Any] = {
        "pre_buffer": False,
        "buffer_size": _BUFFER_BYTES,
        "page_checksum_verification": True,
    }
    with contextlib.ExitStack() as stack:
        with _damage():
            plain = stack.enter_context(pq.ParquetFile(source, **options))
            names = {file.config.text_field, file.config.id_field}
            texts = [name for name in names if _is_text(_type(plain, name))]
            options |= {"metadata": plain.metadata, "read_dictionary": texts}
            shared = stack.enter_context(pq.ParquetFile(source, **options))
            groups, bad = _groups(plain), _bad_schema(file, plain)
        yield _Opened(plain, shared, groups, bad)


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turn whatever a broken file makes Arrow raise into DamageError."""
    try:
        yield
    except Exception as error:
        # Errors of the system and the network have a number, Arrow's own have none.
        if isinstance(error, OSError) and error.errno:
            raise
        said = " ".join(str(error).split())[:200]
        # Arrow raises another class for some of the encodings that it lacks, in these words.
        missing = isinstance(error, NotImplementedError) or "not yet implemented" in said.lower()
        raise (UnsupportedError if missing else DamageError)(said) from None


def _groups(opened: pq.ParquetFile) -> list[_Group]:
    groups: list[_Group] = []
    offset, line = 0, 1
    for number in range(opened.metadata.num_row_groups):
        found = opened.metadata.row_group(number)
        if found.num_rows > 0:
            span = max(found.total_byte_size, 1)
            groups.append(_Group(number, offset, line, span, found.num_rows))
            offset, line = offset + span, line + found.num_rows
    if line - 1 != opened.metadata.num_rows:
        raise DamageError(f"its row groups have {line - 1} rows, not the number it states")
    return groups


def _bad_schema(file: InputFile, opened: pq.ParquetFile) -> BadRecordError | None:
    name = file.config.text_field
    kind = _type(opened, name)
    if kind is None:
        count = opened.schema_arrow.names.count(name)
        several = f"{count} columns are called {name!r}"
        return BadRecordError("text missing", several if count else f"no column {name!r}")
    if not _is_text(kind):
        return BadRecordError("text not a string", f"column {name!r} is {kind}")
    return None


def _type(opened: pq.ParquetFile, name: str) -> pa.DataType | None:
    """The type of the values of a column; None if there is none, or more than one."""
    index = opened.schema_arrow.get_field_index(name)
    if index < 0:
        return None
    kind = opened.schema_arrow.field(index).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType | None) -> bool:
    """Whether a column's values may be texts; whether each is UTF-8 is seen as it is read.

    Impala, Hive and some settings of Spark write texts as bytes that are not said to be UTF-8.
    """
    return kind is not None and bool(
        _is_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _is_string(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_id(kind: pa.DataType) -> bool:
    # Not bytes: those of ids are often no UTF-8.
    return _is_string(kind) or bool(pa.types.is_integer(kind))


def _rows(file: InputFile, opened: _Opened, group: _Group) -> Iterator[RawDocument | Reject]:
    if opened.bad is not None:
        yield from _all_lost(group, 0, 0, opened.bad.reason, opened.bad.detail)
        return
    done = read = 0
    try:
        for text, id in _values(file, opened, group):
            share = group.span * (done + 1) // group.rows - read
            yield _record(file, text, id, group.line + done, group.offset, share)
            done, read = done + 1, read + share
        if done == group.rows:
            return
        cause = "it ends early"
        reason = "damaged file"
    except DamageError as error:
        cause, reason = str(error), _reason(error)
    detail = f"{group.rows - done} rows of row group {group.number} are lost: {cause}"
    yield from _all_lost(group, done, read, reason, detail)


def _all_lost(group: _Group, done: int, read: int, reason: str, detail: str) -> Iterator[Reject]:
    """The rows of the group after the first `done`, of `read` bytes: each is a record."""
    for line in range(group.line + done, group.line + group.rows):
        yield Reject(line, group.offset, reason, detail, group.span - read)
        read = group.span


def _reason(error: DamageError) -> str:
    return UNSUPPORTED if isinstance(error, UnsupportedError) else "damaged file"


def _values(file: InputFile, opened: _Opened, group: _Group) -> Iterator[tuple[bytes | None, Any]]:
    """(text, id) of each row, texts as they are stored. Raises DamageError."""
    done = 0
    try:
        for value in _read(file, opened.shared, group):
            yield value
            done += 1
    except UnsupportedError:
        # Such as the DELTA encodings, from whichever page on.
        yield from itertools.islice(_read(file, opened.plain, group), done, None)


def _read(
    file: InputFile, opened: pq.ParquetFile, group: _Group
) -> Iterator[tuple[bytes | None, Any]]:
    with _damage():
        id_type = _type(opened, file.config.id_field)
        has_id = id_type is not None and _is_id(id_type)
        columns = [file.config.text_field, *([file.config.id_field] if has_id else [])]
        batches = opened.iter_batches(
            _batch_rows(opened, group, columns), [group.number], list(dict.fromkeys(columns)), False
        )
    while True:
        with _damage():
            batch = next(batches, None)
            if batch is None:
                return
            texts, ids = (_plain(batch.column(name)) for name in (columns[0], columns[-1]))
        yield from zip(texts, ids if has_id else itertools.repeat(None, len(batch)), strict=True)


def _batch_rows(opened: pq.ParquetFile, group: _Group, columns: list[str]) -> int:
    """Rows to read at a time: together they hold no more than the group, or _BATCH_BYTES."""
    kinds = (opened.schema_arrow.field(name).type for name in columns)
    is_shared = all(pa.types.is_dictionary(kind) or pa.types.is_integer(kind) for kind in kinds)
    if is_shared and group.span < _MOST_SHARED:
        return _BATCH_ROWS
    # So few that they fit even if each of them has all the bytes of the group. Not by the sizes of
    # columns: reading broken ones ends the process in Arrow.
    return min(max(_BATCH_BYTES // group.span, 1), _BATCH_ROWS)


def _plain(column: pa.Array) -> Iterator[Any]:
    if pa.types.is_dictionary(column.type):
        values, places = _as_bytes(column.dictionary), column.indices.to_pylist()
        # Arrow does not check them.
        if any(at is not None and not 0 <= at < len(values) for at in places):
            raise DamageError("a row has a value that its dictionary lacks")
        if len(values) <= len(column):
            plain = values.to_pylist()
            yield from (None if at is None else plain[at] for at in places)
        else:
            yield from (None if at is None else values[at].as_py() for at in places)
        return
    for value in _as_bytes(column):
        yield value.as_py()


def _as_bytes(column: pa.Array) -> pa.Array:
    # One value that is not UTF-8 costs that record alone.
    return column.cast(pa.large_binary()) if _is_text(column.type) else column


def _record(
    file: InputFile, text: bytes | None, id: Any, line: int, offset: int, read: int
) -> RawDocument | Reject:
    try:
        if text is None:
            raise BadRecordError("text not a string", "found null")
        documents.check_size(file, len(text))
        if not text:
            raise BadRecordError("empty text")
        own = documents.utf8(id) if isinstance(id, bytes) else id
        name = documents.identifier(own, f"{file.relative}:{line}")
        return RawDocument(name, line, offset, read, documents.utf8(text))
    except BadRecordError as bad:
        return bad.at(line, offset, read)
