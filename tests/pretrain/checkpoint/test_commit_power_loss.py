"""The power fails at any moment of a save: what was not synced may be gone.

A killed process leaves the page cache, so a kill shows nothing of this. Here the calls that change
directories or sync are observed (and carried out), and before each of them the disk that a power
loss could leave is built: of every file its synced bytes, of every directory its synced entries,
or, by the toss of a coin, the newer ones that happened to reach the disk.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.load import Checkpoint, newest_good
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.checkpoint.verify import verify

CHANGES = ["fsync", "rename", "replace", "mkdir", "rmdir", "unlink"]


class Disk:
    """What of the tree under `base` is durable, kept by observing fsync."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.files: dict[int, bytes] = {}
        self.directories: dict[int, dict[str, int]] = {base.stat().st_ino: {}}
        self._held: list[int] = []

    def synced(self, descriptor: int) -> None:
        """Note what an fsync of the descriptor has made durable."""
        self._held.append(os.dup(descriptor))  # so that its inode number is not given away again
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            names = os.listdir(descriptor)
            self.directories[status.st_ino] = {
                name: os.stat(name, dir_fd=descriptor).st_ino for name in names
            }
        else:
            self.files[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def after_power_loss(self, target: Path, reaches_disk: Callable[[], bool]) -> None:
        """Build the tree that is left; `reaches_disk` decides for each thing not yet synced."""
        files, directories = dict(self.files), dict(self.directories)
        for path in sorted([self.base, *self.base.rglob("*")]):
            inode = path.stat().st_ino
            if path.is_dir():
                directories.setdefault(inode, {})
                if reaches_disk():
                    directories[inode] = {e.name: e.stat().st_ino for e in path.iterdir()}
            else:
                files.setdefault(inode, b"")
                if reaches_disk():
                    files[inode] = path.read_bytes()

        def build(inode: int, place: Path) -> None:
            if inode in directories:
                place.mkdir()
                for name, child in directories[inode].items():
                    build(child, place / name)
            else:
                place.write_bytes(files.get(inode, b""))

        build(self.base.stat().st_ino, target)

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


Before = Callable[[Disk, str, tuple[Any, ...]], None]


@pytest.fixture
def observe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, Before], None]]:
    """`observe(base, before)`: `before(disk, call, arguments)` precedes each change there."""
    disks: list[Disk] = []

    def start(base: Path, before: Before) -> None:
        disk, quiet = Disk(base), False
        disks.append(disk)

        def observed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                nonlocal quiet
                if quiet:
                    return real(*arguments, **named)
                quiet = True
                try:
                    before(disk, name, arguments)
                    result = real(*arguments, **named)
                    if name == "fsync":
                        disk.synced(arguments[0])
                finally:
                    quiet = False
                return result

            return call

        for name in CHANGES:
            monkeypatch.setattr(os, name, observed(name, getattr(os, name)))

    yield start
    monkeypatch.undo()
    for disk in disks:
        disk.close()


def save_step(root: Path, step: int) -> None:
    pieces = [Piece("w", (1000,), 0, torch.full((1000,), float(step)))]
    lanes = {0: LaneRecord({"token": step}, {"matrix": torch.ones(3, 3)})}
    save(root, step, pieces, lanes, {"step": step}, SoloRanks(), 2, 0, Attempt(root.parent, 1))


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_after_a_power_loss_the_last_committed_one_is_good(
    tmp_path: Path, observe: Any, chance: float
) -> None:
    """With `chance` 0 nothing survives that was not synced, with 1 everything does."""
    base, scratch = tmp_path / "disk", tmp_path / "scratch"
    base.mkdir()
    root = base / "run" / "checkpoints"
    choose = random.Random(f"{chance}")
    committed = moments = 0

    def power_fails(disk: Disk, call: str, arguments: Any) -> None:
        nonlocal moments
        moments += 1
        disk.after_power_loss(scratch, lambda: choose.random() < chance)
        left = scratch / "run" / "checkpoints"
        for directory in left.glob("step-????????"):
            assert verify(directory, SoloRanks()) is None
        found = newest_good(left, SoloRanks())
        if found.path is None:
            assert committed == 0
        else:
            with Checkpoint(found.path) as checkpoint:
                assert checkpoint.step >= committed
                assert checkpoint.tensor("w").tolist() == [float(checkpoint.step)] * 1000
        shutil.rmtree(scratch)

    observe(base, power_fails)
    for step in range(1, 6):
        if step == 4:
            shutil.copytree(root / "step-00000003", root / "step-00000009.writing")
            shutil.copytree(root / "step-00000003", root / "step-00000001.trash")
        save_step(root, step)
        committed = step
    assert moments > 100


def test_every_file_and_its_directory_are_synced_before_the_final_name_is_given(
    tmp_path: Path, observe: Any
) -> None:
    final = tmp_path / "step-00000001"
    synced = {}

    def before(disk: Disk, call: str, arguments: Any) -> None:
        if call == "rename" and Path(arguments[1]) == final:
            writing = Path(arguments[0])
            entries = disk.directories[writing.stat().st_ino]
            synced.update({name: disk.files[inode] for name, inode in entries.items()})

    observe(tmp_path, before)
    save_step(tmp_path, 1)
    assert len(synced) == 4
    assert synced == {entry.name: entry.read_bytes() for entry in final.iterdir()}
