"""Bits per byte of models on whole documents, and what differences between them are sure of.

Intervals are bootstrap intervals over documents: 10,000 resamples, the same for every model, of
each document's nats averaged over seeds. Differences between models are therefore paired by
document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.evaluate import perplexity
from pretrain.evaluate.results import Report

DRAWS = 10_000
# Earlier positions are few tokens, mostly titles and heads of files.
_FIRST = 32


@dataclass(frozen=True)
class Scores:
    """A model's nats by seed and document, and the documents' bytes, ordered by id."""

    nats: np.ndarray  # [seeds, documents]
    bytes: np.ndarray  # [documents]

    @property
    def bits(self) -> float:
        """Bits per byte over all documents, averaged over seeds."""
        return float(self.nats.mean(axis=0).sum() / self.bytes.sum() / math.log(2))

    @property
    def of_seeds(self) -> list[float]:
        """Bits per byte over all documents, for each seed."""
        return [float(one) for one in self.nats.sum(axis=1) / self.bytes.sum() / math.log(2)]

    def drawn(self, draws: np.ndarray) -> np.ndarray:
        """Bits per byte [draws] for each resample of documents [draws, documents]."""
        nats = self.nats.mean(axis=0)[draws].sum(axis=1)
        bits: np.ndarray = nats / self.bytes[draws].sum(axis=1) / math.log(2)
        return bits


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of bootstrap values."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(scores: dict[str, Scores], base: str) -> list[dict[str, Any]]:
    """Bits per byte of each model and its gain over `base`, with intervals."""
    documents = len(scores[base].bytes)
    draws = np.random.default_rng(0).integers(documents, size=(DRAWS, documents))
    reference = scores[base].drawn(draws)
    rows = []
    for name, score in scores.items():
        drawn = score.drawn(draws)
        rows.append(
            {
                "model": name,
                "bits": score.bits,
                "interval": interval(drawn),
                "seeds": score.of_seeds,
                "gain": scores[base].bits - score.bits,
                "gain_interval": interval(reference - drawn),
            }
        )
    return rows


def scores_of(
    reports: Sequence[Report], first: int | None = None, end: int | None = None
) -> Scores:
    """The scores in a model's reports, one per seed.

    With `first`, of the ranges of positions from there on; with `end`, of those up to there.
    Documents without such a position are left out.
    """
    nats, sizes = [], []
    for report in reports:
        documents = sorted(report["by_document"], key=lambda document: document["id"])
        found = [_parts(document, first, end) for document in documents]
        nats.append([sum(map(_nats, parts)) for parts in found if parts])
        sizes = [sum(part["bytes"] for part in parts) for parts in found if parts]
    return Scores(np.array(nats), np.array(sizes))


def _parts(document: dict[str, Any], first: int | None, end: int | None) -> list[dict[str, Any]]:
    if first is None and end is None:
        return [document["total"]]
    return [
        row
        for row in document["positions"]
        if (first is None or row["first"] >= first) and (end is None or row["end"] <= end)
    ]


def _nats(part: dict[str, Any]) -> float:
    """Nats with memory, or without for a model that has none."""
    nats: dict[str, float] = part["nats"]
    return nats[perplexity.MEMORY if perplexity.MEMORY in nats else perplexity.NO_MEMORY]


def by_position(reports: dict[str, list[Report]], base: str) -> list[dict[str, Any]]:
    """`compare` for each range of positions that all documents have, except the very first."""
    documents = next(iter(reports.values()))[0]["by_document"]
    ranges = [{(row["first"], row["end"]) for row in one["positions"]} for one in documents]
    return [
        {
            "first": first,
            "end": end,
            "rows": compare(
                {name: scores_of(found, first, end) for name, found in reports.items()}, base
            ),
        }
        for first, end in sorted(set.intersection(*ranges))
        if end > _FIRST
    ]
