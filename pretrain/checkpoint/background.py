"""A save in a thread, one at a time, while its caller continues.

A thread serves, since hashing, writing, syncing and waiting for other ranks release the
interpreter's lock; and it dies with its rank, so that nothing is committed for a rank that is dead.
What it does must not need the process group of the caller: their collectives would mix.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Saved:
    """A save that has ended well: the checkpoint's directory, and how long it took."""

    path: Path
    step: int
    seconds: float


class BackgroundSave:
    """At most one save in flight.

    `announce` is called with the step when a save begins and with 0 when it ends, however it does.
    """

    def __init__(self, announce: Callable[[int], None]) -> None:
        self._announce = announce
        self._thread: threading.Thread | None = None
        self._outcome: Saved | Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a save has failed whose error `wait` has not yet raised."""
        return isinstance(self._outcome, Exception)

    def begin(self, step: int, action: Callable[[], Path]) -> None:
        """Do `action` in the background; the one before must have been waited for."""
        assert self._thread is None, "a save is in flight"
        self._announce(step)
        self._thread = threading.Thread(
            target=self._run, args=(step, action), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Return when no save is in flight, or after `timeout` seconds; raise what it raised."""
        if self._thread is None:
            return
        self._thread.join(timeout)
        if isinstance(self._outcome, Exception):
            failure, self._outcome, self._thread = self._outcome, None, None
            raise failure

    def ended(self) -> Saved | None:
        """The save that has ended well since the last call, if one has."""
        if not isinstance(self._outcome, Saved):
            return None
        saved, self._outcome, self._thread = self._outcome, None, None
        return saved

    def _run(self, step: int, action: Callable[[], Path]) -> None:
        began = time.perf_counter()
        try:
            try:
                path = action()
            finally:
                self._announce(0)
            self._outcome = Saved(path, step, time.perf_counter() - began)
        except Exception as error:
            self._outcome = error
