"""The whole configuration, and combinations of its sections that cannot work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.dataset import settings
from data_prep.dataset.settings import group, setting
from data_prep.dataset.wording import any_of, counted
from pretrain.config.choices import divisors
from pretrain.config.data import DataConfig, SourceConfig
from pretrain.config.memory import MemoryConfig
from pretrain.config.model import FLASH_HEADS, ModelConfig
from pretrain.config.optim import OptimConfig
from pretrain.config.run import (
    CheckpointConfig,
    LaunchConfig,
    ParallelConfig,
    RunConfig,
    TensorBoardConfig,
    WandbConfig,
    WatchdogConfig,
    ZeroConfig,
)
from pretrain.config.training import EvaluationConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    """Everything that `pretrain train` needs to know."""

    run: RunConfig = group(RunConfig)
    data: DataConfig = group(DataConfig)
    model: ModelConfig = group(ModelConfig)
    train: TrainConfig = group(TrainConfig)
    optim: OptimConfig = group(OptimConfig)
    zero: ZeroConfig = group(ZeroConfig)
    parallel: ParallelConfig = group(ParallelConfig)
    checkpoint: CheckpointConfig = group(CheckpointConfig)
    launch: LaunchConfig = group(LaunchConfig)
    watchdog: WatchdogConfig = group(WatchdogConfig)
    wandb: WandbConfig = group(WandbConfig)
    tensorboard: TensorBoardConfig = group(TensorBoardConfig)

    @property
    def window(self) -> int:
        """Tokens of a window."""
        return self.model.segment * self.train.window_segments

    @property
    def part(self) -> int:
        """Tokens of a window that a rank computes: all of them without sequence parallelism."""
        return self.window // self.parallel.sequence

    @property
    def unlearned_writing(self) -> str:
        """Why nothing trains what the model writes to its memory; empty: something does."""
        memory = self.model.memory
        weighted = "compressive" in memory.traits.settings
        if weighted and memory.compressive.reconstruction_weight == 0:
            return (
                "model.memory.compressive.reconstruction_weight: with 0, nothing trains the "
                "compression, which stays as it was drawn; raise it, e.g. to 0.0001"
            )
        if not memory.traits.learns_to_write:
            return ""
        if self.train.window_segments == 1:
            return (
                "train.window_segments: with 1, no gradient reaches what is written to the memory "
                f"of model.memory.kind={memory.kind}, so that it is not learned; raise it"
            )
        own = "autocompressor" in memory.traits.settings
        if own and memory.autocompressor.backprop_segments == 1:
            return (
                "model.memory.autocompressor.backprop_segments: with 1, no gradient reaches the "
                "summaries, so that they are not learned; raise it, e.g. to 2"
            )
        return ""

    def lanes_a_rank(self, ranks: int) -> int:
        """Lanes that a rank works on; the ranks of a sequence group work on the same ones."""
        return self.data.lanes * self.parallel.sequence // ranks

    def lanes_of_rank(self, rank: int, ranks: int) -> range:
        """The lanes that `rank` works on, a block: consecutive ranks make a sequence group."""
        share, group = self.lanes_a_rank(ranks), rank // self.parallel.sequence
        return range(group * share, (group + 1) * share)

    def tokens_of_rank(self, rank: int) -> slice:
        """The part of each of its lanes' windows that `rank` computes: whole segments."""
        first = rank % self.parallel.sequence * self.part
        return slice(first, first + self.part)

    def problems(self) -> list[str]:
        """Combinations that cannot work, checkable without data and devices."""
        found = []
        if not self.run.directory:
            found.append("run.directory: not set; it says where the run lives, e.g. runs/first")
        if self.train.window_segments % self.parallel.sequence:
            found.append(
                f"parallel.sequence: {self.parallel.sequence} ranks cannot share the "
                f"{counted(self.train.window_segments, 'segment')} of a window "
                "(train.window_segments) evenly; choose a divisor of them"
            )
        kind, traits = self.model.memory.kind, self.model.memory.traits
        if self.parallel.sequence > 1 and not traits.shares_windows:
            found.append(
                "parallel.sequence: ranks cannot share windows with "
                f"model.memory.kind={kind}; set it to 1"
            )
        segments = self.train.window_segments
        laid_out = self.model.span_problems("train.window_segments", segments)
        found += [f"model.{problem}" for problem in laid_out]
        if self.launch.ranks:
            found += self.rank_problems(self.launch.ranks)
        attention = self.model.local_attention
        if attention in FLASH_HEADS and self.train.precision != "bf16":
            found.append(
                f"model.local_attention: {attention} computes in bf16; set "
                "train.precision=bf16, or local_attention=sdpa"
            )
        if attention in FLASH_HEADS and self.launch.device == "cpu":
            found.append(f"model.local_attention: {attention} needs a GPU; set it to sdpa or auto")
        kernel, of_gpu = self.model.memory.kernel, self.model.memory.asks_for_a_gpu
        if of_gpu and self.train.precision != "bf16":
            found.append(
                f"model.memory.kernel: {kernel} computes in bf16; set train.precision=bf16, "
                "or kernel=torch"
            )
        if of_gpu and self.launch.device == "cpu":
            found.append(f"model.memory.kernel: {kernel} needs a GPU; set it to torch or auto")
        if self.data.preface and not traits.remembers:
            found.append(
                "data.preface: documents begin with the memory of a preface, and "
                f"model.memory.kind={kind} has no memory; leave one of them out"
            )
        found += [
            f"{key}.weights[{index}]: never holds, since train.steps={self.train.steps} and it "
            f"begins after step {phase[0]:.15g}; remove it, or raise train.steps"
            for key, source in self.data.sources.items()
            for index, phase in enumerate(source.weights)
            if phase and phase[0] >= self.train.steps
        ]
        if self.zero.stage == 0 and self.train.precision == "bf16":
            found.append(
                "zero.stage: 0 has no float32 master weights, which bf16 needs; choose 1 to 3"
            )
        if self.train.validate_ema and not self.optim.ema_decay:
            found.append(
                "train.validate_ema: there is no average of the weights; set optim.ema_decay, e.g. "
                "to 0.999"
            )
        if not self.data.validation:
            found += self._validation_problems()
        if self.optim.warmup_steps > self.train.steps:
            found.append(
                f"optim.warmup_steps: {self.optim.warmup_steps} is more than "
                f"train.steps={self.train.steps}; set it to at most that, or raise train.steps"
            )
        elif (
            self.optim.schedule == "wsd"
            and self.optim.warmup_steps + self.optim.decay_steps > self.train.steps
        ):
            left = self.train.steps - self.optim.warmup_steps
            found.append(
                "optim.decay_steps: warm-up and decay together are longer than "
                f"train.steps={self.train.steps}; set it to at most {left}, or raise train.steps"
            )
        return found

    def problems_of_new(self) -> list[str]:
        """What a run may not begin with: settings without effect, or with which none learns.

        They were once accepted, and checkpoints of such runs can still be read and resumed.
        """
        found = [f"model.memory.{problem}" for problem in self.model.memory.problems_of_new()]
        if self.model.init_std == 0 and not self.train.start_from:
            found.append(
                "model.init_std: with 0 all matrices begin as zeros, and most have no gradient; "
                "raise it, e.g. to 0.02"
            )
        spikes = self.train.spikes
        if spikes.deviations and spikes.steps >= self.train.steps:
            found.append(
                f"train.spikes.steps: no step is skipped before {spikes.steps} were applied, which "
                f"is never before the last of train.steps={self.train.steps}; lower it, or leave "
                "deviations out"
            )
        return found + [f"optim.{problem}" for problem in self.optim.problems_of_new()]

    def _validation_problems(self) -> list[str]:
        """Settings of validations where there are none; an interval of 0 asks for none."""
        train, default = self.train, TrainConfig()
        asked = {
            "validate_every": train.validate_every not in (0, default.validate_every),
            "validation_windows": train.validation_windows != default.validation_windows,
            "validate_ema": train.validate_ema,
        }
        return [
            f"train.{name}: there is nothing to validate on; set data.validation, or remove it"
            for name, is_asked in asked.items()
            if is_asked
        ]

    def fitting_ranks(self) -> list[int]:
        """The numbers of ranks that can share the lanes evenly, in whole micro-batches.

        They are multiples of `parallel.sequence`, since a sequence group has its lanes to itself.
        """
        units, rest = divmod(self.data.lanes, self.train.micro_batch or 1)
        groups = [] if rest else divisors(units)
        return [count * self.parallel.sequence for count in groups]

    def rank_problems(self, ranks: int) -> list[str]:
        """Why so many ranks cannot share lanes and windows; empty where they can."""
        fits, sequence = self.fitting_ranks(), self.parallel.sequence
        if ranks in fits:
            return []
        below, above = [n for n in fits if n < ranks][-3:], [n for n in fits if n > ranks][:3]
        choices = [f"{any_of(below + above)} ranks"] if fits else []
        if ranks % sequence:
            segments = self.train.window_segments
            sizes = divisors(math.gcd(ranks, segments))
            choices.append(f"parallel.sequence={any_of(sizes)}")
            return [
                f"parallel.sequence: {counted(ranks, 'rank is', 'ranks are')} not whole groups of "
                f"{sequence} that share a window; choose {', or '.join(choices)}"
            ]
        lanes, micro, groups = self.data.lanes, self.train.micro_batch or 1, ranks // sequence
        share = groups * micro
        near = [lanes // share * share, (lanes // share + 1) * share]
        if micro > 1 and lanes % groups == 0:
            choices.append(f"a train.micro_batch that divides {lanes // groups}")
        choices.append(f"data.lanes={any_of([count for count in near if count])}")
        parts = f"in micro-batches of {micro} " if micro > 1 else ""
        grouped = f" in groups of {sequence} (parallel.sequence)" if sequence > 1 else ""
        return [
            f"data.lanes: {counted(lanes, 'lane')} cannot be shared evenly {parts}by {ranks} "
            f"ranks{grouped}; choose {', or '.join(choices)}"
        ]


@dataclass(frozen=True)
class ImportConfig:
    """Settings that an imported model lacks, chosen at import."""

    segment: int = setting(2048, "tokens of a segment N, the reach of local attention", low=1)
    window_segments: int = setting(
        16, "segments that evaluation and generation compute at once", low=1
    )
    memory: MemoryConfig = group(MemoryConfig)

    def problems(self) -> list[str]:
        """Combinations that cannot work."""
        model = ModelConfig(segment=self.segment, memory=self.memory)
        return model.span_problems("window_segments", self.window_segments)


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `key=value` overrides. Raises SettingsError."""
    return settings.load(Config, path, overrides)


def describe() -> list[str]:
    """Every key with its default and meaning."""
    return (
        settings.describe(Config)
        + settings.describe(SourceConfig, "data.mix[].")
        + settings.describe(EvaluationConfig, "train.evaluate[].")
    )
