"""Promise 10: whatever hangs ends within its limit.

The ranks are real processes with their watchdogs, without torch: a limit of seconds is then exact.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.promises.campaign import Promise, Room, check

LIMIT = 2.0  # seconds of a phase
# A rank that beats as a training loop does, until a file tells it to do something else.
RANK = """
import ctypes, pathlib, signal, sys, time
from pretrain.jobs.watchdog import Watchdog

def hangs_in_python():
    while True:
        time.sleep(60)

def hangs_in_c_with_the_interpreters_lock():
    ctypes.PyDLL(None).sleep(60)

def hangs_where_no_signal_reaches_it():
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    time.sleep(60)

def saves_for_ever_while_steps_go_on():
    watchdog.saving(30)
    while True:
        watchdog.beat("step", 41)
        time.sleep(0.05)

def saves_in_time_while_steps_go_on():
    for save in range(4):
        watchdog.saving(30 + save)
        for _ in range(10):
            watchdog.beat("step", 41)
            time.sleep(0.05)
        watchdog.saving(0)
    sys.exit()

def waits_in_vain_beside_saves():
    while True:
        watchdog.saving(30)
        time.sleep(0.05)
        watchdog.saving(0)

run, rank, limit, attempt = sys.argv[1:]
watchdog = Watchdog(pathlib.Path(run), int(rank), dict.fromkeys(("start", "step", "save"),
                                                                float(limit)))
if attempt != "0":
    watchdog.beat("step", 0, int(attempt))
print(watchdog.process.pid, flush=True)
order = pathlib.Path(f"order-{rank}")
step = 0
while True:
    step += attempt != "0"
    if attempt != "0":
        watchdog.beat("step", step, int(attempt))
    time.sleep(0.05)
    text = order.read_text() if order.exists() else ""
    if text.startswith("end"):
        break
    if text:
        watchdog.beat("step", 40, int(attempt))
        globals()[text]()
"""


class Rank:
    """A rank and its watchdog."""

    def __init__(self, directory: Path, rank: int, limit: float, attempt: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RANK, "run", str(rank), str(limit), str(attempt)],
            cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "RANK": str(rank)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.watchdog = int(self.process.stdout.readline())
        self._order = directory / f"order-{rank}"

    def order(self, text: str) -> None:
        """Have it do what a function of RANK does, or `end`."""
        self._order.with_suffix(".new").write_text(text)
        self._order.with_suffix(".new").replace(self._order)

    def end(self, timeout: float = 30) -> tuple[int, str]:
        """The exit code, and what was said on stderr by the rank and its watchdog."""
        _, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, errors


KINDS = (
    *("hangs_in_python", "hangs_in_c_with_the_interpreters_lock", "waits_in_vain_beside_saves"),
    *("hangs_where_no_signal_reaches_it", "saves_for_ever_while_steps_go_on", "stopped"),
)
_SLACK = 3.0  # seconds that a busy machine may take to end processes and tell of it


def ends_in_time(seed: int, room: Room) -> dict[str, Any]:
    """One of two ranks hangs at a random moment; all are dead within its limit."""
    choose = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    (room.here / "run").mkdir()
    limit = choose.choice([LIMIT, 2 * LIMIT])
    ranks = [Rank(room.here, rank, limit, 7) for rank in (0, 1)]
    try:
        time.sleep(choose.random())
        victim = ranks[seed % 2]
        if kind == "stopped":
            victim.process.send_signal(signal.SIGSTOP)
        else:
            victim.order(kind)
        began = time.monotonic()
        ended = [rank.end(timeout=20 * limit) for rank in ranks]
        seconds = time.monotonic() - began
    except subprocess.TimeoutExpired as error:
        check(False, f"{kind}: no end within {20 * limit:g} s ({error})")
    finally:
        for rank in ranks:
            rank.process.kill()
    codes = [code for code, _ in ended]
    check(codes == [-signal.SIGKILL] * 2, f"{kind}: the ranks ended with {ended}")
    stacks = room.here / "run" / "stacks" / "attempt-000007"
    check((stacks / "why.txt").exists(), f"{kind}: nothing says which rank hung")
    check(seconds < limit + _SLACK, f"{kind}: {seconds:.2f} s of {limit:g}")
    return {"kind": kind, "limit": limit, "ended_after": round(seconds, 2)}


PROMISES = (
    Promise(
        10, "hangs", "any hang ends within its limit, with the stacks of all ranks",
        50, "hangs", ends_in_time,
        how=f"two ranks with their watchdogs and limits of {LIMIT:g} and {2 * LIMIT:g} s; one "
        "hangs: " + ", ".join(kind.replace("_", " ") for kind in KINDS) + ".",
    ),
)  # fmt: skip
