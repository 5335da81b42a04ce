"""Associative recall of a model against one forward over each prompt alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.recall import mqar
from pretrain import trained
from pretrain.cli import main as cli
from pretrain.evaluate import mqar as capacity
from pretrain.evaluate.questions import Associations, EvaluationError
from pretrain.trained import Trained
from tests.pretrain import kinds
from tests.pretrain.evaluate.test_recall import without_digits

ASKED = Associations([80, 512], [0, 3], answers=1200, seed=3)


@pytest.fixture(scope="session")
def symbols(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the symbols."""
    path = tmp_path_factory.mktemp("symbols") / "tokenizer.json"
    path.write_bytes(mqar.tokenizer_json())
    return path


@pytest.fixture
def model(tmp_path: Path, write_run: Any, symbols: Path) -> Trained:
    """A run with delta memory, segments of 16 tokens and random weights, which says values alone:
    one of 512 is right now and then."""
    write_run(tmp_path / "run", tokenizer=symbols, tied_embeddings=False)
    loaded = trained.load(tmp_path / "run", torch.device("cpu"))
    loaded.model.lm_head.weight[:-512] = 0
    return loaded


def _naive(model: Trained, pairs: int, distance: int, number: int) -> list[bool]:
    """Which values are right, by one forward over the whole prompt and answer."""
    pair = mqar.document(ASKED.seed, number, pairs, 16 * distance)
    ids = model.tokenizer.encode(f"{pair.prompt}{pair.answer}").tolist()
    tokens = torch.tensor([[0, *ids]])
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    with torch.inference_mode():
        logits = model.model(tokens, starts, model.model.initial_state(1, "cpu")).logits[0]
    said = logits.argmax(dim=-1).tolist()
    # A token of `ids` is one place further in `tokens`, and is said one place before that.
    return [said[place] == ids[place] for place in range(len(pair.prompt) + 1, len(ids), 2)]


def test_accuracies_are_those_of_prompts_read_alone(model: Trained) -> None:
    report = capacity.evaluate(model, ASKED, lambda line: None)
    cells = [(row["pairs"], row["distance"], row["samples"]) for row in report["rows"]]
    assert cells == [(80, 0, 15), (80, 3, 15), (512, 0, 3), (512, 3, 3)]
    assert any(row["accuracy"] for row in report["rows"])
    for row in report["rows"]:
        right = [
            hit
            for number in range(row["samples"])
            for hit in _naive(model, row["pairs"], row["distance"], number)
        ]
        assert len(right) == row["samples"] * row["pairs"]
        assert row["accuracy"] == pytest.approx(np.mean(right))
        assert row["tokens"] == 2 + 2 * row["pairs"] + 16 * row["distance"]
    # Delta: 2 layers, 2 key/value heads of 8: a matrix and a sum, float32.
    assert report["state_bytes"] == 2 * 2 * 8 * (8 + 1) * 4


def test_a_value_counts_where_it_is_said_and_no_key_does() -> None:
    asked = Associations([2], [0, 1], answers=4, seed=0)
    ids = np.array([0, 9, 11, 21, 12, 22, 12, 22, 11, 21])
    no_key, no_value = np.array([0, 22, 0, 21]), np.array([12, 0, 11, 0])
    first, all_right = np.array([12, 22, 11, 0]), ids[6:]
    said = [no_key, first, no_value, all_right]
    rows = capacity._rows(asked, 2, [ids] * 4, [6] * 4, said)
    assert [(row["distance"], row["accuracy"]) for row in rows] == [(0, 0.75), (1, 0.5)]


def test_a_run_is_asked_and_what_it_said_is_written(
    model: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capacity.run(model.run_directory, ASKED) == 0
    report = json.loads((model.run_directory / "mqar-7.json").read_text())
    loaded = trained.load(model.run_directory, torch.device("cpu"))
    assert report == report | capacity.evaluate(loaded, ASKED, lambda line: None)
    assert (model.run_directory / "plots" / "mqar-7.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "memory delta, state of 1,152 bytes" in said and "mqar-7.json" in said


def test_the_average_of_the_weights_is_asked_and_its_result_stands_beside_the_other(
    tmp_path: Path, write_run: Any, symbols: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "averaged"
    write_run(run, tokenizer=symbols, averaged=True)
    # By the command, which takes the choice.
    words = [str(run), "--pairs", "4", "--distances", "0", "--answers", "8"]
    for weights in ("last", "ema"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["eval", "mqar", *words, "--weights", weights])
        assert ended.value.code == 0
    last, averaged = (json.loads((run / f"mqar-{name}.json").read_text()) for name in ("7", "7-2"))
    assert "weights" not in last and averaged["weights"] == "ema"
    assert "step 7 (weights ema), memory delta" in capsys.readouterr().out


def test_a_row_is_a_number_of_pairs_and_a_column_a_distance() -> None:
    rows = [{"accuracy": share} for share in (1.0, 0.5, 0.25, 0.0)]
    about = {"step": 7, "memory_kind": "delta", "state_bytes": 4096, "segment": 64}
    report = {**about, "pairs": [4, 128], "distances": [0, 64], "rows": rows}
    assert capacity.table(report).splitlines() == [
        "step 7, memory delta, state of 4,096 bytes: values that are right, in %, by distance in "
        "segments of 64",
        " pairs      0     64",
        "     4  100.0   50.0",
        "   128   25.0    0.0",
    ]
    assert capacity.accuracies(report).tolist() == [[1.0, 0.25], [0.5, 0.0]]


@kinds.of_every_kind
def test_the_state_is_counted_and_distances_are_of_segments_for_every_kind(
    tmp_path: Path, write_run: Any, symbols: Path, kind: str
) -> None:
    write_run(tmp_path / "run", tokenizer=symbols, memory=kinds.memory(kind))
    loaded = trained.load(tmp_path / "run", torch.device("cpu"))
    report = capacity.evaluate(loaded, Associations([2], [1], 1, 0), lambda line: None)
    assert (report["state_bytes"] == 0) == (kind in ("none", "full"))
    assert report["segment"] == 16 and report["rows"][0]["tokens"] == 2 + 4 + 16


def test_a_model_of_another_tokenizer_is_refused(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(EvaluationError, match="trained on documents of `data-prep mqar`"):
        capacity.run(tmp_path / "run", ASKED)


def test_a_tokenizer_to_which_all_values_are_one_unknown_token_is_refused(tmp_path: Path) -> None:
    # As many tokens as symbols, and any value would be as right as another.
    own = without_digits(tmp_path / "tokenizer.json", "<unk>")
    assert len(own.encode(mqar.SYMBOLS)) == len(mqar.SYMBOLS)
    with pytest.raises(EvaluationError, match="does not have a token for each key and value"):
        capacity._check(own)
