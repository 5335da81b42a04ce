"""`pretrain plan`, `check` and `preflight`: their words, and what a batch script reads."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

from data_prep.dataset import settings
from data_prep.dataset.shards import read_manifest
from pretrain.checkpoint.manifest import Manifest, write_manifest
from pretrain.cli.jobs import Plan
from pretrain.config.root import load
from pretrain.planning.plan import GPUS

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_a_plan_needs_a_vocabulary(pretrain: Run, tmp_path: Path) -> None:
    ended = pretrain("plan", "c.yaml", "run.directory=r", f"data.train={tmp_path / 'nowhere'}")
    assert ended.returncode == 2
    assert f"  - data.train: {tmp_path / 'nowhere'}: there is no such directory" in ended.stderr
    assert "or give --vocab-size, e.g. 128256 for Llama 3's" in ended.stderr


def test_a_plan_takes_every_gpu_that_has_a_data_sheet() -> None:
    assert set(get_args(get_type_hints(Plan)["gpu"])) == set(GPUS)


def test_a_plan_is_of_the_ranks_of_a_node_that_the_configuration_sets(pretrain: Run) -> None:
    shape = ["model.d_model=32", "model.n_layers=1", "data.lanes=6"]
    words = ["plan", "c.yaml", "run.directory=r", "data.train=d", "--vocab-size=300", *shape]
    of_two = pretrain(*words, "launch.ranks=2")
    assert (of_two.returncode, "ranks: 2, on 1 x 2 " in of_two.stdout) == (0, True), of_two.stderr
    of_three = pretrain(*words, "launch.ranks=2", "--gpus-per-node=3")
    assert (of_three.returncode, "ranks: 3, on 1 x 3 " in of_three.stdout) == (0, True)
    of_eight = pretrain(*words)
    assert of_eight.returncode == 2
    assert "ranks are --nodes 1 times --gpus-per-node 8" in of_eight.stderr


def test_a_check_prints_what_a_batch_script_reads(pretrain: Run, data: dict[str, Path]) -> None:
    words = ["run.directory=r", f"data.train={data['train']}", "launch.device=auto"]
    ended = pretrain("check", "c.yaml", *words, "--nodes", "1-2", "--gpus-per-node=2")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        f"directory={Path.cwd() / 'r'}", "ranks=2", "patience=5", "lanes=8", "cpu=0", "validation=",
    ]  # fmt: skip


def test_a_check_reports_all_that_a_job_would_end_with(
    pretrain: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    later = tmp_path / "later"
    words = ["check", "c.yaml", "run.directory=r", f"data.train={data['few']}",
             f"data.validation={later}", "train.start_from=old", "--nodes", "2-1"]  # fmt: skip
    ended = pretrain(*words)
    assert ended.returncode == 2
    starts = [line.removeprefix("  - ").split(":")[0] for line in ended.stderr.splitlines()[1:]]
    assert starts == ["nodes", "train.start_from", "data.train", "data.validation"]
    made = pretrain(*words, "--made-before", str(later), f"--made-before={data['few']}")
    starts = [line.removeprefix("  - ").split(":")[0] for line in made.stderr.splitlines()[1:]]
    assert starts == ["nodes", "train.start_from"]


def test_a_check_knows_what_a_resume_needs(
    pretrain: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    words = ["run.directory=run", f"data.train={data['train']}"]
    plain = settings.to_plain(load(None, words))
    shards = [shard.sha256 for shard in read_manifest(data["train"]).shards]
    trainer = {"optimizer_steps": 4, "configuration": plain, "sources": [shards]}
    path = tmp_path / "run/checkpoints/step-00000004"
    path.mkdir()
    write_manifest(path, Manifest(4, 1, {}, {}, {}, trainer))
    assert pretrain("check", "c.yaml", *words).returncode == 0
    for command in ("check", "train"):
        ended = pretrain(command, "c.yaml", *words, "model.segment=16")
        assert (ended.returncode, ended.stdout) == (2, "")
        assert (
            "  - model.segment: 256 -> 16: the run's checkpoint needs the former;" in ended.stderr
        )
    # Its own configuration, after the run was moved.
    (tmp_path / "run/config.yaml").write_text(settings.to_yaml(load(None, words)))
    (tmp_path / "run").rename(tmp_path / "other")
    for command in ("check", "train"):
        ended = pretrain(command, "other/config.yaml")
        assert ended.returncode == 2 and "give run.directory=other to continue" in ended.stderr
    assert pretrain("check", "other/config.yaml", "run.directory=other").returncode == 0


def test_a_node_of_a_preflight_is_one_of_the_nodes(pretrain: Run) -> None:
    words = ["c.yaml", "run.directory=r", "data.train=d", "--nodes", "a,b", "--node", "c"]
    ended = pretrain("preflight", *words, "--timeout", "0", "--ranks", "0")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[1:] == [
        "  - --ranks: expected at least 1, found 0",
        "  - --timeout: expected more than 0, found 0",
        "  - --node: expected one of --nodes a,b, found c",
    ]
