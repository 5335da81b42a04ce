"""Strict reading of text and jsonl: every record is a document or a reject with its reason.

Nothing is repaired and nothing is lost silently. A jsonl file ends records at `\\n` alone; its
records are numbered from line 1 and known by the byte offset of their line, after decompression.
The text is not changed: byte order marks, carriage returns and NULs belong to it.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, ClassVar

from data_prep.dataset.blocks import BlockReader
from data_prep.dataset.parsing import json_value
from data_prep.dataset.wording import counted
from data_prep.sources import compression, contents, inputs, storage
from data_prep.sources.compression import DamageError, Gap
from data_prep.sources.inputs import InputChangedError, InputFile
from data_prep.sources.storage import Status
from data_prep.tokenizer.parts import cut

_LEAST_BLOCK = 1 << 16
# Characters of a passage, and of a text that is not cut into any.
_PASSAGE = 1 << 20
_WHOLE = 1 << 23
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawDocument:
    """A document before tokenization; its record begins at `offset` and has `read` bytes.

    With `replies` the `text` is a prompt: an answer, the next prompt, its answer, and so on.
    `line` is the number, from 1, of a line, of a row (parquet) or of a record (warc). The offset of
    a row is that of its row group, in bytes after decompression.
    """

    id: str
    line: int
    offset: int
    read: int
    text: str
    replies: Sequence[str] = ()

    def passages(self) -> Iterator[str]:
        """The text as one, or in passages if it is long: some rules take 75 bytes per character."""
        yield from passages([self.text]) if len(self.text) > _WHOLE else [self.text]


@dataclass(frozen=True)
class LongDocument:
    """A document of `read` bytes that is too large to be held: it is read as it is needed."""

    id: str
    line: int
    offset: int
    read: int
    open: Callable[[], Iterator[str]]
    replies: ClassVar[Sequence[str]] = ()

    def passages(self) -> Iterator[str]:
        """The text, passage by passage. Raises BadRecordError where it is not UTF-8."""
        return passages(self.open())


@dataclass(frozen=True)
class Reject:
    """A record that is not used: where it begins, as RawDocument says, and why."""

    line: int
    offset: int
    reason: str
    detail: str
    read: int = 0


@dataclass(frozen=True)
class Survey:
    """What one pass over an input file finds.

    `bytes`, `version` and `sha256` are of the file as it is stored, `size` counts its bytes after
    decompression. `cuts` are (offset, line) of records at which reading can begin, the first of
    them (0, 1); `damage` is "", "truncated file", or why nothing of it is used ("damaged file",
    "unsupported file"), with its `detail`. `gaps` are left out of its compressed data. `records` is
    how many there are at least: of a WARC file that is not known before it is read. `is_pages`:
    most of its text is in web pages, among much markup. `sha256` is empty where not all of it was
    read, since `limit` takes its first records alone, or none, as `is_unread` says.
    """

    bytes: int
    version: str
    sha256: str
    size: int
    cuts: list[tuple[int, int]]
    damage: str
    records: int
    detail: str = ""
    gaps: list[Gap] = field(default_factory=list)
    is_pages: bool = False
    is_unread: bool = False

    @classmethod
    def unread(cls, listed: Status) -> Survey:
        """The survey of a file of which no record is taken."""
        return cls(listed.bytes, listed.version, "", 0, [(0, 1)], "", 0, is_unread=True)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Survey:
        """The survey that `dataclasses.asdict` made plain, also by way of JSON."""
        cuts = [(offset, line) for offset, line in plain["cuts"]]
        gaps = [Gap(**gap) for gap in plain["gaps"]]
        return cls(**{**plain, "cuts": cuts, "gaps": gaps})

    @property
    def is_lost(self) -> bool:
        """Whether nothing of the file can be used."""
        return self.damage not in ("", "truncated file")

    @property
    def status(self) -> Status:
        """Its status at that time."""
        return Status(self.bytes, self.version)


class BadRecordError(Exception):
    """Why a record is no document."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail

    def at(self, line: int, offset: int, read: int) -> Reject:
        """The reject of the record at this place."""
        return Reject(line, offset, self.reason, self.detail, read)


def records(
    file: InputFile, found: Survey, start: tuple[int, int], stop: int
) -> Iterator[RawDocument | LongDocument | Reject]:
    """The records of a text or jsonl file that begin at offsets from `start` up to `stop`."""
    lost = next((gap for gap in found.gaps if gap.is_loss), None)
    if file.format == "text" and lost:
        yield Reject(1, 0, "damaged file", lost.why, found.size)
        return
    offset, line = start
    gaps = deque(gap for gap in found.gaps if offset <= gap.offset)
    is_long = file.config.max_held_bytes < found.size <= file.config.max_record_bytes
    if file.format == "text" and is_long and not found.damage:
        yield from (_gap(gap, 0, 1) for gap in gaps)
        yield _long(file, found)
        return
    for data, size in _lines(file, found, offset, stop):
        is_torn = False
        while gaps and gaps[0].offset < offset + size:
            is_torn = is_torn or (gaps[0].is_loss and gaps[0].offset > offset)
            yield _gap(gaps.popleft(), offset, line)
        if is_torn:
            # What is joined across a gap could read as a text that never was.
            yield Reject(line, offset, "damaged file", "a part of the record is left out", size)
        else:
            yield _record(file, data, size, line, offset)
        offset, line = offset + size, line + 1
    if stop == found.size:
        yield from (_gap(gap, offset, line) for gap in gaps)
    if found.damage and stop == found.size:
        detail = "the compressed file ends here, inside its data; the rest is lost"
        yield Reject(line, offset, found.damage, detail, found.size - offset)


def _long(file: InputFile, found: Survey) -> LongDocument | Reject:
    """A text file that is too large to be held, unless its head is of another format."""
    try:
        _check_text(file, inputs.first_bytes(file, found.gaps))
    except BadRecordError as bad:
        return bad.at(1, 0, found.size)
    return LongDocument(file.relative, 1, 0, found.size, partial(text_of, file, found))


def _gap(gap: Gap, offset: int, line: int) -> Reject:
    """What a gap of the compressed data costs, before this record."""
    return Reject(line, offset, "damaged file", gap.why)


def text_of(file: InputFile, found: Survey) -> Iterator[str]:
    """A text file's text, block by block. Raises BadRecordError where it is not UTF-8.

    Raises InputChangedError where the file is no longer the one that was surveyed.
    """
    if storage.status(file.path) != found.status:
        raise InputChangedError(file.path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with storage.open_binary(file.path) as raw:
        blocks = compression.blocks(raw, file.compression, found.gaps)
        for block in itertools.chain(blocks, [b""]):
            # The first bytes of a character wait for its last.
            waiting, _ = decoder.getstate()
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(offset - len(waiting) + error.start) from None
            offset += len(block)


def passages(texts: Iterable[str]) -> Iterator[str]:
    """The joined texts in passages of about 1 Mi characters, however they come.

    A passage ends after a line, or before a space where the line is longer, if it has any. None but
    a whole text has less than half as many characters: rules judge each alone.
    """
    half = _PASSAGE // 2

    def stop(held: str, start: int) -> int:
        least, end = start + half, start + _PASSAGE
        found = held.rfind("\n", least - 1, end) + 1 or held.rfind(" ", least, end)
        return end if found < 0 else found

    return cut(texts, _PASSAGE + half, stop)


def check_size(file: InputFile, size: int) -> None:
    """Raise BadRecordError for a record of more bytes than are allowed or can be held."""
    for name in ("max_record_bytes", "max_held_bytes"):
        if size > (limit := getattr(file.config, name)):
            raise BadRecordError("record too large", f"{size} bytes; {name} is {limit}")


def _record(
    file: InputFile, data: bytes, size: int, line: int, offset: int
) -> RawDocument | Reject:
    try:
        check_size(file, size)
        if file.format == "text":
            _check_text(file, data)
            id, text, replies = file.relative, utf8(data), list[str]()
            if not text:
                raise BadRecordError("empty text")
        else:
            id, (text, *replies) = _json(file, data, line)
    except BadRecordError as bad:
        return bad.at(line, offset, size)
    return RawDocument(id, line, offset, size, text, replies)


def _check_text(file: InputFile, data: bytes) -> None:
    """Raise BadRecordError where a text file is plainly one of another format."""
    if found := contents.binary(data[: contents.HEAD_BYTES]):
        right = "in UTF-8" if found.startswith("text in ") else "text"
        to_do = contents.remedy(found, "")
        detail = f"it is {found}, not {right}{'; ' * bool(to_do)}{to_do}"
        raise BadRecordError(compression.UNSUPPORTED, detail)
    is_sure = file.config.format == "text" or file.config.group_by != "file"
    if not is_sure and contents.is_json_lines(data[: contents.HEAD_BYTES]):
        detail = "it is JSON lines; set format: jsonl, or format: text to take it as text"
        raise BadRecordError(compression.UNSUPPORTED, detail)
    if not is_sure and inputs.is_hidden_page(file, data[: contents.HEAD_BYTES]):
        detail = f"{contents.PAGE}; or set format: text to take its tags as text"
        raise BadRecordError(compression.UNSUPPORTED, detail)


def _json(file: InputFile, data: bytes, line: int) -> tuple[str, list[str]]:
    """Id, and the text; or a prompt, its answer, the next prompt, and so on."""
    # A byte order mark may head a jsonl file; inside a text it is text.
    content = utf8(data.removeprefix(_BOM) if line == 1 else data)
    if not content.strip():
        raise BadRecordError("blank line")
    try:
        value = json_value(content)
    except json.JSONDecodeError as error:
        raise BadRecordError("broken JSON", f"{error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise BadRecordError("broken JSON", str(error)) from None
    if not isinstance(value, dict):
        raise BadRecordError("not an object", f"found {type(value).__name__}")
    id = identifier(value.get(file.config.id_field), f"{file.relative}:{line}")
    if file.config.prompt_field:
        texts = _turns(value, file.config.prompt_field, file.config.answer_field)
    else:
        texts = [_text(value, file.config.text_field, "text")]
    _check_once(file, content)
    try:
        for part in (*texts, id):
            part.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError("lone surrogate", f"{error.object[error.start]!r}") from None
    return id, texts


def _check_once(file: InputFile, content: str) -> None:
    """Raise BadRecordError where the object has a key of its texts twice: json takes the last."""
    config = file.config
    keys = {config.prompt_field: "prompt", config.answer_field: "answer"}
    for key, what in keys.items() if config.prompt_field else ((config.text_field, "text"),):
        # In a text the quotes are escaped; in a key any letter may be, so that it is not found.
        if content.count(f'"{key}"') != 1 or _may_be_escaped(key, content):
            names = json_value(content, lambda pairs: [name for name, _ in pairs])
            if names.count(key) > 1:
                raise BadRecordError(f"{what} twice", f"the key {key!r}")


def _may_be_escaped(key: str, content: str) -> bool:
    """Whether a letter of the key is written as an escape somewhere."""
    return "\\u" in content and bool(_escapes(key).search(content))


@functools.cache
def _escapes(key: str) -> re.Pattern[str]:
    units = key.encode("utf-16-be", errors="surrogatepass")
    codes = (units[at : at + 2].hex() for at in range(0, len(units), 2))
    return re.compile(rf"\\u(?:{'|'.join(codes)})", re.IGNORECASE)


def _turns(value: dict[str, Any], prompt: str, answer: str) -> list[str]:
    """A prompt, its answer, the next prompt, and so on: of two texts, or of two lists of texts.

    The lists have as many texts as each other. Raises BadRecordError for anything else.
    """
    keys = {prompt: "prompt", answer: "answer"}
    both = [_found(value, key, what) for key, what in keys.items()]
    if not any(isinstance(each, list) for each in both):
        return [_checked(each, what) for each, what in zip(both, keys.values(), strict=True)]
    for key, each in zip(keys, both, strict=True):
        if not isinstance(each, list):
            found = f"{key!r} holds no list, but {type(each).__name__}"
            raise BadRecordError("not an answer to each prompt", found)
    prompts, answers = both
    if len(prompts) != len(answers):
        found = f"{counted(len(prompts), 'prompt')}, {counted(len(answers), 'answer')}"
        raise BadRecordError("not an answer to each prompt", found)
    if not prompts:
        raise BadRecordError("empty prompt", "the list is empty")
    return [
        _checked(text, what, f"turn {number}")
        for number, turn in enumerate(zip(prompts, answers, strict=True), 1)
        for text, what in zip(turn, keys.values(), strict=True)
    ]


def _text(value: dict[str, Any], key: str, what: str) -> str:
    """The value of the key. Raises BadRecordError unless it is a text."""
    return _checked(_found(value, key, what), what)


def _found(value: dict[str, Any], key: str, what: str) -> Any:
    """The value of the key. Raises BadRecordError where there is none."""
    if key not in value:
        raise BadRecordError(f"{what} missing", f"no key {key!r}")
    return value[key]


def _checked(text: Any, what: str, place: str = "") -> str:
    """The text. Raises BadRecordError where it is none, or empty."""
    if not isinstance(text, str):
        found = f"found {type(text).__name__}"
        raise BadRecordError(f"{what} not a string", f"{place}: {found}" if place else found)
    if not text:
        raise BadRecordError(f"empty {what}", place)
    return text


def identifier(value: Any, default: str) -> str:
    """A record's own id where that is a text or a whole number, else the default."""
    if isinstance(value, str) and value:
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else default


def utf8(data: bytes) -> str:
    """The text of UTF-8 bytes. Raises BadRecordError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error.start) from None


def _not_utf8(offset: int) -> BadRecordError:
    return BadRecordError("invalid UTF-8", f"byte {offset + 1} of the record")


def _lines(file: InputFile, found: Survey, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
    """(bytes, size) of the lines that begin in [start, stop); of a text file, its bytes as one.

    The bytes of one that is too large are not all there. A record that damage cuts is left out.
    """
    block = min(max(stop - start, _LEAST_BLOCK), storage.BLOCK_BYTES)
    with storage.open_binary(file.path, block) as raw, contextlib.suppress(DamageError):
        blocks = _from(raw, file, found, start)
        if file.format == "text":
            if not found.damage:
                yield b"".join(blocks) if found.size <= file.held_bytes else b"", found.size
            return
        reader: Any = BlockReader(blocks)
        lines = io.BufferedReader(reader, compression.BLOCK_BYTES)
        while start < stop and (line := lines.readline(file.held_bytes + 1)):
            size, part = len(line), line
            while part and not part.endswith(b"\n"):
                part = lines.readline(compression.BLOCK_BYTES)
                size += len(part)
            yield line, size
            start += size


def _from(raw: BinaryIO, file: InputFile, found: Survey, start: int) -> Iterator[bytes]:
    """Decompressed blocks from the offset `start` on."""
    if file.compression is None:
        raw.seek(start)
        yield from compression.blocks(raw, None)
        return
    skip = start
    for block in compression.blocks(raw, file.compression, found.gaps):
        if skip < len(block):
            yield block[skip:]
        skip = max(0, skip - len(block))
