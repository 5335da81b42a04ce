"""Optimizers by the steps and seconds in which they reach AdamW's final loss on novels.

    python tools/recipes/optimizers.py CORPUS OUT [--seeds 3] [--budget 0.7] [--reports DIR]
        [--jobs 1] [key=value ...]

CORPUS holds novels as configs/data/novels_train.yaml and novels_val.yaml name them. Each optimizer
is trained by configs/novels_cpu.yaml at each rate of a small grid for a third of the steps
(--search) with seed 1, and with every seed at the rate of the lowest final validation loss. AdamW
is trained for all steps, and its final loss with a seed is that seed's target, since a seed is also
an order of the data. The others are trained for a part of the steps (--budget), and those that are
not as good as AdamW then, on average over seeds, for all of them. The schedule is fitted to the
steps of each run, since a schedule that still has to fall tells less. After an interruption, the
same command continues with what is not finished.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import commands
import evidence

from data_prep.dataset.settings import SettingsError
from pretrain.config import root as configuration
from pretrain.evaluate.results import Report
from pretrain.training.metrics import METRICS_FILE, read_records

CONFIG = commands.CONFIGS / "novels_cpu.yaml"
# Peak rates; the middle one of AdamW is the recipe's.
GRID: Mapping[str, tuple[float, ...]] = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "muon": (4e-3, 8e-3, 0.016),
    "adafactor": (0.02, 0.04, 0.08),
}


@dataclass(frozen=True)
class Curve:
    """A run's validation losses, by step, and the median of its seconds per step of training."""

    losses: dict[int, float]
    seconds_per_step: float

    @property
    def final(self) -> float:
        """The loss after the last step."""
        return self.losses[max(self.losses)]

    def reaches(self, loss: float) -> float | None:
        """The step at which the loss is first as low, linear between validations; None: never."""
        before: tuple[int, float] | None = None
        for step, found in sorted(self.losses.items()):
            if found <= loss:
                if before is None or found == before[1]:
                    return float(step)
                return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - found)
            before = step, found
        return None


@dataclass(frozen=True)
class Result:
    """What an optimizer did at its best rate, by seed."""

    name: str
    tried: dict[float, float]
    """Final loss of each rate of the grid, after the steps of the search."""
    rate: float
    steps: int
    curves: list[Curve]

    @property
    def finals(self) -> list[float]:
        """The loss after the last step, of each seed."""
        return [curve.final for curve in self.curves]


def row(result: Result, targets: Sequence[float]) -> dict[str, str]:
    """The optimizer's cells of the table; averages are of the seeds that reached their targets."""
    reached = [
        (curve.reaches(target), curve.seconds_per_step)
        for curve, target in zip(result.curves, targets, strict=True)
    ]
    steps = [step for step, _ in reached if step is not None]
    seconds = [step * each for step, each in reached if step is not None]
    missed = "" if len(steps) == len(reached) else f" ({len(steps)} of {len(reached)} seeds)"
    return {
        "optimizer": result.name,
        "peak rate": f"{result.rate:g}",
        "steps": f"{result.steps}",
        "final loss": f"{mean(result.finals):.4f}",
        "by seed": ", ".join(f"{final:.4f}" for final in result.finals),
        "steps to the target": f"{mean(steps):.0f}{missed}" if steps else "not reached",
        "seconds to it": f"{mean(seconds):.0f}" if seconds else "",
        "seconds per step": f"{mean(one.seconds_per_step for one in result.curves):.2f}",
    }


def searched(tried: Mapping[float, float]) -> str:
    """The rates of a grid, each with its loss."""
    return ", ".join(f"{rate:g} ({loss:.4f})" for rate, loss in tried.items())


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run of each sort."""

    full: int
    search: int
    """Of the runs that choose the rate."""
    fewer: int
    """Of the first runs of all but the baseline."""

    @classmethod
    def of(cls, full: int, search: float, budget: float) -> Steps:
        """`search` and `budget` are parts of `full`."""
        return cls(full, round(full * search), round(full * budget))


def table(results: Sequence[Result], steps: Steps) -> str:
    """The comparison in Markdown; the first result is the baseline."""
    base = results[0]
    rows = [row(result, base.finals) for result in results]
    lines = [
        f"Target: {base.name}'s final validation loss (nats a token) with the same seed after "
        f"{steps.full} steps; {len(base.curves)} seeds; rates by runs of {steps.search} steps",
        "",
        f"| {' | '.join(rows[0])} |",
        "|" + "---|" * len(rows[0]),
        *(f"| {' | '.join(cells.values())} |" for cells in rows),
        "",
        "Rates tried, with the final loss of the search:",
        "",
        *(f"- {one.name}: {searched(one.tried)}" for one in results),
    ]
    return "\n".join(lines) + "\n"


class Trainer:
    """Trains what is missing, on data that are made for the first such run.

    `words` are settings of all runs; `commits` are those of the curves asked for so far.
    """

    def __init__(self, parsed: argparse.Namespace, words: Sequence[str]) -> None:
        self._out, self._config, self._jobs = parsed.out, parsed.config, parsed.jobs
        self._corpus, self._words = parsed.corpus, list(words)
        self._reports = evidence.of(parsed)
        self._preparing, self._sets = threading.Lock(), list[str]()
        self.commits: set[str] = set()

    def curve(self, name: str, rate: float, seed: int, steps: int) -> Curve:
        """The run's curve."""
        run = f"{name}-{rate:g}-{seed}-{steps}"
        own = [f"optim.name={name}", f"optim.lr={rate:g}", f"run.seed={seed}",
               f"train.steps={steps}"]  # fmt: skip
        settings = [*self._words, *own]
        made_by = evidence.made_by(self._config, settings)
        found = self._reports.once(run, made_by, lambda: self._trained(run, settings))
        losses = {int(step): loss for step, loss in found["losses"].items()}
        self.commits.add(found["commit"])
        return Curve(losses, found["seconds_per_step"])

    def _trained(self, name: str, settings: Sequence[str]) -> Report:
        run = self._out / "runs" / name
        places = [*self._prepared(), f"run.directory={run}"]
        commands.run("pretrain", "train", self._config, *settings, *places)
        records = list(read_records(run / METRICS_FILE))
        losses = {r["step"]: r["loss"] for r in records if r["kind"] == "validation"}
        times = [r["seconds_per_step"] for r in records if r["kind"] == "train"]
        return {"losses": losses, "seconds_per_step": median(times)}

    def _prepared(self) -> list[str]:
        """The settings of the data, which are made if they are missing: once, for all threads."""
        with self._preparing:
            if not self._sets:
                evidence.begin(self._out, evidence.made_by(self._config, self._words))
                train, validation = commands.prepare_both(
                    "novels", self._corpus, self._out / "data"
                )
                self._sets = [f"data.train={train}", f"data.validation={validation}"]
            return self._sets

    def result(
        self, name: str, rates: Sequence[float], seeds: int, plan: Steps, base: Result | None
    ) -> Result:
        """The optimizer at its best rate with every seed, with fewer steps if these are enough.

        `base` is the baseline, whose final losses are the targets; None while it is itself trained.
        """
        found = self._curves((name, rate, 1, plan.search) for rate in rates)
        tried = {rate: curve.final for rate, curve in zip(rates, found, strict=True)}
        best, all_seeds = min(tried, key=tried.__getitem__), range(1, seeds + 1)
        if base and plan.fewer < plan.full:
            curves = self._curves((name, best, seed, plan.fewer) for seed in all_seeds)
            shorter = Result(name, tried, best, plan.fewer, curves)
            if mean(shorter.finals) <= mean(base.finals):
                return shorter
        curves = self._curves((name, best, seed, plan.full) for seed in all_seeds)
        return Result(name, tried, best, plan.full, curves)

    def _curves(self, runs: Iterable[tuple[str, float, int, int]]) -> list[Curve]:
        return commands.each(self._jobs, lambda one: self.curve(*one), runs)


def main(words: Sequence[str] | None = None) -> None:
    """Prepare and train whatever is missing, then write the table."""
    parser = commands.parser(
        __doc__,
        ("corpus", "directory of the novels"),
        ("out", "directory of data, runs and the table"),
        of="all runs",
    )
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe of the model")
    parser.add_argument("--seeds", type=commands.number(1), default=3, help="runs at the best rate")
    parser.add_argument(
        "--search", type=commands.positive, default=1 / 3, help="part for choosing the rate"
    )
    parser.add_argument(
        "--budget", type=commands.positive, default=0.7, help="part of the steps to try first"
    )
    parser.add_argument(
        "--rates", type=commands.number(0), default=0, help="first rates of a grid; 0: all"
    )
    commands.add_jobs(parser)
    evidence.add_option(parser)
    parsed = parser.parse_intermixed_args(words)
    out: Path = parsed.out
    settings = ["train.validate_every=25", "wandb.mode=disabled", *parsed.settings]
    places = [f"data.train={out}", f"data.validation={out}", f"run.directory={out}"]
    try:
        config = configuration.load(parsed.config, [*settings, *places])
    except SettingsError as error:
        sys.exit(str(error))
    trainer = Trainer(parsed, settings)
    results: list[Result] = []
    steps = Steps.of(config.train.steps, parsed.search, parsed.budget)
    for name, grid in GRID.items():
        rates = grid[: parsed.rates or None]
        base = results[0] if results else None
        results.append(trainer.result(name, rates, parsed.seeds, steps, base))
        # After each, so that a comparison that is stopped early has a table already.
        text = f"{table(results, steps)}\n{evidence.commits(trainer.commits)}\n"
        commands.conclude(out / "optimizers", text, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
