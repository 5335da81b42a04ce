"""Is a directory a whole, undamaged checkpoint? Decided by sizes and sha256, before any parsing."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

from data_prep.dataset.durable import sha256_of
from data_prep.dataset.wording import counted
from pretrain.checkpoint.manifest import (
    CHECKSUM,
    MANIFEST,
    PASSED_OVER,
    CheckpointError,
    Manifest,
    files_of,
    read_manifest,
)
from pretrain.checkpoint.ranks import Ranks, agreed

# Checkpoints whose every byte this process has hashed and found right, or has written and
# committed itself: (directory, sha256 of its manifest). Hashing all of them again at each save, to
# know what may be pruned, would cost more than the save.
_known: set[tuple[Path, str]] = set()

_log = logging.getLogger(__name__)


def verify(directory: Path, ranks: Ranks) -> str | None:
    """Why the directory is not a good checkpoint; None if it is. The same answer on every rank.

    The files are shared out over the ranks and each byte is hashed by one of them.
    """
    try:
        digests = ranks.gather(agreed(ranks, lambda: _inspect(directory, ranks)))
    except CheckpointError as error:
        return str(error)
    if len(set(digests)) > 1:
        return f"the ranks read different manifests: {digests}"
    remember(directory, digests[0])
    return None


def remember(directory: Path, digest: str) -> None:
    """Note that the directory with this manifest was verified, or committed, by this process."""
    _known.add((directory.absolute(), digest))


def still_good(directory: Path) -> bool:
    """Whether this process knows the checkpoint to be good and nothing of it is missing or cut.

    It reads sizes and the manifest alone: bits that flipped after it was verified are not seen.
    """
    try:
        manifest, digest = read_manifest(directory)
        if (directory.absolute(), digest) not in _known:
            return False
        _check_sizes(directory, manifest)
    except (CheckpointError, OSError):
        return False
    return True


def _inspect(directory: Path, ranks: Ranks) -> str:
    """The manifest's sha256, if sizes and this rank's share of the files are right."""
    if not directory.is_dir():
        raise CheckpointError("is not a directory")
    manifest, digest = read_manifest(directory)
    extra = _check_sizes(directory, manifest)
    if extra and ranks.rank == 0:
        names = ", ".join(extra)
        _log.warning("checkpoint %s: not part of it, and not read: %s", directory.name, names)
    # By size, so that the many bytes are spread evenly and not the many names.
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    for name in by_size[ranks.rank :: ranks.size]:
        if sha256_of(directory / name) != manifest.files[name].sha256:
            raise CheckpointError(f"{name} is damaged: its sha256 differs from the manifest's")
    return digest


def _check_sizes(directory: Path, manifest: Manifest) -> list[str]:
    """Raise CheckpointError unless all files are there and whole; the names of what else is there.

    File managers, network file systems and backups lay files of their own into any directory.
    """
    expected = files_of(manifest.ranks)
    if set(manifest.files) != expected:
        raise CheckpointError(
            f"{MANIFEST} does not list the files of {counted(manifest.ranks, 'rank')}"
        )
    present = {entry.name: entry.lstat() for entry in directory.iterdir()}
    extra = sorted(set(present) - expected - {MANIFEST, CHECKSUM, PASSED_OVER})
    if missing := sorted(expected - set(present)):
        raise CheckpointError(f"{', '.join(missing)}: missing")
    for name in sorted(set(present) - set(extra)):
        if not stat.S_ISREG(present[name].st_mode):
            raise CheckpointError(f"{name} is not a regular file")
    for name, info in manifest.files.items():
        if present[name].st_size != info.bytes:
            raise CheckpointError(
                f"{name} has {present[name].st_size} bytes, expected {info.bytes}"
            )
    return extra
