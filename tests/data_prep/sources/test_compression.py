"""Members of compressed files: each that is sound is read, and what is left out is reported."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import zstandard

from data_prep.config import SourceConfig
from data_prep.sources import readers
from data_prep.sources.documents import LongDocument, RawDocument, Reject
from data_prep.sources.inputs import Format, InputFile

Kind = Literal["gzip", "zstd"]
TEXTS = [f"text {n}, of {n * 7919 % 10007}" for n in range(60)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
PACKS: dict[Kind, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}
SKIPPABLE = b"\x5a\x2a\x4d\x18\x05\0\0\0hello"


def read(path: Path, kind: Kind, form: Format = "jsonl", cut: int = 1 << 20, **more: Any) -> Any:
    file = InputFile(SourceConfig("s", **more), str(path), path.name, form, kind)
    found = readers.survey(file, cut)
    stops = [*(offset for offset, _ in found.cuts[1:]), found.size]
    return [
        one
        for start, stop in zip(found.cuts, stops, strict=True)
        for one in readers.records(file, found, start, stop)
    ]


def split(made: Any) -> tuple[list[str], list[tuple[int, str]]]:
    texts = [one.text for one in made if isinstance(one, RawDocument)]
    return texts, [(one.line, one.reason) for one in made if isinstance(one, Reject)]


def flipped(member: bytes) -> bytes:
    return member[:-7] + bytes([member[-7] ^ 1]) + member[-6:]


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("padding", [bytes(1), bytes(512), bytes(600_000)])
def test_nuls_between_and_behind_members_are_padding(
    kind: Kind, padding: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"".join(PACKS[kind](line) + padding for line in LINES[:5]))
    assert split(read(tmp_path / "a", kind)) == (TEXTS[:5], [])


def test_skippable_frames_hold_nothing(tmp_path: Path) -> None:
    frames = [SKIPPABLE, PACKS["zstd"](LINES[0]), SKIPPABLE, SKIPPABLE, PACKS["zstd"](LINES[1])]
    (tmp_path / "a").write_bytes(b"".join([*frames, SKIPPABLE]))
    assert split(read(tmp_path / "a", "zstd")) == (TEXTS[:2], [])


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("cut", [1 << 20, 1])
def test_a_damaged_member_costs_its_own_lines(kind: Kind, cut: int, tmp_path: Path) -> None:
    members = [PACKS[kind](b"".join(LINES[n : n + 10])) for n in range(0, 60, 10)]
    for lost in ({0}, {2}, {5}, {1, 2}, {0, 3, 5}):
        stored = [flipped(m) if n in lost else m for n, m in enumerate(members)]
        (tmp_path / "a").write_bytes(b"".join(stored))
        texts, rejects = split(read(tmp_path / "a", kind, cut=cut))
        assert texts == [text for n, text in enumerate(TEXTS) if n // 10 not in lost]
        # Members beside each other are left out as one.
        apart = [n for n in lost if n - 1 not in lost]
        kept = [len([m for m in range(n) if m not in lost]) * 10 + 1 for n in sorted(apart)]
        assert rejects == [(line, "damaged file") for line in kept]


@pytest.mark.parametrize("kind", PACKS)
def test_what_was_counted_of_a_damaged_member_is_taken_back(kind: Kind, tmp_path: Path) -> None:
    # Larger than a block, so that a part of it is decompressed before its check.
    texts = [f"{n} {random.Random(n).getrandbits(8000):x}" for n in range(600)]
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    members = [PACKS[kind](b"".join(lines[n : n + 200])) for n in range(0, 600, 200)]
    (tmp_path / "a").write_bytes(members[0] + flipped(members[1]) + members[2])
    file = InputFile(SourceConfig("s"), str(tmp_path / "a"), "a", "jsonl", kind)
    found = readers.survey(file, 100_000)
    assert (found.size, found.records) == (sum(map(len, lines[:200] + lines[400:])), 400)
    kept, rejects = split(read(tmp_path / "a", kind, cut=100_000))
    assert (kept, rejects) == (texts[:200] + texts[400:], [(201, "damaged file")])


@pytest.mark.parametrize("kind", PACKS)
def test_what_is_no_member_is_left_out_and_told(kind: Kind, tmp_path: Path) -> None:
    one, two = PACKS[kind](LINES[0]), PACKS[kind](LINES[1])
    name = {"gzip": "gzip", "zstd": "zstd"}[kind]
    (tmp_path / "a").write_bytes(one + b"garbage" + two + b"-- end of tape")
    made = read(tmp_path / "a", kind)
    assert split(made) == (TEXTS[:2], [(2, "damaged file"), (3, "damaged file")])
    rejects = [reject.detail for reject in made if isinstance(reject, Reject)]
    place = f"bytes {len(one)} to {len(one) + 7} of the compressed file are left out"
    assert rejects[0] == f"{place}: they are not {name} data"
    # A text is whole, whatever lies between its members; so is a long one.
    texts, rejects = split(read(tmp_path / "a", kind, "text", format="text"))
    assert texts == ["".join(line.decode() for line in LINES[:2])]
    assert rejects == [(1, "damaged file"), (2, "damaged file")]
    long = read(tmp_path / "a", kind, "text", format="text", max_held_bytes=9)
    (whole,) = [one for one in long if isinstance(one, LongDocument)]
    assert "".join(whole.passages()) == texts[0]


@pytest.mark.parametrize("kind", PACKS)
def test_a_text_of_which_a_part_is_damaged_is_rejected(kind: Kind, tmp_path: Path) -> None:
    for lost in range(3):
        members = [PACKS[kind](line) for line in LINES[:3]]
        members[lost] = flipped(members[lost])
        (tmp_path / "a").write_bytes(b"".join(members))
        for limit in (1 << 20, 9):
            found = split(read(tmp_path / "a", kind, "text", max_held_bytes=limit))
            assert found == ([], [(1, "damaged file")])


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("cut", [1 << 20, 1])
def test_a_line_never_reaches_across_a_member_that_is_left_out(
    kind: Kind, cut: int, tmp_path: Path
) -> None:
    data, source, texts = b"".join(LINES), random.Random(1), set(TEXTS)
    for _ in range(12):
        at = sorted(source.sample(range(1, len(data)), 4))
        parts = [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]
        lost = source.randrange(5)
        members = [PACKS[kind](part) for part in parts]
        members[lost] = flipped(members[lost])
        (tmp_path / "a").write_bytes(b"".join(members))
        found, rejects = split(read(tmp_path / "a", kind, cut=cut))
        assert set(found) <= texts
        assert len(found) >= 57 - parts[lost].count(b"\n")
        assert [reason for _, reason in rejects].count("damaged file") >= 1
    # Joined, these two would be a text that nobody wrote.
    members = [PACKS[kind](b'{"text": "one '), flipped(PACKS[kind](b"x")), PACKS[kind](b'two"}\n')]
    (tmp_path / "a").write_bytes(b"".join(members))
    assert split(read(tmp_path / "a", kind))[0] == []


@pytest.mark.parametrize("kind", PACKS)
def test_however_many_members_are_damaged_each_costs_its_own_lines(
    kind: Kind, tmp_path: Path
) -> None:
    texts = [f"text {n}, of {n * 7919 % 10007}" for n in range(3300)]
    members = [PACKS[kind](json.dumps({"text": text}).encode() + b"\n") for text in texts]
    # Every second one, and at the end all but every hundredth.
    lost = {n for n in range(3300) if (n % 2 if n < 2200 else n % 100)}
    stored = [flipped(member) if n in lost else member for n, member in enumerate(members)]
    (tmp_path / "a").write_bytes(b"".join(stored))
    kept, rejects = split(read(tmp_path / "a", kind))
    assert kept == [text for n, text in enumerate(texts) if n not in lost]
    assert len(rejects) == 1100 + 11


def test_the_search_behind_damage_ends_and_says_so(tmp_path: Path) -> None:
    # Frames to skip of 8 MB, as they say: to see that they end early, all the rest is read.
    false = b"\x50\x2a\x4d\x18" + (1 << 23).to_bytes(4, "little")
    data = PACKS["zstd"](LINES[0]) + false * 9000 + bytes(1 << 20) + PACKS["zstd"](LINES[1])
    (tmp_path / "a").write_bytes(data)
    made = read(tmp_path / "a", "zstd")
    assert split(made) == (TEXTS[:1], [(2, "damaged file")])
    start = len(PACKS["zstd"](LINES[0]))
    assert made[1].detail == (
        f"bytes {start} to {len(data):,} of the compressed file are left out: "
        "after so much damage they are not looked at further"
    )
    # What was not looked at may be a part of a text.
    assert split(read(tmp_path / "a", "zstd", "text", format="text"))[0] == []


def test_a_file_is_hashed_to_its_end_where_the_search_behind_damage_ends_before_it(
    tmp_path: Path,
) -> None:
    # Each nine bytes begin a frame with a raw block of 131,069, behind which the next block's head
    # is two bytes further on in them, at 0x2f: a reserved kind. So a trial reads 256 KiB.
    head = b"\x28\xb5\x2f\xfd\0\x48" + (131_069 << 3).to_bytes(3, "little")
    data = PACKS["zstd"](LINES[0]) + head * 250_000
    (tmp_path / "a").write_bytes(data)
    file = InputFile(SourceConfig("s"), str(tmp_path / "a"), "a", "jsonl", "zstd")
    found = readers.survey(file, 1 << 20)
    assert [gap.why.endswith("are not looked at further") for gap in found.gaps] == [True]
    assert found.sha256 == hashlib.sha256(data).hexdigest()


def dictionary(data: bytes) -> bytes:
    samples = [bytes(random.Random(n).choices(b"abcdefgh \n", k=200)) for n in range(200)]
    trained = zstandard.train_dictionary(1000, samples)
    return zstandard.ZstdCompressor(dict_data=trained).compress(data)


@pytest.mark.parametrize(
    ("kind", "data", "reason", "detail"),
    [
        ("zstd", dictionary(LINES[0]), "unsupported file", "need a dictionary (number "),
        ("zstd", SKIPPABLE + dictionary(LINES[0]), "unsupported file", "zstd -d -D DICTIONARY"),
        ("zstd", b"\x27\xb5\x2f\xfd" + bytes(99), "unsupported file", "older than version 0.8"),
        ("gzip", b"\x1f\x8b\x07\0" + bytes(99), "unsupported file", "of method 7"),
        ("gzip", PACKS["zstd"](LINES[0]), "unsupported file", "it is zstd data, not gzip"),
        ("zstd", PACKS["gzip"](LINES[0]), "unsupported file", "it is gzip data, not zstd"),
        ("gzip", b"\xfd7zXZ\0" + bytes(99), "unsupported file", "it is xz data, not gzip"),
        ("gzip", LINES[0], "damaged file", "it is not gzip data, as its name says"),
        ("gzip", flipped(PACKS["gzip"](LINES[0])), "damaged file", "fail their check"),
        ("gzip", b"", "truncated file", ""),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "text", "warc"])
def test_what_is_not_read_is_told_from_what_is_damaged(
    kind: Kind, data: bytes, reason: str, detail: str, form: Format, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(data)
    (reject,) = read(tmp_path / "a", kind, form)
    assert (reject.reason, detail in reject.detail) == (reason, True), reject
