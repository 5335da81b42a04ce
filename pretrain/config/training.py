"""Settings of `train`: length, precision, intervals, and evaluations in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from data_prep.dataset.settings import group, setting
from pretrain.config.choices import without_effect

Checkpointing: TypeAlias = Literal["none", "selective", "full"]


class EvaluationTraits(NamedTuple):
    """What sets an evaluation in training apart."""

    settings: tuple[str, ...]
    """The settings of `train.evaluate[]` that this kind reads beside those that all of them do."""
    needed: tuple[str, ...]
    """Those of these that have no default."""


Needle: TypeAlias = Literal[
    "single", "multikey", "multivalue", "multiquery", "variables", "words", "qa1", "qa2", "qa3"
]
"""A task of `pretrain eval needles`."""

_QUESTIONS = ("lengths", "samples", "seed")

EVALUATIONS = {
    "passkey": EvaluationTraits((*_QUESTIONS, "depths"), ("lengths",)),
    "needles": EvaluationTraits((*_QUESTIONS, "filler", "tasks"), ("lengths", "filler")),
    "perplexity": EvaluationTraits(("data", "documents", "batch", "window_segments"), ("data",)),
}


@dataclass(frozen=True)
class EvaluationConfig:
    """An evaluation in training; its settings are the options of `pretrain eval`."""

    kind: Literal["passkey", "needles", "perplexity"] = setting(
        "passkey", "as `pretrain eval` names it"
    )
    every: int = setting(1000, "steps between two of them; 0: after the last step alone", low=0)
    name: str = setting("", "name in metrics; empty: the kind")
    lengths: list[int] = setting([], "passkey, needles: tokens of the prompts", low=1)
    samples: int = setting(4, "passkey, needles: prompts per cell", low=1)
    seed: int = setting(0, "passkey, needles: same seed, same prompts", low=0)
    depths: list[float] = setting(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        "passkey: places of the key, 0 the prompt's start, 1 its end",
        low=0.0,
        high=1.0,
    )
    tasks: list[Needle] = setting([], "needles: some of its tasks; empty: all")
    filler: str = setting("", "needles: data set directory of data-prep with books", path=True)
    data: str = setting(
        "", "perplexity: data set, the directory that data-prep wrote, or its URL", path=True
    )
    documents: int | None = setting(None, "perplexity: only the first N; none: all", low=1)
    batch: int | None = setting(
        None, "perplexity: documents per batch; none: as many as a micro-batch has windows", low=1
    )
    window_segments: int | None = setting(
        None, "perplexity: segments per window; none: train.window_segments", low=1
    )

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or self.kind

    @property
    def tasks_asked(self) -> list[str]:
        """The tasks of recall whose questions are asked."""
        own = {"passkey": ["passkey"], "needles": self.tasks or get_args(Needle)}
        return list(own.get(self.kind, ()))

    @property
    def depths_asked(self) -> Sequence[float | None]:
        """The places of what is asked for; None: drawn."""
        return self.depths if "depths" in EVALUATIONS[self.kind].settings else [None]

    def problems(self) -> list[str]:
        """What is missing or would have no effect."""
        read_by = {kind: traits.settings for kind, traits in EVALUATIONS.items()}
        found = without_effect(vars(self), vars(EvaluationConfig()), "kind", read_by)
        found += [
            f"{key}: not set, and kind={self.kind} needs it; give what `pretrain eval {self.kind}` "
            f"takes as --{key}"
            for key in EVALUATIONS[self.kind].needed
            if not getattr(self, key)
        ]
        if "depths" in EVALUATIONS[self.kind].settings and not self.depths:
            found.append("depths: none given; list some, e.g. [0, 0.5, 1]")
        for key in ("lengths", "depths", "tasks"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                found.append(f"{key}: {values} names one of them twice; list each once")
        if self.name in ("kind", "step"):
            found.append(f"name: {self.name!r} is a key of every record; choose another")
        return found


@dataclass(frozen=True)
class SpikeConfig:
    """Finite steps that are skipped as those that are not finite are."""

    deviations: float = setting(
        0.0,
        "skip a step whose loss or gradient norm is more than so many standard deviations above "
        "the mean of the last applied steps; 0: skip none",
        low=0.0,
    )
    steps: int = setting(
        128, "applied steps that the mean is of; no step is skipped before there are so many", low=2
    )

    def problems(self) -> list[str]:
        """Settings without effect."""
        if self.deviations or self.steps == SpikeConfig().steps:
            return []
        return ["steps: has no effect with deviations=0; remove it, or set deviations, e.g. to 6"]


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision and intervals of training."""

    steps: int = setting(1000, "optimizer steps", low=1)
    start_from: str = setting(
        "",
        "run directory, checkpoint or imported model whose weights initialize a new run; "
        "optimizer, schedule and data order start fresh",
        path=True,
    )
    window_segments: int = setting(16, "segments W of a window, the back-propagated length", low=1)
    micro_batch: int = setting(0, "lanes of a rank per forward and backward; 0: all of them", low=0)
    precision: Literal["float32", "bf16"] = setting("float32", "dtype of weights and activations")
    activation_checkpointing: Checkpointing = setting(
        "none",
        "what the backward computes again to save memory; selective: the feed-forward's hidden "
        "activations; full: each block, of which only the input is kept",
    )
    compile: bool = setting(
        False,
        "fuse what is not a matrix product with torch.compile; the first launch takes half a "
        "minute more",
    )
    clip_norm: float = setting(1.0, "global gradient norm to clip to; 0: no clipping", low=0.0)
    z_loss: float = setting(
        0.0,
        "coefficient of log(Z)^2 of each target in the loss, Z the sum of its exponentiated "
        "logits; PaLM has 0.0001",
        low=0.0,
    )
    spikes: SpikeConfig = group(SpikeConfig)
    max_skipped: int = setting(5, "skipped steps in a row after which the run stops", low=1)
    log_every: int = setting(10, "steps between log lines", low=1)
    validate_every: int = setting(200, "steps between validations; 0: none but the last", low=0)
    validation_windows: int = setting(
        8, "windows of each validation lane, the same for every run.seed", low=1
    )
    validate_ema: bool = setting(False, "validate the average of optim.ema_decay as well")
    evaluate: list[EvaluationConfig] = setting(
        [],
        "evaluations of the current weights, a list of {kind, every, name, ...}: passkey, needles "
        "or perplexity with the options of `pretrain eval`",
    )
    profile_steps: int = setting(
        0, "steps to profile in each attempt, into the run's profile/; 0: none", low=0
    )
    profile_after: int = setting(
        5,
        "steps of an attempt before the profiled ones; ZeRO-3 learns its order in the first two",
        low=0,
    )
    profile_ranks: Literal["first", "all"] = setting("first", "whose steps: rank 0's, or all")
    max_attempts_without_progress: int = setting(
        5,
        "consecutive attempts without a new checkpoint after which the run is not retried",
        low=1,
    )

    def problems(self) -> list[str]:
        """Evaluations that metrics could not tell apart, and profiles that would not be."""
        names = [one.label for one in self.evaluate]
        found = [
            f"evaluate: two evaluations have the name {name!r}; give each a different `name`"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if not self.profile_steps:
            found += [
                f"{name}: has no effect with profile_steps=0; remove it, or set profile_steps, "
                "e.g. to 3"
                for name in ("profile_after", "profile_ranks")
                if getattr(self, name) != getattr(TrainConfig, name)
            ]
        elif self.profile_after >= self.steps:
            found.append(
                f"profile_after: no step is left to profile after {self.profile_after} of "
                f"steps={self.steps}; lower it"
            )
        return found
