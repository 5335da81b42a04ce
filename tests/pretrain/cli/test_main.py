"""The command line: a mistake is told before torch is imported, in one message, with code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoint.attempts import claim


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH whose torch and deepspeed cannot be imported."""
    directory = tmp_path_factory.mktemp("no_torch")
    for name in ("torch", "deepspeed"):
        (directory / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    return directory


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


@pytest.fixture
def pretrain(no_torch: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `pretrain` where importing torch would end it."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "c.yaml").write_text("launch: {device: cpu}\n")
        path = os.pathsep.join([str(no_torch), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", "pretrain.cli", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
        )

    return run


Run = Callable[..., subprocess.CompletedProcess[str]]


def mistakes(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """What a refused command listed."""
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    first, *lines = ended.stderr.splitlines()
    assert first == "pretrain train: this configuration cannot work:"
    assert all(line.startswith("  - ") for line in lines), lines
    return [line[4:] for line in lines]


def test_the_stand_in_for_torch_is_what_would_be_imported(
    pretrain: Run, data: dict[str, Path]
) -> None:
    ended = pretrain("train", "c.yaml", f"data.train={data['train']}", "run.directory=r")
    # The launcher itself needs no torch; its one rank does.
    assert (ended.returncode, ended.stderr) == (1, "torch was imported\n")


def test_every_mistake_is_told_in_one_message_before_torch_is_imported(pretrain: Run) -> None:
    found = mistakes(
        pretrain("train", "c.yaml", "train.stpes=3", "optim.lr=fast", "zero.stage=9", "=3")
    )
    assert len(found) == 6
    for said in (
        "'=3': expected key=value", "did you mean train.steps?", "optim.lr: expected a number",
        "zero.stage: expected one of", "run.directory: not set", "data.train: not set",
    ):  # fmt: skip
        assert sum(said in problem for problem in found) == 1, said


def test_combinations_that_cannot_work_are_told_together(pretrain: Run) -> None:
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


def test_data_sets_are_looked_at_before_any_rank_starts(
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
    assert found[1].startswith(f"data.validation: {tmp_path / 'nowhere'}")
    assert "data-prep" in found[1]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("which", ["validation", "preface"])
def test_a_validation_set_or_preface_of_another_tokenizer_is_refused(
    pretrain: Run, data: dict[str, Path], which: str
) -> None:
    (found,) = mistakes(
        pretrain(
            "train", "c.yaml", "run.directory=r",
            f"data.train={data['train']}", f"data.{which}={data['foreign']}",
        )
    )  # fmt: skip
    assert found.startswith(f"data.{which}: its tokenizer is another than data.train's")
    assert f"tokenizer.path={data['train']}/tokenizer.model" in found


def test_all_that_is_wrong_with_a_mix_is_told_together(
    pretrain: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    listed = ", ".join(f"{{data: {data[name]}}}" for name in ("train", "few", "foreign"))
    found = mistakes(
        pretrain(
            "train", "c.yaml", "run.directory=r", f"data.validation={data['foreign']}",
            f"data.mix=[{listed}, {{data: {tmp_path / 'nowhere'}}}]",
        )
    )  # fmt: skip
    assert len(found) == 4
    assert found[0].startswith(f"data.mix[1]: {data['few']} has 3 shards for data.lanes=8")
    assert "data-prep reshard" in found[0]
    assert found[1].startswith(f"data.mix[3]: {tmp_path / 'nowhere'}: no manifest.json")
    for problem, key in zip(found[2:], ("data.mix[2]", "data.validation"), strict=True):
        assert problem.startswith(f"{key}: its tokenizer is another than data.mix[0]'s")
        assert f"tokenizer.path={data['train']}/tokenizer.model" in problem


def test_ranks_of_torchrun_are_counted_too(pretrain: Run, data: dict[str, Path]) -> None:
    ended = pretrain(
        "train", "c.yaml", "run.directory=r", f"data.train={data['train']}",
        RANK="0", WORLD_SIZE="3", LOCAL_RANK="0",
    )  # fmt: skip
    (found,) = mistakes(ended)
    assert found.startswith("data.lanes: 8 lanes cannot be shared evenly by 3 ranks")


def test_starts_without_progress_are_counted_here_unless_the_batch_script_does(
    pretrain: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    claim(tmp_path / "r", 3, 1000, 1)
    words = ("train", "c.yaml", "run.directory=r", f"data.train={data['train']}",
             "train.max_attempts_without_progress=1")  # fmt: skip
    place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    counted = pretrain(*words, **place, PRETRAIN_STARTS_COUNTED="1")
    assert counted.returncode == 2 and "cannot be shared evenly by 3 ranks" in counted.stderr
    ended = pretrain(*words, **place)
    assert ended.returncode == 78 and "no progress: attempts 1 to 2 " in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log_changes_no_exit_code(tmp_path: Path) -> None:
    leaving = "from pretrain.jobs.launch import leave; print('said'); leave(75)"
    rank = ["-m", "pretrain.cli", "train", "c.yaml", "run.directory=r", "data.train=none"]
    (tmp_path / "c.yaml").touch()
    for words, code in ((["-c", leaving], 75), (rank, 2)):
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(
                [sys.executable, *words], cwd=tmp_path, stdout=full, stderr=full, check=False,
                env={**os.environ, "PYTHONUNBUFFERED": "", "RANK": "0", "WORLD_SIZE": "1"},
            )  # fmt: skip
        assert ended.returncode == code


def test_tasks_of_srun_that_cannot_meet_are_a_mistake_in_the_batch_script(
    pretrain: Run, data: dict[str, Path]
) -> None:
    (found,) = mistakes(
        pretrain(
            "train", "c.yaml", "run.directory=r", f"data.train={data['train']}",
            SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0",
        )
    )  # fmt: skip
    assert found.startswith("srun started 2 tasks without setting MASTER_ADDR and MASTER_PORT;")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {steps: 3", "is not valid YAML"),
        ("- a\n- b\n", "expected keys with values, found a list"),
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


def test_a_plan_tells_its_mistakes_before_torch_is_imported(
    pretrain: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    ended = pretrain("plan", "c.yaml", "train.stpes=3", f"data.train={data['train']}")
    assert ended.returncode == 2 and "did you mean train.steps?" in ended.stderr
    assert ended.stderr.startswith("pretrain plan: this configuration cannot work:\n")
    ended = pretrain("plan", "c.yaml", "run.directory=r", f"data.train={tmp_path / 'nowhere'}")
    assert ended.returncode == 2
    assert "or give --vocab-size, e.g. 128256 for Llama 3's" in ended.stderr


def test_what_recall_cannot_be_asked_is_told_before_torch_is_imported(pretrain: Run) -> None:
    done = pretrain(
        "eval", "needles", "run", "--filler", "none", "--tasks", "riddle", "--lengths", "0"
    )
    assert done.returncode == 2 and "pretrain eval needles: this" in done.stderr
    for part in ("--tasks: riddle", "--lengths: 0", "--filler: none"):
        assert part in done.stderr
    done = pretrain("eval", "passkey", "run", "--lengths", "32k,1mm", "--depths", "0,1")
    assert done.returncode == 2 and "'32k,1mm': expected numbers as 4096,32k,1m" in done.stderr
    done = pretrain("eval", "passkey", "run", "--depths", "deep")
    assert done.returncode == 2 and "'deep': expected numbers as 0,0.5,1" in done.stderr


def test_help_lists_every_setting_with_its_default_and_the_exit_codes(pretrain: Run) -> None:
    ended = pretrain("train", "--help")
    assert ended.returncode == 0
    for line in ("zero.stage = 3", "model.memory.kind = 'delta'", "checkpoint.keep_last = 2"):
        assert f"  {line}  " in ended.stdout
    for line in ("  0   finished", "  75  a signal"):
        assert line in ended.stdout
