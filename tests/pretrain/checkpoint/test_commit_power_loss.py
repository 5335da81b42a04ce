"""The power fails at any moment of a save: what was not synced may be gone."""

from __future__ import annotations

import random
import shutil
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
from tools.promises.power import Disk, observed


def save_step(root: Path, step: int) -> None:
    pieces = [Piece("w", (1000,), 0, torch.full((1000,), float(step)))]
    lanes = {0: LaneRecord({"token": step}, {"matrix": torch.ones(3, 3)})}
    save(root, step, pieces, lanes, {"step": step}, SoloRanks(), 2, 0, Attempt(root.parent, 1))


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_after_a_power_loss_the_last_committed_one_is_good(tmp_path: Path, chance: float) -> None:
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

    with observed(base, power_fails):
        for step in range(1, 6):
            if step == 4:
                shutil.copytree(root / "step-00000003", root / "step-00000009.writing")
                shutil.copytree(root / "step-00000003", root / "step-00000001.trash")
            save_step(root, step)
            committed = step
    assert moments > 100


def test_every_file_and_its_directory_are_synced_before_the_final_name_is_given(
    tmp_path: Path,
) -> None:
    final = tmp_path / "step-00000001"
    synced = {}

    def before(disk: Disk, call: str, arguments: Any) -> None:
        if call == "rename" and Path(arguments[1]) == final:
            writing = Path(arguments[0])
            entries = disk.directories[writing.stat().st_ino]
            synced.update({name: disk.files[inode] for name, inode in entries.items()})

    with observed(tmp_path, before):
        save_step(tmp_path, 1)
    assert len(synced) == 4
    assert synced == {entry.name: entry.read_bytes() for entry in final.iterdir()}
