"""What a run begins with: a checkpoint to the bit, other weights, or what it refuses and why."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.attempts import committed_step
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.manifest import PASSED_OVER, CheckpointError, step_name
from pretrain.checkpoint.pieces import Piece
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.config.memory import MEMORY_KINDS
from pretrain.jobs import resumable
from pretrain.model.memories.kinds import is_of_memory
from pretrain.training import ledger
from pretrain.training.records import Records
from pretrain.training.resume import check_resumable
from pretrain.training.run import Run
from pretrain.training.saver import Saver
from pretrain.training.step import StepResult
from tests.pretrain import kinds

Take = Callable[[Run, int], list[StepResult]]
Make = Callable[..., Saver]


def saved(run: Run, make_saver: Make, records: Records | None = None) -> Path:
    make_saver(run, records).save(run.state, finish=True)
    return path_of(run, run.state.step)


def path_of(run: Run, step: int) -> Path:
    return run.attempt.directory / "checkpoints" / step_name(step)


def memories(run: Run) -> list[torch.Tensor]:
    states = [run.state.memory, run.state.initial or ()]
    return [tensor for state in states for layer in state for tensor in layer]


def of_two_checkpoints(open_run: Any, take_steps: Take, make_saver: Make) -> Run:
    """A run that saved after each of two steps."""
    run: Run = open_run()
    for _ in range(2):
        take_steps(run, 1)
        saved(run, make_saver)
    return run


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def mix_of(data_sets: dict[str, Path], **weights: float) -> str:
    listed = [f"{{data: {data_sets[name]}, weight: {w}}}" for name, w in weights.items()]
    return f"data.mix=[{', '.join(listed)}]"


# To the bit.


@pytest.mark.parametrize(
    "kind",
    ["plain", "mix", "preface", "weighted", "stage 0", "watched", *kinds.KINDS]
    + [f"{kind} stage {stage}" for kind in ("transformer_xl", "rmt") for stage in (0, 1, 2)],
)
def test_a_resumed_run_takes_the_very_steps_that_the_run_would_have_taken(
    open_run: Any,
    take_steps: Take,
    make_saver: Make,
    engine_state: Any,
    data_sets: dict[str, Path],
    kind: str,
) -> None:
    words = {
        **{kind: [*kinds.words(kind), "train.micro_batch=2"] for kind in kinds.KINDS},
        **{
            f"{kind} stage {stage}": [
                *kinds.words(kind),
                f"data.preface={data_sets['other']}",
                f"zero.stage={stage}",
            ]
            for kind in kinds.REMEMBERING
            for stage in range(3)
        },
        "plain": ["train.micro_batch=2"],
        "mix": [mix_of(data_sets, train=3, other=1)],
        "preface": [f"data.preface={data_sets['other']}"],
        "weighted": [f"data.train={data_sets['pairs']}", "data.prompt_weight=0.25"],
        "stage 0": ["zero.stage=0"],
        # Some of the steps after the checkpoint are spikes by the bounds from before.
        "watched": [
            "train.spikes.deviations=0.01",
            "train.spikes.steps=2",
            "train.z_loss=0.01",
            "optim.ema_decay=0.9",
        ],
    }[kind]
    run = open_run(*words)
    records = Records(run.attempt, 1, run.config, run.data, 0)
    take_steps(run, 3)
    saved(run, make_saver, records)
    records.close()
    assert ledger.check(run.attempt.directory) == []
    again = open_run(*words, attempt=2)
    assert again.engine.optimizer_steps == 3 - run.state.skipped
    for _ in range(2):
        one, other = engine_state(run), engine_state(again)
        assert one.keys() == other.keys()
        assert all(torch.equal(values, other[name]) for name, values in one.items())
        assert all(map(torch.equal, memories(again), memories(run)))
        for name in ("step", "tokens", "skipped", "skipped_in_a_row", "places", "histories",
                     "spikes", "recent"):  # fmt: skip
            assert getattr(again.state, name) == getattr(run.state, name), name
        assert take_steps(again, 2) == take_steps(run, 2)
    assert (run.state.spikes > 0) == (kind == "watched")


def test_a_run_that_is_resumed_in_each_phase_of_a_mix_takes_the_very_same_steps(
    open_run: Any, take_steps: Take, make_saver: Make, data_sets: dict[str, Path]
) -> None:
    schedules = {"train": "[[0, 1], [2, 0], [5, 2]]", "other": "[[0, 0], [2, 1]]"}
    listed = [f"{{data: {data_sets[name]}, weights: {w}}}" for name, w in schedules.items()]
    mix = f"data.mix=[{', '.join(listed)}]"
    whole = open_run(mix, name="whole")
    expected = take_steps(whole, 8)
    found: list[StepResult] = []
    for attempt, steps in enumerate((1, 3, 2, 2), 1):
        run = open_run(mix, attempt=attempt)
        records = Records(run.attempt, 1, run.config, run.data, run.state.step)
        found += take_steps(run, steps)
        saved(run, make_saver, records)
        records.close()
    assert found == expected
    assert run.state.places == whole.state.places and run.state.histories == whole.state.histories
    assert ledger.check(run.attempt.directory) == []


def test_without_a_checkpoint_a_run_starts_at_step_0_with_empty_memories(
    open_run: Any, data_sets: dict[str, Path]
) -> None:
    run = open_run(f"data.preface={data_sets['other']}")
    assert (run.state.step, run.state.tokens, run.state.origin) == (0, 0, None)
    assert run.state.places is None and run.state.histories == [""] * 4
    assert len(memories(run)) == 8 and not any(tensor.any() for tensor in memories(run))


def test_a_new_run_starts_with_the_weights_of_another_and_remembers_which(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    source = open_run(name="source")
    take_steps(source, 2)
    path = saved(source, make_saver)
    (source.attempt.directory / "chat_template.jinja").write_text("{{ messages }}")
    words = [f"train.start_from={source.attempt.directory}", "data.lanes=2", "run.seed=9"]
    run = open_run(*words)
    assert (run.attempt.directory / "chat_template.jinja").read_text() == "{{ messages }}"
    weights = {p.name: p.values.clone() for p in source.engine.pieces()}
    for piece in run.engine.pieces():
        expected = weights[piece.name] if piece.name.endswith("/param") else None
        assert torch.equal(piece.values, torch.zeros(()).expand_as(piece.values)
                           if expected is None else expected), piece.name  # fmt: skip
    assert (run.state.step, run.engine.optimizer_steps) == (0, 0)
    origin = {"path": str(path), "step": 2, "sha256": Checkpoint(path).sha256}
    assert run.state.origin == origin
    take_steps(run, 1)
    saved(run, make_saver)
    # With a checkpoint of its own it does without the source.
    shutil.rmtree(source.attempt.directory)
    assert open_run(*words, attempt=2).state.origin == origin


def test_a_run_that_starts_from_another_says_what_of_its_model_differs(
    open_run: Any, take_steps: Take, make_saver: Make, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_run("model.memory.kind=linear", "model.memory.when_empty=local", name="source")
    take_steps(source, 1)
    saved(source, make_saver)
    with caplog.at_level(logging.INFO, "pretrain.training.resume"):
        open_run(f"train.start_from={source.attempt.directory}", "model.memory.kind=linear")
    told = [message for message in caplog.messages if message.startswith("other than there")]
    assert told == ["other than there: model.memory.when_empty: 'local' -> 'zero'"]


def test_gates_that_the_source_lacks_have_their_initial_value(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    source = open_run("model.memory.kind=none", name="source")
    take_steps(source, 1)
    saved(source, make_saver)
    gate = "model.memory.initial_gate=-3.5"
    run = open_run(f"train.start_from={source.attempt.directory}", gate, "zero.stage=1")
    weights = {p.name: p.values for p in source.engine.pieces()}
    for piece in run.engine.pieces():
        if piece.name.endswith("gate/param"):
            assert torch.equal(piece.values, torch.full((4,), -3.5))
        elif piece.name.endswith("/param"):
            assert torch.equal(piece.values, weights[piece.name]), piece.name
    assert sum(piece.name.endswith("gate/param") for piece in run.engine.pieces()) == 2


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("kind", ["rmt", "autocompressor"])
def test_learned_vectors_that_the_source_lacks_begin_random_or_as_the_embedding_of_eos(
    open_run: Any, take_steps: Take, make_saver: Make, kind: str, stage: int
) -> None:
    source = open_run("model.memory.kind=linear", name="source")
    take_steps(source, 1)
    path = saved(source, make_saver)
    with Checkpoint(path) as checkpoint:
        expected = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    start = f"train.start_from={source.attempt.directory}"
    memory = (f"model.memory.kind={kind}", f"model.memory.{kind}.vectors=5")
    run = open_run(start, *memory, f"zero.stage={stage}")
    eos = run.data.tokenizer.eos_id
    assert eos is not None
    learned = run.engine.module.recurrence.learned()
    if kind == "autocompressor":
        row = expected["embedding.weight/param"][eos]
        assert torch.equal(learned, row.expand(5, -1)) and row.any()
    else:
        assert learned.std() > 0.05 and (torch.pdist(learned) > 0.01).all()
    for piece in run.engine.pieces():
        if piece.name == "recurrence.learned.weight/param":
            assert torch.equal(piece.values.flatten(), learned.detach().flatten())
        elif piece.name.endswith("/param"):
            assert torch.equal(piece.values, expected[piece.name].flatten()), piece.name
    take_steps(run, 1)


def test_learned_vectors_of_the_source_are_taken(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    memory = ("model.memory.kind=autocompressor", "model.memory.autocompressor.vectors=5")
    source = open_run(*memory, name="source")
    take_steps(source, 1)
    path = saved(source, make_saver)
    run = open_run(f"train.start_from={source.attempt.directory}", *memory)
    with Checkpoint(path) as checkpoint:
        stored = checkpoint.tensor("recurrence.learned.weight/param")
    assert torch.equal(run.engine.module.recurrence.learned(), stored)
    plain = open_run(f"train.start_from={path}", "model.memory.kind=none", name="plain")
    assert not any("recurrence" in piece.name for piece in plain.engine.pieces())


@pytest.mark.parametrize(
    ("there", "here"),
    [("rmt", "autocompressor"), ("linear", "memorizing"), ("memorizing", "delta")],
)
def test_weights_of_another_kind_of_memory_are_not_taken_for_its_own(
    open_run: Any, take_steps: Take, make_saver: Make, there: str, here: str
) -> None:
    """Although they have the same names and shapes."""
    of_source, own = (
        [*kinds.words(kind), *[f"model.memory.{kind}.vectors=3"] * MEMORY_KINDS[kind].recurrent]
        for kind in (there, here)
    )
    source = open_run(*of_source, name="source")
    take_steps(source, 2)
    run = open_run(f"train.start_from={saved(source, make_saver)}", *own, name="new")
    learned, initial = (
        {p.name: p.values for p in of.engine.pieces() if p.name.endswith("/param")}
        for of in (source, run)
    )
    shared = [name for name in learned if name in initial and is_of_memory(name.split("/")[0])]
    assert shared and not any(torch.equal(learned[name], initial[name]) for name in shared)


# Damaged and left over.


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    open_run: Any, take_steps: Take, make_saver: Make, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run()
    for _ in range(3):
        take_steps(run, 1)
        saved(run, make_saver)
    damage(path_of(run, 3) / "rank-00000-of-00001.safetensors")
    with caplog.at_level(logging.INFO, "pretrain.training.resume"):
        again = open_run(attempt=2)
    assert again.state.step == 2
    name = "rank-00000-of-00001.safetensors"
    assert f"passed over checkpoint step-00000003: {name} is damaged" in caplog.text
    assert f"resumed from {path_of(run, 2)}, step 2" in caplog.text


def test_the_reason_stays_in_a_checkpoint_that_was_passed_over_while_it_holds(
    open_run: Any, take_steps: Take, make_saver: Make, caplog: pytest.LogCaptureFixture
) -> None:
    run = open_run()
    for _ in range(3):
        take_steps(run, 1)
        saved(run, make_saver)
    directory = path_of(run, 3).parent.parent
    tensors = path_of(run, 3) / "rank-00000-of-00001.safetensors"
    good = tensors.read_bytes()
    damage(tensors)
    open_run(attempt=2)
    assert (tensors.parent / PASSED_OVER).read_text().startswith(f"{tensors.name} is damaged")
    assert committed_step(directory) == 2

    tensors.write_bytes(good)  # its disk is back
    with caplog.at_level(logging.WARNING):
        assert open_run(attempt=3).state.step == 3
    assert committed_step(directory) == 3
    assert "not part of it" not in caplog.text


def test_a_superseded_attempt_marks_no_checkpoint(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    run = of_two_checkpoints(open_run, take_steps, make_saver)
    damage(path_of(run, 2) / "rank-00000-of-00001.safetensors")
    attempts = run.attempt.directory / "attempts"
    attempts.mkdir(exist_ok=True)
    (attempts / "000003.json").write_text("{}")
    assert open_run(attempt=2).state.step == 1
    assert not (path_of(run, 2) / PASSED_OVER).exists()
    assert open_run(attempt=3).state.step == 1
    assert (path_of(run, 2) / PASSED_OVER).exists()


def test_one_damaged_checkpoint_that_takes_no_mark_keeps_none_from_the_next(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    run = of_two_checkpoints(open_run, take_steps, make_saver)
    path_of(run, 3).write_text("a file")
    damage(path_of(run, 2) / "rank-00000-of-00001.safetensors")
    assert open_run(attempt=2).state.step == 1
    assert (path_of(run, 2) / PASSED_OVER).exists()


def test_a_checkpoint_saved_anew_in_place_of_one_passed_over_counts(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    run = of_two_checkpoints(open_run, take_steps, make_saver)
    damage(path_of(run, 2) / "rank-00000-of-00001.safetensors")
    again = open_run(attempt=2)
    assert committed_step(path_of(run, 2).parent.parent) == 1
    take_steps(again, 1)
    saved(again, make_saver)
    assert committed_step(path_of(run, 2).parent.parent) == 2


def test_checkpoints_that_are_all_damaged_stop_the_run_instead_of_starting_over(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    run = open_run()
    for step in (1, 2):
        take_steps(run, 1)
        saved(run, make_saver)
        damage(path_of(run, step) / "rank-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_run(attempt=2)
    for step in (1, 2):
        assert f"{step_name(step)}: rank-00000-of-00001.safetensors" in str(caught.value)


def test_what_an_earlier_attempt_was_writing_is_taken_from_it(
    open_run: Any, tmp_path: Path
) -> None:
    root = tmp_path / "run" / "checkpoints"
    for attempt in (1, 3):
        (root / f"step-00000008.{attempt:06d}.writing").mkdir(parents=True)
    open_run(attempt=2)
    assert [entry.name for entry in root.iterdir()] == ["step-00000008.000003.writing"]


def test_an_imported_model_is_refused_with_what_to_do_instead(open_run: Any) -> None:
    run = open_run()
    trainer = {"configuration": settings.to_plain(run.config), "vocab_size": 48}
    root, piece = run.attempt.directory / "checkpoints", Piece("w", (1,), 0, torch.zeros(1))
    save(root, 0, [piece], {}, trainer, SoloRanks(), 2, 0, run.attempt)
    directory = run.attempt.directory
    with pytest.raises(CheckpointError) as caught:
        open_run(attempt=2)
    assert str(caught.value) == (
        f"run.directory: {directory} is an imported model and cannot be resumed; set "
        f"train.start_from={directory} and a new run.directory"
    )


def test_a_checkpoint_of_a_version_without_a_ledger_is_named(
    open_run: Any, take_steps: Take, make_saver: Make
) -> None:
    run = open_run()
    take_steps(run, 1)
    path = saved(run, make_saver)
    with Checkpoint(path) as checkpoint:
        trainer = checkpoint.trainer
        records = {lane: checkpoint.lane(lane) for lane in range(4)}
    for record in records.values():
        del record.place["history"]  # type: ignore[attr-defined]
    shutil.rmtree(path)
    pieces = list(run.engine.pieces())
    save(path.parent, 1, pieces, records, trainer, SoloRanks(), 2, 0, run.attempt)
    with pytest.raises(CheckpointError, match="step-00000001: it was written by a version"):
        open_run(attempt=2)


# Changed.


def stored(run: Run) -> dict[str, Any]:
    """What a checkpoint of the run holds, as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(run.described))
    return plain


def refused(trainer: dict[str, Any], run: Run) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        check_resumable(trainer, run.config, run.data)
    end = (
        ": the run's checkpoint needs the former; set it back, or start a new run in another "
        "run.directory"
    )
    assert all(problem.endswith(end) for problem in caught.value.problems)
    return [problem.removesuffix(end) for problem in caught.value.problems]


def test_a_changed_model_lanes_seed_start_or_data_set_is_refused_with_all_that_changed(
    open_run: Any, data_sets: dict[str, Path]
) -> None:
    before = open_run()
    after = open_run(
        "model.d_ff=64", "model.memory.kind=linear", "data.lanes=2", "run.seed=7",
        f"data.train={data_sets['other']}", "optim.lr=0.5", "optim.name=muon", name="other",
    )  # fmt: skip
    assert sorted(refused(stored(before), after)) == [
        "data.lanes: 4 -> 2",
        "data.train: the data set's shards differ from the checkpoint's",
        "model.d_ff: 48 -> 64",
        "model.memory.kind: 'delta' -> 'linear'",
        "optim.name: 'adamw' -> 'muon'",
        "run.seed: 1 -> 7",
    ]
    trainer = stored(before)
    trainer["configuration"]["train"]["start_from"] = "elsewhere"
    assert refused(trainer, before) == ["train.start_from: 'elsewhere' -> ''"]
    trainer = stored(before)
    del trainer["configuration"]["optim"]["name"]  # as versions before it wrote
    check_resumable(trainer, before.config, before.data)
    assert "optim.name: 'adamw' -> 'muon'" in refused(trainer, after)


def test_other_settings_may_change_and_are_logged(
    open_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = stored(open_run())
    trainer["configuration"]["optim"]["no_longer_there"] = 1
    run = open_run("optim.lr=0.002", "train.steps=22", "model.local_attention=sdpa",
                   "model.memory.kernel=torch", "zero.stage=1")  # fmt: skip
    with caplog.at_level(logging.INFO, "pretrain.training.resume"):
        check_resumable(trainer, run.config, run.data)
    assert {message.removeprefix("changed since the checkpoint: ") for message in caplog.messages} \
        == {
            "optim.lr: 0.01 -> 0.002",
            "train.steps: 24 -> 22",
            "model.local_attention: 'auto' -> 'sdpa'",
            "model.memory.kernel: 'auto' -> 'torch'",
            "zero.stage: 3 -> 1",
        }  # fmt: skip


def of_kind(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Those of the engine's tensors, by their parameters."""
    return {name.split("/")[0]: value for name, value in state.items() if name.endswith(f"/{kind}")}


@pytest.mark.parametrize("stage", [0, 3])
def test_an_average_that_is_switched_on_begins_with_the_weights_of_the_checkpoint(
    open_run: Any, take_steps: Take, make_saver: Make, engine_state: Any, stage: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = open_run(f"zero.stage={stage}")
    take_steps(run, 2)
    saved(run, make_saver)
    with caplog.at_level(logging.INFO, "pretrain.training.states"):
        again = open_run("optim.ema_decay=0.5", attempt=2)
    assert "the average of the weights begins with those of step 2" in caplog.text
    expected = of_kind(engine_state(run), "param")
    for step in (2, 3, 4):
        found = engine_state(again)
        if step > 2:
            decay = min(0.5, (1 + step) / (10 + step))
            weights = of_kind(found, "param")
            expected = {n: decay * e + (1 - decay) * weights[n] for n, e in expected.items()}
        averages = of_kind(found, "ema")
        assert averages.keys() == expected.keys()
        for name, average in averages.items():
            torch.testing.assert_close(average, expected[name], rtol=1e-6, atol=1e-8, msg=name)
        take_steps(again, 1)


def test_an_average_that_is_switched_off_is_dropped_in_the_open(
    open_run: Any, take_steps: Take, make_saver: Make, engine_state: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    run = open_run("optim.ema_decay=0.5")
    take_steps(run, 2)
    saved(run, make_saver)
    with caplog.at_level(logging.INFO, "pretrain"):
        again = open_run(attempt=2)
    assert "later checkpoints have no average of the weights: optim.ema_decay is 0" in caplog.text
    # Where no step is left none is written, and the average stays where it is.
    assert "dropped" not in caplog.text
    assert "optim.ema_decay: 0.5 -> 0.0" in caplog.text
    one, other = engine_state(again), engine_state(run)
    assert not of_kind(one, "ema") and of_kind(other, "ema")
    assert all(torch.equal(values, other[name]) for name, values in one.items())


def test_an_average_of_a_run_that_starts_from_another_begins_with_its_weights(
    open_run: Any, take_steps: Take, make_saver: Make, engine_state: Any
) -> None:
    origin = open_run("optim.ema_decay=0.5", name="origin")
    take_steps(origin, 2)
    path = saved(origin, make_saver)
    run = open_run("optim.ema_decay=0.5", f"train.start_from={path}")
    weights = of_kind(engine_state(origin), "param")
    for kind in ("param", "ema"):
        found = of_kind(engine_state(run), kind)
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_weights_of_a_mix_may_change_and_its_data_sets_may_not(
    open_run: Any, take_steps: Take, make_saver: Make, data_sets: dict[str, Path]
) -> None:
    run = open_run(mix_of(data_sets, train=3, other=1))
    take_steps(run, 2)
    saved(run, make_saver)
    with pytest.raises(SettingsError) as caught:
        open_run(mix_of(data_sets, train=3, validation=1), attempt=2)
    (problem,) = caught.value.problems
    assert problem.startswith("data.mix[1]: the data set's shards differ from the checkpoint's: ")
    with pytest.raises(SettingsError, match=r"data\.mix: 2 data sets -> 1"):
        open_run(mix_of(data_sets, train=1), attempt=2)
    scheduled = mix_of(data_sets, train=3, other=1).replace(
        "weight: 3", "weights: [[0, 3], [9, 1]]"
    )
    changed = open_run(scheduled, attempt=2)
    check_resumable(stored(run), changed.config, changed.data)
    assert resumable.changes(stored(run), changed.config) == {
        "data.mix[0].weight": "data.mix[0].weight: 3.0 -> 1.0",
        "data.mix[0].weights": "data.mix[0].weights: [] -> [[0.0, 3.0], [9.0, 1.0]]",
    }
    again = open_run(mix_of(data_sets, train=0, other=1), attempt=2)
    before = again.state.places
    take_steps(again, 12)
    assert before is not None and again.state.places is not None
    for one, other in zip(before, again.state.places, strict=True):
        # A lane ends the document that it was in, and reads no other of the source.
        assert other.sources[0].read - one.sources[0].read <= 1
    assert sum(place.sources[1].read for place in again.state.places) > 4 + sum(
        place.sources[1].read for place in before
    )


@pytest.mark.parametrize(
    "kind", ["transformer_xl", "compressive", "memorizing", "rmt", "autocompressor"]
)
def test_another_precision_resumes_memories_that_have_the_dtype_of_activations(
    open_run: Any, take_steps: Take, make_saver: Make, kind: str
) -> None:
    own = f"model.memory.kind={kind}"
    for attempt, precision in enumerate(("float32", "bf16", "float32"), 1):
        run = open_run(own, f"train.precision={precision}", attempt=attempt)
        assert run.state.step == attempt - 1
        (result,) = take_steps(run, 1)
        assert result.applied and math.isfinite(result.loss)
        saved(run, make_saver)


def test_evaluations_that_were_added_changed_or_removed_are_told(open_run: Any) -> None:
    def changes(before: str, now: str) -> dict[str, str]:
        return resumable.changes(stored(open_run(before)), open_run(now).config)

    some = "train.evaluate=[{kind: passkey, every: 5, lengths: [64]}]"
    rarer = "train.evaluate=[{kind: passkey, every: 9, lengths: [64]}]"
    added = changes("train.evaluate=[]", some)
    assert added["train.evaluate[0].kind"] == "train.evaluate[0].kind: none -> 'passkey'"
    assert added["train.evaluate[0].every"] == "train.evaluate[0].every: none -> 5"
    assert all(key.startswith("train.evaluate[0].") for key in added)
    assert changes(some, rarer) == {"train.evaluate[0].every": "train.evaluate[0].every: 5 -> 9"}
    removed = changes(some, "train.evaluate=[]")
    assert removed["train.evaluate[0].every"] == "train.evaluate[0].every: 5 -> none"


def test_another_preface_or_none_is_refused(open_run: Any, data_sets: dict[str, Path]) -> None:
    text = "data.preface: its shards differ from the checkpoint's, or it had none"
    with_it = open_run(f"data.preface={data_sets['other']}")
    another = open_run(f"data.preface={data_sets['validation']}")
    without = open_run()
    for trainer, run in ((with_it, another), (with_it, without), (without, with_it)):
        assert refused(stored(trainer), run) == [text]
    check_resumable(stored(with_it), with_it.config, with_it.data)


def test_places_of_a_version_without_sources_are_refused(open_run: Any) -> None:
    run = open_run()
    trainer = {key: value for key, value in stored(run).items() if key != "sources"}
    (problem,) = refused(trainer, run)
    assert "a version without data.mix" in problem
