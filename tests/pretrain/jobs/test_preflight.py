"""Bad nodes are named; on real processes where it is about processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.dataset.wording import counted
from pretrain.config.data import DataConfig
from pretrain.config.optim import OPTIMIZERS, OptimConfig
from pretrain.config.root import Config
from pretrain.config.run import LaunchConfig, RunConfig
from pretrain.jobs import preflight
from pretrain.jobs.preflight import Report, verdict
from pretrain.model.transformer import on_meta
from pretrain.planning import states

ROOT = Path(__file__).resolve().parents[3]
GOOD = Report(versions={"torch": "2.13", "driver": "570"}, product=0.010, exchange=0.004)


def nodes(*reports: Report | None) -> dict[str, Report | None]:
    return {f"n{number}": report for number, report in enumerate(reports)}


def test_good_nodes_are_good() -> None:
    assert verdict(nodes(GOOD, replace(GOOD, product=0.029, skew=-1.9), GOOD), 3.0) == ({}, [])


def test_a_node_that_says_nothing_is_bad() -> None:
    assert verdict(nodes(GOOD, None), 3.0) == ({"n1": ["does not answer"]}, [])


def test_a_node_is_bad_by_what_it_found_by_its_versions_its_clock_and_its_speed() -> None:
    other = {"torch": "2.12", "driver": "570"}
    bad, shared = verdict(
        nodes(
            GOOD,
            replace(GOOD, problems=["GPU 3 has 2 uncorrectable ECC errors"], versions=other),
            replace(GOOD, skew=-2.5),
            replace(GOOD, product=0.031, exchange=0.0121),
            GOOD,
        ),
        3.0,
    )
    assert shared == [] and bad == {
        "n1": ["GPU 3 has 2 uncorrectable ECC errors", "torch is 2.12, elsewhere 2.13"],
        "n2": ["its clock is -2.5 s from the first node's"],
        "n3": [
            "a matrix product took 31.0 ms, the median is 10.0 ms",
            "an exchange with a neighbour took 12.1 ms, the median is 4.0 ms",
        ],
    }


def test_of_two_nodes_the_slower_one_is_named() -> None:
    bad, _ = verdict(nodes(replace(GOOD, product=0.1), GOOD), 3.0)
    assert bad == {"n0": ["a matrix product took 100.0 ms, the median is 10.0 ms"]}


def test_a_version_that_one_node_lacks_is_reported_for_that_node() -> None:
    bad, _ = verdict(nodes(replace(GOOD, versions={"torch": "2.13"}), GOOD, GOOD), 3.0)
    assert bad == {"n0": ["driver is missing, elsewhere 570"]}


def test_what_every_node_says_of_the_run_directory_is_no_nodes_fault() -> None:
    full = replace(GOOD, directory=["run has 1.0 GB free, but two checkpoints need 3.0 GB"])
    assert verdict(nodes(full, full), 3.0) == ({}, full.directory)
    assert verdict(nodes(full, GOOD), 3.0) == ({"n0": full.directory}, [])


def test_neighbours_of_a_ring_are_each_paired_once() -> None:
    assert preflight._ring(2) == [(0, 1)]
    assert sorted(preflight._ring(4)) == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert sorted(preflight._ring(3)) == [(0, 1), (1, 2), (2, 0)]


def config(directory: Path, data: Path | str = "nowhere", **launch: Any) -> Config:
    return Config(
        run=RunConfig(str(directory)),
        data=DataConfig(str(data)),
        launch=LaunchConfig(**{"device": "cpu", **launch}),
    )


def test_a_run_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = preflight.look(config(tmp_path / "file" / "run"), 1)
    assert found.directory == [f"{tmp_path}/file/run cannot be written: Not a directory"]
    assert preflight.look(config(tmp_path / "run"), 1).directory == []
    assert list((tmp_path / "run").iterdir()) == []


def test_two_checkpoints_must_find_their_place(
    tmp_path: Path, write_data_set: Callable[..., Any]
) -> None:
    write_data_set(tmp_path / "data", [range(3, 40)] * 8, 8, 48)
    base = config(tmp_path / "run", tmp_path / "data")
    free = shutil.disk_usage(tmp_path).free
    # Float32 master and two moments: twice 12 bytes a weight; a layer has 12 d^2 of them and more.
    wide = 1 << 16
    layers = free // (2 * 12 * 12 * wide**2) + 2
    model = replace(base.model, d_model=wide, n_heads=wide // 64, n_kv_heads=wide // 64,
                    d_ff=8 * wide // 3, n_layers=int(layers))  # fmt: skip
    (found,) = preflight.look(replace(base, model=model), 1).directory
    assert "GB free, but two checkpoints need" in found
    assert preflight.look(base, 1).directory == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.999])
def test_the_size_of_a_checkpoint_is_that_of_its_optimizer_and_average(
    tmp_path: Path, write_data_set: Callable[..., Any], optimizer: Any, decay: float
) -> None:
    write_data_set(tmp_path / "data", [range(3, 40)] * 8, 8, 4800)
    base = config(tmp_path / "run", tmp_path / "data")
    chosen = replace(base, optim=OptimConfig(name=optimizer, ema_decay=decay))
    stored = states.stored_bytes(chosen, on_meta(chosen.model, 4800), 1)
    assert preflight._checkpoint_bytes(chosen) == pytest.approx(stored, rel=0.02)


def test_the_memory_that_a_job_is_granted_is_the_least_of_its_control_groups(
    tmp_path: Path,
) -> None:
    own, groups = tmp_path / "cgroup", tmp_path / "groups"

    def granted(lines: str, limits: dict[str, str]) -> float:
        own.write_text(lines)
        shutil.rmtree(groups, ignore_errors=True)
        for path, limit in limits.items():
            (groups / path).parent.mkdir(parents=True, exist_ok=True)
            (groups / path).write_text(f"{limit}\n")
        return preflight.memory_granted(own, groups)

    one = {"a/job_7/memory.max": "4000", "a/job_7/step_0/memory.max": "max", "b/memory.max": "1"}
    assert granted("0::/a/job_7/step_0\n", one) == 4000
    assert granted("0::/a\n", one) == math.inf
    two = {"memory/slurm/job_7/memory.limit_in_bytes": "5000", "cpu/memory.max": "1"}
    assert granted("9:cpu,cpuacct:/\n4:memory:/slurm/job_7/step_0\n0::/\n", two) == 5000
    assert granted("0::/../elsewhere\n", {}) == math.inf
    assert preflight.memory_granted(tmp_path / "absent") == math.inf


def test_a_job_that_may_use_less_memory_than_the_copies_need_is_told_to_request_more() -> None:
    (found,) = preflight.host_memory_problems(5_000_000, 3e6)
    assert found == (
        "this job may use 0.0 GB of host memory, but the host copies of a checkpoint need 0.0 GB: "
        "request more"
    )
    assert preflight.host_memory_problems(3_000_000, 3e6) == []


def test_the_copies_of_a_checkpoint_must_find_host_memory(
    tmp_path: Path, write_data_set: Callable[..., Any]
) -> None:
    write_data_set(tmp_path / "data", [range(3, 40)] * 8, 8, 48)
    base = config(tmp_path / "run", tmp_path / "data")
    # 12 bytes a weight, 12 d^2 weights a layer: a third more than this machine has, on two nodes.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wide = 1 << 12
    layers = 4 * memory // 3 // (12 * 12 * wide**2) + 1
    model = replace(base.model, d_model=wide, n_heads=wide // 64, n_kv_heads=wide // 64,
                    d_ff=8 * wide // 3, n_layers=int(layers))  # fmt: skip
    large = replace(base, model=model)
    (found,) = preflight.look(large, 1).problems
    assert "GB of host memory are available, but the host copies of a checkpoint" in found
    assert preflight.look(large, 1, nodes=1000).problems == []
    assert preflight.look(base, 1).problems == []


def test_a_missing_gpu_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = preflight.look(config(tmp_path, device="cuda"), 1)
    assert found.problems == ["torch finds no GPU"]
    # As in a job that has GPUs, whose ranks would train on the CPU without a word.
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    found = preflight.look(config(tmp_path, device="auto"), 8)
    assert found.problems == ["torch finds none of the 8 GPUs of the job"]
    assert preflight.look(config(tmp_path, device="cpu"), 8).problems == []
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert preflight.look(config(tmp_path, device="auto"), 1).problems == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpus_of_this_machine_are_seen(tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    found = preflight.look(config(tmp_path, device="cuda"), count)
    assert found.product > 0 and {"cuda", "gpu", "driver"} <= set(found.versions)
    more = preflight.look(config(tmp_path, device="cuda"), count + 1)
    visible = counted(count, "GPU is", "GPUs are")
    assert f"{visible} visible for {count + 1} ranks" in more.problems


def start(place: Path, names: str, port: int, code: Path = ROOT) -> Callable[[str], Any]:
    """Starts `pretrain preflight` as one node of several, all of them on this machine."""
    (place / "c.yaml").write_text(
        "run: {directory: run}\ndata: {train: nowhere}\nlaunch: {device: cpu}"
    )

    def process(node: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain.cli", "preflight", "c.yaml", f"--nodes={names}",
             f"--node={node}", "--address=localhost", f"--port={port}", "--timeout=10",
             "--slow-factor=1000"],
            cwd=place, env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return process


def outputs(processes: Sequence[Any]) -> list[tuple[int, str]]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert "Traceback" not in err, err
        found.append((process.returncode, out))
    return found


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port: int = listening.getsockname()[1]
        return port


def test_three_nodes_meet_and_one_of_other_code_is_named(tmp_path: Path) -> None:
    for package in ("pretrain", "data_prep"):
        shutil.copytree(ROOT / package, tmp_path / "other" / package)
    with (tmp_path / "other/pretrain/training/optim.py").open("a") as file:
        file.write("# changed\n")
    port, names = free_port(), "a,b,c"
    same = start(tmp_path, names, port)
    first, second, third = outputs(
        [same("a"), same("b"), start(tmp_path, names, port, tmp_path / "other")("c")]
    )
    assert first[0] == 1 and (second, third) == ((0, ""), (0, ""))
    assert first[1].startswith("preflight: bad node c: code is ") and first[1].count("\n") == 1
    (record,) = map(json.loads, (tmp_path / "run/preflight.jsonl").read_text().splitlines())
    assert set(record["nodes"]) == {"a", "b", "c"} and list(record["bad"]) == ["c"]
    assert all(0 < report["exchange"] < 10 for report in record["nodes"].values())
    assert all(abs(report["skew"]) < 2 for report in record["nodes"].values())


def test_a_node_that_never_comes_is_named_by_the_first_and_the_first_by_the_others(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, "a,b,c", free_port())
    lost = start(tmp_path, "x,y", free_port())("y")
    started = time.monotonic()
    (code, first), second, alone = outputs([process("a"), process("b"), lost])
    assert time.monotonic() - started < 60
    assert (code, first) == (1, "preflight: bad node c: does not answer\n") and second[0] == 0
    assert alone[0] == 1 and alone[1].startswith("preflight: no answer from x: ")
    assert alone[1].endswith(" (y)\n")


def test_a_record_that_a_kill_cut_swallows_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "preflight.jsonl"
    for _ in range(2):
        preflight._record(tmp_path, nodes(GOOD), {}, [])
    whole = path.read_text().splitlines()
    path.write_text(f"{whole[0]}\n{whole[1][:20]}")
    preflight._record(tmp_path, nodes(GOOD), {}, [])
    first, cut, last = path.read_text().splitlines()
    assert (first, cut) == (whole[0], whole[1][:20]) and json.loads(last)["bad"] == {}


def test_no_secret_of_the_environment_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {directory: run}\ndata: {train: nowhere}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "preflight", "c.yaml", "launch.device=cpu"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "WANDB_API_KEY": "hunter2", "NCCL_DEBUG": "WARN", "SLURM_JOB_ID": "7"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("preflight: 1 node is good")
    recorded = (tmp_path / "run/preflight.jsonl").read_text()
    assert "hunter2" not in recorded and "WANDB" not in recorded
    assert json.loads(recorded)["environment"]["NCCL_DEBUG"] == "WARN"
