"""Each task's answer, found once more in its prompt by a reader of the prompt alone."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset.settings import MistakeError
from data_prep.recall import tasks
from data_prep.recall.draws import Draws
from data_prep.recall.pair import Pair
from data_prep.recall.passkey import FILLER
from data_prep.recall.stories import World
from data_prep.recall.tasks import TASKS, Haystack
from data_prep.tokenizer import tokenizer, training


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model of the passkey's words and bytes."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    training.train([FILLER * 9], path, 320)
    return path


NOVEL = [f"The {word} sentence of a book stood here." for word in ("first", "second", "third")] * 9


def pairs(task: str, count: int = 40) -> list[Pair]:
    return [TASKS[task](Draws(5, task, str(number)), NOVEL, None) for number in range(count)]


def test_a_passkey_prompt_is_worded_as_in_the_paper() -> None:
    pair = TASKS["passkey"](Draws(1), [FILLER] * 4, 0.5)
    key = pair.answer.strip()
    assert re.fullmatch(r" [1-9]\d{4}", pair.answer)
    assert pair.prompt == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n"
        f"{FILLER} {FILLER} The pass key is {key}. Remember it. {key} is the pass key. "
        f"{FILLER} {FILLER}\n"
        "What is the pass key? The pass key is"
    )


def test_a_depth_moves_the_key_and_changes_nothing_else() -> None:
    made = [TASKS["passkey"](Draws(3), [FILLER] * 8, depth) for depth in (0.0, 0.5, 1.0)]
    assert len({pair.answer for pair in made}) == 1
    assert len({pair.prompt.replace(f"{FILLER} ", "") for pair in made}) > 1
    places = [pair.prompt.index("The pass key is") for pair in made]
    assert places == sorted(places) and len(set(places)) == 3


NEEDLE = re.compile(r"special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


@pytest.mark.parametrize(
    "task, keys, needles, answers",
    [("single", 1, 1, 1), ("multikey", 4, 4, 1), ("multivalue", 1, 4, 4), ("multiquery", 4, 4, 4)],
)
def test_needles_are_hidden_and_asked_for(task: str, keys: int, needles: int, answers: int) -> None:
    for prompt, answer in pairs(task):
        found = NEEDLE.findall(prompt)
        assert len(found) == needles and len({key for key, _ in found}) == keys
        question = prompt.rpartition("\n")[2]
        asked = [(place, value) for place, (key, value) in enumerate(found) if key in question]
        assert answer == " " + ", ".join(value for _, value in asked)
        assert len(asked) == answers


def test_variables_are_those_that_a_chain_gives_the_value() -> None:
    for prompt, answer in pairs("variables"):
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", prompt):
            values[name] = values.get(source, source)
        asked = re.search(r"assigned the value (\d{5}) in the text", prompt)
        assert asked is not None and len(values) == 5
        assert answer.split() == [name for name, value in values.items() if value == asked[1]]


def test_common_words_are_the_ten_most_frequent() -> None:
    for prompt, answer in pairs("words", 5):
        words = Counter(re.findall(r"\d+\. (\w+)", prompt))
        assert {word for word, _ in words.most_common(10)} == set(answer.strip().split(", "))
        assert sorted(words.values())[-10:] == [30] * 10
        assert set(words.values()) == {3, 30}


GO = re.compile(r"(\w+) (?:moved to|went to|travelled to|journeyed to|went back to) the (\w+)\.")
TAKE = re.compile(r"(\w+) (?:grabbed|got|picked up|took) the (\w+) there\.")
DROP = re.compile(r"(\w+) (?:discarded|dropped|left|put down) the (\w+) there\.")


def _replayed(prompt: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Where persons are, and all places that each thing was at, from the facts alone."""
    where: dict[str, str] = {}
    held: dict[str, str] = {}
    paths: dict[str, list[str]] = {}
    for sentence in re.findall(r"(?:Mary|John|Daniel|Sandra)[^.]*\.", prompt):
        if match := GO.fullmatch(sentence):
            where[match[1]] = match[2]
            moved = [thing for thing, person in held.items() if person == match[1]]
        elif match := TAKE.fullmatch(sentence):
            assert match[2] not in held
            held[match[2]] = match[1]
            moved = [match[2]]
        else:
            match = DROP.fullmatch(sentence)
            assert match and held.pop(match[2]) == match[1], sentence
            moved = []
        for thing in moved:
            path = paths.setdefault(thing, [])
            place = where[held[thing]]
            path += [] if path[-1:] == [place] else [place]
    return where, paths


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_a_story_holds_what_is_asked_of_it(task: str) -> None:
    for prompt, answer in pairs(task, 100):
        where, paths = _replayed(prompt)
        *_, question, last = prompt.split("\n")
        assert last == "Answer:"
        words = question.rstrip("?").split()
        if task == "qa1":
            assert answer == f" {where[words[-1]]}"
        elif task == "qa2":
            assert answer == f" {paths[words[-1]][-1]}"
        else:
            assert [answer.strip(), words[-1]] == paths[words[4]][-2:]


def test_a_world_by_hand() -> None:
    world = World()
    world.go("Mary", "went to", "kitchen")
    world.take("Mary", "took", "milk")
    world.go("Mary", "went to", "office")
    world.drop("Mary", "dropped", "milk")
    world.go("Mary", "went to", "garden")
    assert world.where == {"Mary": "garden"} and world.paths == {"milk": ["kitchen", "office"]}
    assert world.takeable("Mary") == ["apple", "football"] and world.takeable("John") == []
    assert world.facts[1] == "Mary took the milk there."


def document(task: str, haystack: Haystack, path: Path, length: int, number: int = 0) -> Pair:
    made = tasks.document(task, haystack, tokenizer.load(path), length, seed=7, number=number)
    return made


@pytest.mark.parametrize("task", list(TASKS))
def test_a_document_has_the_tokens_asked_for_and_is_a_function_of_its_number(
    tokenizer_model: Path, task: str
) -> None:
    model = tokenizer.load(tokenizer_model)
    haystack = Haystack(NOVEL) if task != "passkey" else Haystack.repeated()
    for length in (4000, 9000):
        made = document(task, haystack, tokenizer_model, length, 3)
        # The words' list grows with the different words of the filler alone, which are few here.
        least = 0 if task == "words" else length - 120
        assert least < len(model.encode(made.prompt)) <= length
        assert made == document(task, haystack, tokenizer_model, length, 3)
        assert made != document(task, haystack, tokenizer_model, length, 4)


def test_lengths_lie_between_their_bounds_and_follow_the_seed() -> None:
    drawn = [tasks.length(1, "passkey", number, 128, 8192) for number in range(2000)]
    assert 128 <= min(drawn) < 140 and 7700 < max(drawn) <= 8192
    assert drawn[7] == tasks.length(1, "passkey", 7, 128, 8192)
    assert drawn[7] != tasks.length(2, "passkey", 7, 128, 8192)
    # Of a uniform logarithm half lie below the bounds' geometric mean.
    assert abs(sum(length < 1024 for length in drawn) / 2000 - 0.5) < 0.05


def test_sentences_are_taken_from_the_books_of_a_data_set(
    tmp_path: Path, write_data_set: Any, tokenizer_model: Path
) -> None:
    model = tokenizer.load(tokenizer_model)

    def write(name: str, texts: Sequence[str]) -> None:
        tokens = [model.encode(text) for text in texts]
        write_data_set(tmp_path / name, tokens, 1, model.vocab_size, tokenizer=tokenizer_model)

    write("data", ["One day,\nit rained. “Why?” she  asked. No end", "Two."])
    pieces = Haystack.of_books(tmp_path / "data").drawn(Draws(1))(8)
    assert set(pieces) == {"One day, it rained.", "“Why?”", "she asked.", "Two."}
    assert pieces[:4] == pieces[4:]
    write("none", ["no end"])
    # It stays so however often it is tried again.
    with pytest.raises(MistakeError, match="no sentence, one that ends in a full stop"):
        Haystack.of_books(tmp_path / "none")


def test_sentences_are_those_of_a_search_from_every_place() -> None:
    """Results refer to their bytes."""
    naive, draws = re.compile(r"[^.!?]+[.!?]+[^\s\w]*\s*"), random.Random(2)
    for _ in range(20_000):
        text = "".join(draws.choices(["a", "b c", *'.!?.!?”"“, \n', "é", "字", "「"], k=12))
        assert list(tasks.sentences(text)) == naive.findall(text), ascii(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("他走了。“你好\uff01”她说。完", ["他走了。", "“你好\uff01”", "她说。"]),
        (
            "「はい。」 「なぜ\uff1f\uff01」と聞いた。",
            ["「はい。」 ", "「なぜ\uff1f\uff01」", "と聞いた。"],
        ),
        ("वह गया। कौन? कोई नहीं।", ["वह गया। ", "कौन? ", "कोई नहीं।"]),
        ("。。好。Yes. 完\uff01", ["好。", "Yes. ", "完\uff01"]),
    ],
)
def test_sentences_end_with_the_marks_of_their_language(text: str, found: list[str]) -> None:
    assert list(tasks.sentences(text)) == found


@pytest.mark.parametrize(
    ("repeated", "marks"), [("字", 0), ("a ", 0), ("a“", 0), (".", 0), ("a.", 1), ("字。”", 1)]
)
def test_sentences_of_a_long_text_are_found_in_linear_time(repeated: str, marks: int) -> None:
    """A search from every place takes hours for texts without marks; this takes a second."""
    count = 500_000 if marks else 2_000_000
    assert sum(1 for _ in tasks.sentences(repeated * count)) == marks * count


def test_draws_are_fixed_for_good() -> None:
    draws = Draws(3, "a", "b")
    found = [draws.below(1000), draws.number(5), draws.sample("abcdef", 4), draws.pick("xyz")]
    assert found == [394, "96131", ["f", "a", "d", "b"], "x"]
    assert Draws(3, "a", "c").below(1 << 40) != Draws(3, "a", "b").below(1 << 40)


def test_documents_are_fixed_for_good() -> None:
    """Results refer to their bytes."""
    haystacks = [Haystack.repeated(), Haystack(NOVEL)]
    made = [
        tasks.document(task, haystack, None, 4000, seed=5, number=number, depth=depth)
        for task in TASKS
        for number, depth in ((0, None), (1, 0.0), (2, 0.5))
        for haystack in haystacks
    ]
    hashed = hashlib.sha256(json.dumps(made).encode()).hexdigest()
    assert hashed == "44051fd4e1d38f5ecb39778a19c92adeee388e149ae4802b5a84eeeef808e326"


def test_the_least_of_all_is_that_of_the_longest_prompt(tokenizer_model: Path) -> None:
    own = tokenizer.load(tokenizer_model)
    lengths = [
        len(own.encode(TASKS["qa1"](Draws(2, "task", "qa1", str(number)), [], None).prompt))
        for number in range(8)
    ]
    assert len(set(lengths)) > 1
    found = [tasks.least_of_all("qa1", own, seed=2, samples=n, depths=[None]) for n in (1, 8)]
    assert found == [lengths[0], max(lengths)]
