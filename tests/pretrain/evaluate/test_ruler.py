"""RULER's rule against values by hand, and against greedy continuations by whole forwards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.recall.pair import Pair
from data_prep.recall.tasks import PASSKEY, TASKS
from pretrain import trained
from pretrain.evaluate import ruler
from pretrain.trained import Trained

PROMPT = "It is a truth universally acknowledged, that a single man is in want of"


@pytest.fixture
def model(tmp_path: Path, write_run: Any) -> Trained:
    """A run with random weights whose continuations do not repeat one word."""
    write_run(tmp_path / "run", steps=(2,), tied_embeddings=False)
    return trained.load(tmp_path / "run", torch.device("cpu"))


def _greedy(model: Trained, prompt: str, count: int) -> str:
    ids = [1, *model.tokenizer.encode(prompt).tolist()]
    first = len(ids)
    for _ in range(count):
        tokens = torch.tensor([ids])
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[:, 0] = True
        with torch.inference_mode():
            logits = model.model(tokens, starts, model.model.initial_state(1, "cpu")).logits
        ids.append(int(logits[0, -1].argmax()))
    return model.tokenizer.decode_bytes(ids[first:], inside=True).decode(errors="replace")


def _share(model: Trained, task: str, answer: str) -> float:
    return ruler.share(model, task, Pair(PROMPT, answer), False, lambda line: None)


@pytest.mark.parametrize(
    "text, share",
    [
        (" 1234567, 7654321", 1.0),
        (" 7654321 and then 1234567.", 1.0),  # in any order, among other words
        (" 91234567, 765 4321", 0.5),  # inside a longer number too; not with a gap
        (" 123456", 0.0),
        ("", 0.0),
    ],
)
def test_the_share_is_that_of_the_answers_that_stand_in_the_text(text: str, share: float) -> None:
    assert ruler.match(text, Pair("", " 1234567, 7654321").answers) == share


def test_case_does_not_count() -> None:
    assert ruler.match("In The KITCHEN, and abcde", ["kitchen", "ABCDE", "x"]) == pytest.approx(
        2 / 3
    )


def test_answers_are_the_single_numbers_and_words() -> None:
    assert Pair("", " 1234567, 7654321").answers == ["1234567", "7654321"]
    assert Pair("", " ABCDE FGHIJ").answers == ["ABCDE", "FGHIJ"]
    assert Pair("", " kitchen").answers == ["kitchen"]


def test_every_task_of_rulers_has_its_tokens_and_the_passkey_has_none() -> None:
    assert set(ruler.TOKENS) == set(TASKS) - {PASSKEY}
    assert ruler.TOKENS["multikey"] == 128 and ruler.TOKENS["variables"] == 30


def test_answers_are_looked_for_in_the_greedy_continuation(model: Trained) -> None:
    words = re.findall("[a-z]{2,}", _greedy(model, PROMPT, 32))
    assert len(words) > 1
    said, missing = words[-1], "0987654321"
    assert _share(model, "qa1", f" {said}") == 1.0
    assert _share(model, "qa1", f" {missing}, {said.upper()}") == 0.5
    assert _share(model, "qa1", f" {missing}") == 0.0


def test_as_many_tokens_are_generated_as_ruler_does_or_the_answer_may_need(model: Trained) -> None:
    near, far = _greedy(model, PROMPT, 32), _greedy(model, PROMPT, 60)
    found = [match[0] for match in re.finditer("[a-z]{2,}", far) if match[0] not in near]
    assert found, "the continuation has a word that only comes later"
    assert _share(model, "qa1", f" {found[-1]}") == 0.0
    # 30 tokens, whose twice is 60.
    letters = " zqzqzqzqzqzqzqzqzqzqzqzqzqzqzqzq"
    while len(model.tokenizer.encode(f"{letters} {found[-1]}")) < 30:
        letters += "q"
    assert _share(model, "qa1", f"{letters} {found[-1]}") == 0.5


def test_an_exact_answer_is_not_generated(model: Trained) -> None:
    model.model.embedding.weight.fill_(float("nan"))
    assert ruler.share(model, "single", Pair(PROMPT, " 1234567"), True, lambda line: None) == 1.0
