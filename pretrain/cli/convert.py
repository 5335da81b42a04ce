"""`pretrain import`, `export`, `plot` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data_prep.dataset import durable, settings, shards
from data_prep.dataset.command import Command, file_to_write, option, path_kind, word
from data_prep.dataset.parsing import pointer
from data_prep.dataset.settings import SettingsError
from pretrain.checkpoint.runs import run_directory_of
from pretrain.cli.evaluate import RUN, WEIGHTS_MEANING
from pretrain.config.root import ImportConfig
from pretrain.config.run import Weights
from pretrain.report.figures import MOST_RUNS


def _taken(path: Path) -> str:
    """Why no new directory can be made at this path; empty: one can."""
    if path.exists():
        return f"{path} already exists; choose a new directory"
    return durable.obstacle(path, directory=True)


def _no_model(path: Path) -> str:
    """Why this path is neither a directory nor a GGUF file."""
    if not path.exists():
        return (
            f"{path}: is not there; expected a model's directory, or a GGUF file, on this machine "
            "(`hf download NAME --local-dir DIR` fetches one)"
        )
    if not path.is_file():
        return shards.no_directory(path)
    try:
        with path.open("rb") as file:
            begins = file.read(99)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    said = pointer(begins) or "is neither a directory nor a GGUF file"
    return "" if begins.startswith(b"GGUF") else f"{path}: {said}"


def _import_problems(words: list[str]) -> list[str]:
    """Every mistake in an import's settings."""
    try:
        settings.load(ImportConfig, None, words)
    except SettingsError as error:
        return error.problems
    return []


_NEW_DIRECTORY = path_kind(_taken)
_MODEL = path_kind(_no_model)
_PAGE = Path("report.html")


class Import(Command):
    """Import a Llama, Mistral, Qwen2, Qwen3 or SmolLM2.

    Turns a directory with config.json, safetensors and a tokenizer, or a GGUF file, into a
    checkpoint that train.start_from, eval, generate and export read.
    """

    source: Path = word("the model's directory, or a GGUF file", kind=_MODEL)
    out: Path = word("directory to create", kind=_NEW_DIRECTORY)
    settings: list[str] = word(
        "settings of the imported model", [], metavar="key=value", check=_import_problems
    )
    tokenizer: Path | None = option(
        None, "tokenizer.model or tokenizer.json", otherwise="the one in SOURCE"
    )

    @classmethod
    def epilog(cls) -> str:
        return "\n  ".join(["settings and their defaults:", *settings.describe(ImportConfig)])

    def run(self) -> int:
        from pretrain.convert import llama

        return llama.run(self.source, self.out, self.settings, self.tokenizer)


class Export(Command):
    """Write a model that Hugging Face's transformers load.

    Writes safetensors, config.json, the tokenizer and the code of the model:
    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) loads it. A model without
    memory becomes a plain Llama, which gives the same logits for texts of one segment, or
    with memory.kind=full of memory.full.segments; other papers' memories are not exported.
    """

    path: Path = word("run directory, or one checkpoint of it", kind=RUN)
    out: Path = word("directory to create", kind=_NEW_DIRECTORY)
    dtype: Literal["stored", "float32", "bf16"] = option(
        "stored", "dtype of the weights", otherwise="as stored, without rounding"
    )
    weights: Weights = option("last", WEIGHTS_MEANING)

    def run(self) -> int:
        from pretrain.convert import export

        return export.run(self.path, self.out, self.dtype, self.weights)


class Plot(Command):
    """Draw a run's curves.

    Writes PNGs of a run's loss, speed, memory, gates and bits per byte by position.
    """

    path: Path = word("run directory", kind=RUN)

    def run(self) -> int:
        from pretrain import plot

        for path in plot.plot(run_directory_of(self.path)):
            print(path)
        return 0


class Report(Command):
    """Write a report on runs as one HTML page.

    Shows losses, rates, gates, memory, recall, speed, attempts, faults and configuration, of
    several runs side by side; also while they go on. The page needs no network and no JavaScript,
    and its size does not grow with the length of a run.
    """

    runs: list[Path] = word("run directories", kind=RUN, metavar="RUN", unique=True)
    out: Path | None = option(
        None,
        "the page's file",
        kind=file_to_write(".html"),
        metavar="FILE.html",
        otherwise="report.html in the run directory, of several runs in this directory",
    )

    @property
    def page(self) -> Path:
        """The file to write."""
        if self.out is not None:
            return self.out
        return run_directory_of(self.runs[0]) / "report.html" if len(self.runs) == 1 else _PAGE

    def problems(self) -> list[str]:
        found = []
        if len(self.runs) > MOST_RUNS:
            found.append(f"RUN: {len(self.runs)} runs; expected at most {MOST_RUNS}: choose some")
        first: dict[Path, Path] = {}
        for run in self.runs:
            same = first.setdefault(run_directory_of(run).resolve(), run)
            if same is not run:
                found.append(f"RUN: {run} is of the same run as {same}; leave one of them out")
        if self.out is None and (reason := durable.obstacle(self.page, directory=False)):
            found.append(f"--out: {reason}")
        return found

    def run(self) -> int:
        from pretrain.report import page

        page.write([run_directory_of(run) for run in self.runs], self.page)
        print(self.page)
        return 0
