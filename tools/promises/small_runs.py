"""Runs with a real engine and data, without launcher and loop: of this process, or on its ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.attempts import Attempt, claim
from pretrain.checkpoint.ranks import GroupRanks
from pretrain.config.root import load
from pretrain.data.loader import Batch
from pretrain.training.records import Records
from pretrain.training.run import Run
from pretrain.training.saver import Saver, reserved
from pretrain.training.step import StepResult

SETTINGS = (
    "data.lanes=4",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.d_head=8",
    "model.d_ff=48",
    "model.segment=8",
    "model.init_std=0.1",
    "train.steps=24",
    "train.window_segments=4",
    "train.clip_norm=0.5",
    "optim.lr=0.01",
    "optim.warmup_steps=5",
    "launch.device=cpu",
    "wandb.mode=disabled",
)


class SmallRun:
    """A run in the directory, from its newest checkpoint or from scratch.

    Without a process group this process becomes the only rank; with one, every rank must open it.
    """

    def __init__(self, directory: Path, data: Path | str, words: Sequence[str] = ()) -> None:
        if not dist.is_initialized():
            os.environ["LOCAL_RANK"] = "0"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        given = [*SETTINGS, f"data.train={data}", f"run.directory={directory}", *words]
        self.config = load(None, given)
        ranks = GroupRanks()
        own = claim(directory, ranks.size, 24, None).number if ranks.rank == 0 else 0
        attempt = Attempt(directory, ranks.gather(own)[0])
        self.run = Run(self.config, attempt, torch.device("cpu"))
        self.records = self._opened() if ranks.rank == 0 else None

    def _opened(self) -> Records:
        run = self.run
        return Records(run.attempt, run.ranks.size, self.config, run.data, run.state.step)

    def take(self, steps: int) -> list[tuple[float, float]]:
        """Take so many steps; loss and gradient norm of each."""
        return [(result.loss, result.grad_norm) for result in self.results(steps)]

    def results(
        self, steps: int, before: Callable[[int, Batch], None] = lambda index, batch: None
    ) -> list[StepResult]:
        """Take so many steps, each after `before(index, batch)`; what each did."""
        run, told = self.run, []
        lanes = run.share.lanes
        with (
            run.data.loader(lanes, run.state) as loader,
            run.data.preface_loader(lanes, run.state) as prefaces,
        ):
            for index in range(steps):
                batch = next(loader)
                preface = None if prefaces is None else next(prefaces)
                before(index, batch)
                (weight,) = run.ranks.sum([run.stepper.own_weight(batch)])
                run.state, result = run.stepper.step(run.state, batch, weight, preface)
                told.append(result)
        return told

    def save(self, elsewhere: Path | None = None) -> None:
        """Commit a checkpoint of the last step and end the records of this attempt.

        One that goes `elsewhere`, to another run directory, has no records.
        """
        run = self.run
        attempt = run.attempt if elsewhere is None else Attempt(elsewhere, 1)
        records = self.records if elsewhere is None else None
        copy = reserved(run.engine, run.share.owned, run.state)
        Saver(
            run.engine, run.share.owned, copy, attempt, run.config.checkpoint, run.described,
            run.ranks, lambda step: None, lambda step: None, records,
        ).save(run.state, finish=True)  # fmt: skip
        if records is not None:
            records.close()

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of weights, moments and memories, by name."""
        run = self.run
        found = {piece.name: piece.values.clone() for piece in run.engine.pieces()}
        for name, parameter in run.engine.module.named_parameters():
            found[f"forward {name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
        for kind, states in (("memory", run.state.memory), ("preface", run.state.initial or ())):
            for index, layer in enumerate(states):
                found |= {f"{kind} {index} {n}": t.clone() for n, t in enumerate(layer)}
        return found
