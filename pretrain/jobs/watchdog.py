"""The watchdog: a process beside each rank that ends the rank when it hangs, its stacks kept.

    RUN/stacks/attempt-000007/rank-00001.txt    what every rank was doing when one of them hung

The rank beats when it comes to a phase (start, step, save) and with each step. Where none comes, or
a save in the background takes too long while steps go on, the watchdog tells its peers by that
directory; each has its own rank write its stacks, and some moments later kills it. It begins so
early that all ranks are dead when the phase's limit has passed since the last beat: 28 s before, or
with limits below 80 s when 0.525 of the time has passed.

A process, since a rank may hang in C code that holds the interpreter's lock, and may be stopped.
What counts the time touches no file: what hangs may well be the file system.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

from pretrain.checkpoint.attempts import STACKS, Attempt, note

Phase = Literal["start", "step", "save"]

_DUMP_SIGNAL = signal.SIGUSR2
# Signals that a launcher may send to every process of a job: the rank decides what they mean.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_MOMENT = 2.0  # seconds for a rank to write its stacks, and for the file system to take a file


class WatchdogError(RuntimeError):
    """The watchdog of this rank has died; without it a hang would last for ever."""


class Watchdog:
    """This rank's side: starts the process that watches it, and beats.

    `limits` are seconds by phase. It starts in the phase `start`.
    """

    def __init__(self, directory: Path, rank: int, limits: Mapping[Phase, float]) -> None:
        self._told = _Told()
        self._telling = threading.Lock()
        beats, self._beats = os.pipe()
        stacks, self._stacks = os.pipe()
        os.set_blocking(self._beats, False)
        # By C code in the handler itself: it needs neither the interpreter's lock nor memory.
        faulthandler.register(_DUMP_SIGNAL, file=self._stacks, all_threads=True)
        words = json.dumps([str(directory.absolute()), rank, dict(limits), beats, stacks])
        places = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.jobs.watchdog", words],
            pass_fds=(beats, stacks),
            env={name: value for name, value in os.environ.items() if name not in places},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_mind_no_signals,
        )
        os.close(beats)
        os.close(stacks)

    def beat(self, phase: Phase, step: int = 0, attempt: int = 0) -> None:
        """Say that the rank is alive: in `phase`, after `step`; `attempt` once it is known.

        Raises WatchdogError where nobody listens.
        """
        with self._telling:
            self._told = replace(
                self._told,
                beats=self._told.beats + 1,
                phase=phase,
                step=step,
                attempt=attempt or self._told.attempt,
            )
            self._tell()

    def saving(self, step: int) -> None:
        """Say that a thread has begun to save `step`; 0: that it has ended. Raises WatchdogError.

        It is no beat: between the two, the time of that save is counted beside the rank's own.
        """
        with self._telling:
            self._told = replace(self._told, saving=step)
            self._tell()

    def _tell(self) -> None:
        """Write all that there is to know: a line that finds the pipe full is made up by the next.

        The lock keeps the lines of two threads in order.
        """
        try:
            os.write(self._beats, f"{json.dumps(astuple(self._told))}\n".encode())
        except BlockingIOError:
            pass  # it has enough to read
        except BrokenPipeError:
            raise WatchdogError(
                f"the watchdog of this rank (process {self.process.pid}) was killed, and a hang "
                "would not be noticed; the same command goes on from the last good checkpoint"
            ) from None


@dataclass(frozen=True)
class _Told:
    """What a rank says of itself."""

    beats: int = 0
    phase: Phase = "start"
    step: int = 0
    attempt: int = 0  # 0: not yet known
    saving: int = 0  # the step that a thread saves; 0: none


class _Watcher:
    """The watching process's side of it."""

    def __init__(
        self, directory: Path, rank: int, limits: Mapping[Phase, float], beats: int, stacks: int
    ) -> None:
        self._directory, self._rank, self._limits = directory, rank, limits
        self._beats, self._stacks = beats, stacks
        self._watched = os.getppid()
        self._told = _Told()
        self._waited = self._saved_for = 0.0
        shortest = min(limits.values())
        self._poll = min(2.0, shortest / 40)
        self._moment = min(_MOMENT, shortest / 20)
        self._told_by_peer = threading.Event()
        # Until every peer has noticed a hang and has had its stacks written.
        self._peers_seconds = 4 * self._poll + self._moment
        # Twice: a rank that is woken late must not meet peers that are dead. Or what a rank takes
        # that was stopped, where each file takes its moment.
        self._ending_seconds = max(2 * self._peers_seconds, self._peers_seconds + 4 * self._moment)
        # From the last moment to begin with it until the last peer is dead.
        self._ahead = 3 * self._poll + self._moment + self._ending_seconds

    def run(self) -> None:
        """Return when the rank has ended, by itself or here."""
        threading.Thread(target=self._look_for_peers, daemon=True).start()
        last = time.monotonic()
        while self._read_beats() and os.getppid() == self._watched:
            now = time.monotonic()
            # A job that is suspended as a whole is no hang: there this process stood still, too.
            passed = min(now - last, 2 * self._poll)
            self._waited += passed
            self._saved_for += passed if self._told.saving else 0.0
            last = now
            if self._hang() or self._told_by_peer.is_set():
                self._end()
                return

    def _read_beats(self) -> bool:
        """Take in what the rank said, waiting a moment for it; False when it has ended."""
        ready, _, _ = select.select([self._beats, self._stacks], [], [], self._poll)
        if self._stacks in ready:
            os.read(self._stacks, 1 << 16)  # somebody else sent the signal
        if self._beats not in ready:
            return True
        said = os.read(self._beats, 1 << 16)
        lines = said.decode().split("\n")[:-1]
        if lines:
            told = _Told(*json.loads(lines[-1]))
            if told.beats != self._told.beats:
                self._waited = 0.0
            if told.saving != self._told.saving:
                self._saved_for = 0.0
            self._told = told
        return bool(said)

    def _hang(self) -> str:
        """What takes so long that it has to be ended now; empty: nothing."""
        told, limits = self._told, self._limits
        if self._waited > limits[told.phase] - self._ahead:
            return self._words(told.phase, told.step, self._waited)
        if self._saved_for > limits["save"] - self._ahead:
            return self._words("save", told.saving, self._saved_for)
        return ""

    def _words(self, phase: Phase, step: int, waited: float) -> str:
        return (
            f"{phase} after step {step}, no progress for {waited:.1f} s, and "
            f"watchdog.{phase}={self._limits[phase]:g} ends a hang"
        )

    def _look_for_peers(self) -> None:
        """Notice that a peer of the same attempt hangs. Before its number is known, none can."""
        while not (self._told.attempt and self._place().exists()):
            time.sleep(self._poll)
        self._told_by_peer.set()

    def _place(self) -> Path:
        if self._told.attempt:
            return Attempt(self._directory, self._told.attempt).stacks
        return self._directory / STACKS / "starting"

    def _end(self) -> None:
        """Have the stacks written, leave peers the time to do the same, and kill the rank."""
        began = time.monotonic()
        told, hang = self._told, self._hang()
        what = hang or f"{told.phase} after step {told.step}, no progress for {self._waited:.1f} s"
        why = f"rank {self._rank} on {socket.gethostname()}, process {self._watched}: {what}"
        if hang:
            _in_time(lambda: self._announce(why), self._moment)
        stopped = _state(self._watched).startswith("T")
        if stopped:
            # Once it is woken the others go on: their stacks come first.
            time.sleep(self._peers_seconds)
        stacks = self._dump(stopped)
        if not stacks and os.getppid() != self._watched:
            return
        if not stacks:
            why += f"; it cannot write its stacks: its state is {_state(self._watched)}"
        elif stopped:
            why += "; it was stopped by a signal (SIGSTOP), and was woken to write its stacks"
        if not stacks or stopped:
            _in_time(lambda: self._say(why), self._moment)
        _in_time(lambda: self._write(why, stacks), self._moment)
        time.sleep(max(0.0, began + self._ending_seconds - time.monotonic()))
        if os.getppid() == self._watched:
            os.kill(self._watched, signal.SIGKILL)

    def _announce(self, why: str) -> None:
        """Tell the peers; the first to do so says it in the log."""
        place = self._place()
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.mkdir()
        except FileExistsError:
            if self._told.attempt:
                return
        if self._told.attempt:
            Attempt(self._directory, self._told.attempt).hang.write_text(why, encoding="utf-8")
        self._say(f"{why}; the stacks of all ranks go to {place}, and the ranks are killed")

    def _dump(self, stopped: bool) -> str:
        """The stacks that the rank writes; empty where it cannot."""
        for number in (_DUMP_SIGNAL, signal.SIGCONT)[: 1 + stopped]:
            with contextlib.suppress(ProcessLookupError):  # it ended in this moment
                os.kill(self._watched, number)
        deadline, text = time.monotonic() + self._moment, b""
        while (left := deadline - time.monotonic()) > 0:
            # Once it writes it does so without a pause.
            ready, _, _ = select.select([self._stacks], [], [], min(left, 0.5) if text else left)
            if not ready:
                break
            part = os.read(self._stacks, 1 << 16)
            if not part:
                break
            text += part
        return text.decode(errors="replace")

    def _write(self, why: str, stacks: str) -> None:
        place = self._place()
        name = f"rank-{self._rank:05d}"
        if not self._told.attempt:
            name += f"-{socket.gethostname()}-{self._watched}"
        (place / f"{name}.txt").write_text(f"{why}\n\n{stacks}", encoding="utf-8")
        if self._rank == 0 and self._told.attempt:
            Attempt(self._directory, self._told.attempt).end(1, why)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        note(self._directory, text)


def _in_time(action: Callable[[], None], seconds: float) -> None:
    """Do it, or give it up where it takes longer; what it raises is told."""
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def work() -> None:
        try:
            action()
        except OSError as error:
            print(f"the watchdog cannot write: {error}", file=sys.stderr, flush=True)
        done.put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        done.get(timeout=seconds)
    except queue.Empty:
        print("the watchdog cannot write: the file system hangs", file=sys.stderr, flush=True)


def _state(process: int) -> str:
    """The kernel's word for what a process does, as `T (stopped)`, `D (disk sleep)`."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    (line,) = (line for line in status.splitlines() if line.startswith("State:"))
    return line.partition("\t")[2]


def _mind_no_signals() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _watch() -> None:
    directory, rank, limits, beats, stacks = json.loads(sys.argv[1])
    _Watcher(Path(directory), rank, limits, beats, stacks).run()
    # A thread may still wait for a file system that hangs.
    os._exit(0)


if __name__ == "__main__":
    _watch()
