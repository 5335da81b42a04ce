"""How well a model recalls what stands far back in its prompt: passkeys, needles, stories.

A question is a prompt of a given length and its answer. The answer is *exact* if every token of it
is the likeliest after the tokens before it, which is what greedy decoding would say. *Token
accuracy* is the share of its tokens that are, without those of white space alone.

All questions of a length go through together, window by window, so that of the model's work only a
window stands in memory. Lanes whose prompts have been the same so far are one lane: a passkey's
filler is read once for all depths until the keys are told, and the numbers are those of each prompt
alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data_prep.dataset import durable
from data_prep.recall import tasks
from data_prep.recall.tasks import Haystack
from data_prep.tokenizer.contract import Tokenizer
from pretrain.evaluate.progress import Progress
from pretrain.evaluate.questions import Asked
from pretrain.model.state import of_lanes
from pretrain.model.transformer import Transformer
from pretrain.trained import Trained, default_device, load

# Tokens of all lanes that are computed at once, unless a segment of each has more.
_AT_ONCE = {"cpu": 2**14, "cuda": 2**18}


class RecallError(ValueError):
    """Questions that cannot be put to a model."""


@dataclass(frozen=True)
class _Question:
    """A prompt and its answer as `ids` [n]; the answer's begin at `first`."""

    depth: float | None
    ids: np.ndarray
    first: int


def run(path: Path, name: str, asked: Asked, filler: Path | None) -> int:
    """Put the questions to a run or checkpoint; print the table and write it into the run.

    `NAME-STEP.json` holds the numbers; with depths `plots/NAME-STEP.png` is a heat map. `filler` is
    a data set with books, None: the passkey's own filler. Returns the exit code, 0. Raises what
    `load`, `Haystack.of_books` and `evaluate` raise.
    """
    trained = load(path, default_device())
    haystack = Haystack.repeated() if filler is None else Haystack.of_books(filler)
    report = evaluate(
        trained, haystack, asked, lambda line: print(line, file=sys.stderr, flush=True)
    )
    report["filler"] = None if filler is None else filler.resolve().name
    written = trained.run_directory / f"{name}-{trained.step}.json"
    durable.write_json(written, report)
    print(table(report))
    print(f"written to {written}")
    if len(asked.depths) > 1:
        picture = trained.run_directory / "plots" / f"{name}-{trained.step}.png"
        picture.parent.mkdir(exist_ok=True)
        with durable.replacing(picture) as out:
            heat_map(report).savefig(out, format="png", dpi=120)
        print(f"heat map in {picture}")
    return 0


def evaluate(
    trained: Trained, haystack: Haystack, asked: Asked, report: Callable[[str], None]
) -> dict[str, Any]:
    """Ask every question; `report` is given lines of progress.

    Returns JSON-able numbers: what was asked, and `rows`, each with task, length, depth, samples,
    the mean `tokens` of the prompts, and the shares `exact` and `token_accuracy`.
    Raises RecallError where a length is less than the task's own text has, or the model's numbers
    are not finite.
    """
    total = sum(asked.lengths) * len(asked.tasks) * len(asked.depths) * asked.samples
    progress = Progress("recall", total, report)
    rows: list[dict[str, Any]] = []
    for task in asked.tasks:
        for length in asked.lengths:
            questions = _questions(trained.tokenizer, haystack, asked, task, length)
            said = answers(
                trained.model, [q.ids for q in questions], [q.first for q in questions], progress
            )
            rows += _rows(trained.tokenizer, task, length, questions, said)
    return {
        "step": trained.step,
        "checkpoint": trained.checkpoint_path.name,
        "memory_kind": trained.config.model.memory.kind,
        "segment": trained.config.model.segment,
        "seed": asked.seed,
        "rows": rows,
    }


def _questions(
    tokenizer: Tokenizer, haystack: Haystack, asked: Asked, task: str, length: int
) -> list[_Question]:
    """By depth, then sample; the samples of a number ask the same at every depth."""
    found = []
    for depth in asked.depths:
        for number in range(asked.samples):
            pair = tasks.document(
                task, haystack, tokenizer, length, seed=asked.seed, number=number, depth=depth
            )
            if pair is None:
                raise RecallError(
                    f"--lengths: {length} tokens are fewer than {task} has without any filler; "
                    "ask for longer prompts"
                )
            prompt, whole = (tokenizer.encode(text) for text in (pair.prompt, "".join(pair)))
            # Where a piece reaches from the prompt into the answer, it belongs to the answer.
            shared = min(len(prompt), len(whole))
            same = prompt[:shared] == whole[:shared]
            first = shared if same.all() else int(same.argmin())
            head = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int64)
            ids = np.concatenate([head, whole]).astype(np.int32)
            found.append(_Question(depth, ids, first + len(head)))
    return found


def answers(
    model: Transformer, prompts: Sequence[np.ndarray], firsts: Sequence[int], progress: Progress
) -> list[np.ndarray]:
    """For each of `prompts` [n] the likeliest tokens at its places `first`, ..., n - 1, in order.

    Each is predicted from the tokens before it. Raises RecallError where a logit is not finite.
    """
    device = model.embedding.weight.device
    said: list[list[np.ndarray]] = [[] for _ in prompts]
    state = model.initial_state(1, device)
    with torch.inference_mode():
        for begin, end, lanes, came_from in _shared(model, prompts):
            state = of_lanes(state, came_from)
            tokens = np.zeros((len(lanes), end - begin), np.int64)
            for lane, members in enumerate(lanes):
                part = prompts[members[0]][begin:end]
                tokens[lane, : len(part)] = part
            starts = torch.zeros(tokens.shape, dtype=torch.bool, device=device)
            starts[:, 0] = begin == 0
            hidden, state = model.hidden(torch.from_numpy(tokens).to(device), starts, state)
            for lane, members in enumerate(lanes):
                for row in members:
                    # The token at a place is predicted at the one before it.
                    places = range(max(firsts[row] - 1, begin), min(len(prompts[row]) - 1, end))
                    if places:
                        kept = hidden[lane, places.start - begin : places.stop - begin]
                        said[row].append(_likeliest(model, kept))
                    progress.add(max(0, min(len(prompts[row]), end) - begin))
    return [np.concatenate(parts) if parts else np.array([], np.int64) for parts in said]


def _likeliest(model: Transformer, hidden: Tensor) -> np.ndarray:
    logits = model.lm_head(hidden)
    if not logits.isfinite().all():
        raise RecallError(
            "the model's logits are not finite: its weights or memory have overflowed; evaluate "
            "an earlier checkpoint"
        )
    found: np.ndarray = logits.argmax(dim=-1).cpu().numpy()
    return found


def _shared(
    model: Transformer, prompts: Sequence[np.ndarray]
) -> Iterator[tuple[int, int, list[list[int]], list[int]]]:
    """(begin, end, lanes, came from) of each window.

    A lane is the prompts that have been the same up to `end`, by their numbers; it came from a lane
    of the window before. A prompt that has ended is in no lane.
    """
    segment = model.config.segment
    at_once = _AT_ONCE["cpu" if model.embedding.weight.device.type == "cpu" else "cuda"]
    lanes = [list(range(len(prompts)))]
    begin, longest = 0, max(map(len, prompts))
    while begin < longest:
        # Where lanes part within the window, there may be as many as there are prompts.
        count = sum(len(members) for members in lanes)
        end = min(begin + segment * max(1, at_once // (segment * count)), longest)
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
    said: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """The shares of each depth."""
    rows = []
    for depth in dict.fromkeys(question.depth for question in questions):
        right, counted, exact, sizes = 0, 0, [], []
        for question, tokens in zip(questions, said, strict=True):
            if question.depth != depth:
                continue
            answer = question.ids[question.first :]
            hits = tokens == answer
            blank = np.array(
                [not tokenizer.decode_bytes([id], inside=True).strip() for id in answer]
            )
            right, counted = right + int(hits[~blank].sum()), counted + int((~blank).sum())
            exact.append(bool(hits.all()))
            sizes.append(question.first)
        rows.append(
            {
                "task": task,
                "length": length,
                "depth": depth,
                "samples": len(exact),
                "tokens": sum(sizes) / len(sizes),
                "exact": sum(exact) / len(exact),
                "token_accuracy": right / counted,
            }
        )
    return rows


def table(report: dict[str, Any]) -> str:
    """The report for people: a row a task and length, a column a depth; both shares in percent."""
    rows = report["rows"]
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    shown = ["drawn" if depth is None else f"{depth:g}" for depth in depths]
    samples = rows[0]["samples"]
    lines = [
        f"step {report['step']}, memory {report['memory_kind']}, {samples} samples a cell: answers "
        "that are exact / tokens that are right, in %, by depth",
        " ".join([f"{'task':<12} {'tokens':>9}", *(f"{name:>11}" for name in shown)]),
    ]
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        cells = [
            f"{100 * row['exact']:>4.0f} / {100 * row['token_accuracy']:>4.0f}"
            for row in rows
            if (row["task"], row["length"]) == (task, length)
        ]
        lines.append(" ".join([f"{task:<12} {length:>9,}", *cells]))
    return "\n".join(lines)


def heat_map(report: dict[str, Any]) -> Figure:
    """Token accuracy by length and depth, the prompt's start on top; of the first task."""
    rows = [row for row in report["rows"] if row["task"] == report["rows"][0]["task"]]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    values = np.array([row["token_accuracy"] for row in rows]).reshape(len(lengths), -1).T
    exact = np.array([row["exact"] for row in rows]).reshape(len(lengths), -1).T
    figure = Figure(figsize=(2 + len(lengths), 1.6 + 0.5 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for (y, x), value in np.ndenumerate(values):
        axes.text(
            x, y, f"{value:.0%}\n({exact[y, x]:.0%})", ha="center", va="center", fontsize=8,
            color="black" if value > 0.6 else "white",
        )  # fmt: skip
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("depth of the key")
    axes.set_title(f"{rows[0]['task']}, step {report['step']}, memory {report['memory_kind']}")
    figure.colorbar(image, label="token accuracy (exact answers)")
    return figure


def _tokens(count: int) -> str:
    """32k, 1m: as the command line takes them, where they are whole."""
    for unit, size in (("m", 2**20), ("k", 2**10)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"
