"""The watchdog: a process beside each rank that records its stacks and kills it when it hangs.

    RUN/stacks/attempt-000007/rank-00001.txt    what every rank was doing when one of them hung

The rank sends a beat when it enters a phase (start, step, save) and after each step. Where no beat
comes, or a save in the background takes too long while steps continue, the watchdog notifies its
peers through that directory; each makes its own rank write its stacks, and kills it soon after. It
begins early enough that all ranks are dead when the phase's limit has passed since the last beat:
28 s before; less if the shortest limit is below 80 s, at most 0.475 of that.

It is a process, since a rank may hang in C code that holds the interpreter's lock, or be stopped.
The loop that measures time touches no file, since the file system may be what hangs.
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
from pretrain.jobs.interpreter import python_module

Phase = Literal["start", "step", "save"]

_DUMP_SIGNAL = signal.SIGUSR2
# Signals that a launcher may send to every process of a job: the rank decides what to do.
_IGNORED = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
_MOMENT = 2.0  # seconds for a rank to write its stacks, and for the file system to take a file


class WatchdogError(ValueError):
    """The watchdog of this rank has died, so a hang would not be noticed."""


class Watchdog:
    """This rank's side: launches the process that watches it, and sends beats.

    `limits` are seconds by phase. The first phase is `start`.
    """

    def __init__(self, directory: Path, rank: int, limits: Mapping[Phase, float]) -> None:
        self._status = _Status()
        self._sending = threading.Lock()
        beats, self._beats = os.pipe()
        stacks, self._stacks = os.pipe()
        os.set_blocking(self._beats, False)
        # By C code in the handler itself: it needs neither the interpreter's lock nor memory.
        faulthandler.register(_DUMP_SIGNAL, file=self._stacks, all_threads=True)
        arguments = json.dumps([str(directory.absolute()), rank, dict(limits), beats, stacks])
        places = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        self.process = subprocess.Popen(
            [*python_module("pretrain.jobs.watchdog"), arguments],
            pass_fds=(beats, stacks),
            env={name: value for name, value in os.environ.items() if name not in places},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_ignore_signals,
        )
        os.close(beats)
        os.close(stacks)

    def beat(self, phase: Phase, step: int = 0, attempt: int = 0) -> None:
        """Report that the rank is alive: in `phase`, after `step`; `attempt` once it is known.

        Raises WatchdogError where the watchdog has died.
        """
        with self._sending:
            self._status = replace(
                self._status,
                beats=self._status.beats + 1,
                phase=phase,
                step=step,
                attempt=attempt or self._status.attempt,
            )
            self._send()

    def saving(self, step: int) -> None:
        """Report that a thread has begun to save `step`; 0: has ended. Raises WatchdogError.

        It is no beat: between the two, the time of that save is counted beside the rank's own.
        """
        with self._sending:
            self._status = replace(self._status, saving=step)
            self._send()

    def _send(self) -> None:
        """Write the whole status: what does not fit into a full pipe is in the next line, too.

        The lock keeps the lines of two threads in order.
        """
        try:
            os.write(self._beats, f"{json.dumps(astuple(self._status))}\n".encode())
        except BlockingIOError:
            pass  # it has lines left to read
        except BrokenPipeError:
            raise WatchdogError(
                f"the watchdog of this rank (process {self.process.pid}) was killed, and a hang "
                "would not be noticed; the same command resumes from the last good checkpoint"
            ) from None


@dataclass(frozen=True)
class _Status:
    """What a rank reports."""

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
        self._status = _Status()
        self._unfinished = b""  # the beginning of a line of which the rest is still in the pipe
        self._waited = self._saved_for = 0.0
        shortest = min(limits.values())
        self._poll = min(2.0, shortest / 40)
        self._moment = min(_MOMENT, shortest / 20)
        self._peer_hangs = threading.Event()
        # Until every peer has noticed a hang and has had its stacks written.
        self._peers_seconds = 4 * self._poll + self._moment
        # Twice, so that peers of a rank that is woken late are still alive; or as long as a rank
        # that was stopped takes, if each file takes its moment.
        self._ending_seconds = max(2 * self._peers_seconds, self._peers_seconds + 4 * self._moment)
        # From the last moment to begin with it until the last peer is dead.
        self._ahead = 3 * self._poll + self._moment + self._ending_seconds

    def run(self) -> None:
        """Return when the rank has ended, or was killed here."""
        threading.Thread(target=self._watch_peers, daemon=True).start()
        last = time.monotonic()
        while self._read_beats() and os.getppid() == self._watched:
            now = time.monotonic()
            # A job that is suspended as a whole is no hang: this process was suspended, too.
            passed = min(now - last, 2 * self._poll)
            self._waited += passed
            self._saved_for += passed if self._status.saving else 0.0
            last = now
            if self._hang() or self._peer_hangs.is_set():
                self._end()
                return

    def _read_beats(self) -> bool:
        """Read what the rank reported, waiting a moment for it; False when it has ended."""
        ready, _, _ = select.select([self._beats, self._stacks], [], [], self._poll)
        if self._stacks in ready:
            os.read(self._stacks, 1 << 16)  # another process sent the signal
        if self._beats not in ready:
            return True
        read = os.read(self._beats, 1 << 16)
        *lines, self._unfinished = (self._unfinished + read).split(b"\n")
        if lines:
            status = _Status(*json.loads(lines[-1]))
            if status.beats != self._status.beats:
                self._waited = 0.0
            if status.saving != self._status.saving:
                self._saved_for = 0.0
            self._status = status
        return bool(read)

    def _hang(self) -> str:
        """What has taken too long, so that the rank is ended now; empty: nothing."""
        status = self._status
        waits: tuple[tuple[Phase, int, float], ...] = (
            (status.phase, status.step, self._waited),
            ("save", status.saving, self._saved_for),
        )
        for phase, step, waited in waits:
            if waited > self._limits[phase] - self._ahead:
                limit = f"watchdog.{phase}={self._limits[phase]:g}"
                return f"{_stuck(phase, step, waited)}, and {limit} ends a hang"
        return ""

    def _watch_peers(self) -> None:
        """Notice that a peer of the same attempt hangs; without its number none can be seen."""
        while not (self._status.attempt and self._place().exists()):
            time.sleep(self._poll)
        self._peer_hangs.set()

    def _place(self) -> Path:
        if self._status.attempt:
            return Attempt(self._directory, self._status.attempt).stacks
        return self._directory / STACKS / "starting"

    def _end(self) -> None:
        """Have the stacks written, give peers time to do the same, and kill the rank."""
        began = time.monotonic()
        status, hang = self._status, self._hang()
        what = hang or _stuck(status.phase, status.step, self._waited)
        why = f"rank {self._rank} on {socket.gethostname()}, process {self._watched}: {what}"
        if hang:
            _in_time(lambda: self._announce(why), self._moment)
        stopped = _state(self._watched).startswith("T")
        if stopped:
            # Once it is woken the others continue: their stacks come first.
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
        """Notify the peers; the first to do so writes it to the log."""
        place = self._place()
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.mkdir()
        except FileExistsError:
            if self._status.attempt:
                return
        # Without the attempt's number no peer can be told.
        ending = f"its stacks go to {place}, and it is killed"
        if self._status.attempt:
            Attempt(self._directory, self._status.attempt).hang.write_text(why, encoding="utf-8")
            ending = f"the stacks of all ranks go to {place}, and the ranks are killed"
        self._say(f"{why}; {ending}")

    def _dump(self, stopped: bool) -> str:
        """The stacks that the rank writes; empty where it cannot."""
        for number in (_DUMP_SIGNAL, signal.SIGCONT)[: 1 + stopped]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
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
        if not self._status.attempt:
            name += f"-{socket.gethostname()}-{self._watched}"
        (place / f"{name}.txt").write_text(f"{why}\n\n{stacks}", encoding="utf-8")
        if self._rank == 0 and self._status.attempt:
            Attempt(self._directory, self._status.attempt).end(1, why)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        note(self._directory, text)


def _stuck(phase: Phase, step: int, waited: float) -> str:
    return f"{phase} after step {step}, no progress for {waited:.1f} s"


def _in_time(action: Callable[[], None], seconds: float) -> None:
    """Do it, or give up where it takes longer; an OSError is printed."""
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


def _ignore_signals() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _watch() -> None:
    directory, rank, limits, beats, stacks = json.loads(sys.argv[1])
    _Watcher(Path(directory), rank, limits, beats, stacks).run()
    # A thread may still wait for a file system that hangs.
    os._exit(0)


if __name__ == "__main__":
    _watch()
