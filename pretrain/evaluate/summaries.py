"""Summaries of whole documents, generated and scored by Rouge (the paper's Table 4, Figure 4).

A document is read once, in constant space. Where a share of it ends, the stream forks: into the
question and the answer, which is sampled there, and into the rest of the document. So each answer
is that of a prompt of BOS, the document's first tokens and the question alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from data_prep.dataset.wording import counted
from pretrain.config.run import Weights
from pretrain.evaluate import results, rouge
from pretrain.evaluate.generate import read, sampled
from pretrain.evaluate.pairs import Pair
from pretrain.evaluate.progress import TokenProgress, to_stderr
from pretrain.evaluate.questions import Sampling
from pretrain.evaluate.results import Report
from pretrain.model.stream import StreamState
from pretrain.trained import Trained

_HEADINGS = {"rouge1": "R-1", "rouge2": "R-2", "rougeL": "R-L", "overall": "Overall"}
_COLOURS = {"rouge1": "#0072B2", "rouge2": "#D55E00", "rougeL": "#009E73", "overall": "#000000"}


@dataclass(frozen=True)
class Answer:
    """A model's answer to a share of a document.

    `read` are the document's tokens that it was given, `generated` its own; it `ended` if EOS came
    before the most tokens that it may have.
    """

    id: str
    share: float
    read: int
    generated: int
    ended: bool
    text: str


def run(
    path: Path,
    name: str,
    pairs: Sequence[Pair],
    question: str,
    shares: Sequence[float],
    sampling: Sampling,
    weights: Weights = "last",
) -> int:
    """Let a run or checkpoint answer the pairs; print the table and write it into the run.

    `summaries-STEP-NAME.json` holds the numbers, `.jsonl` beside it every answer; with several
    shares `plots/summaries-STEP-NAME.png` is drawn. Returns the exit code, 0. Raises what
    `open_model`, `answers` and `publish` raise.
    """
    trained = results.open_model(path, weights)
    for line in _changed(trained, pairs, question):
        to_stderr(line)
    given = list(answers(trained, pairs, question, shares, sampling, to_stderr))
    found = {
        **results.of_model(trained),
        "pairs": name,
        "pairs_sha256": _sha256(pairs),
        "question": question,
        "shares": list(shares),
        "decoding": asdict(sampling),
        **report(pairs, given),
    }
    results.publish(
        trained.run_directory,
        f"summaries-{trained.step}-{name}",
        found,
        measured=("rows", "lead"),
        table=table(found),
        lines=lines(pairs, given),
        figure=plot(found) if len(shares) > 1 else None,
    )
    return 0


def _changed(trained: Trained, pairs: Sequence[Pair], question: str) -> Iterator[str]:
    """What the tokenizer does not give back, so that the model reads something else."""
    changes = [(pair.id, trained.tokenizer.changed(pair.document)) for pair in pairs]
    found = [f"{id}: {change}" for id, change in changes if change]
    if found:
        yield (
            f"the tokenizer does not give {counted(len(found), 'document')} back, and the model "
            f"reads what comes of them: in {found[0]}"
        )
    if change := trained.tokenizer.changed(question):
        yield f"the tokenizer does not give the question back, and the model reads it so: {change}"


def _sha256(pairs: Sequence[Pair]) -> str:
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()


def answers(
    trained: Trained,
    pairs: Sequence[Pair],
    question: str,
    shares: Sequence[float],
    sampling: Sampling,
    progress_lines: Callable[[str], None],
) -> Iterator[Answer]:
    """The answers, pair by pair, of each the smallest share first.

    What is sampled for a pair depends on the seed and its place alone, not on other pairs or
    shares. Raises ResultError where the model's numbers are not finite.
    """
    size = sum(len(pair.document.encode()) for pair in pairs)
    progress = TokenProgress("summaries", size // 4, progress_lines)  # some bytes per token
    for place, pair in enumerate(pairs):
        seed = int(np.random.SeedSequence([sampling.seed, place]).generate_state(1)[0])
        own = replace(sampling, seed=seed)
        document = trained.tokenizer.encode(pair.document)
        cuts = [(share, cut(len(document), share)) for share in sorted(shares)]
        heads = _heads(trained, document, question, [count for _, count in cuts], progress)
        for (share, count), (logits, stream) in zip(cuts, heads, strict=True):
            tokens = list(sampled(trained, logits, stream, own))
            text = trained.tokenizer.decode_bytes(tokens, inside=True).decode(errors="replace")
            ended = len(tokens) < sampling.max_tokens
            yield Answer(pair.id, share, count, len(tokens), ended, text)


def cut(tokens: int, share: float) -> int:
    """How many of a document's first tokens are a share of it; at least one."""
    return max(1, round(tokens * share))


def _heads(
    trained: Trained,
    document: np.ndarray,
    question: str,
    cuts: Sequence[int],
    progress: TokenProgress,
) -> Iterator[tuple[Tensor, StreamState]]:
    """Logits [V] and stream after BOS, so many of the document's tokens and the question, each."""
    bos = trained.tokenizer.bos_id
    head = [] if bos is None else [bos]
    asking = [ids for _, ids in trained.tokenizer.encode_parts([question], inside=True)]
    stream = trained.model.open_stream(1, trained.device)
    for begin, end in zip([0, *cuts], cuts, strict=False):
        tokens = np.concatenate([head if begin == 0 else [], document[begin:end]])
        if len(tokens):
            logits, stream = read(trained, tokens, stream, progress)
        if asking:
            yield read(trained, np.concatenate(asking), stream.copied(), progress)
        else:
            yield logits, stream.copied()


def report(pairs: Sequence[Pair], given: Sequence[Answer]) -> Report:
    """JSON-able numbers: `pairs`' Rouge by share, and beside it that of each document's beginning.

    `rows` have share, the mean `read` and `generated` tokens, `ended` as a share of the answers,
    and `rouge`, as `rouge.means` has it. `lead` is the Rouge of the document's first `words`, as
    many as the references have on average.
    """
    references = [pair.answer for pair in pairs]
    rows = []
    for share in dict.fromkeys(one.share for one in given):
        own = [one for one in given if one.share == share]
        rows.append(
            {
                "share": share,
                "read": sum(one.read for one in own) / len(own),
                "generated": sum(one.generated for one in own) / len(own),
                "ended": sum(one.ended for one in own) / len(own),
                "rouge": rouge.means(rouge.scores(references, [one.text for one in own])),
            }
        )
    words = round(sum(len(text.split()) for text in references) / len(references))
    beginnings = [" ".join(pair.document.split()[:words]) for pair in pairs]
    lead = {"words": words, "rouge": rouge.means(rouge.scores(references, beginnings))}
    return {"documents": len(pairs), "rows": rows, "lead": lead}


def lines(pairs: Sequence[Pair], given: Sequence[Answer]) -> bytes:
    """The answers as jsonl, each with its reference and Rouge."""
    references = [pair.answer for pair in pairs for _ in range(len(given) // len(pairs))]
    scored = rouge.scores(references, [one.text for one in given])
    records = [
        {**asdict(one), "answer": answer, **dict(zip(rouge.KINDS, values.tolist(), strict=True))}
        for one, answer, values in zip(given, references, scored, strict=True)
    ]
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records).encode()


def table(found: Report) -> str:
    """The report for people: a row a share, and the document's beginning as a reference."""
    decoding = found["decoding"]
    lines = [
        f"{results.step_of(found)}, memory {found['memory_kind']}, "
        f"{counted(found['documents'], 'pair')} of {found['pairs']}: Rouge with its 95 % interval "
        f"over pairs; temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}, at "
        f"most {counted(decoding['max_tokens'], 'token')}",
        f"{'share':>12} {'tokens read':>12} {'generated':>10} {'ended':>6} "
        + " ".join(f"{name:>20}" for name in _HEADINGS.values()),
    ]
    for row in found["rows"]:
        cells = f"{row['share']:>12g} {row['read']:>12,.0f} {row['generated']:>10,.1f}"
        lines.append(f"{cells} {row['ended']:>6.0%} {_shown(row['rouge'])}")
    lead = found["lead"]
    name = f"first {counted(lead['words'], 'word')}"
    lines.append(f"{name:>12} {'':>{42 - max(12, len(name))}} {_shown(lead['rouge'])}")
    return "\n".join(lines)


def _shown(values: dict[str, Any]) -> str:
    cells = []
    for kind in _HEADINGS:
        low, high = values[kind]["interval"]
        cells.append(f"{values[kind]['value']:.1f} ({low:.1f} to {high:.1f})")
    return " ".join(f"{cell:>20}" for cell in cells)


def plot(found: Report) -> Figure:
    """Rouge by the share of the document that was read (the paper's Figure 4)."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shares = [row["share"] for row in found["rows"]]
    for kind, heading in _HEADINGS.items():
        colour = _COLOURS[kind]
        values = [row["rouge"][kind]["value"] for row in found["rows"]]
        low, high = zip(*(row["rouge"][kind]["interval"] for row in found["rows"]), strict=True)
        axes.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(shares, values, color=colour, marker="o", markersize=4, label=heading)
    lead = found["lead"]["rouge"]["overall"]["value"]
    axes.axhline(lead, color="#666666", linestyle=":", linewidth=1, label="beginning, Overall")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlabel("share of the document that was read")
    axes.set_ylabel("Rouge (95 % over pairs)")
    axes.set_title(
        f"{counted(found['documents'], 'pair')} of {found['pairs']}, {results.step_of(found)}, "
        f"memory {found['memory_kind']}",
        loc="left",
        fontsize=10,
    )
    axes.legend(frameon=False, ncols=3, fontsize=8)
    return figure
