"""How much a memory holds: multi-query associative recall by number of pairs and distance.

A prompt states pairs of a key and a value and, some segments later, asks for every key. The
*accuracy* is the share of keys after which the right value is the likeliest token, given the true
values of the keys before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from data_prep.recall import mqar
from data_prep.tokenizer.contract import Tokenizer
from pretrain.config.run import Weights
from pretrain.evaluate import recall, results
from pretrain.evaluate.progress import TokenProgress, to_stderr
from pretrain.evaluate.questions import Associations, EvaluationError
from pretrain.evaluate.results import Report
from pretrain.trained import Trained


def run(path: Path, asked: Associations, weights: Weights = "last") -> int:
    """Ask a run or checkpoint; print the table and write it into the run.

    `mqar-STEP.json` holds the numbers, `plots/mqar-STEP.png` is a heat map. Returns the exit code,
    0. Raises what `open_model`, `evaluate` and `publish` raise.
    """
    trained = results.open_model(path, weights)
    report = evaluate(trained, asked, to_stderr)
    results.publish(
        trained.run_directory,
        f"mqar-{trained.step}",
        report,
        measured=("rows",),
        table=table(report),
        figure=heat_map(report),
    )
    return 0


def evaluate(trained: Trained, asked: Associations, report: Callable[[str], None]) -> Report:
    """Ask for every value; `report` is given lines of progress.

    Returns JSON-able numbers: what was asked, `state_bytes`, the bytes of the memory of one
    document, and `rows`, each with pairs, distance, samples, the mean `tokens` before the first
    question, and `accuracy`. Raises EvaluationError where the model does not know the symbols, and
    ResultError where a logit is not finite.
    """
    _check(trained.tokenizer)
    segment = trained.config.model.segment
    total = sum(
        asked.samples(pairs) * (4 * pairs + distance * segment)
        for pairs in asked.pairs
        for distance in asked.distances
    )
    progress = TokenProgress("mqar", total, report)
    rows: list[dict[str, Any]] = []
    for pairs in asked.pairs:
        # Read together: prompts of all distances share their beginnings.
        prompts, firsts = zip(*_prompts(trained, asked, pairs, segment), strict=True)
        said = recall.answers(trained.model, prompts, firsts, progress)
        rows += _rows(asked, pairs, prompts, firsts, said)
    state = trained.model.initial_state(1, trained.device)
    return {
        **results.of_model(trained),
        **asdict(asked),
        "segment": segment,  # of the distances, also where attention spans several
        "state_bytes": sum(tensor.nbytes for layer in state for tensor in layer),
        "rows": rows,
    }


def _check(tokenizer: Tokenizer) -> None:
    """Raise EvaluationError unless each symbol is a token of its own."""
    ids = tokenizer.encode(mqar.SYMBOLS)
    if not len(ids) == len(np.unique(ids)) == len(mqar.SYMBOLS):
        raise EvaluationError(
            f"{tokenizer.path}: does not have a token for each key and value; expected a run that "
            "was trained on documents of `data-prep mqar`, with the tokenizer beside them"
        )


def _prompts(
    trained: Trained, asked: Associations, pairs: int, segment: int
) -> list[tuple[np.ndarray, int]]:
    """Prompts with their answers, and where these begin, by distance, then sample."""
    return [
        recall.laid_out(
            trained.tokenizer, mqar.document(asked.seed, number, pairs, distance * segment)
        )
        for distance in asked.distances
        for number in range(asked.samples(pairs))
    ]


def _rows(
    asked: Associations,
    pairs: int,
    prompts: Sequence[np.ndarray],
    firsts: Sequence[int],
    said: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """The accuracy at each distance, from the tokens `said` at the places of each answer."""
    # An answer is keys and values in turn.
    right = [
        (tokens == ids[first:])[1::2].mean()
        for tokens, ids, first in zip(said, prompts, firsts, strict=True)
    ]
    shape = (len(asked.distances), asked.samples(pairs))
    shares, tokens = (np.reshape(each, shape).mean(axis=1).tolist() for each in (right, firsts))
    return [
        {
            "pairs": pairs,
            "distance": distance,
            "samples": asked.samples(pairs),
            "tokens": before,
            "accuracy": share,
        }
        for distance, before, share in zip(asked.distances, tokens, shares, strict=True)
    ]


def accuracies(report: Report) -> np.ndarray:
    """The accuracy by distance and number of pairs: [distances, pairs]."""
    found = [row["accuracy"] for row in report["rows"]]
    return np.reshape(found, (len(report["pairs"]), len(report["distances"]))).T


def table(report: Report) -> str:
    """The report as text: a row per number of pairs, a column per distance; in percent."""
    distances = report["distances"]
    lines = [
        f"{results.step_of(report)}, memory {report['memory_kind']}, state of "
        f"{report['state_bytes']:,} bytes: values that are right, in %, by distance in segments "
        f"of {report['segment']}",
        " ".join([f"{'pairs':>6}", *(f"{distance:>6}" for distance in distances)]),
    ]
    for pairs, shares in zip(report["pairs"], accuracies(report).T, strict=True):
        lines.append(" ".join([f"{pairs:>6}", *(f"{100 * share:>6.1f}" for share in shares)]))
    return "\n".join(lines)


def heat_map(report: Report) -> Figure:
    """Accuracy by number of pairs and distance."""
    shares = accuracies(report)
    return results.heat_map(
        shares,
        np.vectorize("{:.0%}".format)(shares),
        ("pairs", list(map(str, report["pairs"]))),
        ("distance in segments", list(map(str, report["distances"]))),
        f"memory {report['memory_kind']}, {report['state_bytes']:,} bytes, "
        f"{results.step_of(report)}",
        "accuracy",
    )
