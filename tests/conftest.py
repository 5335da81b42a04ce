"""Fixtures that several test files use."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from data_prep.dataset.shards import Document, Manifest, TokenizerInfo
from tests import programs
from tests.cluster import running_cluster
from tools.promises import data_sets

# Read when torch is imported: for tensors as small as the tests', threads cost more than
# they save, and those that wait for others spin. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Run = Callable[..., subprocess.CompletedProcess[str]]


# Files that take longest: workers begin with them, lest one ends alone with the last.
LONGEST = (
    "pretrain/training/test_trainer.py",
    "pretrain/training/test_engine.py",
    "slurm/test_jobs.py",
    "pretrain/planning/test_simulate.py",
    "test_readme.py",
    "pretrain/training/test_resume.py",
    "pretrain/planning/test_plan.py",
    "data_prep/pipeline/test_pipeline.py",
    "pretrain/checkpoint/test_commit_processes.py",
    "pretrain/training/test_parallel.py",
    "pretrain/training/test_step.py",
    "pretrain/test_gathers.py",
    "pretrain/jobs/test_watchdog.py",
    "pretrain/model/test_pointwise.py",
    "data_prep/pipeline/test_slurm.py",
    "pretrain/training/test_metrics.py",
    "pretrain/jobs/test_preflight.py",
    "pretrain/training/test_heap.py",
)

# What collecting the tests imports stays: looking among it for garbage would take a worker longer
# than a tenth of its time.
gc.disable()


def pytest_collection_finish() -> None:
    """From here on, garbage is looked for among what tests make."""
    gc.freeze()
    gc.enable()


def pytest_configure() -> None:
    """Undo what nohup and a shell's & set: programs that tests start would ignore signals too."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the files, take them in the order of LONGEST."""
    if hasattr(config, "workerinput"):
        first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are named by their number: those of gzip hold the time, which workers do not share."""
    return f"{len(val)}_bytes" if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After the run, say how many tests were skipped for want of a program, and how to get it."""
    skipped = terminalreporter.stats.get("skipped", [])
    lacking = programs.lacking(report.longrepr[2] for report in skipped)
    if lacking:
        terminalreporter.section("programs that this machine lacks")
        for names, count in lacking.items():
            terminalreporter.write_line(f"{count} tests skipped, which need {names}")
        terminalreporter.write_line(
            f"{programs.INSTALLER} installs them (as root, on Debian and Ubuntu)"
        )


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command on a host of a Slurm cluster: ctl, or one of the nodes n1, n2, n3."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster.on


@pytest.fixture(scope="session")
def on_cluster(on_host: Run) -> Run:
    """Runs a command where one logs in to the cluster."""
    return lambda *command, **more: on_host("ctl", *command, **more)


class WriteDataSet(Protocol):
    """The signature of `write_data_set`."""

    def __call__(
        self,
        directory: Path,
        documents: Sequence[Any],
        shards: int,
        vocab_size: int,
        *,
        bos_id: int | None = 1,
        eos_id: int | None = 2,
        tokenizer: Path | None = None,
    ) -> Manifest: ...


@pytest.fixture(scope="session")
def write_data_set() -> WriteDataSet:
    """Write a whole data set without the pipeline.

    `documents` are Documents or sequences of token ids (no BOS, no EOS); blocks of them, as equal
    as can be, become the shards, in order. `tokenizer` is a model to copy into the data set;
    without it a stand-in lies there, which no test may open.
    """

    def write(
        directory: Path,
        documents: Sequence[Any],
        shards: int,
        vocab_size: int,
        *,
        bos_id: int | None = 1,
        eos_id: int | None = 2,
        tokenizer: Path | None = None,
    ) -> Manifest:
        directory.mkdir(parents=True, exist_ok=True)
        model = directory / "tokenizer.model"
        if tokenizer is None:
            model.write_bytes(b"stand-in")
        else:
            shutil.copyfile(tokenizer, model)
        info = TokenizerInfo(
            file=model.name,
            sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
            vocab_size=vocab_size,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=None,
            unk_id=0,
        )
        return data_sets.write(
            directory, [_document(*pair) for pair in enumerate(documents)], shards, info
        )

    return write


def _document(number: int, given: Any) -> Document:
    if isinstance(given, Document):
        return given
    tokens = np.asarray(given, dtype=np.int64)
    return Document(f"document-{number}", "test", len(tokens), tokens)
