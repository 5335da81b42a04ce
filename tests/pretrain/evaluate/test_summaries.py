"""Streamed summaries against prompts read at once, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.dataset.shards import Document
from data_prep.recall import mqar
from pretrain import trained
from pretrain.cli import main
from pretrain.data.lanes import Dataset, Lane, Mix
from pretrain.evaluate import generate, rouge, summaries
from pretrain.evaluate.pairs import Pair
from pretrain.evaluate.progress import TokenProgress
from pretrain.evaluate.questions import ResultError, Sampling
from pretrain.trained import Trained
from tests.pretrain import kinds

CPU = torch.device("cpu")
DOCUMENTS = [
    "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 9,
    "However little known “the feelings” of such a man may be. ",
    "On his first entering a neighbourhood, naïve or not, in want of a wife! " * 4,
]
PAIRS = [Pair(str(number), text, " a man must be in want") for number, text in enumerate(DOCUMENTS)]
QUESTION = "\n\nSummary:\n"
SHARES, SAMPLING = [1.0, 0.05, 0.5], Sampling(25, 0.5, 0.95, seed=4)


def _answers(
    model: Trained,
    shares: Sequence[float] = SHARES,
    sampling: Sampling = SAMPLING,
    question: str = QUESTION,
    pairs: Sequence[Pair] = PAIRS,
) -> list[summaries.Answer]:
    return list(summaries.answers(model, pairs, question, shares, sampling, lambda line: None))


@pytest.mark.parametrize(
    ("kind", "question"), [("delta", ""), *((kind, QUESTION) for kind in kinds.KINDS)]
)
def test_answers_are_those_of_prompts_read_at_once(
    tmp_path: Path, write_run: Any, kind: str, question: str
) -> None:
    write_run(tmp_path / "run", memory=kinds.memory(kind))
    model = trained.load(tmp_path / "run", CPU)
    parts = [ids for _, ids in model.tokenizer.encode_parts([question], inside=True)]
    asking = [int(token) for ids in parts for token in ids]
    found = iter(_answers(model, question=question))
    for place, text in enumerate(DOCUMENTS):
        ids = model.tokenizer.encode(text)
        seed = int(np.random.SeedSequence([4, place]).generate_state(1)[0])
        for share in (0.05, 0.5, 1.0):
            one = next(found)
            read = max(1, round(share * len(ids)))
            assert (one.id, one.share, one.read) == (str(place), share, read)
            logits, stream = generate.prefill(model, [*ids[:read], *asking], print)
            sampling = Sampling(25, 0.5, 0.95, seed)
            tokens = list(generate.sampled(model, logits, stream, sampling))
            assert one.generated == len(tokens) and one.ended == (len(tokens) < 25)
            assert one.text == model.tokenizer.decode_bytes(tokens, inside=True).decode(
                errors="replace"
            )
    assert next(found, None) is None


def test_a_share_is_of_the_documents_tokens() -> None:
    assert [summaries.cut(1000, share) for share in (0.1, 0.25, 0.5, 1)] == [100, 250, 500, 1000]
    assert summaries.cut(3, 0.1) == 1  # there is always something to read


def test_a_pairs_answer_depends_on_the_seed_and_its_place_alone(model: Trained) -> None:
    at_once = {(one.id, one.share): one for one in _answers(model)}
    whole = _answers(model, [1.0])
    assert all(at_once[one.id, 1.0] == one for one in whole)
    (first,) = _answers(model, [1.0], pairs=PAIRS[:1])
    assert first == at_once["0", 1.0]
    other = _answers(model, [1.0], replace(SAMPLING, seed=5))
    assert [one.text for one in other] != [one.text for one in whole]


def test_the_loss_is_that_of_the_answer_as_evaluation_asks_for_it(
    model: Trained, tmp_path: Path, write_data_set: Any, tokenizer_model: Path
) -> None:
    """Window by window as in training: on the answer and its EOS alone, after all of the prompt."""
    document = model.tokenizer.encode(DOCUMENTS[0])
    asking, answer = (
        np.concatenate([ids for _, ids in model.tokenizer.encode_parts([text], inside=True)])
        for text in (QUESTION, PAIRS[0].answer)
    )
    tokens = np.concatenate([document, asking, answer])
    stored = Document("pair", "test", 1, tokens, turns=(len(document) + len(asking),))
    data = write_data_set(tmp_path / "data", [stored], 1, 320, tokenizer=tokenizer_model)
    assert data.prompt_tokens == stored.turns[0] > 4 * 64
    lane = Lane(Mix([Dataset(tmp_path / "data")], prompt_weight=0.0), 0, 1, seed=1)
    state, total, weight = model.model.initial_state(1, CPU), 0.0, 0.0
    with torch.inference_mode():
        for length in [64] * (len(tokens) // 64) + [len(tokens) % 64 + 2]:
            window = [torch.from_numpy(part)[None] for part in lane.window(length)]
            ids, targets, starts, weights = window
            output = model.model(ids, starts, state, targets, weights=weights)
            state, total = output.state, total + float(output.loss)
            weight += float(weights.sum())
    heads = summaries._heads(
        model, document, QUESTION, [len(document)], TokenProgress("test", 1, lambda line: None)
    )
    ((logits, stream),) = heads
    expected = 0.0
    for token in [*answer, 2]:
        expected -= float(logits.log_softmax(dim=0)[token])
        after, stream = model.model.extend(torch.tensor([[token]]), stream)
        logits = after[0, -1]
    assert weight == len(answer) + 1
    assert total == pytest.approx(expected, rel=1e-5)


def _evaluate(model: Trained, pairs: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main.main(["eval", "summaries", str(model.run_directory), str(pairs), *words])
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    records = [{"id": one.id, "prompt": one.document, "answer": one.answer} for one in PAIRS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_run_is_evaluated_and_what_it_said_is_written(
    model: Trained, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--question", QUESTION, "--shares", "1,0.05,0.5", "--max-tokens", "25", "--seed", "4"]
    assert _evaluate(model, pairs, *words) == 0
    reported = capsys.readouterr().out
    directory = model.run_directory
    written = [directory / f"summaries-7-pairs.{end}" for end in ("json", "jsonl")]
    report, kept = json.loads(written[0].read_text()), written[1].read_text().splitlines()
    said = _answers(model)
    for line, one in zip(map(json.loads, kept), said, strict=True):
        (score,) = rouge.scores([PAIRS[int(one.id)].answer], [one.text])
        assert {key: line[key] for key in ("id", "share", "text", "ended")} == {
            "id": one.id, "share": one.share, "text": one.text, "ended": one.ended
        }  # fmt: skip
        assert [line[kind] for kind in rouge.KINDS] == score.tolist()
    assert [row["share"] for row in report["rows"]] == [0.05, 0.5, 1.0]
    whole = [one.text for one in said if one.share == 1]
    expected = rouge.means(rouge.scores([pair.answer for pair in PAIRS], whole))
    assert report["rows"][2]["rouge"] == expected
    assert f"{expected['rouge1']['value']:.1f} (" in reported
    # The first six words of each document, as many as the answers have.
    beginnings = [" ".join(text.split()[:6]) for text in DOCUMENTS]
    scores = rouge.scores([pair.answer for pair in PAIRS], beginnings)
    assert report["lead"] == {"words": 6, "rouge": rouge.means(scores)}
    assert (directory / "plots" / "summaries-7-pairs.png").read_bytes()[:4] == b"\x89PNG"
    # The same seed, the same answers.
    assert _evaluate(model, pairs, *words) == 0
    assert written[1].read_text().splitlines() == kept
    assert {**json.loads(written[0].read_text()), "written": report["written"]} == report


def test_table_and_plot_say_which_weights_answered(
    tmp_path: Path, write_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", averaged=True)
    summaries.run(tmp_path / "run", "one", PAIRS[1:2], "", [0.5, 1.0], Sampling(2, 0), "ema")
    assert "step 7 (weights ema), memory delta, 1 pair of one" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/summaries-7-one.json").read_text())
    (axes,) = summaries.plot(found).axes
    assert axes.get_title("left") == "1 pair of one, step 7 (weights ema), memory delta"


def test_the_first_documents_are_evaluated_under_a_name(model: Trained, pairs: Path) -> None:
    words = ["--question", "", "--documents", "2", "--name", "few", "--max-tokens", "3"]
    assert _evaluate(model, pairs, *words) == 0
    report = json.loads((model.run_directory / "summaries-7-few.json").read_text())
    assert report["documents"] == 2 and report["question"] == ""
    assert not (model.run_directory / "plots").exists()


def test_pairs_of_one_book_have_references_of_their_own(model: Trained) -> None:
    twice = [Pair("book", DOCUMENTS[1], "one thing"), Pair("book", DOCUMENTS[1], "another")]
    said = _answers(model, [0.5, 1.0], Sampling(3, 0.0), pairs=twice)
    kept = [json.loads(line) for line in summaries.lines(twice, said).splitlines()]
    assert [line["answer"] for line in kept] == ["one thing"] * 2 + ["another"] * 2


def test_documents_and_questions_that_the_tokenizer_changes_are_told(
    tmp_path: Path, write_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(mqar.tokenizer_json())  # without capitals
    write_run(tmp_path / "other", tokenizer=tmp_path / "tokenizer.json")
    pairs = [Pair(str(number), text, " so") for number, text in enumerate(["a b", "a B", "C"])]
    summaries.run(tmp_path / "other", "x", pairs, QUESTION, [1.0], Sampling(1, 0.0))
    said = capsys.readouterr().err
    assert "give 2 documents back, and the model reads what comes of them: in 1: 'B' beco" in said
    assert "give the question back, and the model reads it so: 'Summary:' becomes 'ummary" in said
    summaries.run(tmp_path / "other", "x", pairs[:1], "\n", [1.0], Sampling(1, 0.0))
    assert "the tokenizer does not" not in capsys.readouterr().err


def test_every_mistake_is_in_one_message(
    model: Trained, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pairs.open("a") as file:
        file.write('{"prompt": "no answer"}\n{"prompt": ["a", "b"], "answer": ["c", "d"]}\n')
    words = ["--shares", "0,2", "--top-p", "0", "--documents", "0"]
    assert _evaluate(model, pairs, *words) == 2
    reported = capsys.readouterr().err
    for part in ("found 0\n", "found 2\n", "--top-p", "--documents", "--question: not"):
        assert part in reported
    assert "pairs.jsonl: line 4: has no text under 'answer'" in reported
    assert "line 5: has a list under 'prompt'; expected a document and its one answer" in reported
    assert not list(model.run_directory.glob("summaries-*"))


def test_logits_that_are_not_finite_are_no_answer(model: Trained) -> None:
    model.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(ResultError, match="not finite"):
        _answers(model)
