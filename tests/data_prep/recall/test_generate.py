"""The file of documents: keyed by numbers, the same for any number of workers."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.recall import generate, tasks
from data_prep.recall.passkey import FILLER
from data_prep.tokenizer import tokenizer, training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model of the passkey's words and bytes."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    training.train([FILLER * 9], path, 320)
    return path


def _written(path: Path, model: Path, *more: str) -> bytes:
    words = ["--documents", "40", "--min-tokens", "1000", "--max-tokens", "4000"]
    assert cli.main(["recall", str(path), "--tokenizer", str(model), *words, *more]) == 0
    return path.read_bytes()


def test_the_file_is_the_same_for_any_number_of_workers(tmp_path: Path, model: Path) -> None:
    one = _written(tmp_path / "one.jsonl", model)
    assert one == _written(tmp_path / "four.jsonl", model, "--workers", "4")
    assert one == gzip.decompress(_written(tmp_path / "a.jsonl.gz", model))
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    assert packed == _written(tmp_path / "b.jsonl.gz", model, "--workers", "2")
    assert packed[4:8] == bytes(4)  # no time in its header
    assert one != _written(tmp_path / "other.jsonl", model, "--seed", "2")


def test_few_documents_wait_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = multiprocessing.get_context("fork").Value("q")
    ahead: list[int] = []

    def line(number: int) -> bytes:
        with made.get_lock():
            made.value += 1
        return b"%d\n" % number

    def slowly(path: Path, lines: Iterable[bytes]) -> None:
        for number, found in enumerate(lines):
            assert found == b"%d\n" % number
            time.sleep(0.2 if number in (0, 500) else 0)
            ahead.append(made.value - number - 1)

    monkeypatch.setattr(generate, "write_lines", slowly)
    generate.write(tmp_path / "a.jsonl", 1000, line, workers=2)
    assert len(ahead) == 1000 and max(ahead) < 2 * 2 * 16


def test_a_record_is_the_document_of_its_number(tmp_path: Path, model: Path) -> None:
    own = tokenizer.load(model)
    lines = _written(tmp_path / "a.jsonl", model, "--tasks", "passkey,multivalue").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records[:3]] == [
        "passkey-1-0",
        "multivalue-1-1",
        "passkey-1-2",
    ]
    for number in (0, 1, 38):
        task = ("passkey", "multivalue")[number % 2]
        length = tasks.length(1, task, number, 1000, 4000)
        made = tasks.document(task, tasks.Haystack.repeated(), own, length, seed=1, number=number)
        assert made == (records[number]["prompt"], records[number]["answer"])
    sizes = [len(own.encode(record["prompt"])) for record in records]
    assert min(sizes) < 1500 and 3000 < max(sizes) <= 4000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_that_is_there_is_kept_unless_it_holds_the_same(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    command = ["mqar", str(path), "--documents", "40", "--gap", "9", "--seed"]
    assert cli.main([*command, "1"]) == 0
    made = path.read_bytes()
    assert cli.main([*command, "1"]) == 0 and path.read_bytes() == made
    whole = gzip.decompress(made) if path.suffix == ".gz" else made
    lines = whole.splitlines(keepends=True)
    for text in (whole + b"more\n", b"".join(lines[:-1]), b"mine\n", b"", whole[:-1]):
        kept = gzip.compress(text) if path.suffix == ".gz" else text
        path.write_bytes(kept)
        assert cli.main([*command, "1"]) == 2
        assert f"{path} is there and holds something else; give ano" in capsys.readouterr().err
        assert path.read_bytes() == kept
    path.write_bytes(made[:-9])  # as gzip it is damaged
    assert cli.main([*command, "1"]) == (0 if path.suffix == ".gz" else 2)
    assert sorted(one.name for one in tmp_path.iterdir()) == [name, "mqar.tokenizer.json"]


def test_without_a_tokenizer_prompts_are_measured_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    words = ["--documents", "20", "--min-tokens", "400", "--max-tokens", "900"]
    assert cli.main(["recall", str(path), *words]) == 0
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    wanted = [tasks.length(1, "passkey", number, 400, 900) for number in range(20)]
    found = [len(prompt.encode()) for prompt in prompts]
    piece = len(FILLER) + 1
    assert all(0 <= more - size < piece for more, size in zip(wanted, found, strict=True))


def test_every_mistake_is_reported(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recall", str(tmp_path / "a.jsonl"), "--tokenizer", str(model), "--tasks", "riddle"]
    words += ["--documents", "0", "--min-tokens", "9", "--max-tokens", "8", "--workers", "0"]
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    for part in ("found 'riddle'", "--documents", "9 to 8", "--workers"):
        assert part in message
    words = ["recall", str(tmp_path / "a.jsonl"), "--tokenizer", str(model)]
    assert cli.main([*words, "--documents", "1", "--min-tokens", "9", "--max-tokens", "9"]) == 2
    assert "--max-tokens: 9 tokens are fewer than passkey has" in capsys.readouterr().err
    words = ["recall", str(tmp_path / "a.jsonl"), "--documents", "1"]
    assert cli.main([*words, "--min-tokens", "9", "--max-tokens", "9"]) == 2
    message = capsys.readouterr().err
    assert "--max-tokens: 9 bytes are fewer than passkey has without filler" in message
    assert "give at least 245, which is enough for every document" in message
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_a_task_that_is_longer_than_its_drawn_length_has_no_filler(
    tmp_path: Path, seed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    assert cli.main(["recall", str(path), "--documents", "60", "--seed", seed]) == 0
    said = capsys.readouterr().out
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    bare = tasks.least("passkey", None, seed=1, number=0)
    drawn = [tasks.length(int(seed), "passkey", number, 128, 8192) for number in range(60)]
    assert min(drawn) < bare
    assert f"passkey: its own text has some {bare} bytes, so none is shorter\n" in said
    for prompt, length in zip(prompts, drawn, strict=True):
        assert (len(prompt) == bare) == (length < bare + len(FILLER) + 1)


def test_the_least_length_of_a_message_is_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recall", str(tmp_path / "a.jsonl"), "--documents", "30", "--tasks", "multiquery,qa3"]
    bounds = ["--min-tokens", "9", "--max-tokens"]
    assert cli.main([*words, *bounds, "10"]) == 2
    least = int(capsys.readouterr().err.split("at least ")[1].split(",")[0])
    assert cli.main([*words, *bounds, str(least - 1)]) == 2
    assert cli.main([*words, *bounds, str(least)]) == 0
