"""Job arrays on a real Slurm make the same bytes as a local run."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep import config
from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.pipeline import pipeline
from data_prep.pipeline.slurm import submit

WORDS = ("the", "sea", "was", "calm", "and", "a", "light", "wind", "came", "over", "harbour")

UNITS = 5  # the first two hold two files each, since the last are smaller

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files in UNITS units: more than three tasks and fewer than eight."""
    root = tmp_path_factory.mktemp("corpus")
    source = random.Random(7)
    for name in range(7):
        texts = [
            " ".join(source.choice(WORDS) + str(source.randrange(99)) for _ in range(300))
            for _ in range(70)
        ]
        lines = [json.dumps({"text": text}) for text in texts]
        (root / f"{name}.jsonl").write_text("\n".join([*lines, "[]", ""]))
    return root


def words(corpus: Path, output: Path) -> list[str]:
    return [
        *(f"root={corpus}", f"output={output}", "sources=[{name: s, paths: ['*.jsonl']}]"),
        *("tokenizer.vocab_size=350", "tokenizer.sample_bytes=50000", "shards.count=5"),
    ]


def submitted(
    on_cluster: Run, corpus: Path, output: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    empty = output.parent / "empty.yaml"
    empty.write_text("{}")
    command = [sys.executable, "-m", "data_prep.cli", "submit", empty, *words(corpus, output)]
    return on_cluster(*command, "slurm.partition=main", "slurm.time=0-00:10", *more)


def wait_for(reached: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a local run makes of the corpus, after seeing that the corpus is what it should be."""
    output = tmp_path_factory.mktemp("made")
    outcome = pipeline.run(config.load(None, [*words(corpus, output), "workers=2"]))
    assert (outcome.manifest.documents, outcome.manifest.rejected) == (490, 7)
    return hashes(output)


def queue_is_empty(on_cluster: Run) -> bool:
    return not on_cluster("squeue", "--noheader").stdout.strip()


def test_three_tasks_make_the_bytes_of_a_local_run(
    on_cluster: Run,
    corpus: Path,
    made: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "set"
    done = submitted(on_cluster, corpus, output, "slurm.tasks=3", "slurm.cpus_per_task=2")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:8]] == [
        *("survey", "sample", "train", "tokenize", "order", "parts", "shards", "finish")
    ]
    with monkeypatch.context() as own:
        own.setenv("SQUEUE_STATES", "SUSPENDED")  # of which squeue would list none
        again = submitted(on_cluster, corpus, output, "slurm.tasks=3")
    assert again.returncode == 2
    assert "its Slurm jobs are still queued or running" in again.stderr
    wait_for(lambda: queue_is_empty(on_cluster), "the end of the jobs")
    assert hashes(output) == made
    assert shards.verify(output) == []
    assert len(list((output / "slurm/tokenize/slurm_logs").glob("*.out"))) == 3
    finished = submitted(on_cluster, corpus, output)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "is finished already" in finished.stdout


@pytest.mark.slow
def test_a_failed_and_a_cancelled_run_continue_with_other_tasks(
    on_cluster: Run, corpus: Path, made: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "set"
    # A task fails: what depends on it is not started and does not stay in the queue.
    submitted(on_cluster, corpus, output, "slurm.tasks=3", "tokenizer.vocab_size=100000")
    wait_for(lambda: queue_is_empty(on_cluster), "the end of the failed jobs")
    assert not (output / "work/tokenize").exists()
    (log,) = (output / "slurm/train/slurm_logs").glob("*.out")
    assert "tokenizer.vocab_size: 100000 does not fit" in log.read_text()
    # Cancelled in the midst of a stage, whose tasks run one after the other here.
    done = submitted(on_cluster, corpus, output, "slurm.tasks=3", "slurm.workers=1")
    assert done.stdout.startswith("sample ")
    marks = output / "work/tokenize"
    wait_for(lambda: list(marks.glob("*.json")), "a tokenized unit")
    cancel = next(line for line in done.stdout.splitlines() if line.startswith("cancel: "))
    on_cluster(*cancel.removeprefix("cancel: ").split())
    wait_for(lambda: queue_is_empty(on_cluster), "the end of the cancelled jobs")
    kept = {path: path.stat().st_mtime_ns for path in marks.glob("*.json")}
    assert 0 < len(kept) < UNITS
    assert submitted(on_cluster, corpus, output, "slurm.tasks=8").returncode == 0
    wait_for(lambda: len(list(marks.glob("*.json"))) == UNITS, "all units tokenized")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    wait_for(lambda: queue_is_empty(on_cluster), "the end of the jobs")
    assert hashes(output) == made


def test_variables_of_sbatch_do_not_replace_what_the_configuration_says(
    on_cluster: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        **{"PARTITION": "low", "TIMELIMIT": "7", "ACCOUNT": "site"},
        **{"MEM_PER_NODE": "99", "ARRAY_INX": "5-9", "JOB_NAME": "other", "NETWORK": "kept"},
    }.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    done = submitted(on_cluster, corpus, tmp_path / "set", "slurm.sbatch=[--account=lab]")
    assert done.returncode == 0, done.stderr
    jobs = next(x for x in done.stdout.splitlines() if x.startswith("cancel: ")).split()[2:]
    shown = on_cluster("scontrol", "-o", "show", "job", jobs[-1]).stdout.split()
    on_cluster("scancel", *jobs)
    assert {"Partition=main", "TimeLimit=00:10:00", "Account=lab", "ArrayTaskId=0"} <= set(shown)
    assert {"JobName=data-prep-finish", "Network=kept"} <= set(shown)


def test_slurm_refusing_a_job_leaves_none(on_cluster: Run, corpus: Path, tmp_path: Path) -> None:
    refused = submitted(on_cluster, corpus, tmp_path / "set", "slurm.partition=nowhere")
    assert refused.returncode == 1
    assert "nothing was submitted" in refused.stderr and "Traceback" not in refused.stderr
    assert queue_is_empty(on_cluster)


def test_what_cannot_be_submitted_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = config.load(None, words(tmp_path, tmp_path / "a set"))
    with pytest.raises(SettingsError) as caught:
        submit(wanted)
    named = [problem.partition(":")[0] for problem in caught.value.problems]
    assert named == ["sources[0].paths[0]", "slurm.partition", "output", "submit"]


def test_jobs_of_an_unknown_fate_keep_a_local_run_away(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "set"
    (output / "work").mkdir(parents=True)
    (output / "work/jobs.json").write_text('{"survey": "4"}')
    with pytest.raises(ValueError, match="there is no squeue here"):
        pipeline.run(config.load(None, words(corpus, output)))
