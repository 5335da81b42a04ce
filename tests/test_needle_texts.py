"""Texts of the needles recipe: every question has its fact, and the last wording is the task's."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import needle_texts
import pytest
from needle_texts import KEYS, PAIRS, SHORT, WHOLE, Facts, Wording
from sentencepiece import SentencePieceProcessor

from data_prep.recall.draws import Draws
from data_prep.recall.needles import ADJECTIVES, NOUNS
from data_prep.recall.tasks import TASKS, Haystack
from tools.recipes import needles

BOOKS = Haystack([f"Sentence {number} of a book is here." for number in range(40)])
SETS = [
    one
    for stage in needles.STAGES
    for one, _ in stage.shares
    if isinstance(one, Facts)
]  # fmt: skip


def document(facts: Facts, number: int) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(facts.line(BOOKS, number))
    return read


def test_pairs_of_words_and_numbers_are_asked_for_in_another_order() -> None:
    facts = Facts("f", (PAIRS,), (3,), 0, keys=8, groups=32, digits=(3,))
    prompts, answers = (document(facts, 5)[key] for key in ("prompt", "answer"))
    stated = re.findall(r"(-[a-z]+)( \d{3})", prompts[0])
    assert len(stated) == 3 and len({key for key, _ in stated}) == 3
    assert (
        prompts[0]
        == "".join(itertools.chain(*stated))
        + prompts[0].rpartition("-")[1]
        + (prompts[0].rpartition("-")[2])
    )
    asked = ["-" + prompts[0].rpartition("-")[2], *prompts[1:]]
    assert dict(zip(asked, answers, strict=True)) == dict(stated)
    assert {key[1:] for key, _ in stated} <= set(NOUNS[:8])
    assert all(int(number) < 32 for _, number in stated)
    # With keys in the loss, the questions are one answer.
    whole = document(replace(facts, answers="pairs"), 5)
    assert whole["prompt"] == "".join(itertools.chain(*stated))
    assert whole["answer"] == "".join(map("".join, zip(asked, answers, strict=True)))


@pytest.mark.parametrize("facts", SETS, ids=lambda facts: facts.name)
def test_of_every_set_each_answer_is_the_number_of_the_key_that_is_asked_for(
    facts: Facts,
) -> None:
    for number in range(24):
        made = document(facts, number)
        if facts.answers == "pairs":
            made = document(replace(facts, answers="values"), number)
        text = made["prompt"][0]
        for prompt, answer in zip(made["prompt"], made["answer"], strict=True):
            key = re.findall(r"-[a-z]+", prompt)[-1]
            (stated,) = re.findall(rf"{key}(?: is)?:? (\d+)", text)
            assert answer == f" {stated}" and len(stated) in facts.digits


def test_the_last_wording_is_that_of_the_task() -> None:
    pair = TASKS["multikey"](Draws(3, "x"), [], None)
    stated = re.findall(r"One of .*? for (\S+) is: (\d+)\.", pair.prompt)
    assert len(stated) == 4
    draws = Draws(1)
    for key, number in stated:
        assert WHOLE.fact(draws, f" {key}", number).strip() in pair.prompt
    asked = pair.prompt.rpartition(" for ")[2].split()[0]
    assert pair.prompt.endswith(WHOLE.question(draws, f" {asked}").strip())
    assert pair.answer == f" {dict(stated)[asked]}"


def test_words_are_cut_after_as_many_as_are_drawn() -> None:
    draws, wording = Draws(1), Wording((" is", ":"), (" a", " b"), cut=True, end=".")
    facts = {wording.fact(draws, "-lamp", "123") for _ in range(60)}
    assert facts == {"-lamp 123.", "-lamp is 123.", "-lamp is: 123."}
    assert {wording.question(draws, "-lamp") for _ in range(60)} == {
        "-lamp",
        "-lamp a",
        "-lamp a b",
    }
    assert KEYS.adjective and not PAIRS.adjective
    assert SHORT.question(draws, " old-lamp") == (
        " number for old-lamp mentioned in the provided text is"
    )


def test_facts_are_scattered_over_the_text_or_come_before_it() -> None:
    facts = Facts("f", (SHORT,), (4,), 3000)
    text = "Sentence 1"
    for number in range(8):
        first, scattered = (
            document(one, number)["prompt"][0] for one in (facts, replace(facts, scattered=True))
        )
        last = first.rindex("is: ")
        assert "Sentence" not in first[:last]
        assert re.sub(r"\W| for \w+-\w+ is: \d+", "", scattered) != ""
    long = [document(replace(facts, scattered=True), number)["prompt"][0] for number in range(24)]
    between = [one[one.index("is: ") : one.rindex("is: ")] for one in long]
    assert sum(text[:8] in one for one in between) >= 12


def test_a_document_depends_on_its_set_and_number_alone() -> None:
    assert SETS[3].line(BOOKS, 7) == SETS[3].line(BOOKS, 7)
    assert SETS[3].line(BOOKS, 7) != SETS[3].line(BOOKS, 8)


def test_numbers_are_three_pieces_and_a_key_ends_in_one_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    lines = [
        f"The {one} stood by the {other}, and it was late." for one in NOUNS for other in NOUNS
    ]
    needle_texts.train_tokenizer(path, iter(lines), 290)
    model = SentencePieceProcessor(model_file=str(path))
    fact = " One of the special magic numbers for old-lamp is: 0071234."
    pieces = [piece.replace("\u2581", "_") for piece in model.encode(fact, out_type=str)]
    assert pieces[-8:] == ["_old", "-lamp", "_is", ":", "_007", "12", "34", "."]
    assert model.decode(model.encode(fact)) == fact
    for adjective, noun in zip(ADJECTIVES, NOUNS, strict=False):
        assert len(model.encode(f" {adjective}-{noun} 123")) == 3


@pytest.mark.parametrize("facts", SETS, ids=lambda facts: facts.name)
def test_the_mean_of_a_set_is_that_of_its_documents_within_a_third(
    facts: Facts, tmp_path: Path
) -> None:
    # Pieces are counted by eye: a word, a mark, and a number as `own_pieces` cuts it; text of the
    # book by its bytes.
    tokens = []
    for number in range(60):
        made = document(facts, number)
        parts = [_listed(made["prompt"]), _listed(made["answer"])]
        text = "".join(itertools.chain(*zip(*parts, strict=True)))
        book = sum(map(len, re.findall(r"Sentence[^.]*\.?", text)))
        rest = re.sub(r"Sentence[^.]*\.?", "", text)
        numbers = [1 + (len(one) - 3) // 2 for one in re.findall(r" \d+", rest)]
        words = re.findall(r"-?[a-z]+|[:.,?]", re.sub(r" \d+", "", rest).lower())
        tokens.append(len(words) + sum(numbers) + book / 2.4)
    assert facts.mean == pytest.approx(sum(tokens) / len(tokens), rel=0.33)


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
