"""Numbers of a run's records as curves over steps, whatever a version of the trainer records."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.report.runs import Records, Run

Points = tuple[np.ndarray, np.ndarray]
"""Steps [n] and values [n], float64; a value that was not finite is NaN."""

# Not measured: where a record belongs, or what has its own place in the report.
_LEFT_OUT = {"kind", "step", "time", "eta_seconds", "stragglers"}
# Of more curves than these the first are kept: sources, layers, cells of a table.
_MOST = 64
# Fractions that say which row of a table it is, not what was measured.
_OF_A_ROW = {"depth", "share"}


@dataclass
class Family:
    """The numbers under one key of one kind of record.

    `curves` by name: "" for a single number; layers, from "1"; or the names in a mapping.
    """

    kind: str
    key: str
    layers: bool = False
    curves: dict[str, Points] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        """Whether it is one number a record."""
        return list(self.curves) == [""]

    def mean(self) -> Points:
        """The mean of its curves by step, of those that have a value there."""
        steps = np.concatenate([x for x, _ in self.curves.values()])
        values = np.concatenate([y for _, y in self.curves.values()])
        found, index = np.unique(steps, return_inverse=True)
        sums, counts = np.zeros(len(found)), np.zeros(len(found))
        np.add.at(sums, index, values)
        np.add.at(counts, index, 1)
        return found, sums / counts


def families(run: Run) -> dict[tuple[str, str], Family]:
    """Every number of the run's records, by kind of record and key."""
    found: dict[tuple[str, str], Family] = {}
    for kind, records in run.records.items():
        for key in dict.fromkeys(key for record in records for key in record):
            family = _family(kind, key, records) if key not in _LEFT_OUT else None
            if family is not None:
                found[kind, key] = family
    return found


def _family(kind: str, key: str, records: Records) -> Family | None:
    """None where the key has no number, or never one (as the MFU of a device of unknown peak)."""
    gathered: dict[str, tuple[list[int], list[float]]] = {}
    layers = False
    for record in records:
        value = record.get(key, _ABSENT)
        if value is _ABSENT:
            continue
        layers |= isinstance(value, list) and not any(isinstance(x, Mapping) for x in value)
        for name, number in numbers(value):
            if name not in gathered and len(gathered) == _MOST:
                continue
            steps, values = gathered.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(number)
    curves = {
        name: (np.array(steps, float), np.array(values, float))
        for name, (steps, values) in gathered.items()
    }
    if not curves or (key == "mfu" and all(np.isnan(y).all() for _, y in curves.values())):
        return None
    return Family(kind, key, layers, curves)


_ABSENT = object()


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a value by name; None is a number that was not finite.

    A list has one entry per layer, by its number from 1, a list of lists the mean of each; of a
    table, a list of mappings, each row is named by what is no share: task, length, depth.
    """
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield name, math.nan if value is None else _float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(item, f"{name} {key}".strip())
    elif isinstance(value, list):
        for layer, item in enumerate(value, 1):
            if isinstance(item, Mapping):
                yield from _row(item, name)
            else:
                yield f"{name} {layer}".strip(), _mean(item)


def _row(row: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    own = [key for key, item in row.items() if key in _OF_A_ROW or not isinstance(item, float)]
    label = " ".join([name, *(str(row[key]) for key in own if row[key] is not None)]).strip()
    for key, item in row.items():
        if key not in own:
            yield f"{label} {key.replace('_', ' ')}", _float(item)


def _mean(value: Any) -> float:
    if isinstance(value, list) and value:
        with contextlib.suppress(TypeError, OverflowError):  # the usual case, of numbers alone
            return _float(sum(value) / len(value))
    found = [number for _, number in numbers(value)]
    return sum(found) / len(found) if found else math.nan


def _float(value: float) -> float:
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan
