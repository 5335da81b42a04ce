"""`pretrain train` up to where its ranks start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def mistakes(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """What a refused command listed."""
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    first, *lines = ended.stderr.splitlines()
    assert first == "pretrain train: this command cannot run:"
    assert all(line.startswith("  - ") for line in lines), lines
    return [line[4:] for line in lines]


def test_every_mistake_of_the_configuration_is_in_one_message(pretrain: Run) -> None:
    found = mistakes(
        pretrain("train", "c.yaml", "train.stpes=3", "optim.lr=fast", "zero.stage=9", "=3")
    )
    assert len(found) == 6
    for said in (
        "'=3': expected key=value", "did you mean train.steps?", "optim.lr: expected a number",
        "zero.stage: expected one of", "run.directory: not set", "data.train: not set",
    ):  # fmt: skip
        assert sum(said in problem for problem in found) == 1, said


def test_combinations_that_cannot_work_are_reported_together(pretrain: Run) -> None:
    found = mistakes(
        pretrain(
            "train", "c.yaml", "data.lanes=8", "launch.ranks=3", "zero.stage=0",
            "train.precision=bf16", "model.d_head=9", "optim.warmup_steps=2000",
        )
    )  # fmt: skip
    assert [problem.split(":")[0] for problem in found] == [
        "data.train", "model.d_head", "run.directory", "data.lanes", "zero.stage",
        "optim.warmup_steps",
    ]  # fmt: skip


def test_data_sets_are_checked_before_any_rank_starts(
    pretrain: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    found = mistakes(
        pretrain(
            "train", "c.yaml", "run.directory=r", "data.lanes=8",
            f"data.train={data['few']}", f"data.validation={tmp_path / 'nowhere'}",
        )
    )  # fmt: skip
    assert len(found) == 2
    assert found[0].startswith(f"data.train: {data['few']} has 3 shards for data.lanes=8")
    assert found[1].startswith(f"data.validation: {tmp_path / 'nowhere'}: there is no such dir")
    assert not (tmp_path / "r").exists()


def test_a_run_directory_that_cannot_be_made_is_a_mistake_of_every_rank_too(
    pretrain: Run, data: dict[str, Path]
) -> None:
    words = ["c.yaml", "run.directory=c.yaml/r", f"data.train={data['train']}"]
    problem = "run.directory: c.yaml/r cannot be made, since c.yaml is not a directory; give "
    for found in mistakes(pretrain("train", *words)), pretrain("check", *words).stderr.split("- "):
        assert found[-1].strip() == f"{problem}another place"
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    rank = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "train", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **place},
        check=False,
    )
    assert mistakes(rank) == [f"{problem}another place"]


def test_tasks_of_srun_that_cannot_meet_are_a_mistake_in_the_batch_script(
    pretrain: Run, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("STEP_ID", "0"), ("STEP_NUM_TASKS", "2"), ("PROCID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    (found,) = mistakes(
        pretrain("train", "c.yaml", "run.directory=r", f"data.train={data['train']}")
    )
    assert found.startswith("srun started 2 tasks without setting MASTER_ADDR and MASTER_PORT;")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 3", "is not valid YAML"),
        ("- a\n- b\n", "expected keys with values, found a list"),
        ("hello\n", "bad.yaml: expected keys with values, found one value\n"),
        ("42\n", "bad.yaml: expected keys with values, found one value\n"),
        ("train: 7\n", "train: expected keys, found 7"),
        ("run: {directory: '${oc.env:HOME}'}\n", "uses a resolver"),
        ("run: {directory: '${nowhere}'}\n", "nowhere"),
    ],
)
def test_a_file_that_is_no_configuration_is_a_mistake_too(
    pretrain: Run, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    ended = pretrain("train", "bad.yaml")
    assert ended.returncode == 2
    assert said in ended.stderr and "Traceback" not in ended.stderr


def test_a_file_that_is_not_there_is_named(pretrain: Run) -> None:
    (found,) = mistakes(pretrain("train", "nowhere.yaml"))
    assert found.startswith("nowhere.yaml: cannot be read")


def test_help_lists_every_setting_with_its_default_and_the_exit_codes(pretrain: Run) -> None:
    ended = pretrain("train", "--help")
    assert ended.returncode == 0
    for line in ("zero.stage = 3", "model.memory.kind = 'delta'", "checkpoint.keep_last = 2"):
        assert f"  {line}  " in ended.stdout
    for line in ("  0   finished", "  75  a signal"):
        assert line in ended.stdout
