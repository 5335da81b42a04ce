"""Evaluations in training: the numbers of `pretrain eval`, and a run that does not notice them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.recall.tasks import Haystack
from pretrain import trained
from pretrain.checkpoint.manifest import CheckpointError, step_name
from pretrain.config.training import EvaluationConfig
from pretrain.evaluate import perplexity, recall
from pretrain.evaluate.questions import Questions
from pretrain.jobs.launch import EXIT_STOPPED
from pretrain.training.evaluator import Evaluation, EvaluationStoppedError, Evaluator
from pretrain.training.metrics import read_records
from pretrain.training.records import Records
from pretrain.training.run import Run
from tests.pretrain import kinds
from tests.pretrain.training.stopped import Stopping, attempted

PASSKEY = "{kind: passkey, every: 2, lengths: [400, 700], samples: 2, depths: [0, 0.5]}"
NEEDLES = "{{kind: needles, lengths: [900], samples: 1, tasks: [single, qa1], filler: {0}}}"
SHORT = "{every: 2, lengths: [400], samples: 1, depths: [1]}"
PERPLEXITY = "{{kind: perplexity, every: 3, name: books, data: {0}, documents: 3, batch: 2}}"


@pytest.fixture(scope="module")
def books(
    tmp_path_factory: pytest.TempPathFactory,
    write_data_set: Callable[..., Any],
    tokenizer_model: Path,
) -> Path:
    """A data set of the vocabulary of a real tokenizer, with sentences."""
    from data_prep.tokenizer import tokenizer

    directory = tmp_path_factory.mktemp("data") / "books"
    text = "It was a dark night. Nobody spoke of the stormy weather. They waited. "
    tokens = tokenizer.load(tokenizer_model).encode(text * 6)
    rng = np.random.default_rng(1)
    documents = [tokens[: int(size)] for size in rng.integers(20, len(tokens), size=24)]
    write_data_set(directory, documents, 8, 320, tokenizer=tokenizer_model)
    return directory


Opened = Callable[..., tuple[Run, Evaluator]]


@pytest.fixture
def opened(open_run: Any, books: Path) -> Opened:
    """A run on the books with evaluations, and what evaluates it."""

    def open_(*words: str, name: str = "run", attempt: int = 1) -> tuple[Run, Evaluator]:
        listed = ", ".join([PASSKEY, NEEDLES.format(books), PERPLEXITY.format(books)])
        run = open_run(
            f"data.train={books}", f"train.evaluate=[{listed}]", *words, name=name, attempt=attempt
        )
        Records(run.attempt, 1, run.config, run.data, run.state.step).close()
        return run, Evaluator(run.config, run.engine, run.ranks, run.attempt.directory)

    return open_


def evaluated(run: Run, evaluator: Evaluator, one: EvaluationConfig) -> Evaluation:
    return evaluator.run(one, run.state.step, lambda: None, lambda: False)


def asked_later(path: Path, one: EvaluationConfig) -> dict[str, Any]:
    """What `pretrain eval` finds in a checkpoint."""
    model = trained.load(path, torch.device("cpu"))
    if one.kind == "perplexity":
        return perplexity.numbers(perplexity.evaluate(
            model, one.data, window_segments=None, max_documents=3, batch=2,
            report=lambda line: None,
        ))  # fmt: skip
    haystack = Haystack.of_books(Path(one.filler)) if one.filler else Haystack.repeated()
    depths = [0.0, 0.5] if one.kind == "passkey" else [None]
    names = ["passkey"] if one.kind == "passkey" else ["single", "qa1"]
    asked = Questions(names, one.lengths, depths, one.samples, 0)
    return recall.numbers(recall.evaluate(model, haystack, asked, lambda line: None))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_numbers_are_those_of_an_evaluation_of_that_steps_checkpoint(
    opened: Opened, take_steps: Any, make_saver: Any, stage: int
) -> None:
    run, evaluator = opened(f"zero.stage={stage}", "optim.lr=0.03")
    take_steps(run, 4)
    found = {one.label: evaluated(run, evaluator, one) for one in run.config.train.evaluate}
    make_saver(run).save(run.state, finish=True)
    path = run.attempt.directory / "checkpoints" / step_name(4)
    for one in run.config.train.evaluate:
        assert found[one.label].numbers == asked_later(path, one), one.kind
    assert list(found) == ["passkey", "needles", "books"]
    bits = found["books"].numbers["bits_per_byte"]
    assert set(bits) == {"memory", "masked"} and 0 < bits["memory"] < 20
    assert set(found["passkey"].numbers["passkey"]) == {"400", "700"}
    assert set(found["passkey"].numbers["passkey"]["400"]) == {"0", "0.5"}
    assert set(found["needles"].numbers["qa1"]["900"]) == {"exact", "token_accuracy"}
    assert found["passkey"].line.startswith("exact answers / right tokens: passkey 400 ")
    assert found["books"].line.startswith("bits per byte ")


@pytest.mark.parametrize(
    "words",
    [
        ("model.memory.kind=delta", "train.micro_batch=2"),
        ("model.memory.kind=delta", "zero.stage=0"),
        (*kinds.words("rmt"), "zero.stage=3"),
        (*kinds.words("memorizing"), "zero.stage=1"),
    ],
    ids=lambda words: " ".join(words[::3]),
)
def test_a_run_that_is_evaluated_is_the_same_to_the_bit(
    opened: Opened,
    take_steps: Any,
    engine_state: Callable[[Run], dict[str, torch.Tensor]],
    books: Path,
    words: tuple[str, ...],
) -> None:
    words = (*words, f"train.evaluate=[{SHORT}, {PERPLEXITY.format(books)}]")
    plain, _ = opened(*words, name="plain")
    expected = take_steps(plain, 5)
    run, evaluator = opened(*words)
    found = []
    for steps in (1, 1, 3):
        for one in run.config.train.evaluate:
            before, generator = engine_state(run), torch.get_rng_state()
            state = run.state
            memory = [tensor.clone() for layer in state.memory for tensor in layer]
            assert "error" not in evaluated(run, evaluator, one).numbers
            after = engine_state(run)
            assert all(torch.equal(values, after[name]) for name, values in before.items())
            assert torch.equal(torch.get_rng_state(), generator)
            assert run.state is state and run.engine.module.training
            now = [tensor for layer in state.memory for tensor in layer]
            assert all(map(torch.equal, now, memory))
        found += take_steps(run, steps)
    assert found == expected
    one, other = engine_state(run), engine_state(plain)
    assert all(torch.equal(values, other[name]) for name, values in one.items())
    assert run.state.histories == plain.state.histories


def test_an_evaluation_is_due_every_so_many_steps_and_after_the_last(opened: Opened) -> None:
    _, evaluator = opened("train.steps=25")
    due = {step: [one.label for one in evaluator.due(step)] for step in range(26)}
    assert due[0] == due[1] == [] and due[2] == ["passkey"] and due[3] == ["books"]
    assert due[6] == ["passkey", "books"] and due[25] == ["passkey", "needles", "books"]


def test_one_that_is_in_the_records_is_not_missed(opened: Opened) -> None:
    run, evaluator = opened()
    path = run.attempt.directory / "metrics.jsonl"

    def missed(step: int) -> list[str]:
        return [one.label for one in evaluator.missed(step)]

    assert missed(0) == missed(1) == [] and missed(6) == ["passkey", "books"]
    records = [
        {"kind": "train", "step": 6, "loss": 1.0},
        {"kind": "evaluation", "step": 4, "passkey": {}},
        {"kind": "evaluation", "step": 6, "books": {"error": "it failed"}},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert missed(6) == ["passkey"] and missed(4) == []
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: Is a directory"):
        missed(6)


def test_one_that_fails_says_why_and_the_run_goes_on(
    opened: Opened, take_steps: Any, books: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(books, copy)
    run, evaluator = opened()
    take_steps(run, 1)
    shard = sorted(copy.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    damaged = EvaluationConfig(kind="perplexity", data=str(copy))
    found = evaluated(run, evaluator, damaged)
    assert str(shard) in found.numbers["error"] and found.line.startswith("failed: ")
    shutil.rmtree(copy)
    assert str(copy) in evaluated(run, evaluator, damaged).numbers["error"]
    needles = EvaluationConfig(kind="needles", lengths=[900], filler=str(copy))
    assert str(copy) in evaluated(run, evaluator, needles).numbers["error"]
    take_steps(run, 1)
    with torch.no_grad():
        for parameter in run.engine.module.parameters():
            parameter.ds_tensor.fill_(torch.nan)  # type: ignore[attr-defined]
    passkey, _, ppl = run.config.train.evaluate
    assert "not finite" in evaluated(run, evaluator, passkey).numbers["error"]
    assert "not finite" in evaluated(run, evaluator, ppl).numbers["error"]
    assert run.engine.module.training


def test_the_watchdog_is_told_at_every_window_and_a_signal_ends_it_there(opened: Opened) -> None:
    run, evaluator = opened()
    one = EvaluationConfig(lengths=[400], samples=1, depths=[1.0])
    beats: list[None] = []
    evaluator.run(one, 2, lambda: beats.append(None), lambda: False)
    # 400 tokens, less what the key's place rounds off, in windows of 4 lanes of 32 tokens.
    count = len(beats)
    assert 4 <= count <= 8
    with pytest.raises(EvaluationStoppedError):
        evaluator.run(one, 2, lambda: beats.append(None), lambda: len(beats) >= count + 3)
    assert len(beats) == count + 3 and run.engine.module.training


def test_no_more_tokens_are_computed_at_once_than_in_a_step(opened: Opened) -> None:
    run, evaluator = opened("train.micro_batch=1", "train.window_segments=8")
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        forward = run.engine.module.forward

        def watched(tokens: torch.Tensor, *rest: Any, **more: Any) -> Any:
            sizes.append(tokens.numel())
            return forward(tokens, *rest, **more)

        patch.setattr(run.engine.module, "forward", watched)
        one = EvaluationConfig(lengths=[700], samples=4)
        evaluated(run, evaluator, one)
    # A segment of each of 20 prompts where they differ, and a window where they are one lane.
    assert 64 <= max(sizes) <= 20 * 8


@pytest.mark.parametrize("every", [2, 3])
def test_an_evaluation_that_a_signal_ends_is_made_by_the_resumed_run(
    opened: Opened, take_steps: Any, books: Path, tmp_path: Path, every: int
) -> None:
    words = ("train.steps=4", "optim.warmup_steps=1", "train.log_every=1",
             f"checkpoint.every={every}",
             f"train.evaluate=[{SHORT}, {PERPLEXITY.format(books)}]")  # fmt: skip

    # At step 2 its own beat comes first, then those of the evaluation's windows; with a save that
    # is due it is written meanwhile, else it is made then. At step 4 the run is done but for it.
    def ended(attempt: int, rank: Stopping) -> int:
        return attempted(opened(*words, name="stopped", attempt=attempt)[0], rank)

    assert ended(1, Stopping(2, 4)) == EXIT_STOPPED
    root = tmp_path / "stopped"
    assert (root / "checkpoints" / step_name(2)).exists()
    assert not any(r["kind"] == "evaluation" for r in read_records(root / "metrics.jsonl"))
    assert ended(2, Stopping(4, 4)) == EXIT_STOPPED
    assert ended(3, Stopping()) == 0
    assert [one.label for one in opened(*words, name="stopped", attempt=4)[1].missed(4)] == []
    records = read_records(root / "metrics.jsonl")
    found = [(r["step"], *(r.keys() - {"kind", "step"})) for r in records
             if r["kind"] == "evaluation"]  # fmt: skip
    assert found == [(2, "passkey"), (3, "books"), (4, "passkey"), (4, "books")]
    run, _ = opened(*words, name="plain")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses == [result.loss for result in take_steps(run, 4)]
