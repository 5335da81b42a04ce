"""Groups of files: what is one document, in which order, and what becomes of a bad member."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path

import pytest
import zstandard

from data_prep import config
from data_prep.config import SourceConfig
from data_prep.dataset import shards
from data_prep.pipeline import pipeline
from data_prep.sources import compression, documents, inputs, readers
from data_prep.sources.compression import Compression
from data_prep.sources.documents import LongDocument, RawDocument, Reject
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import tokenizer

BOOKS = {
    "a/chapter-10.txt": "ten",
    "a/chapter-2.txt": "two",
    "a/Chapter-1.txt": "one",
    "a/notes/n01.txt": "first note",
    "a/notes/n1.txt": "another first note",
    "b/only.txt": "b alone",
    "top.txt": "at the top",
}


def library(root: Path, members: dict[str, str]) -> None:
    for name, text in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("latin-1"))


def grouped(
    root: Path, by: str, *more: str
) -> list[tuple[str, RawDocument | LongDocument | Reject]]:
    """(name of the file, record) of each record."""
    given = ", ".join(["name: s", "paths: ['**/*.txt']", f"group_by: {by}", *more])
    wanted = config.load(None, [f"root={root}", "output=/none", f"sources=[{{{given}}}]"])
    problems: list[str] = []
    files = inputs.find(wanted, problems)
    assert problems == []
    made = []
    for members in inputs.groups(files):
        ours = [files[index] for index in members]
        surveys = [readers.survey(file, 1) for file in ours]
        if ours[0].group:
            made += [(ours[n].name, record) for n, record in readers.group(ours, surveys)]
        else:
            whole = readers.records(ours[0], surveys[0], (0, 1), surveys[0].size)
            made += [(ours[0].name, record) for record in whole]
    return made


def texts(made: list[tuple[str, RawDocument | LongDocument | Reject]]) -> dict[str, str]:
    return {doc.id: doc.text for _, doc in made if isinstance(doc, RawDocument)}


def test_a_directory_is_a_document_in_natural_order(tmp_path: Path) -> None:
    library(tmp_path, BOOKS)
    made = grouped(tmp_path, "directory")
    assert texts(made) == {
        ".": "at the top",
        "a": "one\n\ntwo\n\nten",
        "a/notes": "first note\n\nanother first note",
        "b": "b alone",
    }
    assert [name for name, _ in made] == [
        *("s/top.txt", "s/a/Chapter-1.txt", "s/a/notes/n01.txt", "s/b/only.txt")
    ]


def test_all_below_a_top_directory_is_a_document(tmp_path: Path) -> None:
    library(tmp_path, BOOKS)
    assert texts(grouped(tmp_path, "top", "group_separator: '|'")) == {
        "top.txt": "at the top",
        "a": "one|two|ten|first note|another first note",
        "b": "b alone",
    }
    assert set(texts(grouped(tmp_path, "file"))) == set(BOOKS)


def test_a_bad_member_is_rejected_by_its_name_and_the_others_stay(tmp_path: Path) -> None:
    library(tmp_path, {"a/1.txt": "caf\xe9", "a/2.txt": "two", "a/3.txt": "", "a/4.txt": "four"})
    made = grouped(tmp_path, "directory")
    assert texts(made) == {"a": "two\n\nfour"}
    assert [(name, one.reason) for name, one in made if isinstance(one, Reject)] == [
        ("s/a/1.txt", "invalid UTF-8"),
        ("s/a/3.txt", "empty text"),
    ]
    # The document has the place of its first member, so no place is taken twice.
    assert [name for name, one in made if isinstance(one, RawDocument)] == ["s/a/2.txt"]
    assert sum(record.read for _, record in made) == 4 + 3 + 4


def test_a_group_of_bad_members_is_no_document(tmp_path: Path) -> None:
    library(tmp_path, {"a/1.txt": "caf\xe9", "a/2.txt": ""})
    assert [type(record) for _, record in grouped(tmp_path, "top")] == [Reject, Reject]


def test_a_group_that_is_too_large_is_one_reject(tmp_path: Path) -> None:
    library(tmp_path, {f"a/{n}.txt": "x" * 30 for n in range(5)})
    assert texts(grouped(tmp_path, "top", "max_record_bytes: 158")).keys() == {"a"}
    ((name, reject),) = grouped(tmp_path, "top", "max_record_bytes: 157")
    assert isinstance(reject, Reject)
    assert (name, reject.reason, reject.read) == ("s/a/0.txt", "record too large", 150)
    assert reject.detail == "the group: 158 bytes; max_record_bytes is 157"


def test_a_group_that_is_too_large_to_be_held_comes_in_passages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PASSAGE", 20)
    members = {f"a/{n}.txt": f"member {n}\n" * 9 for n in range(5)}
    members |= {"a/2.txt": "caf\xe9 " * 40, "a/0.txt": ""}
    library(tmp_path, members)
    (whole,) = texts(grouped(tmp_path, "top")).values()
    for held in (len(whole) - 1, 20):  # together, or each alone
        made = grouped(tmp_path, "top", f"max_held_bytes: {held}")
        assert [(name, one.reason) for name, one in made if isinstance(one, Reject)] == [
            ("s/a/0.txt", "empty text"),
            ("s/a/2.txt", "invalid UTF-8"),
        ]
        ((name, long),) = [(name, one) for name, one in made if isinstance(one, LongDocument)]
        assert (name, long.id, long.read) == ("s/a/1.txt", "a", 3 * 81)
        assert "".join(long.passages()) == whole
        assert all(part.endswith("\n") for part in long.passages())


def test_only_text_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    given = "sources=[{name: s, paths: ['*'], group_by: top}]"
    problems: list[str] = []
    inputs.find(config.load(None, [f"root={tmp_path}", "output=/none", given]), problems)
    assert problems == [
        f"sources[0].group_by: joins text files, and {tmp_path}/a.jsonl is jsonl; exclude such "
        "files, or leave group_by out"
    ]


@pytest.mark.parametrize("cut_bytes", [1 << 20, 400])
def test_a_group_is_in_one_unit_and_every_record_is_accounted_for(
    cut_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.pipeline.workspace.CUT_BYTES", cut_bytes)
    root = tmp_path / "in"
    members = {
        f"book {b}/{c}.txt": f"book {b}, chapter {c}: {b * c * 7919} words " * 5
        for b in range(12)
        for c in range(12)
    }
    members |= {"book 3/5.txt": "caf\xe9", "book 4/12.txt": "", "bad/1.txt": "\xff"}
    library(root, members)
    sources = "sources=[{name: s, paths: ['**/*.txt'], group_by: directory}]"
    settings = ["tokenizer.vocab_size=320", "shards.count=2", "workers=2"]
    places = [f"root={root}", f"output={tmp_path / 'set'}"]
    pipeline.run(config.load(None, [*places, sources, *settings]))
    manifest = shards.read_manifest(tmp_path / "set")
    assert (manifest.documents, manifest.rejected) == (12, 3)
    rejects = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").open()]
    assert {reject["file"] for reject in rejects} == {
        *("s/book 3/5.txt", "s/book 4/12.txt", "s/bad/1.txt")
    }
    model = tokenizer.load(tmp_path / "set/tokenizer.model")
    made = {
        doc.id: model.decode(doc.tokens)
        for info in manifest.shards
        for doc in shards.read_shard(tmp_path / "set" / info.name, info)
    }
    for b in range(12):
        good = [c for c in range(13) if (b, c) not in ((3, 5), (4, 12)) and c < 12]
        assert made[f"book {b}"] == "\n\n".join(members[f"book {b}/{c}.txt"] for c in good)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_a_survey_of_the_first_lines_reads_and_hashes_no_more(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"{n} {random.Random(n).random()}"}).encode() for n in range(9000)]
    data = b"\n".join([*lines, b""])
    members = [data[:2000], data[2000:]]
    whole = {"": data, ".gz": b"".join(map(gzip.compress, members))}
    whole[".zst"] = b"".join(map(zstandard.ZstdCompressor().compress, members))
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(whole[packed])
    kind: Compression = {"": None, ".gz": "gzip", ".zst": "zstd"}[packed]  # type: ignore[assignment]
    file = InputFile(SourceConfig(name="s"), str(path), path.name, "jsonl", kind)
    monkeypatch.setattr(compression, "BLOCK_BYTES", 4096)
    read = 0
    add = readers._Counted.add

    def counted(self: readers._Counted, block: bytes) -> None:
        nonlocal read
        read += len(block)
        add(self, block)

    monkeypatch.setattr(readers._Counted, "add", counted)
    for most in (1, 50, 200):
        read = 0
        found = readers.survey(file, 500, most)
        assert (found.size, found.records) == (sum(len(line) + 1 for line in lines[:most]), most)
        assert found.sha256 == "" and not found.damage and not found.gaps
        assert read < found.size + (1 << 18) < len(data)
        taken = list(readers.records(file, found, (0, 1), found.size))
        assert [record.line for record in taken] == list(range(1, most + 1))
        assert all(isinstance(record, RawDocument) for record in taken)
        assert all(offset < found.size for offset, _ in found.cuts)
    everything = readers.survey(file, 500, len(lines) + 1)
    assert everything == readers.survey(file, 500)
    assert everything.sha256 == hashlib.sha256(whole[packed]).hexdigest()
