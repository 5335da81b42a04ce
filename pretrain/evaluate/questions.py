"""What an evaluation of recall asks; free of torch, so that a mistake is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.recall.tasks import TASKS


@dataclass(frozen=True)
class Asked:
    """Of every task, length in tokens and depth (None: drawn) so many samples."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float | None]
    samples: int
    seed: int

    def problems(self) -> list[str]:
        """Every reason why this cannot be asked, by the option of the command line."""
        found = [
            f"--tasks: {task} is not known; there are {', '.join(TASKS)}"
            for task in self.tasks
            if task not in TASKS
        ]
        found += [
            f"--lengths: {length} is not a number of tokens"
            for length in self.lengths
            if length < 1
        ]
        found += [
            f"--depths: {depth} is not between 0 (the prompt's start) and 1 (its end)"
            for depth in self.depths
            if depth is not None and not 0 <= depth <= 1
        ]
        for option, values in (
            ("--tasks", self.tasks),
            ("--lengths", self.lengths),
            ("--depths", self.depths),
        ):
            twice = [value for value in dict.fromkeys(values) if list(values).count(value) > 1]
            found += [f"{option}: {value} is given twice" for value in twice]
        if self.samples < 1:
            found.append(f"--samples: expected at least 1, found {self.samples}")
        if self.seed < 0:
            found.append(f"--seed: expected 0 or more, found {self.seed}")
        return found
