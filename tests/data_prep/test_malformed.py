"""One campaign of malformed inputs: nothing crashes, hangs, grows without bound or gets lost.

Every case is a file with what must become of it. All files are one corpus (two, with its groups),
so that the whole pipeline runs over them together.
"""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import config
from data_prep.config import SourceConfig
from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.pipeline import pipeline
from data_prep.sources import inputs, readers
from data_prep.sources.compression import Compression
from data_prep.sources.documents import RawDocument, Reject
from data_prep.sources.inputs import Format, InputFile

# Bytes that are no UTF-8: lone parts, overlong forms, surrogates, beyond Unicode.
NOT_UTF8 = (b"\xff", b"\xe9", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3")
BROKEN_JSON = (
    *(b"{", b'{"text": ', b'{"text": "a"', b'{"text": "a",}', b"{'text': 'a'}", b'{"text": a}'),
    *(b'{"text": "a"} {"text": "b"}', b'{"text" "a"}', b'{"text": "\\x"}', b'{"text": "\t"}'),
    *(b'{"text": "a\0"}', b'\0{"text": "a"}', b"}", b"tru", b"\x7f", b"[" * 5000, b"text"),
)
NO_OBJECT = (b"[]", b'["text"]', b"1", b"-1e9999", b'"text"', b"null", b"true", b"NaN", b"[{}]")
NO_TEXT = (b"{}", b'{"Text": "a"}', b'{"id": 1}', b'{"text ": "a"}')
WRONG_TEXT = (b"null", b"1", b"1.5", b"true", b"[]", b'["a"]', b"{}", b'{"text": "a"}', b"NaN")
ROWS = [f"row {n} of a table" + "x" * (n % 30) for n in range(40)]
NAMES = (
    "a b",
    "new\nline",
    "$(touch x)",
    "`x`",
    "; rm -rf .",
    "-rf",
    "'\"",
    "\u00fc\U0001f600",
    "*",
)


@dataclass(frozen=True)
class Case:
    """A file, and how many documents and which rejects it must give; None: at least one record."""

    name: str
    data: bytes
    documents: int | None
    rejects: tuple[str, ...] = ()


def text_of(n: int) -> str:
    return f"good text number {n}: {n * 7919 % 10007}"


def good(n: int) -> bytes:
    return json.dumps({"text": text_of(n), "id": n}).encode()


def around(bad: bytes, n: int) -> bytes:
    return good(n) + b"\n" + bad + b"\n" + good(n + 1) + b"\n"


def lines() -> Iterator[Case]:
    """Malformed jsonl: the good lines before and after each bad one stay."""
    text = b'{"text": "some text", "id": "x"}'
    bad = [
        (text[:at] + wrong + text[at:], "invalid UTF-8") for wrong in NOT_UTF8 for at in range(33)
    ]
    bad += [(line, "broken JSON") for line in BROKEN_JSON]
    bad += [(line, "not an object") for line in NO_OBJECT]
    bad += [(line, "text missing") for line in NO_TEXT]
    bad += [(b'{"text": ' + value + b"}", "text not a string") for value in WRONG_TEXT]
    bad += [(b'{"text": ""}', "empty text"), (b"", "blank line"), (b" \t", "blank line")]
    bad += [
        (b'{"text": "\\ud83d"}', "lone surrogate"),
        (b'{"text": "' + b"x" * 9000 + b'"}', "large"),
    ]
    for n, (line, reason) in enumerate(bad):
        reason = "record too large" if reason == "large" else reason
        yield Case(f"lines/{n:03d}.jsonl", around(line, n), 2, (reason,))
    yield Case("lines/empty.jsonl", b"", 0)
    yield Case("lines/no end.jsonl", good(1) + b"\n" + good(2), 2)
    yield Case("lines/nul.jsonl", b"\0" * 3000, 0, ("broken JSON",))


def packed() -> Iterator[Case]:
    """Compressed files, cut and flipped at any place."""
    source = random.Random(3)
    data = b"".join(good(n) + b"\n" for n in range(100))
    for suffix, whole in (
        ("gz", gzip.compress(data, mtime=0)),
        ("zst", zstandard.ZstdCompressor(write_checksum=True).compress(data)),
    ):
        for n in range(45):
            cut = whole[: len(whole) * n // 45]
            yield Case(f"packed/{n}.cut.jsonl.{suffix}", cut, None, ("truncated file",))
        for n in range(45):
            flipped = bytearray(whole)
            flipped[source.randrange(12, len(whole) - 8)] ^= 1 << source.randrange(8)
            yield Case(f"packed/{n}.bit.jsonl.{suffix}", bytes(flipped), None)
        yield Case(f"packed/text.jsonl.{suffix}", data[:500], 0, ("damaged file",))
        yield Case(f"packed/text.txt.{suffix}", whole[:-3], 0, ("truncated file",))


def tables() -> Iterator[Case]:
    """Parquet, cut and flipped at any place."""
    source = random.Random(4)
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ROWS}), out, row_group_size=10, write_page_checksum=True)
    whole = out.getvalue()
    for n in range(40):
        cut = whole[: len(whole) * n // 40]
        yield Case(f"tables/{n}.cut.parquet", cut, 0, ("truncated file",))
    for n in range(80):
        flipped = bytearray(whole)
        flipped[source.randrange(4, len(whole) - 4)] ^= 1 << source.randrange(8)
        yield Case(f"tables/{n}.bit.parquet", bytes(flipped), None)
    for n in range(20):
        yield Case(f"tables/{n}.noise.parquet", source.randbytes(500) + b"PAR1", None)


def texts() -> Iterator[Case]:
    """Text and WARC files, and names that shells and terminals trip over."""
    for n, wrong in enumerate(NOT_UTF8):
        for at in (0, 5, 10):
            data = b"plain text"[:at] + wrong + b"plain text"[at:]
            yield Case(f"texts/{n}.{at}.txt", data, 0, ("invalid UTF-8",))
    for n, name in enumerate(NAMES):
        yield Case(f"names/{name}.txt", f"text under name {n}".encode(), 1)
        yield Case(f"names/{name}/{name}.jsonl", around(b"[]", n), 2, ("not an object",))
    yield Case("texts/empty.txt", b"", 0, ("empty text",))
    yield Case("texts/nuls.txt", b"\0" * 1000, 1)
    yield Case("texts/large.txt", b"x" * 9000, 0, ("record too large",))
    record = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n"
    for n in range(len(record) - 4):
        cut = record + record[:n]
        rejected = () if n == 0 else ("damaged file",) if n < 7 else ("truncated file",)
        yield Case(f"warc/{n}.warc", cut, 1, rejected)


CASES = [*lines(), *packed(), *tables(), *texts()]


@dataclass(frozen=True)
class Campaign:
    """What a data set of all cases says of each file."""

    output: Path
    documents: dict[str, list[str]]
    rejects: dict[str, list[str]]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    root = tmp_path_factory.mktemp("malformed")
    for case in CASES:
        path = root / "in" / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.data)
    (root / "in/names/directory.txt").mkdir()
    words = [
        *(f"root={root / 'in'}", f"output={root / 'set'}", "workers=2"),
        "sources=[{name: s, paths: ['**/*.*'], max_record_bytes: 8000}]",
        *("tokenizer.vocab_size=350", "shards.count=2"),
    ]
    wanted = config.load(None, words)
    pipeline.run(wanted)
    rejects: dict[str, list[str]] = {}
    for line in (root / "set/rejects.jsonl").open():
        reject = json.loads(line)
        rejects.setdefault(reject["file"], []).append(reject["reason"])
    documents: dict[str, list[str]] = {}
    for file in inputs.find(wanted, []):
        found = readers.survey(file, 1 << 20)
        made = readers.records(file, found, (0, 1), found.size)
        documents[file.name] = [doc.text for doc in made if isinstance(doc, RawDocument)]
    return Campaign(root / "set", documents, rejects)


def test_there_are_more_than_500_cases() -> None:
    assert len(CASES) > 500
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_file_is_accounted_for(campaign: Campaign) -> None:
    wrong = {}
    for case in CASES:
        documents, rejects = (
            len(campaign.documents[f"s/{case.name}"]),
            campaign.rejects.get(f"s/{case.name}", []),
        )
        if case.documents is None:
            # Damage may hide in what carries no text; then all of it is there.
            sound = documents + len(rejects) > 0 and set(case.rejects) <= set(rejects)
        else:
            sound = (documents, tuple(rejects)) == (case.documents, case.rejects)
        if not sound:
            wrong[case.name] = (documents, rejects)
    assert wrong == {}


def test_a_flipped_bit_is_never_a_wrong_text_nor_a_silent_loss(campaign: Campaign) -> None:
    cases = [case for case in CASES if ".bit." in case.name]
    assert len(cases) == 170
    for case in cases:
        found = campaign.documents[f"s/{case.name}"]
        whole = ROWS if case.name.endswith("parquet") else [text_of(n) for n in range(100)]
        assert set(found) <= set(whole), case.name
        assert (found == whole) == (f"s/{case.name}" not in campaign.rejects), case.name


def test_as_many_records_come_out_as_went_in(campaign: Campaign) -> None:
    assert shards.verify(campaign.output) == []
    manifest = shards.read_manifest(campaign.output)
    assert manifest.documents == sum(map(len, campaign.documents.values()))
    assert manifest.rejected == sum(map(len, campaign.rejects.values()))


def test_a_directory_is_no_file_and_runs_nothing(campaign: Campaign) -> None:
    root = campaign.output.parent / "in"
    assert {path.name for path in (root / "names").iterdir()} == {
        *(f"{name}.txt" for name in NAMES),
        *NAMES,
        "directory.txt",
    }


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)
        server.bind(path.name)


def not_utf8(path: Path) -> None:
    Path(os.fsdecode(os.fsencode(path) + b"\xff")).touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dangling, "is a dangling link; repair or exclude it"),
        (fifo, "is not a regular file; exclude it"),
        (unix_socket, "is not a regular file; exclude it"),
        (not_utf8, "is not a name in UTF-8; rename or exclude it"),
    ],
)
def test_what_cannot_be_read_is_reported_before_the_start(
    make: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").write_text("text")
    make(tmp_path / "odd")
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "workers=1"]
    with pytest.raises(SettingsError) as caught:
        pipeline.run(config.load(None, [*words, "sources=[{name: s, paths: ['*']}]"]))
    (problem,) = caught.value.problems
    assert problem.endswith(message)
    problems: list[str] = []
    left = "sources=[{name: s, paths: ['*'], exclude: ['odd*']}]"
    (file,) = inputs.find(config.load(None, [*words, left]), problems)
    assert (file.relative, problems) == ("good", [])


def measured(path: Path, form: Format, packing: Compression, limit: int) -> tuple[int, str, int]:
    """Records (5 at most), reasons of rejects, and MB of memory that reading a file takes.

    In a process forked from a small one: in this one there is memory to reuse.
    """
    receiver, sender = APART.Pipe(duplex=False)
    limits = {"max_record_bytes": limit, "max_held_bytes": limit}
    file = InputFile(SourceConfig("s", **limits), str(path), "f", form, packing)
    process = APART.Process(target=measure, args=(file, sender))
    process.start()
    sender.close()
    assert receiver.poll(500)
    found: tuple[int, str, int] = receiver.recv()
    process.join()
    return found


APART = multiprocessing.get_context("forkserver")
APART.set_forkserver_preload([__name__])


def measure(file: InputFile, sender: Connection) -> None:
    """Run apart: sends what `measured` returns."""
    before = peak()
    found = readers.survey(file, 1 << 20)
    stops = [*(offset for offset, _ in found.cuts[1:]), found.size]
    reasons, count = set(), 0
    for start, stop in zip(found.cuts, stops, strict=True):
        for record in readers.records(file, found, start, stop):
            count += 1
            if isinstance(record, Reject):
                reasons.add(record.reason)
            if count == 5:
                break
    sender.send((count, ",".join(sorted(reasons)) or "-", (peak() - before) >> 10))


def peak() -> int:
    """Peak memory of this process in kB."""
    # Not ru_maxrss, in which a new program begins with what its parent had.
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1])


def write_line(path: Path, size: int) -> None:
    """A line of `size` bytes between two short ones."""
    with path.open("wb") as file:
        file.write(good(1) + b'\n{"text": "')
        for _ in range(size >> 20):
            file.write(b"long line text! " * 65536)
        file.write(b'"}\n' + good(2) + b"\n")


@pytest.mark.parametrize("size", [64 << 20, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_huge_line_takes_no_more_memory_than_the_limit(size: int, tmp_path: Path) -> None:
    write_line(tmp_path / "f", size)
    count, reasons, memory = measured(tmp_path / "f", "jsonl", None, 4 << 20)
    assert (count, reasons) == (3, "record too large")
    assert memory < 24
    count, reasons, memory = measured(tmp_path / "f", "jsonl", None, 2 << 30)
    assert (count, reasons) == (3, "-")
    # Its blocks, these joined, and decoded: three copies, two of which JSON makes anew.
    assert size >> 20 < memory < 5.5 * (size >> 20)


@pytest.mark.parametrize("size", [1 << 27, pytest.param(3 << 30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packing", ["gzip", "zstd"])
@pytest.mark.parametrize("form", ["text", "jsonl", "warc"])
def test_a_compression_bomb_takes_no_more_memory_than_the_limit(
    packing: Compression, form: Format, size: int, tmp_path: Path
) -> None:
    with (tmp_path / "f").open("wb") as raw:
        opened = (
            gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9)
            if packing == "gzip"
            else zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
        )
        with opened as out:
            if form == "warc":
                header = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n"
                out.write(header % size)
            for _ in range(size >> 20):
                out.write(bytes(1 << 20))
    assert (tmp_path / "f").stat().st_size < size >> 9
    count, reasons, memory = measured(tmp_path / "f", form, packing, 4 << 20)
    assert (count, reasons) == (1, "record too large")
    assert memory < 64


def test_a_parquet_bomb_takes_no_more_memory_than_its_pages(tmp_path: Path) -> None:
    # One text of 8 MB, said a hundred thousand times: 800 GB in a few thousand bytes.
    one = pa.array(["a" * (8 << 20)])
    for stored in (True, False):
        table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 100_000, one)})
        pq.write_table(table, tmp_path / "f", compression="zstd", store_schema=stored)
        assert (tmp_path / "f").stat().st_size < 1 << 20
        count, reasons, memory = measured(tmp_path / "f", "parquet", None, 1 << 20)
        assert (count, reasons) == (5, "record too large")
        assert memory < 1000
