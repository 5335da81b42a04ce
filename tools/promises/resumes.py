"""Promises 5 and 17: runs of one rank that are resumed, moved, linked, or under another clock."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from pretrain.config.optim import OPTIMIZERS
from tools.promises import data_sets
from tools.promises.campaign import Promise, Room, check
from tools.promises.states import differences

# 5. To the bit.


def resumes_to_the_bit(seed: int, room: Room) -> dict[str, Any]:
    """A run goes on; another one resumes from its checkpoint and takes the same steps."""
    from pretrain.training import ledger
    from tests.pretrain import kinds  # a new kind of memory joins this list of small settings
    from tools.promises.small_runs import SmallRun

    choose = random.Random(seed)
    kind = [*kinds.KINDS][seed % len(kinds.KINDS)]
    optimizer = choose.choice([*OPTIMIZERS])
    stage, precision = choose.randrange(4), choose.choice(["float32", "float32", "bf16"])
    if precision == "bf16" and stage == 0:
        stage = 1  # stage 0 has no float32 masters
    data = room.made("data", lambda path: data_sets.small(path, seed=1))
    words = [
        *kinds.words(kind), f"optim.name={optimizer}", f"zero.stage={stage}",
        f"train.precision={precision}", f"train.micro_batch={choose.choice([1, 2, 4])}",
        f"run.seed={seed}",
    ]  # fmt: skip
    if choose.random() < 0.3 and kind in kinds.REMEMBERING:
        other = room.made("other", lambda path: data_sets.small(path, seed=2))
        words.append(f"data.preface={other}")
    run = SmallRun(room.here / "run", data, words)
    before, after = choose.randint(1, 4), choose.randint(1, 3)
    run.take(before)
    run.save()
    again = SmallRun(room.here / "run", data, words)
    check(again.run.state.step == before, f"resumed at step {again.run.state.step}")
    check(not (wrong := differences(run.state(), again.state())), f"differ at first: {wrong}")
    check(run.take(after) == again.take(after), "the losses differ")
    check(not (wrong := differences(run.state(), again.state())), f"differ: {wrong}")
    problems = ledger.check(room.here / "run")
    check(not problems, f"ledger: {problems}")
    return {"words": words, "steps": [before, after], "ledgers": 1}


# 17. Clocks, links, moved and copied directories.


def _moved_run(place: Path) -> tuple[Path, Path]:
    return Path(shutil.move(place / "run", place / "elsewhere")), place / "data"


def _copied_run(place: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(place / "run", place / "copy")), place / "data"


def _linked_run(place: Path) -> tuple[Path, Path]:
    (place / "link").symlink_to("run")
    return place / "link", place / "data"


def _moved_data(place: Path) -> tuple[Path, Path]:
    return place / "run", Path(shutil.move(place / "data", place / "other data"))


def _linked_data(place: Path) -> tuple[Path, Path]:
    shutil.move(place / "data", place / "store")
    (place / "data").symlink_to(place / "store")
    return place / "run", place / "data"


def _linked_shards(place: Path) -> tuple[Path, Path]:
    (place / "store").mkdir()
    for path in [*(place / "data").iterdir()]:
        shutil.move(path, place / "store" / path.name)
        path.symlink_to(place / "store" / path.name)
    return place / "run", place / "data"


def _relative(place: Path) -> tuple[Path, Path]:
    os.chdir(place)
    return Path("./run"), Path("run/../data")


def _old_files(place: Path) -> tuple[Path, Path]:
    for path in place.rglob("*"):
        os.utime(path, (0, 0))
    return place / "run", place / "data"


def _files_of_the_future(place: Path) -> tuple[Path, Path]:
    later = time.time() + 20 * 365 * 86400
    for path in place.rglob("*"):
        os.utime(path, (later, later))
    return place / "run", place / "data"


def _nothing(place: Path) -> tuple[Path, Path]:
    return place / "run", place / "data"


CHANGES: tuple[Callable[[Path], tuple[Path, Path]], ...] = (
    *(_moved_run, _copied_run, _linked_run, _moved_data, _linked_data, _linked_shards, _relative),
    *(_old_files, _files_of_the_future, _nothing),
)
_CLOCKS = (0.0, -400 * 86400.0, 400 * 86400.0)  # seconds by which the clock is wrong on a resume


def is_the_same_elsewhere(seed: int, room: Room) -> dict[str, Any]:
    """Something but the run's content changes between two parts of a run."""
    from pretrain.training import ledger
    from tools.promises.small_runs import SmallRun

    change, clock = CHANGES[seed % len(CHANGES)], _CLOCKS[seed // len(CHANGES) % len(_CLOCKS)]
    place = room.here / "a place"
    place.mkdir()
    data_sets.small(place / "data", seed=1)
    run = SmallRun(place / "run", place / "data")
    run.take(3)
    run.save()
    whole = run.take(3)
    directory, data = change(place)
    now = time.time
    with mock.patch.object(time, "time", lambda: now() + clock):
        again = SmallRun(directory, data)
        check(again.run.state.step == 3, f"resumed at step {again.run.state.step}")
        check(again.take(3) == whole, "the losses differ")
        again.save()
    check(not (wrong := differences(run.state(), again.state())), f"differ: {wrong}")
    problems = ledger.check(directory)
    check(not problems, f"ledger: {problems}")
    return {"change": change.__name__.strip("_"), "clock": clock, "ledgers": 1}


PROMISES = (
    Promise(
        5, "resume", "a resume is bitwise, with every kind of memory and optimizer",
        50, "resumes", resumes_to_the_bit, limit=300.0,
        how="one rank; every kind of memory, optimizers, stages, precisions, micro-batches and "
        "prefaces drawn; weights, moments, memories and losses are compared. More ranks: layouts.",
    ),
    Promise(
        17, "places", "clocks, symlinks, moved and copied directories change nothing but names",
        30, "changes", is_the_same_elsewhere, limit=300.0,
        how=", ".join(change.__name__.strip("_").replace("_", " ") for change in CHANGES)
        + "; each with a clock that is right, 400 days behind and 400 days ahead.",
    ),
)  # fmt: skip
