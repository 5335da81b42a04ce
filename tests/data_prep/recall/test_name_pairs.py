"""Names by hand, and pairs that depend on the data set and what is wanted alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import cli
from data_prep.dataset import shards
from data_prep.pipeline import reshard
from data_prep.recall.name_pairs import names
from data_prep.tokenizer import tokenizer, training

BOOKS = {
    "one": "When Sara came, Becky saw Sara and the cat. Then came Lavinia; Becky, Sara fled. " * 40,
    "two": "So the rain fell on London, and Oliver met Fagin in London. But Oliver ran. " * 60,
}


def test_names_are_counted_inside_of_sentences() -> None:
    text = (
        "Emma rose. When Emma saw Mr Knightley, she told Emma's father; Harriet did not.\n"
        "Then and there Harriet met Knightley. Yes, Emma said Rose is a rose, and Hope is hope."
    )
    # Sentences begin with Emma (once), When and Then; Rose and Hope are written in lower case, too.
    assert names(text, 9) == ["Emma", "Knightley", "Harriet"]
    assert names(text, 2) == ["Emma", "Knightley"]
    assert names("Léonie spoke; then Élise met Zoë.", 9) == ["Élise", "Zoë"]
    assert names("He said no. NO. And then he left.", 9) == []


def test_names_are_of_any_script_with_capitals() -> None:
    assert names("Wtedy Łukasz i Pawłowski; a Łukasz, Świętosława.", 9) == [
        *("Łukasz", "Pawłowski", "Świętosława")
    ]
    russian = ["\u0416\u044e\u043b\u0438", "\u0424\u0451\u0434\u043e\u0440"]
    greek = "\u1f48\u03b4\u03c5\u03c3\u03c3\u03b5\u1f7a\u03c2"
    assert names(f"\u0434\u0430, {russian[0]}; {russian[1]} \u0438 {russian[0]}.", 9) == russian
    assert names(f"\u03bf {greek}.", 9) == [greek]


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory, write_data_set: Any) -> Path:
    """A data set of two books."""
    directory = tmp_path_factory.mktemp("books")
    training.train([*BOOKS.values()], directory / "trained.model", 320)
    model = tokenizer.load(directory / "trained.model")
    documents = [
        shards.Document(id, "novels", len(text.encode()), model.encode(text))
        for id, text in BOOKS.items()
    ]
    write_data_set(directory / "set", documents, 2, 320, tokenizer=directory / "trained.model")
    return directory / "set"


def _written(path: Path, books: Path, *words: str) -> bytes:
    assert cli.main(["pairs", str(path), "--books", str(books), *words]) == 0
    return path.read_bytes()


def test_a_book_is_a_pair_whole(tmp_path: Path, books: Path) -> None:
    records = [json.loads(line) for line in _written(tmp_path / "a.jsonl", books).splitlines()]
    assert [(one["id"], one["prompt"]) for one in records] == list(BOOKS.items())
    assert [one["answer"] for one in records] == [" Sara, Becky, Lavinia", " London, Oliver, Fagin"]


def test_passages_are_from_their_books_and_have_their_own_names(
    tmp_path: Path, books: Path
) -> None:
    words = ["--passages", "30", "--min-tokens", "20", "--max-tokens", "200", "--names", "2"]
    records = [
        json.loads(line) for line in _written(tmp_path / "a.jsonl", books, *words).splitlines()
    ]
    assert len(records) == 30 and len({one["id"] for one in records}) > 25
    model = tokenizer.load(tokenizer.find(books))
    sizes = []
    for one in records:
        book = BOOKS[one["id"].partition("-")[0]]
        assert f" {one['prompt']} " in book  # whole words of it
        assert one["answer"] == f" {', '.join(names(one['prompt'], 2))}"
        sizes.append(len(model.encode(one["prompt"])))
    assert min(sizes) < 40 and 120 < max(sizes) <= 201
    assert {one["id"].partition("-")[0] for one in records} == set(BOOKS)


def test_the_bytes_depend_on_the_books_and_what_is_wanted_alone(
    tmp_path: Path, books: Path
) -> None:
    words = ["--passages", "9", "--min-tokens", "30"]
    one = _written(tmp_path / "one.jsonl", books, *words)
    assert one == _written(tmp_path / "again.jsonl", books, *words)
    assert one == gzip.decompress(_written(tmp_path / "a.jsonl.gz", books, *words))
    assert one != _written(tmp_path / "other.jsonl", books, *words, "--seed", "2")
    assert reshard.run(books, tmp_path / "cut", 1)
    assert one == _written(tmp_path / "cut.jsonl", tmp_path / "cut", *words)


def test_every_mistake_is_reported(
    tmp_path: Path, books: Path, write_data_set: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--passages", "0", "--min-tokens", "9", "--max-tokens", "8", "--names", "0"]
    assert cli.main(["pairs", str(tmp_path / "a.jsonl"), "--books", str(books), *words]) == 2
    message = capsys.readouterr().err
    for part in ("--passages: expected at least 1", "9 to 8", "--names"):
        assert part in message
    model = tokenizer.find(books)
    nameless = tokenizer.load(model).encode("no name is here. " * 50)
    write_data_set(tmp_path / "set", [nameless], 1, 320, tokenizer=model)
    command = ["pairs", str(tmp_path / "a.jsonl"), "--books", str(tmp_path / "set")]
    assert cli.main(command) == 2
    assert "none of its documents has a name" in capsys.readouterr().err
    assert cli.main([*command, "--passages", "2", "--min-tokens", "9"]) == 2
    assert "in a row have no name in them" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_documents_that_make_no_pair_are_counted_and_no_passage_is_too_short(
    tmp_path: Path, books: Path, write_data_set: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tokenizer.load(tokenizer.find(books))
    texts = [
        "Then she met Anna, and Anna smiled. " * 40,
        "They saw Bob, and Bob.",
        "no name. " * 90,
    ]
    tokens = [model.encode(text) for text in texts]
    least = len(tokens[1]) + 1
    write_data_set(tmp_path / "set", tokens, 1, 320, tokenizer=model.path)
    command = ["pairs", str(tmp_path / "a.jsonl"), "--books", str(tmp_path / "set")]
    assert cli.main(command) == 0
    assert (
        capsys.readouterr().out
        == f"2 pairs: {tmp_path / 'a.jsonl'}\nleft out: 1 document with no name in it\n"
    )
    command[1] = str(tmp_path / "b.jsonl")
    passages = ["--passages", "20", "--min-tokens", str(least)]
    assert cli.main([*command, *passages, "--max-tokens", "99999"]) == 0
    told = f"left out: 1 document with fewer than {least} tokens"
    assert told in capsys.readouterr().out
    answers = [
        json.loads(line)["answer"] for line in (tmp_path / "b.jsonl").read_text().splitlines()
    ]
    assert answers == [" Anna"] * 20
    assert cli.main([*command, "--passages", "2", "--min-tokens", "5000"]) == 2
    assert "none of its documents has 5,000 tokens; lower --min-tokens" in capsys.readouterr().err
