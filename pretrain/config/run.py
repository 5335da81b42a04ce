"""Settings of a run as a whole: where it lives, its ranks, checkpoints, watchdog and tracking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from data_prep.dataset.settings import setting
from pretrain.config.choices import without_effect

CONFIG_FILE = "config.yaml"
"""The configuration file in a run directory."""

Weights: TypeAlias = Literal["last", "ema"]
"""The weights of a run: those after its last step, or their exponential moving average."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    directory: str = setting("", "run directory; the same command on it resumes the run", path=True)
    seed: int = setting(
        1, "seed of initial weights and of the order of shards", low=0, high=2**63 - 1
    )


@dataclass(frozen=True)
class ZeroConfig:
    """What DeepSpeed partitions over the ranks."""

    stage: Literal[0, 1, 2, 3] = setting(
        3, "0: nothing, 1: optimizer, 2: and gradients, 3: and weights"
    )
    live_parameters: int = setting(
        1_000_000_000,
        "stage 3: weights that may be gathered at the same time, prefetched or kept for reuse; "
        "fewer take less memory and are gathered more often",
        low=1,
    )

    def problems(self) -> list[str]:
        """Settings of another stage, which would have no effect."""
        read_by = {0: (), 1: (), 2: (), 3: ("live_parameters",)}
        return without_effect(vars(self), vars(ZeroConfig()), "zero.stage", read_by)


@dataclass(frozen=True)
class ParallelConfig:
    """How a window is shared, beside ZeRO's sharing of lanes and weights."""

    sequence: int = setting(
        1,
        "ranks that share the windows of their lanes, each with the same number of consecutive "
        "segments; layers exchange only memory states",
        low=1,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = setting(200, "steps between checkpoints", low=1)
    keep_last: int = setting(2, "newest checkpoints to keep", low=2)
    keep_every: int = setting(
        0, "checkpoints at multiples of this are never pruned; 0: none", low=0
    )

    def problems(self) -> list[str]:
        """Multiples at most of which no checkpoint is written."""
        every, kept = self.every, self.keep_every
        if not kept or kept % every == 0 or every % kept == 0:
            return []
        return [
            f"keep_every: a checkpoint is written every {every} steps, so of the multiples of "
            f"{kept} only those of {math.lcm(every, kept)} would be kept; choose a multiple of "
            f"every, e.g. {-(-kept // every) * every}"
        ]


@dataclass(frozen=True)
class LaunchConfig:
    """Ranks that `pretrain train` launches itself; unused under torchrun or srun."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    ranks: int = setting(0, "ranks to start; 0: one per GPU, or one on CPU", low=0)


@dataclass(frozen=True)
class WatchdogConfig:
    """When an unresponsive rank and its peers are killed, after their stacks were written.

    That takes the last 28 s of a limit; less if the shortest is below 80 s, at most 0.475 of that.
    """

    start: float = setting(1800.0, "seconds until the first step is done", low=10.0)
    step: float = setting(
        600.0, "seconds per step, or per window of a validation or an evaluation", low=10.0
    )
    save: float = setting(1800.0, "seconds per checkpoint", low=10.0)


@dataclass(frozen=True)
class WandbConfig:
    """Tracking with Weights & Biases; the key is read from the environment and never stored."""

    mode: Literal["offline", "online", "disabled"] = setting(
        "offline", "offline: files in the run directory, for `wandb sync`"
    )
    project: str = setting("infini-pretrain", "project")
    entity: str = setting("", "team or user; empty: your default")
    name: str = setting("", "display name; empty: the run directory's name")

    def problems(self) -> list[str]:
        """A project that wandb refuses, which would be known once all ranks have started."""
        wrong = sorted(set(self.project) & set("/\\#?%:"))
        if self.mode != "disabled" and (wrong or len(self.project) > 128):
            return [
                f"project: {self.project!r}: wandb takes names of at most 128 characters without "
                "/ \\ # ? % and :; give such a one"
            ]
        return []


@dataclass(frozen=True)
class TensorBoardConfig:
    """Tracking with TensorBoard, of the same numbers under the same names."""

    enabled: bool = setting(
        False, "event files in the run directory's tensorboard/; needs the extra tensorboard"
    )
