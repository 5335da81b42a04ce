"""What a save keeps, what it refuses, and what it leaves when it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import commit, load
from pretrain.checkpoint import verify as verification
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.manifest import PASSED_OVER, CheckpointError, undoubted_steps
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import Ranks, SoloRanks

ALONE = Attempt(Path("no run directory"), 3)  # without any other attempt


def one_piece(value: float = 1.0, count: int = 8) -> list[Piece]:
    return [Piece("w", (count,), 0, torch.full((count,), value))]


def save_alone(root: Path, step: int, keep_last: int = 2, keep_every: int = 0) -> Path:
    return save(root, step, one_piece(step), {}, {}, SoloRanks(), keep_last, keep_every, ALONE)


def steps(root: Path) -> list[int]:
    """The steps of all directories; anything else there fails the test."""
    return sorted(int(entry.name.removeprefix("step-")) for entry in root.iterdir())


def damage(root: Path, step: int) -> None:
    with (root / f"step-{step:08d}" / "rank-00000-of-00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forget what this process has verified, as a restarted run has."""
    return lambda: monkeypatch.setattr(verification, "_known", set())


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "saved", "kept"),
    [
        (2, 0, [10], [10]),
        (2, 0, [10, 20], [10, 20]),
        (2, 0, [10, 20, 30], [20, 30]),
        (2, 0, [10, 20, 30, 40, 50], [40, 50]),
        (3, 0, [10, 20, 30, 40, 50], [30, 40, 50]),
        (2, 20, [10, 20, 30, 40, 50, 60, 70], [20, 40, 60, 70]),
        (2, 50, [0, 10, 20, 30, 40, 45], [0, 40, 45]),
        (2, 10, [10, 20, 30, 40], [10, 20, 30, 40]),
        (9, 30, [10, 20, 30], [10, 20, 30]),
    ],
)
def test_the_newest_and_every_nth_are_kept(
    tmp_path: Path, keep_last: int, keep_every: int, saved: list[int], kept: list[int]
) -> None:
    for step in saved:
        save_alone(tmp_path, step, keep_last, keep_every)
    assert steps(tmp_path) == kept
    for step in kept:
        assert Checkpoint(tmp_path / f"step-{step:08d}").tensor("w").tolist() == [step] * 8


def test_a_damaged_newer_one_does_not_count_among_the_last(
    tmp_path: Path, new_process: Any
) -> None:
    for step in (10, 20, 30):
        save_alone(tmp_path, step)
    damage(tmp_path, 30)
    new_process()
    found = newest_good(tmp_path, SoloRanks())
    assert found.path == tmp_path / "step-00000020"
    assert [name for name, _ in found.passed_over] == ["step-00000030"]
    save_alone(tmp_path, 22)
    assert steps(tmp_path) == [20, 22, 30]
    save_alone(tmp_path, 24)
    assert steps(tmp_path) == [22, 24, 30]
    save_alone(tmp_path, 40)
    assert steps(tmp_path) == [24, 30, 40]
    save_alone(tmp_path, 50)
    assert steps(tmp_path) == [40, 50]


def test_what_was_never_verified_is_no_reason_to_delete_another(
    tmp_path: Path, new_process: Any
) -> None:
    for step in (10, 20, 30):
        save_alone(tmp_path, step, keep_last=3)
    new_process()
    save_alone(tmp_path, 40, keep_last=2)
    assert steps(tmp_path) == [10, 20, 30, 40]
    save_alone(tmp_path, 50, keep_last=2)
    assert steps(tmp_path) == [40, 50]


def test_the_one_that_a_run_resumed_from_counts_as_good(tmp_path: Path, new_process: Any) -> None:
    for step in (10, 20, 30):
        save_alone(tmp_path, step, keep_last=3)
    new_process()
    assert newest_good(tmp_path, SoloRanks()).path == tmp_path / "step-00000030"
    save_alone(tmp_path, 40, keep_last=2)
    assert steps(tmp_path) == [30, 40]


def test_one_that_lost_a_file_since_it_was_committed_does_not_count(tmp_path: Path) -> None:
    for step in (10, 20):
        save_alone(tmp_path, step)
    (tmp_path / "step-00000020" / "rank-00000-of-00001.json").unlink()
    save_alone(tmp_path, 30)
    assert steps(tmp_path) == [10, 20, 30]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_alone(tmp_path, 10)
    save_alone(tmp_path, 20)
    damage(tmp_path, 20)
    assert save_alone(tmp_path, 20) == tmp_path / "step-00000020"
    assert newest_good(tmp_path, SoloRanks()).path == tmp_path / "step-00000020"
    assert steps(tmp_path) == [10, 20]


def test_a_good_checkpoint_of_the_same_step_is_kept(tmp_path: Path, run_ranks: Any) -> None:
    path = save_alone(tmp_path, 20)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}

    def work(ranks: Ranks) -> Path:
        pieces = one_piece(20) if ranks.rank == 0 else []
        return save(tmp_path, 20, pieces, {}, {}, ranks, 2, 0, ALONE)

    assert run_ranks(2, work) == [path, path]
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_a_good_checkpoint_of_the_same_step_that_was_passed_over_counts_again(
    tmp_path: Path,
) -> None:
    path = save_alone(tmp_path, 20)
    (path / PASSED_OVER).write_text("is not a directory\n")
    assert undoubted_steps(tmp_path) == []
    assert save_alone(tmp_path, 20) == path
    assert undoubted_steps(tmp_path) == [20]


def test_what_killed_attempts_left_is_removed_and_nothing_of_a_later_one(tmp_path: Path) -> None:
    save_alone(tmp_path, 10)
    left = ("step-00000011.000002.writing", "step-00000010.000003.writing",
            "step-00000004.000001.trash")  # fmt: skip
    kept = ("mine", "step-00000011.000004.writing", "step-00000004.000004.trash")
    for name in (*left, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("left")
    (tmp_path / "notes.trash").write_text("mine")
    save_alone(tmp_path, 20)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"step-00000010", "step-00000020", "notes.trash", *kept}


def test_trash_stays_until_there_is_a_good_checkpoint(tmp_path: Path, new_process: Any) -> None:
    save_alone(tmp_path, 10).rename(tmp_path / "step-00000010.000002.trash")
    new_process()

    def failing() -> Iterator[Piece]:
        yield Piece("w", (8,), 0, torch.zeros(7))

    with pytest.raises(CheckpointError):
        save(tmp_path, 20, failing(), {}, {}, SoloRanks(), 2, 0, ALONE)
    assert (tmp_path / "step-00000010.000002.trash").is_dir()
    save_alone(tmp_path, 20)
    assert steps(tmp_path) == [20]


def test_pieces_that_do_not_cover_a_tensor_are_refused_on_all_ranks(
    tmp_path: Path, run_ranks: Any
) -> None:
    def work(ranks: Ranks) -> Path:
        piece = Piece("w", (10,), 5 * ranks.rank, torch.zeros(5 - ranks.rank))
        return save(tmp_path, 1, [piece], {}, {}, ranks, 2, 0, ALONE)

    errors = run_ranks(2, work)
    assert {str(error) for error in errors} == {
        "the ranks' pieces do not make whole tensors: w: the pieces end at element 9 of 10"
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owned", [[[0, 1], [1, 2]], [[0], [2]], [[1], [2]]])
def test_lanes_that_are_missing_or_stored_twice_are_refused(
    tmp_path: Path, run_ranks: Any, owned: list[list[int]]
) -> None:
    def work(ranks: Ranks) -> Path:
        lanes = {lane: LaneRecord({"epoch": 0}, {}) for lane in owned[ranks.rank]}
        return save(tmp_path, 1, [], lanes, {}, ranks, 2, 0, ALONE)

    for error in run_ranks(2, work):
        assert "expected every lane from 0 on once" in str(error)


def test_ranks_that_save_different_steps_are_refused(tmp_path: Path, run_ranks: Any) -> None:
    errors = run_ranks(2, lambda r: save(tmp_path, 5 + r.rank, [], {}, {}, r, 2, 0, ALONE))
    assert {str(error) for error in errors} == {"the ranks save different steps: [5, 6]"}


@pytest.mark.parametrize(
    "trainer", [{"loss": float("nan")}, {"config": object()}, {"betas": (0.9, 0.95)}, {1: "one"}]
)
def test_a_trainers_state_that_json_would_change_is_refused(
    tmp_path: Path, trainer: dict[Any, Any]
) -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        save(tmp_path, 1, one_piece(), {}, trainer, SoloRanks(), 2, 0, ALONE)


def test_numbers_of_the_trainer_come_back_exactly(tmp_path: Path) -> None:
    trainer = {"loss": 0.1 + 0.2, "tokens": 2**62 + 1, "tiny": 5e-324, "name": "ü\n", "none": None}
    path = save(tmp_path, 1, one_piece(), {}, trainer, SoloRanks(), 2, 0, ALONE)
    assert Checkpoint(path).trainer == trainer


def test_a_failing_source_of_pieces_reaches_all_ranks(tmp_path: Path, run_ranks: Any) -> None:
    def pieces(rank: int) -> Iterator[Piece]:
        yield from one_piece()
        if rank == 1:
            raise MemoryError("no host memory")

    errors = run_ranks(2, lambda r: save(tmp_path, 1, pieces(r.rank), {}, {}, r, 2, 0, ALONE))
    assert {str(error) for error in errors} == {"MemoryError('no host memory') (rank 1)"}


class BlindAttempt(Attempt):
    """An attempt whose directory cannot be listed."""

    def superseded(self) -> str | None:
        raise OSError(5, "Input/output error", "run/attempts")


def test_a_disk_that_fails_where_a_save_looks_around_is_an_error_on_all_ranks(
    tmp_path: Path, run_ranks: Any
) -> None:
    attempt = BlindAttempt(tmp_path, 1)

    def work(ranks: Ranks) -> Path:
        pieces = one_piece() if ranks.rank == 0 else []
        return save(tmp_path / "root", 1, pieces, {}, {}, ranks, 2, 0, attempt)

    errors = run_ranks(2, work)
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert {str(error) for error in errors} == {"run/attempts: Input/output error (rank 0)"}


def test_a_disk_that_fails_while_old_checkpoints_are_looked_at_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(root: Path) -> list[int]:
        raise OSError(5, "Input/output error", str(root))

    for step in (1, 2):
        save_alone(tmp_path, step)
    with monkeypatch.context() as patched:
        patched.setattr(commit, "_checkpoints", fails)
        # Before the commit it is refused, after it the commit counts.
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_alone(tmp_path, 3)
    assert steps(tmp_path) == [1, 2]
    prune = commit._prune
    with monkeypatch.context() as patched:

        def pruned(*arguments: Any) -> str | None:
            patched.setattr(commit, "_checkpoints", fails)
            return prune(*arguments)

        patched.setattr(commit, "_prune", pruned)
        save_alone(tmp_path, 3)
    assert steps(tmp_path) == [1, 2, 3] and "could not all be deleted" in caplog.text


def test_a_listing_that_fails_on_one_rank_is_an_error_on_all(
    tmp_path: Path, run_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(root: Path) -> list[int]:
        raise OSError(5, "Input/output error", "checkpoints")

    monkeypatch.setattr(load, "steps_in", fails)
    errors = run_ranks(2, lambda ranks: newest_good(tmp_path, ranks))
    assert {str(error) for error in errors} == {"checkpoints: Input/output error (rank 0)"}
