"""Which directories are runs and checkpoints in them, and what others are; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.dataset import durable, shards
from data_prep.dataset.parsing import json_value
from data_prep.dataset.settings import MistakeError
from pretrain.checkpoint.attempts import begun
from pretrain.checkpoint.manifest import CHECKPOINTS, CHECKSUM, step_of, steps_in

CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
GENERATION = "generation_config.json"
"""Files and a directory of files beside an imported model's weights, as transformers name them."""

HUGGING_FACE = "config.json"
"""The file by which a Hugging Face model is recognised."""

_EXPECTED = f"expected a run directory, or a checkpoint in its {CHECKPOINTS}/"


class TrainedError(MistakeError):
    """A path that holds no trained model; the message says what was expected there."""


def is_checkpoint(path: Path) -> bool:
    """Whether the directory is a checkpoint, good or damaged."""
    return step_of(path.resolve().name) is not None or (path / CHECKSUM).is_file()


def is_run(path: Path) -> bool:
    """Whether the directory is that of a run: an attempt has begun there, or it has a checkpoint.

    A directory named checkpoints/ alone says nothing: other programs make such, too.
    """
    return begun(path) or bool(steps_in(path / CHECKPOINTS))


def no_run(path: Path) -> str:
    """Why `path` is neither a run directory nor a checkpoint in one; empty: it is one of them."""
    if reason := shards.no_directory(path):
        return f"{reason}; {_EXPECTED}"
    if is_checkpoint(path):
        resolved = path.resolve()
        if resolved.parent.name == CHECKPOINTS:
            return ""
        return (
            f"{path}: is not in a run's {CHECKPOINTS}/, and the run's tokenizer is needed too; "
            f"give RUN/{CHECKPOINTS}/{resolved.name}"
        )
    if is_run(path):
        return ""
    if (path / shards.MANIFEST).is_file():
        return f"{path}: is a data set; {_EXPECTED}"
    if (path / HUGGING_FACE).is_file():
        return f"{path}: is a Hugging Face model; give what `pretrain import` makes of it"
    return (
        f"{path}: is neither a run directory (no checkpoint in {CHECKPOINTS}/) nor a checkpoint "
        f"of one (named RUN/{CHECKPOINTS}/step-00000100)"
    )


def run_directory_of(path: Path) -> Path:
    """The run directory that `path` is, or that it is a checkpoint of. Raises TrainedError."""
    if reason := no_run(path):
        raise TrainedError(reason)
    return path.resolve().parent.parent if is_checkpoint(path) else path


def files_beside(run_directory: Path) -> dict[str, bytes]:
    """The files that came with an imported model's weights, by their path in the directory."""
    more = sorted((run_directory / MORE_TEMPLATES).glob("*.jinja"))
    paths = [run_directory / CHAT_TEMPLATE, run_directory / GENERATION, *more]
    return {
        str(path.relative_to(run_directory)): path.read_bytes() for path in paths if path.is_file()
    }


def write_beside(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write such files, durably."""
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        durable.write_bytes(path, data)


def ends_of(generation: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, of a generation_config.json, where there may be one or several."""
    given = generation.get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    return [id for id in listed if isinstance(id, int)]


def ends(run_directory: Path) -> list[int]:
    """The ids that end a text of an imported model, beside its tokenizer's EOS."""
    with suppress(OSError, ValueError):
        plain = json_value((run_directory / GENERATION).read_bytes())
        if isinstance(plain, dict):
            return ends_of(plain)
    return []
