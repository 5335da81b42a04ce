"""Pairs as they are read, and every mistake in them."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset import settings, shards
from pretrain.config.data import DataConfig
from pretrain.config.root import Config
from pretrain.evaluate import pairs
from pretrain.evaluate.pairs import Fields, Pair

FIELDS = Fields("book", "summary", "\n\nSummary:\n")


def _jsonl(path: Path, *records: Any) -> Path:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_pairs_of_several_files_are_in_order(tmp_path: Path) -> None:
    one = _jsonl(tmp_path / "a.jsonl.gz", {"id": "x", "book": "It was.", "summary": "Was."})
    two = _jsonl(
        tmp_path / "b.jsonl",
        {"book": " So\n", "summary": "S", "more": 1},
        {"id": 7, "book": "No", "summary": "N"},
    )
    assert pairs.read([one, two], FIELDS) == (
        [Pair("x", "It was.", "Was."), Pair("b.jsonl:1", " So\n", "S"), Pair("7", "No", "N")],
        [],
    )


def test_a_file_that_is_given_twice_is_refused_also_by_way_of_a_link(tmp_path: Path) -> None:
    one = _jsonl(tmp_path / "a.jsonl", {"id": "x", "book": "It was.", "summary": "Was."})
    link = tmp_path / "b.jsonl"
    link.symlink_to(one)
    for again in (one, tmp_path / ".." / tmp_path.name / "a.jsonl", link):
        _, problems = pairs.read([one, again], FIELDS)
        assert problems == [
            f"{again}: is given twice, and each pair is to count once; leave it out"
        ]


def test_every_mistake_of_every_file_is_reported(tmp_path: Path) -> None:
    lines = [
        b'{"book": "a", "summary": "b"}',
        b'{"book": "a"}',
        b'{"book": "a", "summary": " "}',
        b"[1]",
        b"{",
        b'{"book": "\xff"}',
        b'{"book": "a", "summary": "\\ud800"}',
        *[b""] * 9,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    cut = _jsonl(tmp_path / "cut.jsonl.gz", {"book": "a" * 99, "summary": "b"})
    cut.write_bytes(cut.read_bytes()[:-9])
    (tmp_path / "no.jsonl.gz").write_bytes(b"no gz")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    paths = [tmp_path / name for name in ("a.jsonl", "cut.jsonl.gz", "no.jsonl.gz", "none.jsonl")]
    read, problems = pairs.read(paths, FIELDS)
    assert read[0] == Pair("a.jsonl:1", "a", "b")
    reported = [problem.removeprefix(f"{tmp_path}/") for problem in problems]
    assert reported[:6] == [
        "a.jsonl: line 2: has no text under 'summary'; it has 'book'",
        "a.jsonl: line 3: has no text under 'summary'; it has 'book', 'summary'",
        "a.jsonl: line 4: is a list, expected an object",
        "a.jsonl: line 5: is not JSON (Expecting property name enclosed in double quotes: line 2 "
        "column 1 (char 2))",
        "a.jsonl: line 6: is not UTF-8 (byte 11)",
        "a.jsonl: line 7: has a lone surrogate under 'summary'",
    ]
    assert reported[10] == "a.jsonl: and 4 more lines"
    assert reported[11].startswith("cut.jsonl.gz: is a damaged gz file")
    assert reported[12].startswith("no.jsonl.gz: cannot be read (Not a gzipped file")
    assert reported[13] == "none.jsonl: cannot be read (No such file or directory)"
    assert pairs.read([empty], FIELDS) == ([], [f"{empty}: holds no pair; expected one a line"])


def test_a_byte_order_mark_is_read_over_and_compressed_files_are_named(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "marked.jsonl", {"book": "a", "summary": "b"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    packed = _jsonl(tmp_path / "a.jsonl.gz", {"book": "a" * 99, "summary": "b"})
    unnamed = packed.rename(tmp_path / "unnamed.jsonl")
    zstd = tmp_path / "a.jsonl.zst"
    zstd.write_bytes(b"\x28\xb5\x2f\xfd\n\n\n")
    assert pairs.read([path, unnamed, zstd], FIELDS) == (
        [Pair("marked.jsonl:1", "a", "b")],
        [
            f"{unnamed}: is gzip data; expected JSON lines, plain or named .gz",
            f"{zstd}: is zstd data; expected JSON lines, plain or named .gz",
        ],
    )


@pytest.fixture
def run(tmp_path: Path, write_data_set: Any) -> Path:
    """A run directory whose training data set has pairs and is there."""
    manifest = write_data_set(tmp_path / "data", [[3, 4, 5]], 1, 320)
    source = {
        "prompt_field": "book", "answer_field": "summary", "question": FIELDS.question
    }  # fmt: skip
    shards.write_manifest(
        tmp_path / "data", replace(manifest, configuration={"sources": [source, {}]})
    )
    directory = tmp_path / "run"
    (directory / "checkpoints" / "step-00000007").mkdir(parents=True)
    config = Config(data=DataConfig(train=str(tmp_path / "data")))
    plain = settings.to_plain(config)
    plain["run"]["directory"] = str(directory)
    (directory / "config.yaml").write_text(json.dumps(plain))
    return directory


def test_fields_are_those_of_the_pairs_that_the_run_was_trained_on(run: Path) -> None:
    for path in (run, run / "checkpoints" / "step-00000007"):
        assert pairs.fields(path, None, None, None) == (FIELDS, [])
    own, problems = pairs.fields(run, "text", None, "")
    assert (own, problems) == (Fields("text", "summary", ""), [])


def test_a_question_that_is_not_known_is_asked_for(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    _, (problem,) = pairs.fields(run, None, None, None)
    assert problem.startswith(f"--question: not given, and not known from {run}")
    assert pairs.fields(run, None, None, "?") == (Fields("prompt", "answer", "?"), [])
