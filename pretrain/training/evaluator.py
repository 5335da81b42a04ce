"""Evaluations of the current weights while a run trains: `train.evaluate`.

They are those of `pretrain eval`, on the model that is being trained: under ZeRO-3 each layer's
weights are gathered as in a step, so all ranks compute the same windows in step, each all of it.
What is computed depends on prompts and documents alone, never on what the model says. Nothing that
the run depends on is changed: weights, memories, places in the data, random states.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_prep.dataset.shards import DataError
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer import tokenizer
from pretrain.checkpoint.ranks import Ranks, agreed, of_first
from pretrain.config.root import Config
from pretrain.config.training import EvaluationConfig
from pretrain.evaluate import perplexity, recall
from pretrain.evaluate.progress import Pace
from pretrain.evaluate.questions import EvaluationError, Questions, ResultError
from pretrain.model import compiling
from pretrain.trained import Learned
from pretrain.training.engine import Engine
from pretrain.training.metrics import METRICS_FILE, records_of

T = TypeVar("T")

KIND = "evaluation"
"""Of the records in `metrics.jsonl`."""


class EvaluationStoppedError(Exception):
    """A signal ended an evaluation, on all ranks together."""


class Evaluation(NamedTuple):
    """The result of an evaluation."""

    numbers: dict[str, Any]
    """By name; `error`, a text, where it failed."""
    line: str
    seconds: float


@dataclass(frozen=True)
class Evaluator:
    """Runs the evaluations of a run in `directory`; all ranks take part."""

    config: Config
    engine: Engine
    ranks: Ranks
    directory: Path

    def due(self, step: int) -> list[EvaluationConfig]:
        """Those that belong to the state after `step` steps."""
        last = step == self.config.train.steps
        return [
            one
            for one in self.config.train.evaluate
            if step and (last or (one.every and step % one.every == 0))
        ]

    def missed(self, step: int) -> list[EvaluationConfig]:
        """Those of `due` of which the run has no record: it ended before them.

        To be called on every rank. Raises CheckpointError where the records cannot be read.
        """
        due = self.due(step)
        if not due:
            return []

        def recorded() -> list[str]:
            own = records_of(self.directory / METRICS_FILE, KIND, step)
            return [name for record in own for name in record]

        known = of_first(self.ranks, recorded)
        return [one for one in due if one.label not in known]

    def run(
        self,
        one: EvaluationConfig,
        step: int,
        beat: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> Evaluation:
        """Evaluate the current weights, those after `step` steps.

        `beat` is called at each window. Where the evaluation fails on any rank, the result is the
        reason, on all of them. Raises EvaluationStoppedError once `stopping` is true on any rank.
        """

        def pace(action: Callable[[], T]) -> T:
            beat()
            if self.ranks.sum([float(stopping())]) != [0.0]:
                raise EvaluationStoppedError
            return agreed(self.ranks, action, ResultError)

        began = time.perf_counter()
        try:
            with self.engine.evaluating() as model, compiling.left_out():
                own = pace(lambda: tokenizer.load(tokenizer.find(self.directory)))
                numbers, line = self._measured(one, Learned(self.config, model, step, own), pace)
        except (EvaluationError, ResultError, DataError) as error:
            numbers, line = {"error": str(error)}, f"failed: {error}"
        return Evaluation(numbers, line, time.perf_counter() - began)

    def _measured(
        self, one: EvaluationConfig, learned: Learned, pace: Pace
    ) -> tuple[dict[str, Any], str]:
        """Its numbers, and a line for the log."""
        windows = self.config.train.micro_batch or self.config.lanes_a_rank(self.ranks.size)
        if one.kind == "perplexity":
            report = perplexity.evaluate(
                learned,
                one.data,
                window_segments=one.window_segments,
                max_documents=one.documents,
                batch=one.batch or windows,
                report=_unread,
                pace=pace,
            )
            return perplexity.numbers(report), perplexity.line(report)
        haystack = Haystack.repeated()
        if one.kind == "needles":
            haystack = pace(functools.partial(Haystack.of_books, Path(one.filler)))
        # No more at once than in a step, beside whose weights and states there is room for it.
        asked = Questions(one.tasks_asked, one.lengths, one.depths_asked, one.samples, one.seed)
        report = recall.evaluate(
            learned, haystack, asked, _unread, pace, windows * self.config.part
        )
        return recall.numbers(report), recall.line(report)


def _unread(line: str) -> None:
    """Progress goes to the watchdog."""
