"""Recall against one forward over each prompt alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models

from data_prep.recall import tasks
from data_prep.recall.pair import Pair
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer.hugging_face import HuggingFace
from pretrain.evaluate import recall
from pretrain.evaluate.progress import TokenProgress
from pretrain.evaluate.questions import EvaluationError, Questions, ResultError
from pretrain.model.transformer import Transformer
from pretrain.trained import Trained
from tests.pretrain import kinds

CPU = torch.device("cpu")
ASKED = Questions(["passkey"], [400, 900], [0.0, 0.4, 1.0], samples=2, seed=3)


def _progress() -> TokenProgress:
    return TokenProgress("recall", 1, lambda line: None)


def _likeliest(model: Transformer, ids: np.ndarray, first: int) -> list[int]:
    """By one forward over the whole prompt and answer."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    with torch.inference_mode():
        logits = model(tokens, starts, model.initial_state(1, CPU)).logits
    found: list[int] = logits[0, first - 1 : -1].argmax(dim=-1).tolist()
    return found


@kinds.of_every_kind
@pytest.mark.parametrize("at_once", [1, 130, 4096])
def test_answers_are_those_of_one_forward_over_each_prompt(
    tmp_path: Path, write_run: Any, monkeypatch: pytest.MonkeyPatch, kind: str, at_once: int
) -> None:
    # Windows of one segment, of some, and of all: prompts part within them and at their edges.
    monkeypatch.setitem(recall._AT_ONCE, "cpu", at_once)
    model = write_run(tmp_path / "run", memory=kinds.memory(kind))
    draws = np.random.default_rng(1)
    stem = draws.integers(3, 320, 150)
    kept = [150, 150, 120, 64, 63, 0]
    prompts = [
        np.concatenate([stem[:same], draws.integers(3, 320, more)]).astype(np.int32)
        for same, more in zip(kept, [7, 40, 5, 80, 1, 50], strict=True)
    ]
    firsts = [
        len(prompt) - count for prompt, count in zip(prompts, [5, 33, 1, 2, 6, 49], strict=True)
    ]
    said = recall.answers(model, prompts, firsts, _progress())
    for prompt, first, tokens in zip(prompts, firsts, said, strict=True):
        assert tokens.tolist() == _likeliest(model, prompt, first)


def test_what_prompts_share_is_read_once(write_run: Any, tmp_path: Path) -> None:
    model = write_run(tmp_path / "run")
    stem = np.arange(16_000, dtype=np.int32) % 300
    prompts = [np.concatenate([stem, np.full(32, last, np.int32)]) for last in range(8)]
    windows = list(recall._shared(model, prompts))
    computed = sum((end - begin) * len(lanes) for begin, end, lanes, _ in windows)
    assert sum(end - begin for begin, end, *_ in windows) == 16_032
    assert computed < 2 * 16_032  # apart, they would be 8 times as many
    assert max((end - begin) * len(lanes) for begin, end, lanes, _ in windows) <= 2**14


def test_only_windows_with_an_answer_have_an_output_of_the_top_layer(
    write_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, computed = write_run(tmp_path / "run"), []
    monkeypatch.setitem(recall._AT_ONCE, "cpu", model.config.span)
    *_, top = model.layers.blocks()
    top.feed_forward.register_forward_pre_hook(lambda _, given: computed.append(given[0].shape[1]))
    prompt = np.arange(10 * model.config.span, dtype=np.int32) % 300
    first = len(prompt) - 3
    said = recall.answers(model, [prompt], [first], _progress())
    assert sum(computed) == model.config.span
    computed.clear()
    same = recall.answers(model, [prompt], [first], _progress(), is_partitioned=True)
    assert sum(computed) == len(prompt) and np.array_equal(said, same)


def _naive(model: Trained, asked: Questions, length: int, depth: float) -> tuple[float, float]:
    """Shares of exact answers and of right digits, question by question."""
    exact, right, digits = 0, 0, 0
    for number in range(asked.samples):
        pair = tasks.document(
            "passkey", Haystack.repeated(), model.tokenizer, length,
            seed=asked.seed, number=number, depth=depth,
        )  # fmt: skip
        prompt, answer = (model.tokenizer.encode(text) for text in pair)
        ids = np.concatenate([[1], prompt, answer])
        said = _likeliest(model.model, ids, 1 + len(prompt))
        pieces = [model.tokenizer.decode_bytes([id], inside=True).strip() for id in answer]
        exact += said == answer.tolist()
        hits = [a == b for a, b, piece in zip(said, answer, pieces, strict=True) if piece]
        right, digits = right + sum(hits), digits + len(hits)
    assert digits == 5 * asked.samples
    return exact / asked.samples, right / digits


def test_shares_are_those_of_prompts_read_alone(model: Trained) -> None:
    report = recall.evaluate(model, Haystack.repeated(), ASKED, lambda line: None)
    cells = [(row["length"], row["depth"]) for row in report["rows"]]
    assert cells == [(length, depth) for length in (400, 900) for depth in (0.0, 0.4, 1.0)]
    for row in report["rows"]:
        expected = _naive(model, ASKED, row["length"], row["depth"])
        assert (row["exact"], row["token_accuracy"]) == expected
        assert row["samples"] == 2 and row["length"] - 130 < row["tokens"] <= row["length"] + 1


def test_an_answer_is_exact_where_all_of_it_is_said(model: Trained) -> None:
    ids = np.array([9, 9, *model.tokenizer.encode(" 12345")])
    question = recall._Question(0.5, ids, 2, Pair("", " 12345"))
    answer = question.ids[2:]
    wrong = answer.copy()
    wrong[-1] += 1

    def share(said: np.ndarray) -> tuple[float, float]:
        (row,) = recall._rows(model.tokenizer, "passkey", 100, [question] * 2, [answer, said])
        return row["exact"], row["token_accuracy"]

    assert share(answer) == (1.0, 1.0)
    assert share(wrong) == (0.5, 0.9)


def test_a_run_is_asked_and_what_it_said_is_written(
    model: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recall.run(model.run_directory, "passkey", ASKED, None) == 0
    report = json.loads((model.run_directory / "passkey-7.json").read_text())
    assert report["rows"] == recall.evaluate(
        model, Haystack.repeated(), ASKED, lambda line: None
    )["rows"]  # fmt: skip
    assert (model.run_directory / "plots" / "passkey-7.png").read_bytes()[:4] == b"\x89PNG"
    reported = capsys.readouterr().out
    assert "passkey            400" in reported and "passkey-7.json" in reported


def test_needles_are_asked_for_among_the_sentences_of_books(
    model: Trained, tmp_path: Path, write_data_set: Any, tokenizer_model: Path
) -> None:
    text = "It was a dark night. Nobody spoke of the stormy weather. They waited. " * 9
    write_data_set(
        tmp_path / "books", [model.tokenizer.encode(text)], 1, 320, tokenizer=tokenizer_model
    )
    names = [name for name in tasks.TASKS if name != "words"]
    asked = Questions(names, [2500], [None], samples=1, seed=0)
    assert recall.run(model.run_directory, "needles", asked, tmp_path / "books") == 0
    report = json.loads((model.run_directory / "needles-7.json").read_text())
    assert [row["task"] for row in report["rows"]] == names
    assert [row["task"] for row in report["rows"] if "ruler" in row] == names[1:]
    assert report["filler"] == "books" and not (model.run_directory / "plots").exists()


def test_rulers_rule_has_a_column_of_its_own() -> None:
    """By hand: one of two samples exact, the other with half of its answers in what it says."""
    common = {"length": 4096, "depth": None, "samples": 2, "exact": 0.5, "token_accuracy": 0.625}
    rows = [{"task": "multivalue", **common, "ruler": 0.75}, {"task": "passkey", **common}]
    lines = recall.table({"step": 7, "memory_kind": "delta", "rows": rows}).splitlines()
    assert lines[1:] == [
        "task            tokens        drawn RULER's rule",
        "multivalue       4,096    50 /   62           75",
        "passkey          4,096    50 /   62",
    ]


def test_rulers_shares_are_averaged_over_the_samples_of_a_depth(model: Trained) -> None:
    pair = Pair("Once, there was a man", " 12345")
    ids = np.array([1, *model.tokenizer.encode(pair.prompt), *model.tokenizer.encode(pair.answer)])
    first = 1 + len(model.tokenizer.encode(pair.prompt))
    questions = [recall._Question(depth, ids, first, pair) for depth in (0.1, 0.1, 0.9)]
    exact, wrong = ids[first:], ids[first:] + 1
    shares = recall._by_ruler(model, "qa1", questions, [exact, wrong, exact], lambda line: None)
    assert shares == {0.1: 0.5, 0.9: 1.0}


def without_digits(path: Path, unknown: str | None) -> HuggingFace:
    """A token for each letter; other characters are `unknown`, each, or left out."""
    letters = "abcdefghijklmnopqrstuvwxyz "
    vocabulary = {text: id for id, text in enumerate(["<unk>", *letters])}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    model.decoder = decoders.Fuse()
    model.save(str(path))
    return HuggingFace(path, path.read_bytes())


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_an_answer_without_tokens_is_not_asked_for(tmp_path: Path, unknown: str | None) -> None:
    # Each of its digits is the same unknown token, so that 54321 would be as right.
    own = without_digits(tmp_path / "tokenizer.json", unknown)
    with pytest.raises(EvaluationError, match="has no tokens for the answer '12345', so that any"):
        recall.laid_out(own, Pair("the pass key is", " 12345"))
    _, first = recall.laid_out(own, Pair("the pass key is", " known"))
    assert first == len("the pass key is")


def test_a_length_without_room_for_the_task_is_refused(model: Trained) -> None:
    asked = Questions(["passkey"], [20], [0.5], samples=1, seed=0)
    with pytest.raises(EvaluationError, match=r"20 tokens are fewer than .* at least \d+"):
        recall.evaluate(model, Haystack.repeated(), asked, lambda line: None)


def test_all_lengths_without_room_are_named_before_any_question_is_asked(model: Trained) -> None:
    model.model.embedding.weight.fill_(float("nan"))  # an answer would raise another error
    asked = Questions(["passkey", "single"], [2500, 20, 30], [None], samples=1, seed=0)
    with pytest.raises(EvaluationError) as caught:
        recall.evaluate(model, Haystack.repeated(), asked, lambda line: None)
    found = str(caught.value).split("; --lengths: ")
    assert [" ".join(one.split()[:6]) for one in found] == [
        "--lengths: 20 tokens are fewer than", "30 tokens are fewer than passkey",
        "20 tokens are fewer than single", "30 tokens are fewer than single",
    ]  # fmt: skip


def test_logits_that_are_not_finite_are_no_answer(model: Trained) -> None:
    model.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(ResultError, match="not finite"):
        recall.answers(model.model, [np.array([1, 2, 3])], [2], _progress())
