"""The manifest: what a checkpoint consists of, and the checksum of every byte of it.

`manifest.json` is the last file written. It lists every other file with size and sha256;
`manifest.sha256` holds its own, in the form that `sha256sum -c` reads, so that a damaged manifest
is found before it is parsed. A checksum finds damage, not malice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
CHECKPOINTS = "checkpoints"
"""Where a run directory has its checkpoints."""

PASSED_OVER = "passed_over.txt"
"""The file that says, in a checkpoint, why the last attempt did not resume from it."""

_STEP_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; raised with the same text on every rank."""


@dataclass(frozen=True)
class FileInfo:
    """Size and hex sha256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorInfo:
    """A whole tensor: safetensors' name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint of `ranks` writers after `step` optimizer steps.

    `lanes` maps each lane to the rank that stored it; `trainer` is the trainer's own (schedule,
    counters, configuration).
    """

    step: int
    ranks: int
    files: Mapping[str, FileInfo]
    tensors: Mapping[str, TensorInfo]
    lanes: Mapping[int, int]
    trainer: Mapping[str, Any]


def step_name(step: int) -> str:
    """The name of the checkpoint's directory."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint directory's name; None for any other name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def steps_in(root: Path) -> list[int]:
    """The steps of the checkpoints under `root`, good or damaged, newest first."""
    names = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    return sorted((step for name in names if (step := step_of(name)) is not None), reverse=True)


def undoubted_steps(root: Path) -> list[int]:
    """The steps of the checkpoints under `root` that no attempt passed over, newest first."""
    return [step for step in steps_in(root) if not (root / step_name(step) / PASSED_OVER).exists()]


def none_good(root: Path, reasons: Iterable[tuple[str, str]]) -> str:
    """What is wrong where `root` holds checkpoints, each with its reason, and none is good."""
    listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons)
    return (
        f"{root} holds checkpoints, but none is good:{listed}\n"
        "Put a good copy in place, or move them away to start from step 0."
    )


def layout_file(rank: int, ranks: int) -> str:
    """The JSON file that lists the pieces and lanes in the rank's tensor file."""
    return f"rank-{rank:05d}-of-{ranks:05d}.json"


def tensor_file(rank: int, ranks: int) -> str:
    """The rank's safetensors file."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def files_of(ranks: int) -> set[str]:
    """The names of all files that `ranks` writers leave, without the manifest's two."""
    return {name(rank, ranks) for rank in range(ranks) for name in (layout_file, tensor_file)}


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys. CheckpointError for what JSON cannot hold, NaN and infinity too."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"not storable as JSON: {error}") from error
    return (text + "\n").encode()


def write_manifest(directory: Path, manifest: Manifest) -> str:
    """Write both files durably, `manifest.json` last; its hex sha256."""
    data = json_bytes({"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)})
    digest = hashlib.sha256(data).hexdigest()
    durable.write_bytes(directory / CHECKSUM, _checksum_line(digest))
    durable.write_bytes(directory / MANIFEST, data)
    return digest


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The directory's manifest and its sha256, which is checked before a byte is parsed.

    Raises CheckpointError where it is missing, damaged, of another format version, or of another
    step than the directory's name says, or where it cannot be read.
    """
    data, digest = _undamaged(directory)
    manifest = _parse(data)
    if step_of(directory.name) not in (manifest.step, None):
        raise CheckpointError(f"{MANIFEST} is of step {manifest.step}, not of this directory")
    return manifest, digest


def refuse_newer(directory: Path) -> None:
    """Raise SettingsError if a newer version of this program wrote the checkpoint.

    It is not damaged: to continue from an older one would undo the steps since.
    """
    try:
        version = json.loads(_undamaged(directory)[0])["format_version"]
    except (CheckpointError, KeyError, RecursionError, TypeError, ValueError):
        return  # of no program: verification says why
    if isinstance(version, int) and version > FORMAT_VERSION:
        formats = f"format {version}; this one reads {FORMAT_VERSION}"
        raise SettingsError(
            [
                f"{directory}: a newer version of this program wrote it ({formats}); "
                "update infini-pretrain, or move it away to continue from an older checkpoint"
            ]
        )


def _undamaged(directory: Path) -> tuple[bytes, str]:
    """The manifest's bytes and sha256. Raises CheckpointError where that is not its checksum."""
    for name in (MANIFEST, CHECKSUM):
        if not (directory / name).is_file():
            raise CheckpointError(f"{name} is missing: not a finished checkpoint")
    data, line = _bytes(directory / MANIFEST), _bytes(directory / CHECKSUM)
    digest = hashlib.sha256(data).hexdigest()
    if line != _checksum_line(digest):
        raise CheckpointError(f"{MANIFEST} differs from its checksum in {CHECKSUM}")
    return data, digest


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None


def _checksum_line(digest: str) -> bytes:
    return f"{digest}  {MANIFEST}\n".encode()


def _parse(data: bytes) -> Manifest:
    try:
        raw = json.loads(data)
        version = raw["format_version"]
        if version == FORMAT_VERSION:
            return Manifest(
                step=int(raw["step"]),
                ranks=int(raw["ranks"]),
                files={name: FileInfo(**info) for name, info in raw["files"].items()},
                tensors={
                    name: TensorInfo(info["dtype"], tuple(info["shape"]))
                    for name, info in raw["tensors"].items()
                },
                lanes={int(lane): int(rank) for lane, rank in raw["lanes"].items()},
                trainer=dict(raw["trainer"]),
            )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST} is not a manifest ({error!r})") from None
    raise CheckpointError(
        f"{MANIFEST} has format version {version}; this program reads {FORMAT_VERSION}"
    )
