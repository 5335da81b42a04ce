"""What can be known of a run before a rank starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.attempts import claim
from pretrain.checkpoint.manifest import step_name
from pretrain.config.root import load
from pretrain.jobs.start_checks import (
    check_start,
    data_problems,
    directory_problems,
    no_place_for_a_run,
)


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]
) -> dict[str, Path]:
    """A data set of 8 shards, one of 3, and one of another tokenizer."""
    root = tmp_path_factory.mktemp("data")
    documents = [np.arange(3, 10)] * 16
    write_data_set(root / "train", documents, 8, 48)
    write_data_set(root / "few", documents, 3, 48)
    other = root / "other.model"
    other.write_bytes(b"another stand-in")
    write_data_set(root / "foreign", documents, 8, 48, tokenizer=other)
    return {name: root / name for name in ("train", "few", "foreign")}


def problems(ranks: int, *words: str) -> list[str]:
    config = load(None, ["launch.device=cpu", "run.directory=r", *words])
    try:
        check_start(config, ranks)
    except SettingsError as error:
        return error.problems
    return []


def test_a_run_that_can_start_has_no_problems(data: dict[str, Path]) -> None:
    assert problems(4, f"data.train={data['train']}", f"data.validation={data['train']}") == []


def test_a_setting_that_linear_does_not_read_is_refused_where_a_run_begins(
    data: dict[str, Path], tmp_path: Path
) -> None:
    kind = ["model.memory.kind=linear", "optim.gate_lr=0.1", f"data.train={data['train']}"]
    words = [*kind, "model.memory.normaliser=paper"]
    assert problems(1, *kind) == []
    assert problems(1, *words) == [
        "model.memory.normaliser: has no effect with memory.kind=linear; remove it, or set "
        "memory.kind=delta"
    ]
    # A run that began before this was refused can be resumed.
    (tmp_path / "run/checkpoints" / step_name(3)).mkdir(parents=True)
    assert not any(
        "normaliser" in one for one in problems(1, *words, f"run.directory={tmp_path}/run")
    )


def test_ranks_of_every_launcher_are_counted(data: dict[str, Path]) -> None:
    (found,) = problems(3, f"data.train={data['train']}")
    assert found.startswith("data.lanes: 8 lanes cannot be shared evenly by 3 ranks")


def test_a_run_in_the_directory_of_a_data_set_is_refused_made_or_not(
    data: dict[str, Path], tmp_path: Path
) -> None:
    (found,) = problems(1, f"data.train={data['train']}", f"run.directory={data['few']}")
    assert found.startswith(f"run.directory: {data['few']} is a data set, whose tokenizer would")
    later = load(None, [f"run.directory={tmp_path}/later", f"data.train={data['train']}"])
    assert directory_problems(later, [tmp_path / "other"]) == []
    (found,) = directory_problems(later, [tmp_path / "later"])
    assert found.startswith(f"run.directory: {tmp_path}/later is where an earlier job makes a data")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("manifest.json", "is a data set, whose tokenizer would be replaced; give a new directory"),
        ("config.json", "is a Hugging Face model, whose tokenizer would be replaced; give a new"),
        ("config.yaml", "is no run, and its config.yaml would be replaced; give a new directory"),
        ("tokenizer.json", "is no run, and its tokenizer.json would be replaced; give a new"),
    ],
)
def test_a_run_replaces_no_file_of_something_else(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).touch()
    assert no_place_for_a_run(tmp_path).startswith(f"{tmp_path} {said}")
    # In a run, all of these are its own.
    claim(tmp_path, ranks=1, steps=1, most_without_progress=None)
    assert no_place_for_a_run(tmp_path) == ""


def test_a_run_begins_in_a_new_directory_an_empty_one_and_beside_the_logs_of_its_queued_job(
    tmp_path: Path,
) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs").touch()
    for directory in (tmp_path / "new" / "run", tmp_path / "slurm", tmp_path):
        assert no_place_for_a_run(directory) == ""


def test_no_run_begins_among_the_checkpoints_of_another(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / step_name(4)).mkdir(parents=True)
    for inside in ("checkpoints", "checkpoints/mine", f"checkpoints/{step_name(4)}"):
        directory = tmp_path / "run" / inside
        assert no_place_for_a_run(directory) == (
            f"{directory} is in the checkpoints/ of the run {tmp_path / 'run'}; give another place"
        )
    # Who keeps runs in a directory of that name may.
    assert no_place_for_a_run(tmp_path / "checkpoints" / "first") == ""


@pytest.mark.parametrize("which", ["validation", "preface"])
def test_a_validation_set_or_preface_of_another_tokenizer_is_refused(
    data: dict[str, Path], which: str
) -> None:
    (found,) = problems(1, f"data.train={data['train']}", f"data.{which}={data['foreign']}")
    assert found.startswith(f"data.{which}: its tokenizer differs from data.train's")
    assert f"tokenizer.path={data['train']}/tokenizer.model" in found


def test_all_that_evaluations_in_training_lack_is_reported_together(
    data: dict[str, Path],
    tmp_path: Path,
    write_data_set: Callable[..., Any],
    tokenizer_model: Path,
) -> None:
    real = tmp_path / "real"
    write_data_set(real, [np.arange(3, 300)] * 8, 8, 320, tokenizer=tokenizer_model)
    write_data_set(tmp_path / "one", [np.arange(3, 300)], 1, 320, tokenizer=tokenizer_model)

    def listed(*evaluations: str) -> list[str]:
        return problems(1, f"data.train={real}", f"train.evaluate=[{', '.join(evaluations)}]")

    right = (
        "{lengths: [400]}",
        f"{{kind: perplexity, data: {tmp_path / 'one'}}}",
        # Books may be of another tokenizer: they are decoded.
        f"{{kind: needles, lengths: [900], tasks: [single], filler: {data['foreign']}}}",
    )
    assert listed(*right) == []
    # The first data set is retired, and its files are gone.
    (tmp_path / "retired").mkdir()
    shutil.copy(real / "manifest.json", tmp_path / "retired")
    mix = f"data.mix=[{{data: {tmp_path / 'retired'}, weight: 0}}, {{data: {real}}}]"
    (short,) = problems(1, mix, "train.evaluate=[{lengths: [20]}]")
    assert short.startswith("train.evaluate[0].lengths: 20 tokens are fewer than passkey has")
    nowhere = tmp_path / "nowhere"
    found = listed(
        "{lengths: [400, 20], name: short}", f"{{kind: perplexity, data: {data['foreign']}}}",
        f"{{kind: perplexity, name: more, data: {nowhere}}}",
        f"{{kind: needles, lengths: [900], tasks: [single], filler: {nowhere}}}",
    )  # fmt: skip
    assert len(found) == 4
    assert found[0].startswith(f"train.evaluate[2].data: {nowhere}: there is no such directory")
    assert found[1].startswith("train.evaluate[1].data: its tokenizer differs from data.train's")
    assert found[2].startswith(
        "train.evaluate[0].lengths: 20 tokens are fewer than passkey has without any filler"
    )
    assert found[3].startswith(f"train.evaluate[3].filler: {nowhere}: there is no such directory")


def test_all_that_is_wrong_with_a_mix_is_reported_together(
    data: dict[str, Path], tmp_path: Path
) -> None:
    listed = ", ".join(f"{{data: {data[name]}}}" for name in ("train", "few", "foreign"))
    found = problems(
        1, f"data.validation={data['foreign']}",
        f"data.mix=[{listed}, {{data: {tmp_path / 'nowhere'}}}]",
    )  # fmt: skip
    assert len(found) == 4
    assert found[0].startswith(f"data.mix[1]: {data['few']} has 3 shards for data.lanes=8")
    assert "data-prep reshard" in found[0]
    assert found[1].startswith(f"data.mix[3]: {tmp_path / 'nowhere'}: there is no such dir")
    for problem, key in zip(found[2:], ("data.mix[2]", "data.validation"), strict=True):
        assert problem.startswith(f"{key}: its tokenizer differs from data.mix[0]'s")
        assert f"tokenizer.path={data['train']}/tokenizer.model" in problem


def test_files_that_a_data_set_lacks_are_told_before_the_start(
    data: dict[str, Path], tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(data["train"], part)
    for number in (1, 4, 5):
        (part / f"shard-{number:05d}.tar").unlink()
    (part / "tokenizer.model").write_bytes(b"another")
    lacking = [
        f"{part}/shard-00001.tar and 2 other shards are missing; copy the data set again",
        f"{part}/tokenizer.model: its sha256 is not the manifest's; copy the data set again",
    ]
    train = f"data.train={data['train']}"
    assert problems(1, train, f"data.validation={part}") == [
        f"data.validation: {one}" for one in lacking
    ]
    mix = f"data.mix=[{{data: {data['train']}}}, {{data: {part}, weight: %s}}]"
    assert problems(1, mix % 2) == [f"data.mix[1]: {one}" for one in lacking]
    assert problems(1, mix % 0) == []  # it is not read
    phases = f"data.mix=[{{data: {data['train']}}}, {{data: {part}, weights: %s}}]"
    begins, ends = phases % "[[0, 0], [9, 1]]", phases % "[[0, 1], [9, 0]]"
    assert problems(1, begins) == []  # not yet
    assert problems(1, ends) == [f"data.mix[1]: {one}" for one in lacking]
    run = tmp_path / "run"
    for step, found in ((8, lacking), (9, [])):  # it is retired after step 9
        (run / "checkpoints" / step_name(step)).mkdir(parents=True)
        lacks = [one for one in problems(1, ends, f"run.directory={run}") if "data.mix" in one]
        assert lacks == [f"data.mix[1]: {one}" for one in found]
    asked = f"train.evaluate=[{{kind: needles, lengths: [9999], tasks: [single], filler: {part}}}]"
    assert [f"train.evaluate[0].filler: {one}" for one in lacking] == [
        one for one in problems(1, train, asked) if "filler" in one
    ]
    (part / "tokenizer.model").unlink()
    _, absent = problems(1, train, f"data.validation={part}")
    assert absent.endswith("tokenizer.model: cannot be read (No such file or directory)")


def test_data_sets_of_an_earlier_job_need_not_exist(tmp_path: Path) -> None:
    config = load(None, ["run.directory=r", f"data.train={tmp_path / 'later'}"])
    assert len(data_problems(config)) == 1
    assert data_problems(config, [tmp_path / "later"]) == []
