"""What an evaluation of recall asks; free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """Of every task, length in tokens and depth (None: drawn) so many samples."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float | None]
    samples: int
    seed: int
