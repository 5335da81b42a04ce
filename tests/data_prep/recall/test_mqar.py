"""Associative recall: each document read back by a reader of the text alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.recall import mqar
from data_prep.tokenizer import tokenizer


def _read(text: str) -> list[tuple[str, str]]:
    """The keys and values of a text, letters aside."""
    symbols = text.strip("abcdefghijklmnopqrstuvwxyz")
    assert all("\u4e00" <= key < "\u5000" for key in symbols[::2])
    assert all("\uac00" <= value < "\uae00" for value in symbols[1::2])
    return list(zip(symbols[::2], symbols[1::2], strict=True))


@pytest.mark.parametrize("pairs", [1, 4, 512])
def test_every_key_is_stated_once_and_asked_for_once(pairs: int) -> None:
    for number in range(5):
        prompt, answer = mqar.document(3, number, pairs, 7)
        stated, asked = _read(prompt), _read(answer)
        assert len(dict(stated)) == len({value for _, value in stated}) == pairs
        assert sorted(asked) == sorted(stated)
        assert pairs < 4 or asked != stated
        # A letter before the pairs, and the gap behind them.
        assert len(prompt) == 1 + 2 * pairs + 7 and prompt[1:3] == "".join(stated[0])


def test_a_longer_gap_changes_nothing_else() -> None:
    near, far = mqar.document(3, 5, 8, 10), mqar.document(3, 5, 8, 90)
    assert far.answer == near.answer and far.prompt.startswith(near.prompt)
    assert len(far.prompt) == len(near.prompt) + 80
    assert mqar.document(4, 5, 8, 10) != near != mqar.document(3, 6, 8, 10)


def test_few_symbols_are_the_first_of_all() -> None:
    made = ["".join(mqar.document(3, number, 4, 0, 5)) for number in range(20)]
    drawn = {symbol for text in made for pair in _read(text) for symbol in pair}
    assert drawn == {chr(first + number) for first in (0x4E00, 0xAC00) for number in range(5)}


def test_a_symbol_is_a_token_and_white_space_stays_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(mqar.tokenizer_json())
    model = tokenizer.load(path)
    assert (model.bos_id, model.eos_id) == (0, 1)
    assert model.vocab_size == 2 + 4 + 26 + 2 * 512
    text = f" \t{mqar.SYMBOLS}\n"
    ids = model.encode(text)
    assert len(set(ids.tolist())) == len(ids) == len(text)
    assert model.decode(ids) == text


def _written(path: Path, *more: str) -> bytes:
    words = ["--documents", "60", "--pairs", "2,16", "--gap", "300", *more]
    assert cli.main(["mqar", str(path), *words]) == 0
    return path.read_bytes()


def test_a_file_has_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    one = _written(tmp_path / "one.jsonl")
    assert one == _written(tmp_path / "three.jsonl", "--workers", "3")
    assert one == gzip.decompress(_written(tmp_path / "a.jsonl.gz"))
    assert one != _written(tmp_path / "other.jsonl", "--seed", "2")
    assert (tmp_path / "mqar.tokenizer.json").read_bytes() == mqar.tokenizer_json()


def test_numbers_of_pairs_take_turns_and_gaps_lie_between_their_bounds(tmp_path: Path) -> None:
    records = [json.loads(line) for line in _written(tmp_path / "a.jsonl").splitlines()]
    assert [record["id"] for record in records[:2]] == ["mqar-1-0", "mqar-1-1"]
    gaps = []
    for number, record in enumerate(records):
        pairs = (2, 16)[number % 2]
        prompts, answers = record["prompt"], record["answer"]
        gaps.append(len(prompts[0]) - 2 - 2 * pairs)
        stated, asked = mqar.document(1, number, pairs, gaps[-1])
        assert prompts == [stated + asked[0], *asked[2::2]] and answers == list(asked[1::2])
        assert len(answers) == pairs
    assert min(gaps) < 3 and 200 < max(gaps) <= 300
    # The same documents, with keys among the answers.
    whole = [
        json.loads(line)
        for line in _written(tmp_path / "b.jsonl", "--answers", "pairs").splitlines()
    ]
    for record, one, gap in zip(records, whole, gaps, strict=True):
        pairs = len(record["answer"])
        assert (one["prompt"], one["answer"]) == mqar.document(1, int(one["id"][7:]), pairs, gap)


def test_every_mistake_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--documents", "0", "--pairs", "4,513", "--gap", "-1", "--workers", "0"]
    assert cli.main(["mqar", str(tmp_path / "a.jsonl"), *words]) == 2
    message = capsys.readouterr().err
    for part in ("--documents", "at most 512, found 513", "--gap", "--workers"):
        assert part in message
    words = ["--documents", "1", "--pairs", "4,16", "--symbols", "8"]
    assert cli.main(["mqar", str(tmp_path / "a.jsonl"), *words]) == 2
    assert "16 pairs cannot be drawn from 8 keys" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
