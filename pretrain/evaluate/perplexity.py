"""How well a model predicts whole documents, by position, with its memory and without reading it.

Documents are streamed window by window, so the space is constant however long they are. Lanes (B
rows of a batch) each read documents of their own; a document begins at a segment's start, as in
generation, and what is left of its last segment is padding. So a document's losses are those of one
forward over it alone, whatever lies beside it.

*Position* p of a target is the number of text tokens before it: BOS is no target, EOS is the last
one. The first token of a text is predicted from BOS alone, and is no target where the tokenizer has
no BOS. *Bits per byte* are the bits of targets over the UTF-8 bytes of text that their tokens make.
EOS makes none: its bits count (a model must also say where the text ends). With BOS the bytes are
those of the text, for every tokenizer that gives texts back exactly; without, they are fewer by the
first token's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.dataset import durable
from data_prep.dataset.shards import Document
from data_prep.dataset.wording import counted
from data_prep.tokenizer.contract import Tokenizer
from pretrain.config.run import Weights
from pretrain.data.files import name_of
from pretrain.data.lanes import Dataset
from pretrain.data.packing import IGNORE, LaidOut, Packer, Span, Window
from pretrain.evaluate import results
from pretrain.evaluate.progress import Pace, TokenProgress, alone, to_stderr
from pretrain.evaluate.questions import EvaluationError, ResultError
from pretrain.evaluate.results import Report
from pretrain.model.state import of_lanes
from pretrain.model.transformer import Output
from pretrain.trained import Learned

MEMORY, MASKED, NO_MEMORY = "memory", "masked", "none"
"""Columns of a report: memory read, its read masked, or a model without memory."""

_MEASURED = ("text_bytes", "total", "positions")
_BUCKETS = 64
_HEADINGS = {MEMORY: "with memory", MASKED: "masked", NO_MEMORY: "no memory"}


def run(
    path: Path,
    location: str | Path,
    *,
    window_segments: int | None = None,
    max_documents: int | None = None,
    batch: int = 8,
    weights: Weights = "last",
) -> int:
    """Evaluate a run or checkpoint, print the table, write `eval-STEP-DATA.json` into the run.

    Returns the exit code, 0. Raises what `open_model`, `evaluate` and `publish` raise.
    """
    trained = results.open_model(path, weights)
    report = evaluate(
        trained,
        location,
        window_segments=window_segments,
        max_documents=max_documents,
        batch=batch,
        report=to_stderr,
    )
    name = f"eval-{trained.step}-{report['data']}"
    results.publish(trained.run_directory, name, report, measured=_MEASURED, table=table(report))
    return 0


def evaluate(
    learned: Learned,
    location: str | Path,
    *,
    window_segments: int | None,
    max_documents: int | None,
    batch: int,
    report: Callable[[str], None],
    by_document: bool = False,
    masked: bool = True,
    pace: Pace = alone,
) -> Report:
    """Score the first `max_documents` (None: all) documents of a data set, `batch` side by side.

    A window is `window_segments` segments (None: the run's), rounded up to what local attention
    spans; neither it nor `batch` changes what is measured. `report` is given progress lines.
    Returns JSON-able numbers: what was evaluated, and `total` and each of `positions` (targets at
    `first` <= p < `end`) with tokens, bytes, and by column nats, bits_per_byte (None without bytes)
    and perplexity; with `by_document` also, under that key, the id, text_bytes, total and positions
    of each document alone. Without `masked` a model with memory is not run a second time with its
    reads masked.
    Raises EvaluationError, ResultError or DataError.
    """
    if window_segments is None:
        window_segments = learned.config.train.window_segments
    data = pace(lambda: _opened(learned, location))
    count = min(data.manifest.documents, max_documents or data.manifest.documents)
    progress = TokenProgress("evaluate", round(count * data.mean_length), report)
    columns = _columns(learned, masked)
    # Text tokens are counted from 0: BOS is at -1.
    first = 0 if data.manifest.tokenizer.bos_id is None else -1
    score = _Score(columns, learned.tokenizer, first, by_document)
    queue = _Queue(itertools.islice(data.documents(), max_documents))
    lanes = [_Lane(queue, data, learned.config.model.span) for _ in range(batch)]
    for windows, losses in _losses(learned, lanes, window_segments, columns, pace):
        pace(functools.partial(score.add, windows, losses))
        progress.add(sum(span.tokens for _, spans in windows for span in spans))
    found = score.report()
    if not found["total"]["bytes"]:
        raise EvaluationError(f"{location}: the documents asked for have no text to predict")
    return {
        **results.of_model(learned),
        "data": name_of(location),
        "data_sha256": data.files.manifest_sha256,
        "tokenizer_sha256": data.manifest.tokenizer.sha256,
        "window_segments": window_segments,
        "documents": queue.documents,
        "text_bytes": queue.text_bytes,
        **found,
    }


def table(report: Report) -> str:
    """The report as text: a row per range of positions, and all of them together."""
    columns = list(report["total"]["nats"])
    compared = len(columns) == 2
    headings = [f"{'position':>19} {'tokens':>12}", *(f"{_HEADINGS[c]:>12}" for c in columns)]
    lines = [
        f"{results.step_of(report)} on {report['data']}: "
        f"{counted(report['documents'], 'document')}, {report['text_bytes']:,} bytes; bits per "
        "byte by position (text tokens before the target)",
        " ".join([*headings, f"{'gain':>9}"] if compared else headings),
    ]
    rows = [(range_of(row), row) for row in report["positions"]] + [("all", report["total"])]
    for name, row in rows:
        bits = [row["bits_per_byte"][column] for column in columns]
        cells = [f"{name:>19} {row['tokens']:>12,}", *(f"{_shown(value):>12}" for value in bits)]
        if compared:
            gain = None if None in bits else bits[1] - bits[0]
            cells.append(f"{_shown(gain, sign='+'):>9}")
        lines.append(" ".join(cells))
    perplexities = [
        f"{report['total']['perplexity'][column]:.3f} {_HEADINGS[column]}" for column in columns
    ]
    lines.append(f"perplexity per token: {', '.join(perplexities)}")
    return "\n".join(lines)


def numbers(report: Report) -> dict[str, Any]:
    """By column the total's `bits_per_byte` and `perplexity`, and the bits per byte of positions
    from 0, 1, 2, 4, ... on."""
    return {
        "bits_per_byte": report["total"]["bits_per_byte"],
        "perplexity": report["total"]["perplexity"],
        "positions": {str(row["first"]): row["bits_per_byte"] for row in report["positions"]},
    }


def line(report: Report) -> str:
    """The totals in one line."""
    total = report["total"]
    cells = [f"{_shown(bits)} {_HEADINGS[c]}" for c, bits in total["bits_per_byte"].items()]
    perplexity = next(iter(total["perplexity"].values()))
    return f"bits per byte {', '.join(cells)} | perplexity {perplexity:.3f}"


def range_of(row: Report) -> str:
    """The positions of a report's row."""
    last = row["end"] - 1
    return f"{last:,}" if row["first"] == last else f"{row['first']:,} to {last:,}"


_Packed = tuple[Window, list[Span]]


class _Queue(Iterator[Document]):
    """The documents that the lanes take turns to take from, counted."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._remaining = documents

    def __next__(self) -> Document:
        document = next(self._remaining)
        self.documents += 1
        self.text_bytes += document.bytes
        return document


class _Lane(Packer):
    """One row of the batch: document after document, each from a segment's start on."""

    def __init__(self, documents: Iterator[Document], data: Dataset, span: int) -> None:
        super().__init__(align=span)
        self._documents = documents
        self._data = data

    def open_document(self) -> LaidOut | None:
        for document in self._documents:
            tokens = self._data.lay_out(document)
            if len(tokens):
                return LaidOut(document.id, tokens)
        return None


def _losses(
    learned: Learned,
    lanes: Sequence[_Lane],
    window_segments: int,
    columns: Sequence[str],
    pace: Pace,
) -> Iterator[tuple[list[_Packed], list[np.ndarray]]]:
    """Windows of all lanes with their losses of each column, float64 [B, T] in nats."""
    model, device = learned.model, learned.device
    length = learned.config.model.whole_spans(window_segments)
    state = model.initial_state(len(lanes), device)
    while True:
        packed = pace(functools.partial(_packed, lanes, length))
        kept = [row for row, (_, spans) in enumerate(packed) if spans]
        if not kept:
            return
        if len(kept) < len(lanes):
            lanes, state = [lanes[row] for row in kept], of_lanes(state, kept)
        windows = [packed[row] for row in kept]
        width = max(spans[-1].end for _, spans in windows)
        tokens, targets, starts = (
            torch.from_numpy(np.stack(rows)[:, :width]).to(device)
            for rows in zip(*(window[:3] for window, _ in windows), strict=True)
        )
        # Not inference mode, whose tensors autograd refuses: ZeRO-3 may keep what it gathers.
        with torch.no_grad():
            output: Output = model(tokens, starts, state, targets)
            state = output.state
            losses = [_on_host(output)]
            if MASKED in columns:
                # What is never read need not be carried.
                unread = model.initial_state(len(windows), device)
                masked: Output = model(tokens, starts, unread, targets, read_memory=False)
                losses.append(_on_host(masked))
        yield windows, losses


def _packed(lanes: Sequence[_Lane], length: int) -> list[_Packed]:
    return [lane.pack(length) for lane in lanes]


def _on_host(output: Output) -> np.ndarray:
    assert output.losses is not None
    losses: np.ndarray = output.losses.cpu().double().numpy()
    return losses


def _token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token makes, [2, vocabulary]: inside a text, and as its first.

    Measured by decoding: a model with a dummy prefix drops the first token's space.
    """
    alone = [len(tokenizer.decode_bytes([id])) for id in range(tokenizer.vocab_size)]
    twice = [len(tokenizer.decode_bytes([id, id])) for id in range(tokenizer.vocab_size)]
    return np.array([np.subtract(twice, alone), alone])


class _Score:
    """Sums over the targets of all documents, and where that is asked for of each.

    Sums are float64 [2 + columns, _BUCKETS]: tokens, bytes, and nats by column, by bucket of
    position. `first` is the position of a document's first token.
    """

    def __init__(
        self, columns: Sequence[str], tokenizer: Tokenizer, first: int, by_document: bool
    ) -> None:
        self._columns = columns
        self._empty = np.zeros((2 + len(columns), _BUCKETS))
        self._all = self._empty.copy()
        self._documents: dict[str, np.ndarray] = {}
        self._by_document = by_document
        self._token_bytes = _token_bytes(tokenizer)
        self._first = first

    def add(self, windows: Sequence[_Packed], losses: Sequence[np.ndarray]) -> None:
        """Add a batch of windows, losses [B, T] of each column.

        Raises ResultError where one is not finite.
        """
        for row, (window, spans) in enumerate(windows):
            own = [values[row] for values in losses]
            parts = [self._of_span(window, span, own) for span in spans]
            # At once, since sums of floats depend on their order.
            self._all += _summed(*map(np.concatenate, zip(*parts, strict=True)))
            if self._by_document:
                for span, part in zip(spans, parts, strict=True):
                    sums = self._documents.setdefault(span.id, self._empty.copy())
                    sums += _summed(*part)

    def report(self) -> Report:
        """`total`, `positions`, and `by_document` where it was asked for."""
        found = self._numbers(self._all)
        if self._by_document:
            found["by_document"] = [
                {"id": id, "text_bytes": int(sums[1].sum()), **self._numbers(sums)}
                for id, sums in self._documents.items()
                if sums[0].any()
            ]
        return found

    def _of_span(
        self, window: Window, span: Span, losses: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, ...]:
        """Of each target of a document: bucket, 1, bytes, and nats by column, [n] each."""
        targets = window.targets[span.at : span.end]
        is_target = targets != IGNORE
        positions = (np.arange(span.tokens) + (span.offset + 1 + self._first))[is_target]
        nats = [values[span.at : span.end][is_target] for values in losses]
        for column, values in zip(self._columns, nats, strict=True):
            if not (finite := np.isfinite(values)).all():
                raise ResultError(
                    f"the loss is not finite in document {span.id} at position "
                    f"{positions[~finite][0]} ({_HEADINGS[column]}): the weights or the memory "
                    "have overflowed; evaluate an earlier checkpoint"
                )
        sizes = self._token_bytes[np.equal(positions, 0).astype(int), targets[is_target]]
        return bucket_of(positions), np.ones_like(sizes), sizes, *nats

    def _numbers(self, sums: np.ndarray) -> Report:
        tokens, sizes, nats = sums[0], sums[1], sums[2:]
        rows = []
        for bucket in np.flatnonzero(tokens).tolist():
            edges = {"first": 2**bucket // 2, "end": 2**bucket}
            own = self._row(int(tokens[bucket]), int(sizes[bucket]), nats[:, bucket])
            rows.append({**edges, **own})
        total = self._row(int(tokens.sum()), int(sizes.sum()), [values.sum() for values in nats])
        return {"total": total, "positions": rows}

    def _row(
        self, tokens: int, text_bytes: int, sums: Sequence[float] | np.ndarray
    ) -> dict[str, Any]:
        nats = {column: float(value) for column, value in zip(self._columns, sums, strict=True)}
        return {
            "tokens": tokens,
            "bytes": text_bytes,
            "nats": nats,
            "bits_per_byte": {
                column: value / math.log(2) / text_bytes if text_bytes else None
                for column, value in nats.items()
            },
            "perplexity": {
                # Capped, so that it stays finite.
                column: math.exp(min(value / tokens, 700.0))
                for column, value in nats.items()
                if tokens
            },
        }


def _summed(buckets: np.ndarray, *values: np.ndarray) -> np.ndarray:
    """The sums of values [n] by bucket: [values, _BUCKETS]."""
    return np.stack([np.bincount(buckets, each, _BUCKETS) for each in values])


def bucket_of(positions: np.ndarray) -> np.ndarray:
    """0 for position 0, b for 2^(b - 1) <= p < 2^b."""
    # p = m 2^b with 0.5 <= m < 1.
    exponents: np.ndarray = np.frexp(positions)[1]
    return exponents


def _columns(learned: Learned, masked: bool) -> tuple[str, ...]:
    if not learned.config.model.memory.traits.remembers:
        return (NO_MEMORY,)
    return (MEMORY, MASKED) if masked else (MEMORY,)


def _opened(learned: Learned, location: str | Path) -> Dataset:
    """The data set. Raises DataError, and EvaluationError where its tokens mean other texts."""
    data = Dataset(location, learned.config.data.cache)
    own = durable.sha256_of(learned.tokenizer.path)
    if own != data.manifest.tokenizer.sha256:
        raise EvaluationError(
            f"{data.location}: was prepared with another tokenizer than the run's, so its tokens "
            "mean other texts; prepare it again with data-prep's "
            f"tokenizer.path={learned.tokenizer.path}"
        )
    return data


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
