"""Writing a checkpoint so that it is whole or absent, whatever is killed, full or without power.

    step-00000100.000007.writing   every rank's files, then the manifest; all synced
    step-00000100                  by one rename, synced; from here on it is a checkpoint
    step-00000050.000007.trash     a pruned one, renamed before its files are deleted

Only names of the middle form are ever loaded, so a killed save or a killed pruning leaves nothing
that could be mistaken for a checkpoint; the next save removes what it left.

The number is the attempt's that writes. A later attempt, before it looks for a checkpoint, renames
away what earlier ones are writing (`take_over`): whatever a rank that was left over still does, the
rename that would commit its checkpoint finds nothing to rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.dataset import durable
from pretrain.checkpoint.attempts import Attempt, SupersededError
from pretrain.checkpoint.manifest import (
    PASSED_OVER,
    CheckpointError,
    FileInfo,
    Manifest,
    json_bytes,
    layout_file,
    step_name,
    steps_in,
    tensor_file,
    write_manifest,
)
from pretrain.checkpoint.pieces import (
    Extent,
    LaneRecord,
    Piece,
    extent_of,
    lane_key,
    whole_tensors,
    write_layout,
    write_tensors,
)
from pretrain.checkpoint.ranks import Ranks, agreed, of_first
from pretrain.checkpoint.verify import remember, still_good, verify

_WRITING = "writing"
_TRASH = "trash"
_MARKED = re.compile(r"(step-\d+)\.(\d+)\.(writing|trash)")

_log = logging.getLogger(__name__)


def save(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    lanes: Mapping[int, LaneRecord],
    trainer: Mapping[str, Any],
    ranks: Ranks,
    keep_last: int,
    keep_every: int,
    attempt: Attempt,
) -> Path:
    """Commit a checkpoint of `step` under `root` and prune older ones; its directory.

    Every rank calls it with its own pieces and lanes; together they must hold every element of
    every tensor exactly once, and every lane from 0 on. `trainer` is rank 0's, plain JSON.

    Raises CheckpointError, the same on every rank, if any rank fails; then nothing that was there
    before has been touched. It is a SupersededError if a newer attempt than `attempt` has begun;
    that is looked at first, and again right before the commit and the pruning. It is a barrier: on
    return every rank has finished, and the pruning is done.

    A good checkpoint of this step that is already there is kept and returned: the state of a run
    after a step is one. A damaged one is replaced.

    Pruning keeps the `keep_last` (2 or more) newest good checkpoints and, for good, those whose
    step is a multiple of `keep_every` (0: none). Good are those that this process committed or
    verified at loading, as long as none of their files is missing or cut; others never count
    among `keep_last`, and are deleted once so many good ones are newer.
    """
    assert keep_last >= 2 and keep_every >= 0
    refuse_superseded(attempt, ranks)
    held: list[Piece] = []
    manifest = _plan(step, pieces, held, lanes, trainer, ranks)
    final = root / step_name(step)
    if of_first(ranks, final.exists) and verify(final, ranks) is None:
        of_first(ranks, partial(count_again, final))
        return final
    writing = _marked(final, attempt, _WRITING)
    of_first(ranks, partial(_prepare, writing, attempt))
    try:
        written = ranks.gather(agreed(ranks, lambda: _write_rank(writing, held, lanes, ranks)))
        files = {name: FileInfo(**info) for one in written for name, info in one.items()}
        manifest = dataclasses.replace(manifest, files=files)
        digest = of_first(ranks, partial(_commit, writing, final, manifest, attempt))
    except CheckpointError as error:
        _give_up(writing, attempt, ranks)
        raise CheckpointError(
            f"{final} could not be saved: {error}; earlier checkpoints are untouched"
        ) from error
    remember(final, digest)
    reason = of_first(ranks, partial(_prune, root, keep_last, keep_every, attempt))
    if reason is not None:
        raise SupersededError(reason)
    return final


def _give_up(writing: Path, attempt: Attempt, ranks: Ranks) -> None:
    """Remove what was being written. Raises SupersededError if that is why it came to nothing."""
    if ranks.rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
    try:
        refuse_superseded(attempt, ranks)
    except SupersededError:
        raise
    except CheckpointError:
        pass  # where the disk fails, too; the error of the save says more


def take_over(root: Path, attempt: Attempt) -> None:
    """Make sure that no earlier attempt can still commit what it is writing under `root`.

    To be called on one rank, once, after the attempt was claimed and before checkpoints are looked
    for: what an earlier one commits before is found there, and nothing comes after.
    """
    for entry, writer in _of_kind(root, _WRITING) if root.is_dir() else []:
        if writer < attempt.number:
            # A half deleted directory could still be renamed, one of another name cannot.
            taken = _marked(entry, attempt, _WRITING)
            with contextlib.suppress(FileNotFoundError):  # committed in this moment
                entry.rename(taken)
                durable.sync_directory(root)
                shutil.rmtree(taken)


def refuse_superseded(attempt: Attempt, ranks: Ranks) -> None:
    """Raise SupersededError on every rank if rank 0 sees a newer attempt. Call it on all ranks."""
    if (reason := of_first(ranks, attempt.superseded)) is not None:
        raise SupersededError(reason)


def count_again(directory: Path) -> None:
    """Count a good checkpoint as progress, though an attempt passed it over: its disk was away."""
    with contextlib.suppress(OSError):
        (directory / PASSED_OVER).unlink(missing_ok=True)


def _plan(
    step: int,
    pieces: Iterable[Piece],
    held: list[Piece],
    lanes: Mapping[int, LaneRecord],
    trainer: Mapping[str, Any],
    ranks: Ranks,
) -> Manifest:
    """The manifest but for its files, checked by all ranks before a byte is written.

    The pieces are drawn into `held` here, where an error of theirs reaches all ranks.
    """

    def mine() -> dict[str, Any]:
        if json.loads(json_bytes(trainer)) != trainer:
            raise CheckpointError(
                "trainer has tuples, or keys that are not text, which JSON would change"
            )
        held.extend(pieces)
        extents = [dataclasses.astuple(extent_of(piece)) for piece in held]
        return {"step": step, "extents": extents, "lanes": sorted(lanes)}

    plans = ranks.gather(agreed(ranks, mine))
    if len({plan["step"] for plan in plans}) > 1:
        raise CheckpointError(f"the ranks save different steps: {[p['step'] for p in plans]}")
    tensors = whole_tensors(
        Extent(name, dtype, tuple(shape), offset, length)
        for plan in plans
        for name, dtype, shape, offset, length in plan["extents"]
    )
    owners = [(lane, rank) for rank, plan in enumerate(plans) for lane in plan["lanes"]]
    if sorted(lane for lane, _ in owners) != list(range(len(owners))):
        raise CheckpointError(
            f"expected every lane from 0 on once, found (lane, rank) {sorted(owners)}"
        )
    return Manifest(step, ranks.size, {}, tensors, dict(owners), trainer)


def _prepare(writing: Path, attempt: Attempt) -> None:
    """An empty directory to write in; what a killed save left is removed first, for its space.

    Trash that a killed pruning left goes before the save only if a checkpoint is known to be good.
    """
    root = writing.parent
    created = [directory for directory in (root, *root.parents) if not directory.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for directory in created:
        durable.sync_directory(directory.parent)
    _remove_all(root, _WRITING, attempt)
    if any(still_good(directory) for _, directory in _checkpoints(root)):
        _remove_all(root, _TRASH, attempt)
    writing.mkdir()


def _write_rank(
    writing: Path, held: Iterable[Piece], lanes: Mapping[int, LaneRecord], ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Write this rank's two files; their FileInfos as plain JSON, by name."""
    stored = [(extent, piece.values) for piece in held if (extent := extent_of(piece)).length]
    tensors = {extent.key: values for extent, values in stored}
    for lane, record in lanes.items():
        tensors |= {lane_key(lane, name): value for name, value in record.tensors.items()}
    assert len(tensors) == len(stored) + sum(len(record.tensors) for record in lanes.values())
    layout = writing / layout_file(ranks.rank, ranks.size)
    values = writing / tensor_file(ranks.rank, ranks.size)
    files = {
        values.name: write_tensors(values, tensors),
        layout.name: write_layout(layout, [extent for extent, _ in stored], lanes),
    }
    return {name: dataclasses.asdict(info) for name, info in files.items()}


def _commit(writing: Path, final: Path, manifest: Manifest, attempt: Attempt) -> str:
    """Write the manifest and give the directory its name; the manifest's sha256."""
    digest = write_manifest(writing, manifest)
    attempt.require_newest()
    if final.exists():
        _discard(final, attempt)
    writing.rename(final)
    durable.sync_directory(final.parent)
    return digest


def _prune(root: Path, keep_last: int, keep_every: int, attempt: Attempt) -> str | None:
    """Delete what need not be kept; why the attempt may not, or None.

    A failure is logged: the save is done, the next one retries.
    """
    try:
        checkpoints = _checkpoints(root)
        good = [step for step, directory in checkpoints if still_good(directory)]
        oldest_kept = good[keep_last - 1] if len(good) >= keep_last else 0
        _remove_all(root, _TRASH, attempt)
        for step, directory in checkpoints:
            if step < oldest_kept and not (keep_every and step % keep_every == 0):
                if reason := attempt.superseded():
                    return reason
                _discard(directory, attempt)
    except OSError as error:
        _log.warning("%s: old checkpoints could not all be deleted: %s", root, error)
    return None


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every name that is a checkpoint's, newest first."""
    return [(step, root / step_name(step)) for step in steps_in(root)]


def _discard(directory: Path, attempt: Attempt) -> None:
    """Take the directory's name away, durably, then delete it."""
    trash = _marked(directory, attempt, _TRASH)
    if trash.exists():
        shutil.rmtree(trash)
    directory.rename(trash)
    durable.sync_directory(directory.parent)
    shutil.rmtree(trash)


def _marked(checkpoint: Path, attempt: Attempt, kind: str) -> Path:
    """The name that a checkpoint's directory has while `attempt` writes or deletes it."""
    return checkpoint.with_name(f"{checkpoint.name.split('.')[0]}.{attempt.number:06d}.{kind}")


def _of_kind(root: Path, kind: str) -> list[tuple[Path, int]]:
    """The directories that are being written, or deleted, each with the number of its attempt."""
    matches = [(entry, _MARKED.fullmatch(entry.name)) for entry in root.iterdir()]
    return [(entry, int(match[2])) for entry, match in matches if match and match[3] == kind]


def _remove_all(root: Path, kind: str, attempt: Attempt) -> None:
    """Delete what this attempt and earlier ones left. A later one's may be in use."""
    for entry, writer in _of_kind(root, kind):
        if writer <= attempt.number:
            with contextlib.suppress(FileNotFoundError):  # its own attempt deletes it, too
                shutil.rmtree(entry)
