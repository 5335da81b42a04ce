"""One save in flight, while its caller goes on; how it ends is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pretrain.checkpoint.background import BackgroundSave
from pretrain.checkpoint.manifest import CheckpointError

PATH = Path("step-00000004")


def test_the_caller_continues_until_it_waits() -> None:
    told: list[int] = []
    written, goes_on = threading.Event(), threading.Event()

    def action() -> Path:
        assert goes_on.wait(30)
        written.set()
        return PATH

    save = BackgroundSave(told.append)
    save.begin(4, action)
    assert not written.is_set() and save.ended() is None and told == [4]
    save.wait(timeout=0.01)
    assert not written.is_set() and save.ended() is None
    goes_on.set()
    save.wait()
    assert written.is_set() and told == [4, 0] and not save.failed
    ended = save.ended()
    assert ended is not None and (ended.path, ended.step) == (PATH, 4) and ended.seconds > 0
    assert save.ended() is None


def test_a_failure_is_raised_once_and_the_next_save_can_begin() -> None:
    told: list[int] = []

    def action() -> Path:
        raise CheckpointError("no space")

    save = BackgroundSave(told.append)
    save.begin(4, action)
    with pytest.raises(CheckpointError, match="no space"):
        save.wait()
    assert told == [4, 0] and not save.failed and save.ended() is None
    save.wait()
    save.begin(8, lambda: PATH)
    save.wait()
    ended = save.ended()
    assert ended is not None and ended.step == 8


def test_a_failure_shows_before_anybody_waits() -> None:
    told = threading.Event()

    def action() -> Path:
        raise OSError("gone")

    save = BackgroundSave(lambda step: None if step else told.set())
    save.begin(4, action)
    assert told.wait(30)
    while not save.failed:
        pass
    assert save.ended() is None
    with pytest.raises(OSError, match="gone"):
        save.wait()
