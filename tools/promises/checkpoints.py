"""Promises 1 to 4: checkpoints that are killed, without power, damaged, or out of space."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from data_prep.dataset.shards import DataError
from pretrain.checkpoint import load
from pretrain.checkpoint.attempts import Attempt, claim
from pretrain.checkpoint.load import newest_good
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.ranks import GroupRanks, Ranks, SoloRanks
from pretrain.config.data import CacheConfig
from pretrain.data.files import files_of
from tools.promises import data_sets, kills, power, small_disk
from tools.promises.campaign import BrokenError, Promise, Room, check

KILLS, POINTS, POWER_LOSSES = 200, 80, 20
INJECTED, FULL = 300, 50
_CHANCES = (0.0, 0.1, 0.5, 0.9, 1.0)
_OWN_FILES = 4  # of a checkpoint of one rank: manifest, its checksum, values, layout


# 1. Whole or invisible.


def survives(seed: int, room: Room) -> dict[str, Any]:
    """A SIGKILL at a random moment, at one call of a save, or a power loss before each."""
    root = room.here / "run" / "checkpoints"
    if seed < KILLS:
        return _killed(seed, root)
    if seed < KILLS + POINTS:
        return _killed_at(seed - KILLS + 1, root)
    return _without_power(seed, room.here)


def _killed(seed: int, root: Path) -> dict[str, Any]:
    choose = random.Random(seed)
    root.mkdir(parents=True)
    committed = 0
    for life in range(2):  # the second one resumes from what the first one left
        store = root.with_name(f"store-{life}") if choose.random() < 0.2 else None
        pair = kills.RankPair(root, store)
        moment = choose.choice(["any", "any", ".writing", ".trash"])
        pair.wait_for_commit()
        if moment == "any":
            time.sleep(choose.random() * 0.15)
        else:
            kills.wait_for(root, moment)
            time.sleep(choose.random() * (0.03 if moment == ".writing" else 0.0005))
        committed = max(committed, pair.kill(choose))
        struck = sorted({entry.suffix for entry in root.iterdir() if entry.suffix})
        committed = kills.assert_all_whole(root, committed)
    return {"moment": moment, "struck": struck, "committed": committed}


def _killed_at(point: int, root: Path) -> dict[str, Any]:
    for step in (1, 2):
        kills.save_step(root, step, SoloRanks())
    shutil.copytree(root / "step-00000001", root / "step-00000000.000001.trash")
    shutil.copytree(root / "step-00000001", root / "step-00000003.000001.writing")
    child = os.fork()
    if child == 0:
        kills.save_and_die(root, point)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check(code in (0, -signal.SIGKILL), f"the save failed at point {point}")
    newest = kills.assert_all_whole(root, 3 if code == 0 else 2)
    kills.save_step(root, newest + 1, SoloRanks())
    left = [entry.name for entry in root.iterdir() if entry.suffix]
    check(not left, f"the next save left {left}")
    return {"point": point, "ended": code == 0}


def _without_power(seed: int, here: Path) -> dict[str, Any]:
    choose, chance = random.Random(seed), _CHANCES[seed % len(_CHANCES)]
    base, scratch = here / "disk", here / "scratch"
    base.mkdir()
    committed = moments = 0

    def power_fails(disk: power.Disk, call: str, arguments: Any) -> None:
        nonlocal moments
        moments += 1
        disk.after_power_loss(scratch, lambda: choose.random() < chance)
        left = scratch / "run" / "checkpoints"
        newest = kills.assert_all_whole(left, committed) if left.is_dir() else 0
        check(newest >= committed, f"step {committed} was lost before {call}{arguments}")
        shutil.rmtree(scratch)

    with power.observed(base, power_fails):
        for step in range(1, 5):
            kills.save_step(base / "run" / "checkpoints", step, SoloRanks())
            committed = step
    return {"chance": chance, "moments": moments}


# 2. Changed bytes.


def refuses_a_changed_byte(seed: int, room: Room) -> dict[str, Any]:
    """One byte of one file of a checkpoint or of a data set becomes another one."""
    choose = random.Random(seed)
    whole = room.made("whole", _whole)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    # Small files as often as large ones: that is where parsers are.
    source = files[seed % len(files)]
    here = room.here / "copy"
    shutil.copytree(whole, here)
    path = here / source.relative_to(whole)
    data = bytearray(path.read_bytes())
    place = choose.randrange(len(data))
    data[place] ^= choose.randrange(1, 256)
    path.write_bytes(data)
    kind = path.relative_to(here).parts[0]
    if kind == "checkpoints":
        _refused_checkpoint(here / kind, bytes(data))
    else:
        _refused_data_set(here / kind, path.name, bytes(data))
    return {"file": str(path.relative_to(here)), "byte": place}


def _whole(directory: Path) -> None:
    for step in (1, 2):
        kills.save_step(directory / "checkpoints", step, SoloRanks())
    shutil.rmtree(directory / "checkpoints" / "step-00000001")
    data_sets.small(directory / "data", seed=1, documents=40, count=3)


@contextmanager
def _parsed() -> Iterator[list[bytes]]:
    """What reaches JSON's parser in this block; safetensors is not to be reached at all."""
    seen: list[bytes] = []

    def reached(*_: object, **__: object) -> None:
        raise BrokenError("safetensors was asked to open a file before all were verified")

    recording = _recording(json.loads, seen)
    with mock.patch.object(load, "safe_open", reached), mock.patch.object(json, "loads", recording):
        yield seen


def _refused_checkpoint(root: Path, changed: bytes) -> None:
    with _parsed() as seen:
        try:
            found = newest_good(root, SoloRanks())
        except CheckpointError:
            check(changed not in seen, "the changed file was parsed")
            return
    raise BrokenError(f"{found} was taken")


def _refused_data_set(directory: Path, name: str, changed: bytes) -> None:
    """All that a run reads: the manifest, the tokenizer, each shard."""
    seen: list[bytes] = []
    with mock.patch.object(json, "loads", _recording(json.loads, seen)):
        try:
            files = files_of(directory, CacheConfig())
            for info in files.manifest.shards:
                with files.shard(info, checked=False):
                    pass
            files.tokenizer()
        except DataError:
            check(changed not in seen, "the changed file was parsed")
            return
    raise BrokenError(f"{directory / name} was taken")


def _recording(loads: Callable[[Any], Any], seen: list[bytes]) -> Callable[..., Any]:
    def call(data: Any, **named: Any) -> Any:
        seen.append(data if isinstance(data, bytes) else str(data).encode())
        return loads(data, **named)

    return call


# 3. Falling back, together.


def falls_back_together(seed: int, room: Room) -> dict[str, Any]:
    """Damage to some of four checkpoints, or on one rank alone, read by 2 or 4 gloo ranks."""
    choose = random.Random(seed)
    size = 2 if seed % 2 else 4
    root = room.here / "checkpoints"
    shutil.copytree(room.made("four", _four), root)
    steps = [4, 3, 2, 1]
    damaged = steps[: choose.choice([0, 1, 1, 2, 2, 3, 4])]
    did = {str(step): _damage(root / f"step-{step:08d}", choose) for step in damaged}
    blind = choose.randrange(size) if choose.random() < 0.3 and len(damaged) < 4 else None
    unreadable = steps[len(damaged)] if blind is not None else 0
    told = _on_ranks(size, room.here, lambda ranks: _found(root, ranks, blind, unreadable))
    check(len(set(told)) == 1, f"the ranks do not agree: {told}")
    good = [step for step in steps if step not in damaged and step != unreadable]
    expected = f"step {good[0]}" if good else "none is good"
    check(told[0] == expected, f"expected {expected}, found {told[0]}")
    return {"ranks": size, "damaged": did, "unreadable on": blind}


def _four(directory: Path) -> None:
    for step in (1, 2, 3, 4):
        kills.save_step(directory, step, SoloRanks(), keep_last=4)


def _damage(directory: Path, choose: random.Random) -> str:
    path = choose.choice(sorted(directory.iterdir()))
    kind = choose.choice(["bit", "cut", "missing", "longer"])
    data = bytearray(path.read_bytes())
    if kind == "bit":
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del data[choose.randrange(len(data)) :]
    elif kind == "longer":
        data += b"\n"
    path.write_bytes(data)
    if kind == "missing":
        path.unlink()
    return f"{path.name} {kind}"


def _found(root: Path, ranks: Ranks, blind: int | None, unreadable: int) -> str:
    """What a rank finds; the rank `blind` cannot read the files of one step."""
    if ranks.rank == blind:
        read = Path.read_bytes

        def fails(path: Path) -> bytes:
            if path.parent.name == f"step-{unreadable:08d}":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return read(path)

        Path.read_bytes = fails  # type: ignore[method-assign, assignment]  # in this process
    try:
        found = newest_good(root, ranks)
    except CheckpointError as error:
        check("none is good" in str(error), str(error))
        return "none is good"
    return "nothing there" if found.path is None else f"step {kills.check(found.path)}"


def _on_ranks(size: int, here: Path, work: Callable[[Ranks], str]) -> list[str]:
    """What each of so many forked gloo ranks says."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _rank(rank, size, here, work)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    said = [here / f"said-{rank}" for rank in range(size)]
    return [path.read_text() if path.exists() else "nothing" for path in said]


def _rank(rank: int, size: int, here: Path, work: Callable[[Ranks], str]) -> None:
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.GroupMember.WORLD = None  # that of the process it is forked from, if any
        store = dist.FileStore(str(here / "store"), size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        try:
            text = work(GroupRanks())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        (here / f"said-{rank}").write_text(text)
        dist.barrier()
    finally:
        os._exit(0)


# 4. No space, no disk.


def survives_a_failing_disk(seed: int, room: Room) -> dict[str, Any]:
    """ENOSPC or EIO at one of the calls of a save, or a real disk that is full; then there is room
    again."""
    if seed >= INJECTED:
        return small_disk.on_a_small_disk(room.here, lambda disk: _full(seed, disk))
    root = room.here / "run" / "checkpoints"
    attempt = _two_saves(root)
    number = (errno.ENOSPC, errno.EIO)[seed % 2]
    with power.failing(room.here, seed // 2, number) as failed:
        saved = _third_save(root, attempt)
    kills.assert_all_whole(root, saved)
    # A failure while old ones are pruned costs nothing; any other one costs step 3 alone.
    check(saved == 3 or failed, "the save failed without a fault")
    _saves_again(root, attempt)
    return {"error": errno.errorcode[number], "at": failed, "saved": saved}


def _full(seed: int, disk: Path) -> dict[str, Any]:
    """A disk with room for a part of a checkpoint, in bytes or in files."""
    choose = random.Random(seed)
    root = disk / "run" / "checkpoints"
    attempt = _two_saves(root)
    least = sum(path.stat().st_size for path in (root / "step-00000002").iterdir())
    if seed % 2:
        left = choose.randrange(least)
        ballast = [small_disk.filled(disk, left)]
    else:
        left = choose.randrange(_OWN_FILES + 1)  # with its directory
        ballast = small_disk.without_inodes(disk, left)
    saved = _third_save(root, attempt)
    kills.assert_all_whole(root, saved)
    check(saved == 2, "a checkpoint was saved where there was no room")
    for path in ballast:
        path.unlink()
    _saves_again(root, attempt)
    return {"left": left, "of": "files" if seed % 2 == 0 else "bytes"}


def _two_saves(root: Path) -> Attempt:
    attempt = claim(root.parent, 1, 100, None)
    for step in (1, 2):
        kills.save_step(root, step, SoloRanks(), attempt)
    return attempt


def _third_save(root: Path, attempt: Attempt) -> int:
    """The last step that was saved, 2 or 3."""
    try:
        kills.save_step(root, 3, SoloRanks(), attempt)
    except CheckpointError:
        return 2
    return 3


def _saves_again(root: Path, attempt: Attempt) -> None:
    for step in (3, 4):
        kills.save_step(root, step, SoloRanks(), attempt)
        check(kills.assert_all_whole(root, step) == step, f"step {step} is not there")
    left = [entry.name for entry in root.iterdir() if entry.suffix]
    check(not left, f"left over: {left}")


PROMISES = (
    Promise(
        1, "checkpoint",
        "a checkpoint is whole or invisible; the last good one survives any death, power loss "
        "included",
        KILLS + POINTS + POWER_LOSSES, "deaths", survives,
        how=f"{KILLS} SIGKILLs of two ranks at random moments of a save, each after a resume; "
        f"{POINTS} deaths at the 1st, 2nd, ... call of a save that opens or changes files; "
        f"{POWER_LOSSES} times four saves with a power loss before every call that syncs or "
        "changes directories, replayed from what was synced.",
    ),
    Promise(
        2, "changed-bytes", "any changed byte is refused before it is parsed",
        1000, "bytes", refuses_a_changed_byte,
        how="one byte of any file of a checkpoint, or of a data set's manifest, tokenizer and "
        "shards, is changed; each file equally often.",
    ),
    Promise(
        3, "fallback",
        "a run falls back to the previous good step, never to step 0, and ranks agree",
        200, "damaged runs", falls_back_together,
        how="0 to 4 of four checkpoints are damaged, or unreadable on one rank alone; 2 or 4 gloo "
        "ranks look for the newest good one.",
    ),
    Promise(
        4, "full-disk",
        "a full disk or an I/O error never costs the last good checkpoint, and saving goes on "
        "when there is room",
        INJECTED + FULL, "failing saves", survives_a_failing_disk,
        how=f"{INJECTED} times ENOSPC or EIO at the 1st, 2nd, ... call of a save that opens, "
        f"writes, syncs or renames; {FULL} times a tmpfs with room for a part of a checkpoint, in "
        "bytes or in files; then two saves without faults.",
    ),
)  # fmt: skip


torch.set_num_threads(1)  # threads would not survive a fork
