"""What a resume needs, known without torch from the newest checkpoint's manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset import settings
from data_prep.dataset.shards import read_manifest
from pretrain.checkpoint.manifest import Manifest, step_name, write_manifest
from pretrain.config.root import Config, load
from pretrain.jobs import resumable
from pretrain.jobs.start_checks import moved_problems

END = (
    ": the run's checkpoint needs the former; set it back, or start a new run in another "
    "run.directory"
)


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]
) -> dict[str, Path]:
    """Two data sets of other documents."""
    root = tmp_path_factory.mktemp("data")
    for name, first in (("one", 3), ("two", 4)):
        write_data_set(root / name, [np.arange(first, 10)] * 16, 8, 48)
    return {name: root / name for name in ("one", "two")}


def configured(directory: Path, data: Path, *words: str) -> Config:
    return load(None, [f"run.directory={directory}", f"data.train={data}", *words])


def commit(config: Config, step: int, **more: Any) -> Path:
    """The manifest of a checkpoint as the trainer of this configuration writes it."""
    shards = read_manifest(Path(config.data.train)).shards
    trainer = {
        "optimizer_steps": step,
        "configuration": settings.to_plain(config),
        "sources": [[shard.sha256 for shard in shards]],
        "preface": None,
        **more,
    }
    path = Path(config.run.directory) / "checkpoints" / step_name(step)
    path.mkdir(parents=True)
    write_manifest(path, Manifest(step, 1, {}, {}, {}, json.loads(json.dumps(trainer))))
    return path


def test_a_new_run_and_one_that_nothing_has_changed_in_can_go_on(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    config = configured(tmp_path / "run", data["one"])
    assert resumable.problems(config) == []
    commit(config, 4)
    assert resumable.problems(config) == []
    free = configured(tmp_path / "run", data["one"], "optim.lr=0.5", "zero.stage=1")
    assert resumable.problems(free) == []


def test_all_that_a_checkpoint_does_not_allow_is_said_as_the_trainer_says_it(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    commit(configured(tmp_path / "run", data["one"]), 4)
    words = ["model.segment=16", "run.seed=2", "optim.lr=0.5", f"data.preface={data['two']}"]
    changed = configured(tmp_path / "run", data["two"], *words)
    assert sorted(resumable.problems(changed)) == [
        f"data.preface: its shards differ from the checkpoint's, or it had none{END}",
        f"data.train: the data set's shards differ from the checkpoint's{END}",
        f"model.segment: 256 -> 16{END}",
        f"run.seed: 1 -> 2{END}",
    ]
    # What an earlier job makes cannot be compared yet.
    assert sorted(resumable.problems(changed, [data["two"]])) == [
        f"model.segment: 256 -> 16{END}",
        f"run.seed: 1 -> 2{END}",
    ]


def test_the_newest_checkpoint_whose_manifest_can_be_read_decides(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    config = configured(tmp_path / "run", data["one"])
    other = configured(tmp_path / "run", data["one"], "run.seed=2")
    commit(other, 4)
    newest = commit(config, 8)
    assert resumable.problems(config) == []
    (newest / "manifest.json").write_text("{}")
    assert resumable.problems(config) == [f"run.seed: 2 -> 1{END}"]
    (newest.parent / "step-00000004" / "manifest.sha256").unlink()
    (problem,) = resumable.problems(config)
    assert problem.startswith(f"{newest.parent} holds checkpoints, but none is good:")
    assert "step-00000008: manifest.json differs" in problem and "Put a good copy" in problem


def test_a_setting_that_the_checkpoints_version_lacked_had_its_default(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    before = settings.to_plain(configured(tmp_path / "run", data["one"]))
    del before["model"]["memory"]["when_empty"], before["model"]["qk_norm"], before["optim"]["name"]
    before["optim"]["no_more"] = 3
    same = configured(tmp_path / "run", data["one"])
    commit(same, 4, configuration=before)
    assert resumable.problems(same) == []
    words = "model.memory.when_empty=local", "model.qk_norm=true", "optim.name=muon"
    other = configured(tmp_path / "run", data["one"], *words)
    assert sorted(resumable.problems(other)) == [
        f"model.memory.when_empty: 'zero' -> 'local'{END}",
        f"model.qk_norm: False -> True{END}",
        f"optim.name: 'adamw' -> 'muon'{END}",
    ]


def test_an_imported_model_is_no_run(tmp_path: Path, data: dict[str, Path]) -> None:
    config = configured(tmp_path / "run", data["one"])
    path = tmp_path / "run" / "checkpoints" / step_name(0)
    path.mkdir(parents=True)
    write_manifest(path, Manifest(0, 1, {}, {}, {}, {"configuration": settings.to_plain(config)}))
    (problem,) = resumable.problems(config)
    assert problem.startswith(f"run.directory: {tmp_path / 'run'} is an imported model and cannot")


def test_a_runs_own_configuration_must_name_the_run_that_it_lies_in(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured(Path("runs/a"), data["one"])
    commit(config, 4)
    text = settings.to_yaml(config)
    for directory in ("runs/a", "elsewhere"):
        Path(directory).mkdir(exist_ok=True)
        Path(directory, "config.yaml").write_text(text)
    Path("runs/a").rename("runs/b")
    moved = Path("runs/b/config.yaml")
    (problem,) = moved_problems(moved, [], config)
    assert problem == (
        "run.directory: runs/b/config.yaml is the configuration of the run in runs/b, but names "
        "runs/a: the run was moved or copied, or runs/a is not seen from here; give "
        "run.directory=runs/b to continue the run in runs/b, or run.directory=runs/a"
    )
    assert moved_problems(moved, ["run.directory=runs/a"], config) == []
    own = configured(Path("runs/b"), data["one"])
    assert moved_problems(moved, [], own) == []
    # A configuration that lies in no run is whoever's, also beside another program's checkpoints.
    Path("elsewhere/checkpoints").mkdir()
    assert moved_problems(Path("elsewhere/config.yaml"), [], config) == []
    # Nor does it depend on where one stands.
    monkeypatch.chdir("runs")
    assert len(moved_problems(Path("b/config.yaml"), [], own)) == 1
