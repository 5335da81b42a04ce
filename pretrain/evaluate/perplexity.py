"""How well a model predicts whole documents, by position, with its memory and without reading it.

Documents are streamed window by window, so the space is constant however long they are. Lanes (B
rows of a batch) each read documents of their own; a document starts at a segment's start, as in
generation, and what is left of its last segment is padding behind it. So a document's losses are
those of one forward over it alone, whatever stands beside it.

*Position* p of a target is the number of text tokens before it: BOS is no target, EOS is the last
one. The first token of a text is predicted from BOS alone, and is no target where the tokenizer has
no BOS. *Bits a byte* are the bits of all targets over the UTF-8 bytes of the text. EOS has 0 bytes:
its bits count (a model must also say where the text ends), its bytes do not. By position, a target
has the bytes that its token stands for; they add up to the text's bytes for every tokenizer that
gives texts back exactly.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.dataset import durable
from data_prep.dataset.shards import Document
from data_prep.tokenizer.contract import Tokenizer
from pretrain.data.lanes import IGNORE, Dataset
from pretrain.evaluate.progress import Progress
from pretrain.model.state import of_lanes
from pretrain.trained import Trained, default_device, load

MEMORY, MASKED, NO_MEMORY = "memory", "masked", "none"
"""Columns of a report: memory read, its read masked, or a model without memory."""

_BUCKETS = 64
_HEADINGS = {MEMORY: "with memory", MASKED: "masked", NO_MEMORY: "no memory"}


class EvaluationError(ValueError):
    """A model or data set that cannot be evaluated, or not as asked."""


def run(
    path: Path,
    data_directory: Path,
    *,
    window_segments: int | None = None,
    max_documents: int | None = None,
    batch: int = 8,
) -> int:
    """Evaluate a run or checkpoint, print the table, write `eval-STEP-DATA.json` into the run.

    Returns the exit code, 0. Raises what `load` and `evaluate` raise.
    """
    trained = load(path, default_device())
    report = evaluate(
        trained,
        data_directory,
        window_segments=window_segments,
        max_documents=max_documents,
        batch=batch,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    name = f"eval-{trained.step}-{report['data']}.json"
    durable.write_json(trained.run_directory / name, report)
    print(table(report))
    print(f"written to {trained.run_directory / name}")
    return 0


def evaluate(
    trained: Trained,
    data_directory: Path,
    *,
    window_segments: int | None,
    max_documents: int | None,
    batch: int,
    report: Callable[[str], None],
    by_document: bool = False,
    masked: bool = True,
) -> dict[str, Any]:
    """Score the first `max_documents` (None: all) documents of a data set, `batch` side by side.

    A window is `window_segments` segments (None: the run's); neither it nor `batch` changes what is
    measured. `report` is given progress lines. Returns JSON-able numbers: what was evaluated, and
    `total` and each of `positions` (targets at `first` <= p < `end`) with tokens, bytes, and by
    column nats, bits_per_byte (None without bytes) and perplexity; with `by_document` also, under
    that key, the id, text_bytes, total and positions of each document alone. Without `masked` a
    model with memory is not run a second time with its reads masked.
    Raises EvaluationError or DataError.
    """
    if window_segments is None:
        window_segments = trained.config.train.window_segments
    data = Dataset(data_directory)
    _check_tokenizer(trained, data)
    progress = Progress("evaluate", _tokens_ahead(data, max_documents), report)
    score = _Score(_columns(trained, masked), _TokenBytes.of(trained.tokenizer))
    score.documents = {} if by_document else None
    queue = _Queue(itertools.islice(data.documents(), max_documents))
    lanes = [_Lane(queue, data, trained.config.model.segment) for _ in range(batch)]
    for windows, losses in _losses(trained, lanes, window_segments, score.columns):
        score.add(windows, losses)
        progress.add(sum(window.taken for window in windows))
    if not (score.tokens.sum() and queue.text_bytes):
        raise EvaluationError(f"{data_directory}: the documents asked for have no text to predict")
    return {
        "step": trained.step,
        "checkpoint": trained.checkpoint_path.name,
        "data": data_directory.resolve().name,
        "tokenizer_sha256": data.manifest.tokenizer.sha256,
        "memory_kind": trained.config.model.memory.kind,
        "segment": trained.config.model.segment,
        "window_segments": window_segments,
        "documents": queue.documents,
        "text_bytes": queue.text_bytes,
        "total": score.total(queue.text_bytes),
        "positions": score.by_position(),
        **({} if score.documents is None else {"by_document": _each(score.documents)}),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text for people: a row a range of positions, and all of them together."""
    columns = list(report["total"]["nats"])
    compared = len(columns) == 2
    headings = [f"{'position':>19} {'tokens':>12}", *(f"{_HEADINGS[c]:>12}" for c in columns)]
    lines = [
        f"step {report['step']} on {report['data']}: {report['documents']:,} documents, "
        f"{report['text_bytes']:,} bytes; bits a byte by position (text tokens before the target)",
        " ".join([*headings, f"{'gain':>9}"] if compared else headings),
    ]
    rows = [(_range(row), row) for row in report["positions"]] + [("all", report["total"])]
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
    lines.append(f"perplexity a token: {', '.join(perplexities)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Window:
    """A lane's next window: arrays [length]; `taken` tokens of documents, the rest is padding.

    `positions` are of the targets, `owners` the place in `ids` of their document. `end` is where
    the last of the documents' tokens ends.
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    owners: np.ndarray
    taken: int
    end: int
    ids: list[str]


class _Queue(Iterator[Document]):
    """The documents that the lanes take turns to draw from, counted."""

    def __init__(self, documents: Iterator[Document]) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._remaining = documents

    def __next__(self) -> Document:
        document = next(self._remaining)
        self.documents += 1
        self.text_bytes += document.bytes
        return document


class _Lane:
    """One row of the batch: document after document, each from a segment's start on."""

    def __init__(self, documents: Iterator[Document], data: Dataset, segment: int) -> None:
        self._documents = documents
        self._data = data
        self._segment = segment
        # Text tokens are counted from 0: BOS stands at -1.
        self._shift = 0 if data.manifest.tokenizer.bos_id is None else 1
        self._id = ""
        self._laid_out = np.array([], np.int64)
        self._offset = 0

    def window(self, length: int) -> _Window | None:
        """The next window, `length` being a multiple of the segment; None where nothing is left."""
        tokens, positions = np.zeros(length, np.int64), np.zeros(length, np.int64)
        targets, starts = np.full(length, IGNORE, np.int64), np.zeros(length, np.bool_)
        owners = np.zeros(length, np.int64)
        filled = taken = end = 0
        ids: list[str] = []
        while filled < length and self._open():
            offset = self._offset
            count = min(length - filled, len(self._laid_out) - offset)
            end = filled + count
            tokens[filled:end] = self._laid_out[offset : offset + count]
            following = self._laid_out[offset + 1 : offset + 1 + count]
            targets[filled : filled + len(following)] = following
            positions[filled:end] = np.arange(count) + (offset + 1 - self._shift)
            starts[filled] = offset == 0
            owners[filled:end] = len(ids)
            ids.append(self._id)
            self._offset += count
            taken += count
            filled += math.ceil(count / self._segment) * self._segment
        if not taken:
            return None
        return _Window(tokens, targets, starts, positions, owners, taken, end, ids)

    def _open(self) -> bool:
        """Whether there is a token left, of the open document or of the next."""
        while self._offset == len(self._laid_out):
            document = next(self._documents, None)
            if document is None:
                return False
            self._id, self._offset = document.id, 0
            self._laid_out = self._data.lay_out(document)
        return True


def _losses(
    trained: Trained, lanes: Sequence[_Lane], window_segments: int, columns: Sequence[str]
) -> Iterator[tuple[list[_Window], dict[str, Tensor]]]:
    """Windows of all lanes with their losses by column, [B, T] in nats on the CPU."""
    model, device = trained.model, trained.device
    length = window_segments * trained.config.model.segment
    state = model.initial_state(len(lanes), device)
    while True:
        drawn = [lane.window(length) for lane in lanes]
        kept = [row for row, window in enumerate(drawn) if window is not None]
        if not kept:
            return
        if len(kept) < len(lanes):
            lanes, state = [lanes[row] for row in kept], of_lanes(state, kept)
        windows = [window for window in drawn if window is not None]
        width = max(window.end for window in windows)
        tokens, starts, targets = (
            torch.from_numpy(np.stack([getattr(window, name) for window in windows])[:, :width]).to(
                device
            )
            for name in ("tokens", "starts", "targets")
        )
        found: dict[str, Tensor] = {}
        with torch.inference_mode():
            output = model(tokens, starts, state, targets)
            state = output.state
            found[columns[0]] = output.losses.cpu()
            if MASKED in columns:
                # What is never read need not be carried.
                unread = model.initial_state(len(windows), device)
                masked = model(tokens, starts, unread, targets, read_memory=False)
                found[MASKED] = masked.losses.cpu()
        yield windows, found


@dataclass(frozen=True)
class _TokenBytes:
    """Bytes of text that each token stands for, [vocabulary]: inside a text, and as its first."""

    inside: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _TokenBytes:
        """Measured by decoding; a model with a dummy prefix drops the first token's space."""
        alone = [len(tokenizer.decode_bytes([id])) for id in range(tokenizer.vocab_size)]
        twice = [len(tokenizer.decode_bytes([id, id])) for id in range(tokenizer.vocab_size)]
        return cls(np.subtract(twice, alone), np.array(alone))

    def __call__(self, targets: np.ndarray, positions: np.ndarray) -> np.ndarray:
        lengths: np.ndarray = np.where(positions == 0, self.first[targets], self.inside[targets])
        return lengths


@dataclass
class _Score:
    """Sums over targets by bucket of position; bucket b > 0 holds 2^(b - 1) <= p < 2^b."""

    columns: Sequence[str]
    token_bytes: _TokenBytes
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))
    nats: dict[str, np.ndarray] = field(default_factory=dict)
    documents: dict[str, _Score] | None = None
    """The same of each document, where that is asked for."""

    def __post_init__(self) -> None:
        self.nats = {column: np.zeros(_BUCKETS) for column in self.columns}

    def add(self, windows: Sequence[_Window], losses: dict[str, Tensor]) -> None:
        """Add a batch of windows. Raises EvaluationError where a loss is not finite."""
        for row, window in enumerate(windows):
            is_target = window.targets != IGNORE
            positions, targets = window.positions[is_target], window.targets[is_target]
            nats = {}
            for column, batch in losses.items():
                values = batch[row].double().numpy()[is_target[: batch.shape[1]]]
                if not np.isfinite(values).all():
                    raise EvaluationError(
                        f"the loss is not finite in {' or '.join(window.ids)}, near position "
                        f"{positions[~np.isfinite(values)][0]} ({_HEADINGS[column]}): the weights "
                        "or the memory have overflowed; evaluate an earlier checkpoint"
                    )
                nats[column] = values
            own = (bucket_of(positions), self.token_bytes(targets, positions), nats)
            self._count(*own)
            if self.documents is not None:
                self._count_each(self.documents, window.ids, window.owners[is_target], *own)

    def _count(self, buckets: np.ndarray, sizes: np.ndarray, nats: dict[str, np.ndarray]) -> None:
        """Add targets: bucket and bytes [n], and nats [n] by column."""
        self.tokens += np.bincount(buckets, minlength=_BUCKETS)
        self.bytes += np.bincount(buckets, sizes, _BUCKETS).astype(np.int64)
        for column, values in nats.items():
            self.nats[column] += np.bincount(buckets, values, _BUCKETS)

    def _count_each(
        self,
        documents: dict[str, _Score],
        ids: Sequence[str],
        owners: np.ndarray,
        buckets: np.ndarray,
        sizes: np.ndarray,
        nats: dict[str, np.ndarray],
    ) -> None:
        for index, id in enumerate(ids):
            own = owners == index
            score = documents.setdefault(id, _Score(self.columns, self.token_bytes))
            score._count(
                buckets[own], sizes[own], {column: values[own] for column, values in nats.items()}
            )

    def total(self, text_bytes: int) -> dict[str, Any]:
        """Over all targets and `text_bytes`."""
        nats = {column: float(values.sum()) for column, values in self.nats.items()}
        return _numbers(int(self.tokens.sum()), text_bytes, nats)

    def by_position(self) -> list[dict[str, Any]]:
        """Of each bucket that holds a target."""
        rows = []
        for bucket in np.flatnonzero(self.tokens).tolist():
            nats = {column: float(values[bucket]) for column, values in self.nats.items()}
            edges = {"first": 2**bucket // 2, "end": 2**bucket}
            numbers = _numbers(int(self.tokens[bucket]), int(self.bytes[bucket]), nats)
            rows.append({**edges, **numbers})
        return rows


def _each(documents: dict[str, _Score]) -> list[dict[str, Any]]:
    sizes = {id: int(score.bytes.sum()) for id, score in documents.items()}
    return [
        {
            "id": id,
            "text_bytes": sizes[id],
            "total": score.total(sizes[id]),
            "positions": score.by_position(),
        }
        for id, score in documents.items()
        if score.tokens.sum()
    ]


def bucket_of(positions: np.ndarray) -> np.ndarray:
    """0 for position 0, b for 2^(b - 1) <= p < 2^b."""
    # p = m 2^b with 0.5 <= m < 1.
    exponents: np.ndarray = np.frexp(positions)[1]
    return exponents


def _numbers(tokens: int, text_bytes: int, nats: dict[str, float]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "bytes": text_bytes,
        "nats": nats,
        "bits_per_byte": {
            column: value / math.log(2) / text_bytes if text_bytes else None
            for column, value in nats.items()
        },
        "perplexity": {
            # Hopeless, and still a number.
            column: math.exp(min(value / tokens, 700.0))
            for column, value in nats.items()
        },
    }


def _tokens_ahead(data: Dataset, max_documents: int | None) -> int:
    """About how many tokens the first documents have, BOS and EOS among them."""
    info, manifest = data.manifest.tokenizer, data.manifest
    marks = sum(mark is not None for mark in (info.bos_id, info.eos_id))
    tokens = manifest.tokens + manifest.documents * marks
    if max_documents is None or max_documents >= manifest.documents:
        return tokens
    return tokens * max_documents // manifest.documents


def _columns(trained: Trained, masked: bool) -> tuple[str, ...]:
    if not trained.config.model.memory.traits.remembers:
        return (NO_MEMORY,)
    return (MEMORY, MASKED) if masked else (MEMORY,)


def _check_tokenizer(trained: Trained, data: Dataset) -> None:
    own = durable.sha256_of(trained.tokenizer.path)
    if own != data.manifest.tokenizer.sha256:
        raise EvaluationError(
            f"{data.directory}: was prepared with another tokenizer than the run's, so its tokens "
            "mean other texts; prepare it anew with data-prep's "
            f"tokenizer.path={trained.tokenizer.path}"
        )


def _range(row: dict[str, Any]) -> str:
    last = row["end"] - 1
    return f"{last:,}" if row["first"] == last else f"{row['first']:,} to {last:,}"


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
