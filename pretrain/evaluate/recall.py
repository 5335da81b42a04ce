"""How well a model recalls what lies far back in its prompt: passkeys, needles, stories.

A question is a prompt of a given length and its answer. The answer is *exact* if every token of it
is the likeliest after the tokens before it, which is what greedy decoding would say. *Token
accuracy* is the share of its tokens that are, without those of white space alone. Tasks of RULER
are also scored by its own rule (ruler.py).

All questions of a length go through together, window by window, so that the activations of one
window alone are in memory. Lanes whose prompts have been the same so far are one lane: a passkey's
filler is read once for all depths until the keys come, and the numbers are those of each prompt
alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_prep.dataset import durable, shards
from data_prep.dataset.command import TOKENS
from data_prep.dataset.wording import counted
from data_prep.recall import tasks
from data_prep.recall.pair import Pair
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer.contract import Tokenizer
from pretrain.config.run import Weights
from pretrain.evaluate import results, ruler
from pretrain.evaluate.generate import finite
from pretrain.evaluate.progress import Pace, TokenProgress, alone, to_stderr
from pretrain.evaluate.questions import EvaluationError, Questions
from pretrain.evaluate.results import Report
from pretrain.model.state import of_lanes
from pretrain.model.transformer import Output, Transformer
from pretrain.trained import Learned, Trained

if TYPE_CHECKING:  # not imported by the ranks of a training that is evaluated
    from matplotlib.figure import Figure

# Tokens of all lanes that are computed at once, unless a span of each has more.
_AT_ONCE = {"cpu": 2**14, "cuda": 2**18}


@dataclass(frozen=True)
class _Question:
    """A prompt and its answer as `ids` [n]; the answer's begin at `first`."""

    depth: float | None
    ids: np.ndarray
    first: int
    pair: Pair


def run(
    path: Path, name: str, asked: Questions, filler: Path | None, weights: Weights = "last"
) -> int:
    """Put the questions to a run or checkpoint; print the table and write it into the run.

    `NAME-STEP.json` holds the numbers; with depths `plots/NAME-STEP.png` is a heat map. `filler` is
    a data set with books, None: the passkey's own filler. Returns the exit code, 0. Raises what
    `open_model`, `Haystack.of_books`, `evaluate` and `publish` raise.
    """
    trained = results.open_model(path, weights)
    report: Report = {"filler": None}
    haystack = Haystack.repeated()
    if filler is not None:
        haystack = Haystack.of_books(filler)
        report = {
            "filler": filler.resolve().name,
            "filler_sha256": durable.sha256_of(filler / shards.MANIFEST),
        }
    report |= evaluate(trained, haystack, asked, to_stderr)
    results.publish(
        trained.run_directory,
        f"{name}-{trained.step}",
        report,
        measured=("rows",),
        table=table(report),
        figure=heat_map(report) if len(asked.depths) > 1 else None,
    )
    return 0


def evaluate(
    learned: Learned,
    haystack: Haystack,
    asked: Questions,
    report: Callable[[str], None],
    pace: Pace = alone,
    at_once: int | None = None,
) -> Report:
    """Ask every question; `report` is given lines of progress.

    At most `at_once` tokens (None: as many as the device computes well) are computed at once,
    unless a span of each lane has more.
    Returns JSON-able numbers: what was asked, and `rows`, each with task, length, depth, samples,
    the mean `tokens` of the prompts, the shares `exact` and `token_accuracy`, and for tasks of
    RULER `ruler`, the share by its rule.
    Raises EvaluationError with all lengths that are less than a task's own text has, before any
    is asked for, or where an answer has no tokens, and ResultError where a logit is not finite.
    """
    if short := pace(functools.partial(_too_short, learned.tokenizer, asked)):
        raise EvaluationError("; ".join(f"--lengths: {reason}" for reason in short))
    total = sum(asked.lengths) * len(asked.tasks) * len(asked.depths) * asked.samples
    progress = TokenProgress("recall", total, report)
    rows: list[dict[str, Any]] = []
    for task in asked.tasks:
        for length in asked.lengths:
            questions = pace(
                functools.partial(_questions, learned.tokenizer, haystack, asked, task, length)
            )
            prompts = [question.ids for question in questions]
            firsts = [question.first for question in questions]
            is_partitioned = not isinstance(learned, Trained)
            given = answers(learned.model, prompts, firsts, progress, pace, at_once, is_partitioned)
            found = _rows(learned.tokenizer, task, length, questions, given)
            # Generation is not in step with the other ranks of a training.
            if task in ruler.TOKENS and isinstance(learned, Trained):
                shares = _by_ruler(learned, task, questions, given, report)
                found = [{**row, "ruler": shares[row["depth"]]} for row in found]
            rows += found
    return {**results.of_model(learned), **asdict(asked), "rows": rows}


def numbers(report: Report) -> dict[str, Any]:
    """`exact` and `token_accuracy` by task, length and (where it was asked for) depth."""
    found: dict[str, Any] = {}
    for row in report["rows"]:
        cell = found.setdefault(row["task"], {}).setdefault(str(row["length"]), {})
        shares = {share: row[share] for share in ("exact", "token_accuracy")}
        cell.update(shares if row["depth"] is None else {f"{row['depth']:g}": shares})
    return found


def line(report: Report) -> str:
    """The means over depths in one line."""
    cells = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in report["rows"]):
        own = [r for r in report["rows"] if (r["task"], r["length"]) == (task, length)]
        exact, tokens = (
            sum(row[share] for row in own) / len(own) for share in ("exact", "token_accuracy")
        )
        cells.append(f"{task} {TOKENS.show(length)} {exact:.0%} / {tokens:.0%}")
    return f"exact answers / right tokens: {', '.join(cells)}"


def _too_short(tokenizer: Tokenizer, asked: Questions) -> list[str]:
    """Which lengths have no room for a task, a sentence each."""
    return [
        reason
        for task in asked.tasks
        for reason in tasks.too_short(
            task,
            tokenizer,
            asked.lengths,
            seed=asked.seed,
            samples=asked.samples,
            depths=asked.depths,
        )
    ]


def _questions(
    tokenizer: Tokenizer, haystack: Haystack, asked: Questions, task: str, length: int
) -> list[_Question]:
    """By depth, then sample; the samples of a number ask the same at every depth."""
    found = []
    for depth in asked.depths:
        for number in range(asked.samples):
            pair = tasks.document(
                task, haystack, tokenizer, length, seed=asked.seed, number=number, depth=depth
            )
            found.append(_Question(depth, *laid_out(tokenizer, pair), pair))
    return found


def laid_out(tokenizer: Tokenizer, pair: Pair) -> tuple[np.ndarray, int]:
    """BOS, the prompt and its answer as ids [n], int32, and where the answer begins.

    Raises EvaluationError where the tokenizer does not tell the answer from others.
    """
    prompt, whole = (tokenizer.encode(text) for text in (pair.prompt, "".join(pair)))
    # A token that reaches from the prompt into the answer belongs to the answer.
    shared = min(len(prompt), len(whole))
    same = prompt[:shared] == whole[:shared]
    first = shared if same.all() else int(same.argmin())
    said = tokenizer.decode_bytes(whole[first:], inside=True)
    if not said.strip() or tokenizer.unk_id in whole[first:].tolist():
        raise EvaluationError(
            f"{tokenizer.path}: has no tokens for the answer {pair.answer.strip()!r}, so that any "
            "other would count as right; expected a run whose tokenizer has its characters"
        )
    head = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int64)
    return np.concatenate([head, whole]).astype(np.int32), first + len(head)


def answers(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    firsts: Sequence[int],
    progress: TokenProgress,
    pace: Pace = alone,
    at_once: int | None = None,
    is_partitioned: bool = False,
) -> list[np.ndarray]:
    """For each of `prompts` [n] the likeliest tokens at its places `first`, ..., n - 1, in order.

    Each is predicted from the tokens before it. `is_partitioned`: the model is a training's, whose
    modules gather their weights. Raises ResultError where a logit is not finite.
    """
    device = model.embedding.weight.device
    found: list[list[int]] = [[] for _ in prompts]
    state = model.initial_state(1, device)
    # Not inference mode, whose tensors autograd refuses: ZeRO-3 may keep what it gathers.
    with torch.no_grad():
        for begin, end, lanes, came_from in _shared(model, prompts, at_once):
            state = of_lanes(state, came_from)
            tokens = torch.from_numpy(_padded([prompts[rows[0]][begin:end] for rows in lanes]))
            starts = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
            starts[:, 0] = begin == 0
            # The token at a place is predicted at the one before it.
            wanted = [
                (lane, place - begin, row)
                for lane, rows in enumerate(lanes)
                for row in rows
                for place in range(max(firsts[row] - 1, begin), min(len(prompts[row]) - 1, end))
            ]
            at = torch.tensor(wanted, dtype=torch.int64, device=device).view(len(wanted), 3)
            if wanted or is_partitioned:
                places = at[:, 0], at[:, 1]
                output: Output = model(tokens.to(device), starts, state, places=places)
                state = output.state
                said = pace(functools.partial(_likeliest, output.logits))
                for (_, _, row), token in zip(wanted, said, strict=True):
                    found[row].append(token)
            else:
                state = model.memory_after(tokens.to(device), starts, state)
            rows = [row for members in lanes for row in members]
            progress.add(sum(min(len(prompts[row]), end) - begin for row in rows))
    return [np.array(tokens, np.int64) for tokens in found]


def _padded(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Side by side, with zeros behind the shorter ones: int64 [parts, the longest]."""
    tokens = np.zeros((len(parts), max(map(len, parts))), np.int64)
    for row, part in zip(tokens, parts, strict=True):
        row[: len(part)] = part
    return tokens


def _likeliest(logits: Tensor | None) -> list[int]:
    """Of each place."""
    assert logits is not None
    found: list[int] = finite(logits).argmax(dim=-1).tolist()
    return found


def _shared(
    model: Transformer, prompts: Sequence[np.ndarray], at_once: int | None = None
) -> Iterator[tuple[int, int, list[list[int]], list[int]]]:
    """(begin, end, lanes, came from) of each window.

    A lane is the prompts that have been the same up to `end`, by their numbers; it came from a lane
    of the window before. A prompt that has ended is in no lane.
    """
    span = model.config.span
    at_once = at_once or _AT_ONCE["cpu" if model.embedding.weight.is_cpu else "cuda"]
    lanes = [list(range(len(prompts)))]
    begin, longest = 0, max(map(len, prompts))
    while begin < longest:
        # Where lanes part within the window, there may be as many as there are prompts.
        count = sum(len(members) for members in lanes)
        end = min(begin + span * max(1, at_once // (span * count)), longest)
        parted: dict[tuple[int, bytes], list[int]] = {}
        for lane, members in enumerate(lanes):
            for row in members:
                part = prompts[row][begin:end]
                if len(part):
                    parted.setdefault((lane, part.tobytes()), []).append(row)
        lanes = list(parted.values())
        yield begin, end, lanes, [lane for lane, _ in parted]
        begin = end


def _rows(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    questions: Sequence[_Question],
    given: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """The shares of each depth, from the tokens `given` to each question."""
    rows = []
    for depth in dict.fromkeys(question.depth for question in questions):
        own = [pair for pair in zip(questions, given, strict=True) if pair[0].depth == depth]
        hits = [tokens == question.ids[question.first :] for question, tokens in own]
        # Tokens of white space alone are no part of an answer.
        counted = [
            bool(tokenizer.decode_bytes([id], inside=True).strip())
            for question, _ in own
            for id in question.ids[question.first :]
        ]
        rows.append(
            {
                "task": task,
                "length": length,
                "depth": depth,
                "samples": len(own),
                "tokens": sum(question.first for question, _ in own) / len(own),
                "exact": sum(bool(each.all()) for each in hits) / len(own),
                "token_accuracy": int(np.concatenate(hits)[counted].sum()) / sum(counted),
            }
        )
    return rows


def _by_ruler(
    trained: Trained,
    task: str,
    questions: Sequence[_Question],
    given: Sequence[np.ndarray],
    report: Callable[[str], None],
) -> dict[float | None, float]:
    """The mean share of each depth by RULER's rule."""
    shares: dict[float | None, list[float]] = {}
    for question, tokens in zip(questions, given, strict=True):
        is_exact = np.array_equal(tokens, question.ids[question.first :])
        share = ruler.share(trained, task, question.pair, is_exact, report)
        shares.setdefault(question.depth, []).append(share)
    return {depth: sum(each) / len(each) for depth, each in shares.items()}


def table(report: Report) -> str:
    """The report as text: a row per task and length, a column per depth; both shares in percent.

    A last column has RULER's share, over all depths, where tasks have one.
    """
    rows = report["rows"]
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    shown = ["drawn" if depth is None else f"{depth:g}" for depth in depths]
    shown += ["RULER's rule"] if any("ruler" in row for row in rows) else []
    samples = rows[0]["samples"]
    lines = [
        f"{results.step_of(report)}, memory {report['memory_kind']}, "
        f"{counted(samples, 'sample')} per cell: exact answers / tokens that are right, in %, "
        "by depth",
        " ".join([f"{'task':<12} {'tokens':>9}", *(f"{name:>12}" for name in shown)]),
    ]
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        own = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        cells = [f"{100 * row['exact']:>5.0f} / {100 * row['token_accuracy']:>4.0f}" for row in own]
        shares = [row["ruler"] for row in own if "ruler" in row]
        cells += [f"{100 * sum(shares) / len(shares):>12.0f}"] if shares else []
        lines.append(" ".join([f"{task:<12} {length:>9,}", *cells]))
    return "\n".join(lines)


def heat_map(report: Report) -> Figure:
    """Token accuracy by length and depth, the prompt's start on top; of the first task."""
    rows = [row for row in report["rows"] if row["task"] == report["rows"][0]["task"]]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    values, exact = (
        np.array([row[share] for row in rows]).reshape(len(lengths), -1).T
        for share in ("token_accuracy", "exact")
    )
    return results.heat_map(
        values,
        np.vectorize("{:.0%}\n({:.0%})".format)(values, exact),
        ("tokens of the prompt", list(map(TOKENS.show, lengths))),
        ("depth of the key", [f"{depth:.0%}" for depth in depths]),
        f"{rows[0]['task']}, {results.step_of(report)}, memory {report['memory_kind']}",
        "token accuracy (exact answers)",
    )
