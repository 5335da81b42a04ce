"""TensorBoard's files hold what metrics.jsonl holds, each step once, also after resumes."""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.attempts import Attempt
from pretrain.config.data import DataConfig
from pretrain.config.root import Config
from pretrain.config.run import TensorBoardConfig, WandbConfig
from pretrain.jobs.start_checks import check_start, tracking_problems
from pretrain.training.metrics import Recorder, read_records
from pretrain.training.trackers import TENSORBOARD, TrackingError

INSTALLED = importlib.util.find_spec("tensorboard") is not None
needs_tensorboard = pytest.mark.skipif(not INSTALLED, reason="needs the extra tensorboard")
UNTRACKED = Config(wandb=WandbConfig(mode="disabled"))
TRACKED = Config(wandb=WandbConfig(mode="disabled"), tensorboard=TensorBoardConfig(enabled=True))


def record(recorder: Recorder, *steps: int, scale: float = 1.0) -> None:
    for step in steps:
        gates = [[0.25, 0.5], [0.75, scale]]
        values = {"step": step, "loss": scale / step, "mfu": None, "gates": gates}
        recorder.record("train", {**values, "epochs": {"novels": step / 8}})


def read(run: Path) -> Any:
    """As TensorBoard reads the directory, all points of a curve kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / TENSORBOARD), size_guidance={"scalars": 0})
    found.Reload()
    return found


def points(run: Path, name: str) -> list[tuple[int, float]]:
    return [(one.step, one.value) for one in read(run).Scalars(name)]


@needs_tensorboard
def test_tensorboard_gets_the_numbers_of_the_records_under_the_names_that_wandb_gets(
    tmp_path: Path,
) -> None:
    recorder = Recorder(Attempt(tmp_path, 1), TRACKED, 0)
    record(recorder, 1, 2, 3)
    recorder.record("validation", {"step": 3, "loss": 7.5})
    recorder.close()
    names = read(tmp_path).Tags()["scalars"]
    assert set(names) == {
        *("train/loss", "train/epochs/novels", "validation/loss"),
        *(f"train/gates/{layer:02}/{head:02}" for layer in (0, 1) for head in (0, 1)),
    }
    recorded = [one for one in read_records(tmp_path / "metrics.jsonl") if one["kind"] == "train"]
    for name, number in (
        ("train/loss", lambda one: one["loss"]),
        ("train/gates/01/00", lambda one: one["gates"][1][0]),
        ("train/epochs/novels", lambda one: one["epochs"]["novels"]),
    ):
        wanted = [(one["step"], pytest.approx(number(one), rel=1e-6)) for one in recorded]
        assert points(tmp_path, name) == wanted
    assert points(tmp_path, "validation/loss") == [(3, 7.5)]


@needs_tensorboard
def test_a_resumed_run_has_each_step_once_and_the_repeated_ones_anew(tmp_path: Path) -> None:
    killed = Recorder(Attempt(tmp_path, 1), TRACKED, 0)
    record(killed, 1, 2)
    killed.sync()
    record(killed, 3, 4)
    killed._trackers["TensorBoard"].flush()  # they had reached the disk before the kill
    resumed = Recorder(Attempt(tmp_path, 1), TRACKED, 2)
    record(resumed, 3, 4, 5, scale=2.0)
    resumed.close()
    wanted = [(1, 1.0), (2, 0.5), (3, 2 / 3), (4, 0.5), (5, 0.4)]
    assert points(tmp_path, "train/loss") == [(step, pytest.approx(y)) for step, y in wanted]
    assert len(list((tmp_path / TENSORBOARD).iterdir())) == 2
    killed.close()


@needs_tensorboard
def test_what_was_recorded_before_a_commit_outlives_a_kill(tmp_path: Path) -> None:
    """A thread writes the files: what it still holds is of steps that are never repeated."""
    recorder = Recorder(Attempt(tmp_path, 1), TRACKED, 0)
    recorder.record("train", {"step": 1, "norms": [0.5] * 500})
    recorder.sync()
    (file,) = (tmp_path / TENSORBOARD).iterdir()
    size = file.stat().st_size
    recorder.close()
    assert size == file.stat().st_size > 500 * 20


@needs_tensorboard
def test_the_configuration_and_numbers_that_are_not_finite_are_there(tmp_path: Path) -> None:
    recorder = Recorder(Attempt(tmp_path, 1), TRACKED, 0)
    recorder.record("train", {"step": 1, "grad_norm": math.inf})
    recorder.close()
    assert points(tmp_path, "train/grad_norm") == [(1, math.inf)]
    (text,) = read(tmp_path).Tensors("configuration/text_summary")
    assert b"    tensorboard:\n      enabled: true" in text.tensor_proto.string_val[0]


@needs_tensorboard
def test_a_tracker_that_fails_costs_no_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(Attempt(tmp_path, 1), TRACKED, 0)
    recorder._trackers["TensorBoard"].close()
    recorder._trackers["TensorBoard"].__dict__.clear()
    for step in (1, 2):
        record(recorder, step)
    recorder.close()
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("TensorBoard failed (") == 1


class Gone:
    """A tracker whose process has ended; a save in the background notices it first."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        save = threading.Thread(target=self._recorder.sync)
        save.start()
        save.join()
        raise BrokenPipeError(f"step {step}")

    def flush(self) -> None:
        raise BrokenPipeError("in a save")

    def close(self) -> None:
        raise AssertionError("it has failed before")


def test_a_tracker_that_fails_in_training_and_in_a_save_at_once_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(Attempt(tmp_path, 1), UNTRACKED, 0)
    recorder._trackers["wandb"] = Gone(recorder)
    record(recorder, 1, 2)
    recorder.close()
    assert [one["step"] for one in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    assert caplog.text.count("wandb failed (") == 1


def test_nothing_is_written_where_no_tracker_is_switched_on(tmp_path: Path) -> None:
    recorder = Recorder(Attempt(tmp_path, 1), UNTRACKED, 0)
    record(recorder, 1)
    recorder.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_missing_package_is_reported_before_training_with_all_other_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])  # as where nothing is installed
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    (problem,) = tracking_problems(TRACKED)
    assert problem == (
        "tensorboard.enabled: tensorboard is not installed; install the extra `tensorboard` "
        "(README), or set it to false"
    )
    assert tracking_problems(Config()) == []
    with pytest.raises(SettingsError) as refused:
        check_start(replace(TRACKED, data=DataConfig(train=str(tmp_path / "none"))), 1)
    assert problem in refused.value.problems and len(refused.value.problems) > 1
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(TrackingError, match="install the extra `tensorboard`"):
        Recorder(Attempt(tmp_path, 1), TRACKED, 0)
