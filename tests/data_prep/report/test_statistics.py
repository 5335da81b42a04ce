"""Statistics are counted from the shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import config
from data_prep.dataset import shards
from data_prep.dataset.shards import DataError
from data_prep.pipeline import pipeline
from data_prep.report import statistics
from data_prep.tokenizer import tokenizer

TEXT = "the segment reads the memory and then the segment writes the memory. "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    lines = [json.dumps({"text": TEXT * n}) for n in range(1, 12)]
    (root / "a.jsonl").write_text("\n".join([*lines, "[]", '{"text": 1}', "[]"]))
    (root / "b.txt").write_text("\U0001f600 and \u2581", encoding="utf-8")
    sources = "sources=[{name: one, paths: ['*.jsonl']}, {name: two, paths: ['*.txt']}]"
    words = [f"root={root}", f"output={root / 'set'}", sources, "tokenizer.vocab_size=300"]
    pipeline.run(config.load(None, [*words, "tokenizer.character_coverage=0.99", "shards.count=2"]))
    return root / "set"


def test_the_numbers_are_those_of_the_texts(made: Path) -> None:
    model = tokenizer.load(made / "tokenizer.model")
    lengths = [len(model.encode(TEXT * n)) for n in range(1, 12)]
    other = "\U0001f600 and \u2581"
    alone = len(model.encode(other))
    found = statistics.stats(made).plain()
    counts = ("documents", "rejected", "shards", "vocab_size")
    assert [found[name] for name in counts] == [12, 3, 2, 300]
    assert found["bytes"] == 66 * len(TEXT) + len(other.encode())
    assert found["tokens"] == sum(lengths) + alone
    assert found["bytes_per_token"] == found["bytes"] / found["tokens"]
    # Four bytes of the emoji and three of U+2581 are the only bytes without a piece.
    assert found["byte_fallback"] == 7 / found["tokens"]
    names = ("documents", "tokens", "bytes", "bytes_per_token", "byte_fallback")
    size, other_size = 66 * len(TEXT), len(other.encode())
    values = {
        "one": (11, sum(lengths), size, size / sum(lengths), 0.0),
        "two": (1, alone, other_size, other_size / alone, 7 / alone),
    }
    assert found["sources"] == {
        name: dict(zip(names, row, strict=True)) for name, row in values.items()
    }
    assert found["length_percentiles"]["0"] == min(*lengths, alone)
    assert found["length_percentiles"]["100"] == max(lengths)
    assert found["rejected_by_reason"] == {"not an object": 2, "text not a string": 1}
    assert found["dropped"] == found["duplicates"] == 0


def test_the_records_that_were_left_out_add_up(tmp_path: Path) -> None:
    texts = [TEXT, TEXT, "Bonjour tout le monde, il fait beau et je vais bien. " * 9, TEXT * 2]
    lines = [*map(json.dumps, [{"text": text} for text in texts]), "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    sources = "sources=[{name: one, paths: ['*.jsonl'], cleaning: {languages: [en]}}]"
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", sources, "duplicates.exact=true"]
    pipeline.run(config.load(None, [*words, "tokenizer.vocab_size=300", "shards.count=1"]))
    found = statistics.stats(tmp_path / "set")
    plain = found.plain()
    kinds = ("documents", "rejected", "dropped", "duplicates")
    assert [plain[kind] for kind in kinds] == [2, 1, 1, 1]
    shown = [line.split("  ")[0] for line in statistics.lines(found)]
    assert [
        name for name in shown if name in ("rejected", "dropped by cleaning", "duplicates")
    ] == [*("rejected", "dropped by cleaning", "duplicates")]


def test_words_and_the_longest_are_those_of_the_texts(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tokenizer.load(made / "tokenizer.model")
    found = statistics.stats(made, words=True)
    one = found.sources["one"]
    assert (one.words, one.word_tokens) == (66 * 12, sum(one.lengths))
    assert [tokens for tokens, *_ in found.longest[:11]] == sorted(one.lengths, reverse=True)
    assert found.longest[0] == (len(model.encode(TEXT * 11)), "a.jsonl:11", "one")
    monkeypatch.setattr(statistics, "_LONGEST", 3)
    monkeypatch.setattr(statistics, "_DOCUMENT_WORD_TOKENS", 5)
    few = statistics.stats(made, words=True)
    assert few.longest == found.longest[:3]
    assert few.sources["one"].word_tokens == 55
    assert statistics.stats(made).sources["one"].words == 0


def test_of_equally_long_documents_the_first_are_listed(
    made: Path, tmp_path: Path, write_data_set: Any
) -> None:
    model = made / "tokenizer.model"
    write_data_set(tmp_path, [[5] * (1 + n // 15) for n in range(45)], 2, 300, tokenizer=model)
    (tmp_path / "rejects.jsonl").touch()
    listed = [id for _, id, _ in statistics.stats(tmp_path).longest]
    assert listed == [f"document-{n}" for n in [*range(30, 45), *range(15, 20)]]


def test_the_lines_hold_the_numbers(made: Path) -> None:
    found = statistics.stats(made)
    rows = [line.split("  ", 1) for line in statistics.lines(found)]
    values = {name.strip(): value.strip() for name, value in rows if name.strip()}
    assert values["documents"] == "12"
    assert values["byte fallback"] == f"{7 / found.manifest.tokens:.3%} of tokens"
    assert values["source two"].startswith("1 document, ")


def test_the_closing_names_the_path_and_the_next_command(made: Path) -> None:
    shown = "\n".join(statistics.closing(made, shards.read_manifest(made), 2.0))
    assert "15 records in: 12 documents out, 3 rejected" in shown
    assert "rejected: 2 x not an object" in shown
    assert f"next: data-prep report {made}" in shown
    assert "2.0 s" in shown


def test_damage_is_refused(made: Path, tmp_path: Path) -> None:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first, *_ = (tmp_path / "rejects.jsonl").read_text().splitlines()
    (tmp_path / "rejects.jsonl").write_text(first)
    with pytest.raises(DataError, match=r"rejects\.jsonl: lists 1 record, the manifest says 3"):
        statistics.stats(tmp_path)
    shard = tmp_path / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    with pytest.raises(DataError, match=r"shard-00001\.tar: is cut"):
        statistics.stats(tmp_path)
