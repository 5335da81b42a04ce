"""Promises 1 to 4 in small, and faults that turn them red."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.dataset import durable, shards
from pretrain.checkpoint import commit, verify
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.load import newest_good
from pretrain.checkpoint.ranks import SoloRanks
from tests.tools.promises.failures import failures
from tools.promises import checkpoints, small_disk
from tools.promises.campaign import UnavailableError
from tools.promises.checkpoints import INJECTED, KILLS, POINTS

WITHOUT_POWER = KILLS + POINTS  # nothing survives that was not synced
MANIFEST, LAYOUT = 4, 2  # seeds that change a byte there


def test_deaths_of_every_kind_lose_nothing(tmp_path: Path) -> None:
    assert failures(tmp_path, "checkpoint", [0, KILLS + 20, WITHOUT_POWER]) == {}


def test_a_missing_sync_of_a_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "sync_directory", lambda directory: None)
    assert failures(tmp_path, "checkpoint", [WITHOUT_POWER])


def test_changed_bytes_are_refused_in_every_file(tmp_path: Path) -> None:
    assert failures(tmp_path, "changed-bytes", range(18)) == {}


def test_a_skipped_checksum_of_a_checkpoint_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(path: Path) -> str:
        listed = json.loads((path.parent / "manifest.json").read_bytes())["files"]
        return str(listed[path.name]["sha256"])

    monkeypatch.setattr(verify, "sha256_of", said)
    assert failures(tmp_path, "changed-bytes", [LAYOUT]).keys() == {LAYOUT}


def test_a_skipped_checksum_of_a_data_set_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_check_seal", lambda path, data: None)
    monkeypatch.setattr(shards, "check_shard", lambda path, info: None)
    found = failures(tmp_path, "changed-bytes", range(MANIFEST, MANIFEST + 4))
    assert found.keys() == set(range(MANIFEST, MANIFEST + 4))


def test_ranks_fall_back_together(tmp_path: Path) -> None:
    assert failures(tmp_path, "fallback", range(4)) == {}


def test_ranks_that_do_not_agree_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "newest_good", lambda root, _: newest_good(root, SoloRanks()))
    found = failures(tmp_path, "fallback", range(8))
    assert any("the ranks do not agree" in text for text in found.values())


def skip_without_a_small_disk(here: Path) -> None:
    """Where no file system may be mounted."""
    try:
        small_disk.on_a_small_disk(here, lambda disk: {})
    except UnavailableError as error:
        pytest.skip(str(error))


def making_room(prepare: Callable[[Path, Attempt], None]) -> Callable[[Path, Attempt], None]:
    """A fault: whatever was committed goes before the next save."""

    def makes_room(writing: Path, attempt: Attempt) -> None:
        for path in writing.parent.glob("step-????????"):
            shutil.rmtree(path)
        prepare(writing, attempt)

    return makes_room


def test_failing_calls_cost_no_checkpoint(tmp_path: Path) -> None:
    assert failures(tmp_path, "full-disk", range(0, INJECTED, 40)) == {}


def test_a_disk_that_is_full_costs_no_checkpoint(tmp_path: Path) -> None:
    skip_without_a_small_disk(tmp_path)
    assert failures(tmp_path, "full-disk", range(INJECTED, INJECTED + 6)) == {}


def test_making_room_by_the_last_good_checkpoint_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_prepare", making_room(commit._prepare))
    assert failures(tmp_path, "full-disk", [60])


def test_making_room_on_a_full_disk_by_the_last_good_checkpoint_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_a_small_disk(tmp_path)
    monkeypatch.setattr(commit, "_prepare", making_room(commit._prepare))
    assert failures(tmp_path, "full-disk", [INJECTED + 1])
