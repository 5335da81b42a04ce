"""Wording of what a setting excludes, and the numbers that would fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.dataset.wording import any_of


def without_effect(
    chosen: Mapping[str, object],
    defaults: Mapping[str, object],
    key: str,
    read_by: Mapping[Any, Sequence[str]],
) -> list[str]:
    """Settings that are not their default and that only other choices of `key` read.

    `read_by` says which settings a choice reads beside those that all of them do.
    """
    own = chosen[key.rpartition(".")[2]]
    found = []
    for name in dict.fromkeys(name for names in read_by.values() for name in names):
        readers = [choice for choice, names in read_by.items() if name in names]
        if own not in readers and chosen[name] != defaults[name]:
            found.append(
                f"{name}: has no effect with {key}={own}; remove it, or set {key}={any_of(readers)}"
            )
    return found


def divisors(number: int) -> list[int]:
    """In order; quickly also where a number of tokens was given as one of lanes."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})
