"""Runs of one rank in this process: a real engine and data, no launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.attempts import claim
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.config import load
from pretrain.training.records import Records
from pretrain.training.run import Run
from pretrain.training.saver import Saver, reserved

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
    """A run of one rank in the directory, from its newest checkpoint or from scratch."""

    def __init__(self, directory: Path, data: Path | str, words: Sequence[str] = ()) -> None:
        if not dist.is_initialized():
            os.environ["LOCAL_RANK"] = "0"
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        given = [*SETTINGS, f"data.train={data}", f"run.directory={directory}", *words]
        self.config = load(None, given)
        attempt = claim(directory, 1, 24, None)
        self.run = Run(self.config, attempt, torch.device("cpu"))
        self.records = Records(attempt, 1, self.config, self.run.data, self.run.state.step)

    def take(self, steps: int) -> list[tuple[float, float]]:
        """Take so many steps; loss and gradient norm of each."""
        run, told = self.run, []
        lanes = run.share.lanes
        with (
            run.data.loader(lanes, run.state) as loader,
            run.data.preface_loader(lanes, run.state) as prefaces,
        ):
            for _ in range(steps):
                batch = next(loader)
                preface = None if prefaces is None else next(prefaces)
                weight = run.stepper.own_weight(batch)
                run.state, result = run.stepper.step(run.state, batch, weight, preface)
                told.append((result.loss, result.grad_norm))
        return told

    def save(self) -> None:
        """Commit a checkpoint of the last step, and end the records of this attempt."""
        run = self.run
        copy = reserved(run.engine, run.share.owned, run.state)
        Saver(
            run.engine, run.share.owned, copy, run.attempt, run.config.checkpoint, run.described,
            SoloRanks(), lambda step: None, lambda step: None, self.records,
        ).save(run.state, finish=True)  # fmt: skip
        self.records.close()

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


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names under which two states are not equal to the bit."""
    names = sorted(one.keys() | other.keys())
    return [
        name
        for name in names
        if name not in one
        or name not in other
        or one[name].dtype != other[name].dtype
        or not torch.equal(one[name], other[name])
    ]
