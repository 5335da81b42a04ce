"""A tokenizer is trained on every line of its texts, and reproducibly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_prep import config
from data_prep.tokenizer import tokenizer, training
from data_prep.tokenizer.contract import Tokenizer, TokenizerError
from tests.data_prep.tokenizer.texts import SIZE, TEXT

SOURCES = "sources=[{name: s, paths: ['*']}]"


def test_training_is_reproducible(trained: Tokenizer, tmp_path: Path) -> None:
    training.train([TEXT], tmp_path / "again.model", SIZE)
    assert (tmp_path / "again.model").read_bytes() == trained.path.read_bytes()


def test_long_lines_are_trained_on(tmp_path: Path) -> None:
    # SentencePiece skips sentences over its limit: a corpus of one line would teach nothing.
    training.train([TEXT.replace("\n", " ")], tmp_path / "m.model", SIZE)
    model = tokenizer.load(tmp_path / "m.model")
    assert len(model.encode(TEXT)) < len(TEXT) / 2


def test_lines_with_the_sign_for_the_unknown_are_trained_on(tmp_path: Path) -> None:
    training.train([TEXT.replace("\n", "\u2585\n")], tmp_path / "m.model", SIZE)
    assert len(tokenizer.load(tmp_path / "m.model").encode(TEXT)) < len(TEXT) / 2


@pytest.mark.parametrize("text", ["a", " " * 99, "hello world " * 50, "\u65e5\u672c\u8a9e" * 300])
def test_the_sizes_that_a_refusal_names_can_be_set_and_trained(text: str, tmp_path: Path) -> None:
    for wanted in (261, 2000):
        try:
            training.train([text], tmp_path / "m.model", wanted)
        except TokenizerError as error:
            (named,) = map(int, re.findall(r"(?:at most|at least) (\d+)", str(error)))
            config.load(None, [f"tokenizer.vocab_size={named}", "output=a", SOURCES])
            training.train([text], tmp_path / "m.model", named)
            assert tokenizer.load(tmp_path / "m.model").vocab_size == named


@pytest.mark.parametrize(
    ("texts", "size", "words"),
    [
        (["a b c"], 2000, "2000 does not fit the training text; the text allows at most 26"),
        ([TEXT], 260, "bytes and characters alone need at least"),
        ([], SIZE, "no text to train on"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_reported(
    texts: list[str], size: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=words):
        training.train(texts, tmp_path / "m.model", size)
    assert list(tmp_path.iterdir()) == []
