"""Results of evaluations: files in the run that say of which model they are, and what was asked.

A file never replaces the result of another model or another question: where `NAME.json` holds one,
the new result is `NAME-2.json`, and so on. Asking the same again replaces the former answer.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.dataset import durable
from data_prep.dataset.parsing import json_value
from pretrain.checkpoint.runs import run_directory_of
from pretrain.config.run import Weights
from pretrain.evaluate.questions import EvaluationError, ResultError
from pretrain.trained import Learned, Trained, default_device, load

if TYPE_CHECKING:  # not imported by the ranks of a training that is evaluated
    from matplotlib.figure import Figure

Report = dict[str, Any]
"""JSON-able: of which model it is, what was asked, and what was measured."""

# When and by which code a result was written: not what it is of.
_PROVENANCE = ("code", "written")
_SOURCE = Path(__file__).resolve().parents[2]


def open_model(path: Path, weights: Weights = "last") -> Trained:
    """The model of a run or checkpoint, once it is known that results can be written into the run.

    Raises EvaluationError and what `load` raises.
    """
    directory = run_directory_of(path)
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise EvaluationError(
            f"{directory}: results cannot be written into this run directory ({error.strerror}); "
            "make it writable, or evaluate a copy of it"
        ) from None
    return load(path, default_device(), weights)


def of_model(learned: Learned) -> Report:
    """What identifies the model in a report."""
    stored = {}
    if isinstance(learned, Trained):
        # Results from before there was an average are those of the last step's weights.
        averaged = {} if learned.weights == "last" else {"weights": learned.weights}
        stored = {
            **averaged,
            "checkpoint": learned.checkpoint_path.name,
            "checkpoint_sha256": learned.checkpoint_sha256,
        }
    return {
        "step": learned.step,
        **stored,
        "memory_kind": learned.config.model.memory.kind,
        "segment": learned.config.model.span,
    }


def step_of(report: Report) -> str:
    """Words for the step of a report's model, and for its weights where they are not the step's."""
    averaged = f" (weights {report['weights']})" if "weights" in report else ""
    return f"step {report['step']}{averaged}"


def publish(
    directory: Path,
    name: str,
    report: Report,
    *,
    measured: Collection[str],
    table: str,
    lines: bytes | None = None,
    figure: Figure | None = None,
) -> None:
    """Write `name`.json into a run directory, then print the table and where the files are.

    `measured` are the keys of the report that hold what was found; the others say what was asked
    of which model. `lines` become `name`.jsonl, the figure plots/`name`.png. Raises ResultError
    where a file cannot be written, after the whole report and the lines were printed.
    """
    report = {**report, "code": _code(), "written": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        path = _free(directory, name, report, {*measured, *_PROVENANCE})
        written = [path]
        if lines is not None:
            written.append(path.with_suffix(".jsonl"))
            durable.write_bytes(written[-1], lines)
        if figure is not None:
            written.append(directory / "plots" / f"{path.stem}.png")
            write_figure(written[-1], figure, dpi=120)
        # The JSON last: where it is, the others are too.
        durable.write_json(path, report)
    except OSError as error:
        print(table)
        print(json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False))
        print((lines or b"").decode(), end="")
        raise ResultError(
            f"{error.filename or directory}: cannot be written ({error.strerror or error}); the "
            "whole result was printed instead"
        ) from None
    print(table)
    for one in written:
        print(f"written to {one}")


def heat_map(
    shares: np.ndarray,
    said: np.ndarray,
    columns: tuple[str, Sequence[str]],
    rows: tuple[str, Sequence[str]],
    title: str,
    label: str,
) -> Figure:
    """Shares, 0 to 1, as colours with what is `said` of each: both [rows, columns].

    `columns` and `rows` are each the axis's meaning and the names of its places, the first row on
    top; `label` is the colours' meaning.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + shares.shape[1], 1.6 + 0.5 * len(shares)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(shares.shape[1]), columns[1])
    axes.set_yticks(range(len(shares)), rows[1])
    for (y, x), share in np.ndenumerate(shares):
        color = "black" if share > 0.6 else "white"
        axes.text(x, y, str(said[y, x]), ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel(columns[0])
    axes.set_ylabel(rows[0])
    axes.set_title(title)
    figure.colorbar(image, label=label)
    return figure


def write_figure(path: Path, figure: Figure, dpi: int = 150) -> None:
    """Write a PNG durably; its directory is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def _free(directory: Path, name: str, report: Report, found: Collection[str]) -> Path:
    """The first of NAME.json, NAME-2.json, ... without a result of another model or question."""

    def asked(one: Report) -> Report:
        return {key: value for key, value in one.items() if key not in found}

    own = json.loads(json.dumps(asked(report)))  # tuples as the lists that JSON makes of them
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    paths = (directory / f"{one}.json" for one in names)
    return next(path for path in paths if not path.exists() or asked(_read(path)) == own)


def _read(path: Path) -> Report:
    """The report in a file; one of nothing where it cannot be read."""
    try:
        report = json_value(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _code() -> str:
    """The version, and in a checkout of the repository its commit."""
    version = metadata.version("infini-pretrain")
    if not (_SOURCE / ".git").exists():
        return version
    command = ["git", "-C", str(_SOURCE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} {done.stdout.strip()}"
