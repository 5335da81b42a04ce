"""Runs of one rank, opened in this process: a real engine and data, no launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import torch.distributed as dist

from data_prep.dataset.shards import Document
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.ranks import Ranks, SoloRanks
from pretrain.config.root import load
from pretrain.data.loader import Batch
from pretrain.training.records import Records
from pretrain.training.run import Run
from pretrain.training.saver import Saver, reserved
from pretrain.training.step import StepResult
from tools.promises.small_runs import SETTINGS

VOCABULARY = 48


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """The process group of this process alone; DeepSpeed takes no second one in a process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def data_sets(
    tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]
) -> dict[str, Path]:
    """Small data sets: three of plain documents, and pairs of a prompt and an answer."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for name in ("train", "other", "validation"):
        sizes = rng.integers(1, 150, size=40)
        documents = [rng.integers(3, VOCABULARY, size=int(size)) for size in sizes]
        write_data_set(root / name, documents, 8, VOCABULARY)
    pairs = [
        Document(f"pair {number}", "test", 1, rng.integers(3, VOCABULARY, size=90), (70,))
        for number in range(40)
    ]
    write_data_set(root / "pairs", pairs, 8, VOCABULARY)
    return {name: root / name for name in ("train", "other", "validation", "pairs")}


class OpenRun(Protocol):
    """The signature of `open_run`."""

    def __call__(self, *settings: str, name: str = "run", attempt: int = 1) -> Run: ...


@pytest.fixture
def open_run(
    one_rank: None, data_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> OpenRun:
    """Open the run in the directory `name`, from its newest checkpoint or from scratch."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # an engine sets it; commands of other tests inherit it
    # ZeRO-3 replaces it for good, and other tests count its products.
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)

    def open_(*settings: str, name: str = "run", attempt: int = 1) -> Run:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        words = [*SETTINGS, f"data.train={data_sets['train']}", f"run.directory={directory}"]
        if any(word.startswith("data.mix") for word in settings):
            words = [word for word in words if not word.startswith("data.train")]
        config = load(None, [*words, *settings])
        return Run(config, Attempt(directory, attempt), torch.device("cpu"))

    return open_


def batches(run: Run, count: int) -> list[tuple[Batch, Batch | None]]:
    """The windows of the steps that follow, and those of the prefaces."""
    lanes = run.share.lanes
    with (
        run.data.loader(lanes, run.state) as loader,
        run.data.preface_loader(lanes, run.state) as prefaces,
    ):
        return [(next(loader), None if prefaces is None else next(prefaces)) for _ in range(count)]


@pytest.fixture(scope="session")
def take_steps() -> Callable[[Run, int], list[StepResult]]:
    """`take_steps(run, count)`: take the run so many steps on; what each did."""

    def take(run: Run, count: int) -> list[StepResult]:
        results = []
        for batch, preface in batches(run, count):
            weight = run.stepper.own_weight(batch)
            run.state, result = run.stepper.step(run.state, batch, weight, preface)
            results.append(result)
        return results

    return take


@pytest.fixture(scope="session")
def next_batches() -> Callable[[Run, int], list[tuple[Batch, Batch | None]]]:
    """`next_batches(run, count)`: the windows of the steps that follow, and the prefaces'."""
    return batches


class MakeSaver(Protocol):
    """The signature of `make_saver`."""

    def __call__(
        self,
        run: Run,
        records: Records | None = None,
        *,
        ranks: Ranks | None = None,
        heard: list[tuple[str, int]] | None = None,
    ) -> Saver: ...


@pytest.fixture(scope="session")
def make_saver() -> MakeSaver:
    """A saver of a run; what it says to its watchdog goes to `heard`."""

    def make(
        run: Run,
        records: Records | None = None,
        *,
        ranks: Ranks | None = None,
        heard: list[tuple[str, int]] | None = None,
    ) -> Saver:
        heard = [] if heard is None else heard
        return Saver(
            run.engine,
            run.share.owned,
            reserved(run.engine, run.share.owned, run.state),
            run.attempt,
            run.config.checkpoint,
            run.described,
            ranks or SoloRanks(),
            lambda step: heard.append(("waits", step)),
            lambda step: heard.append(("saves", step)),
            records,
        )

    return make


def held(run: Run) -> dict[str, torch.Tensor]:
    """Copies of the weights and moments that the engine holds, and of the weights that it uses."""
    state = {piece.name: piece.values.clone() for piece in run.engine.pieces()}
    for name, parameter in run.engine.module.named_parameters():
        state[f"forward {name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    return state


@pytest.fixture(scope="session")
def engine_state() -> Callable[[Run], dict[str, torch.Tensor]]:
    """`engine_state(run)`: copies of all tensors that the engine holds, by name."""
    return held
