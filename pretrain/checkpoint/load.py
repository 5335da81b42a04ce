"""Finding the newest good checkpoint, and reading any slice of any tensor from it."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pretrain.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    layout_file,
    none_good,
    read_manifest,
    refuse_newer,
    step_name,
    steps_in,
    tensor_file,
)
from pretrain.checkpoint.pieces import DTYPES, Extent, LaneRecord, lane_key
from pretrain.checkpoint.ranks import Ranks, of_first
from pretrain.checkpoint.verify import verify


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint (None: there is no checkpoint at all), and (name, reason) of each
    newer one that is not good, newest first.
    """

    path: Path | None
    passed_over: tuple[tuple[str, str], ...]


def newest_good(root: Path, ranks: Ranks) -> Found:
    """Verify checkpoints under `root`, newest first, until one is good. The same on every rank.

    Those that a run which goes on writes meanwhile are looked at, too: it may have deleted the
    others. Raises CheckpointError, with each reason, if there are checkpoints but none is good:
    starting at step 0 over them would be a loss that nobody asked for. Raises SettingsError for one
    that a newer version of this program wrote.
    """
    passed_over: list[tuple[str, str]] = []
    seen: set[int] = set()
    while left := [step for step in of_first(ranks, lambda: steps_in(root)) if step not in seen]:
        seen.add(left[0])
        name = step_name(left[0])
        of_first(ranks, partial(refuse_newer, root / name))
        reason = verify(root / name, ranks)
        if reason is None:
            return Found(root / name, tuple(passed_over))
        if not of_first(ranks, (root / name).exists):
            reason = "was deleted while it was verified"
        passed_over.append((name, reason))
    if passed_over:
        raise CheckpointError(none_good(root, passed_over))
    return Found(None, ())


def deleted(path: Path) -> str:
    """What to do where a checkpoint was deleted while it was read."""
    newest = [str(path.parent / step_name(step)) for step in steps_in(path.parent)[:1]]
    return (
        f"{path}: was deleted while it was read, as training deletes old checkpoints; "
        f"{''.join(f'read {name}, ' for name in newest)}"
        f"{'or ' * bool(newest)}have the run keep more (checkpoint.keep_last, keep_every)"
    )


@contextmanager
def _being_read(path: Path) -> Iterator[None]:
    """Within, an error is a CheckpointError that says so if the checkpoint was deleted."""
    try:
        yield
    except (OSError, CheckpointError):
        if path.exists():
            raise
        raise CheckpointError(deleted(path)) from None


class Checkpoint:
    """Reads a checkpoint that `newest_good` or `verify` found good, one slice at a time.

    Files are mapped, never loaded whole. `step`, `trainer` (the trainer's own JSON), `ranks` (how
    many wrote it) and `sha256` (of its manifest) are attributes. Close it, or use it in a `with`
    block. Whatever reads raises CheckpointError where training has deleted it meanwhile.
    """

    def __init__(self, path: Path) -> None:
        with _being_read(path):
            manifest, self.sha256 = read_manifest(path)
            self._layouts = [_layout(path, manifest, rank) for rank in range(manifest.ranks)]
        self.path = path
        self.step = manifest.step
        self.ranks = manifest.ranks
        self.trainer = dict(manifest.trainer)
        self._manifest = manifest
        self._parts = self._parts_by_name()
        self._open: dict[int, Any] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        self._open.clear()

    def names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {name: info.shape for name, info in self._manifest.tensors.items()}

    def expect(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless the tensors are exactly those of `shapes` (name: shape)."""
        stored = self.names()
        problems = [f"{name} is missing" for name in shapes if name not in stored]
        problems += [f"{name} is not expected" for name in stored if name not in shapes]
        problems += [
            f"{name} has shape {list(stored[name])}, expected {list(shape)}"
            for name, shape in shapes.items()
            if stored.get(name, shape) != tuple(shape)
        ]
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"{self.path.name} is of another model: {'; '.join(problems[:5])}{more}"
            )

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that tensor `name` was stored in. CheckpointError for an unknown name."""
        if name not in self._manifest.tensors:
            raise CheckpointError(
                f"{self.path.name} has no tensor {name!r}; it has {len(self._manifest.tensors)}, "
                "of a model or optimizer with other parts"
            )
        return DTYPES[self._manifest.tensors[name].dtype]

    def read(self, name: str, offset: int, length: int, dtype: torch.dtype | None = None) -> Tensor:
        """Elements [offset, offset + length) of the flattened tensor: a new 1-D tensor on the CPU.

        Raises CheckpointError for an unknown name, elements that the tensor does not have, or a
        stored dtype other than `dtype` (None: any).
        """
        stored = self.dtype(name)
        if dtype not in (None, stored):
            raise CheckpointError(f"{self.path.name}: {name} is {stored}, expected {dtype}")
        shape = self._manifest.tensors[name].shape
        end = offset + length
        if not 0 <= offset <= end <= math.prod(shape):
            raise CheckpointError(
                f"{self.path.name}: {name} has shape {list(shape)}, elements {offset} to {end} "
                "were asked for: the model's shape has changed"
            )
        values = torch.empty(length, dtype=stored)
        starts, parts = self._parts[name]
        for rank, part in parts[max(bisect_right(starts, offset) - 1, 0) :]:
            low, high = max(offset, part.offset), min(end, part.offset + part.length)
            if part.offset >= end:
                break
            if low < high:
                piece = self._file(rank).get_slice(part.key)
                values[low - offset : high - offset] = piece[low - part.offset : high - part.offset]
        return values

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor in its shape. Raises as `read` does."""
        self.dtype(name)
        shape = self._manifest.tensors[name].shape
        return self.read(name, 0, math.prod(shape), dtype).reshape(shape)

    def lanes(self) -> int:
        """The number of lanes."""
        return len(self._manifest.lanes)

    def lane(self, lane: int) -> LaneRecord:
        """The lane's place and memory. CheckpointError for a lane that is not in it."""
        if lane not in self._manifest.lanes:
            raise CheckpointError(
                f"{self.path.name} has lanes 0 to {self.lanes() - 1}, lane {lane} was asked for: "
                "the number of lanes (data.lanes) has changed"
            )
        rank = self._manifest.lanes[lane]
        record = self._layouts[rank]["lanes"][str(lane)]
        file = self._file(rank)
        return LaneRecord(
            record["place"],
            {name: file.get_tensor(lane_key(lane, name)).clone() for name in record["tensors"]},
        )

    def _parts_by_name(self) -> dict[str, tuple[list[int], list[tuple[int, Extent]]]]:
        """Of each tensor: the offsets of its pieces, and (rank, piece), in order of offset."""
        found: dict[str, list[tuple[int, Extent]]] = {name: [] for name in self._manifest.tensors}
        for rank, layout in enumerate(self._layouts):
            for name, offset, length in layout["pieces"]:
                info = self._manifest.tensors[name]
                extent = Extent(name, info.dtype, info.shape, offset, length)
                found[name].append((rank, extent))
        for parts in found.values():
            parts.sort(key=lambda part: part[1].offset)
        return {name: ([part.offset for _, part in parts], parts) for name, parts in found.items()}

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self.path / tensor_file(rank, self.ranks)
            with _being_read(self.path):
                self._open[rank] = safe_open(path, framework="pt", device="cpu")
        return self._open[rank]


def _layout(directory: Path, manifest: Manifest, rank: int) -> dict[str, Any]:
    name = layout_file(rank, manifest.ranks)
    data = (directory / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise CheckpointError(f"{directory.name}/{name} was changed after it was verified")
    layout: dict[str, Any] = json.loads(data)
    return layout
