"""What an evaluation asks of a model; free of torch, so that mistakes are reported at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.dataset.settings import MistakeError


class EvaluationError(MistakeError):
    """An evaluation that cannot be done as asked."""


class ResultError(ValueError):
    """A result that is not finite, or that cannot be written."""


@dataclass(frozen=True)
class Questions:
    """`samples` of every task, length in tokens and depth (None: drawn for each)."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float | None]
    samples: int
    seed: int


@dataclass(frozen=True)
class Associations:
    """Values asked for, at least `answers` for every number of pairs and distance in segments."""

    pairs: Sequence[int]
    distances: Sequence[int]
    answers: int
    seed: int

    def samples(self, pairs: int) -> int:
        """Prompts per cell; each asks for all of its values."""
        return -(-self.answers // pairs)


@dataclass(frozen=True)
class Sampling:
    """At most `max_tokens` tokens: the likeliest ones at temperature 0, else drawn with `seed`.

    Raises EvaluationError for values that nothing can be sampled with.
    """

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.max_tokens >= 1 and 0 <= self.temperature < math.inf and 0 < self.top_p <= 1):
            raise EvaluationError(
                f"{self}: expected max_tokens of 1 or more, a temperature of 0 (greedy) or more, "
                "and top_p of more than 0 and at most 1"
            )
