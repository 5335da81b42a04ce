"""Which directories are runs and checkpoints in them, and what others are; free of torch."""

from __future__ import annotations

from pathlib import Path

from data_prep.dataset import shards
from data_prep.dataset.settings import MistakeError
from pretrain.checkpoint.attempts import ATTEMPTS
from pretrain.checkpoint.manifest import CHECKPOINTS, CHECKSUM, step_of

_EXPECTED = f"expected a run directory, or a checkpoint in its {CHECKPOINTS}/"


class TrainedError(MistakeError):
    """A path that holds no trained model; the message says what was expected there."""


def is_checkpoint(path: Path) -> bool:
    """Whether the directory is a checkpoint, good or damaged."""
    return step_of(path.resolve().name) is not None or (path / CHECKSUM).is_file()


def is_run(path: Path) -> bool:
    """Whether the directory is that of a run."""
    return (path / CHECKPOINTS).is_dir() or (path / ATTEMPTS).is_dir()


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
    if (path / "config.json").is_file():
        return f"{path}: is a Hugging Face model; give what `pretrain import` makes of it"
    return (
        f"{path}: is neither a run directory (no {CHECKPOINTS}/ in it) nor a checkpoint of one "
        f"(named RUN/{CHECKPOINTS}/step-00000100)"
    )


def run_directory_of(path: Path) -> Path:
    """The run directory that `path` is, or that it is a checkpoint of. Raises TrainedError."""
    if reason := no_run(path):
        raise TrainedError(reason)
    return path.resolve().parent.parent if is_checkpoint(path) else path
