"""Ranks: read from the environment of torchrun or srun, or launched here on one machine.

The exit codes of `pretrain train` are listed in its help (pretrain/cli/outcome.py). torchrun turns
every failure into 1: the attempt's exit code is in the run directory's exit.json.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from data_prep.dataset import children, cores, durable
from data_prep.dataset.command import say
from data_prep.dataset.settings import EXIT_MISTAKE, MistakeError, SettingsError
from pretrain.checkpoint.attempts import NoProgressError, SupersededError
from pretrain.config.root import Config

EXIT_STOPPED = 75  # EX_TEMPFAIL
EXIT_NO_PROGRESS = 78  # EX_CONFIG: not to be started again automatically

# What ends a job, a terminal or a session. SIGHUP: it is closed; SIGQUIT: Ctrl-\; SIGXCPU: the CPU
# time of `ulimit -t` or of a batch system is used up.
_STOPPING = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGXCPU, signal.SIGUSR1),
)

# After one rank has failed, its peers sit in a collective that will not end: they get this long to
# print their own errors before they are killed.
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_STORE = "PRETRAIN_STORE"
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")  # of Open MPI; of MPICH and Intel MPI


@dataclass(frozen=True)
class Place:
    """This process among the ranks of a run."""

    rank: int
    size: int
    local_rank: int
    init_method: str


def place_in(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process; None where none did.

    Understood: our own launcher, torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
    and srun with one task per rank (SLURM_PROCID and kin; the batch script sets MASTER_ADDR and
    MASTER_PORT). Only a step of srun has SLURM_STEP_ID; the batch shell has a SLURM_PROCID, too.
    Raises SettingsError where the ranks cannot find each other.
    """
    env = environment
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local_rank = _numbers(env, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        if _STORE in env:
            return Place(rank, size, local_rank, f"file://{env[_STORE]}")
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]:
            raise SettingsError(
                [
                    f"RANK={rank} and WORLD_SIZE={size} are set, as torchrun does, without "
                    f"{' and '.join(missing)}; launch with torchrun, or unset RANK and WORLD_SIZE "
                    "to have the ranks launched here"
                ]
            )
        return Place(rank, size, local_rank, "env://")
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise SettingsError(
                [
                    f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks without setting "
                    f"{' and '.join(missing)}; export the first node's name and a free port in "
                    "the batch script. In a shell of srun --pty, unset SLURM_STEP_ID to have the "
                    "ranks launched here"
                ]
            )
        rank, size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        method = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        return Place(rank, size, int(env["SLURM_LOCALID"]), method)
    # Each process of mpirun would launch ranks of its own, and supersede the others'.
    for name in _MPI_SIZES:
        if env.get(name, "1") != "1":
            raise SettingsError(
                [
                    f"{name}={env[name]}: mpirun started several of this command, and it takes no "
                    "place from MPI; launch with torchrun, or without mpirun to have the ranks "
                    "launched here"
                ]
            )
    return None


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    """Variables that a launcher sets to whole numbers; 0 for one that is not set.

    Raises SettingsError where one is set to something else, or the rank is none of them.
    """
    given = {name: environment.get(name, "0") for name in names}
    problems = [
        f"{name}: expected a whole number, as torchrun sets it, found {text!r}; unset it"
        for name, text in given.items()
        if not re.fullmatch("[0-9]+", text)
    ]
    if not problems and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        problems = [
            f"RANK: {given['RANK']} is none of WORLD_SIZE={given['WORLD_SIZE']} ranks, which count "
            "from 0; unset both to have the ranks launched here"
        ]
    if problems:
        raise SettingsError(problems)
    return [int(text) for text in given.values()]


def default_ranks(config: Config) -> int:
    """One rank per GPU of this machine, or one on a CPU."""
    if config.launch.device == "cpu":
        return 1
    import torch

    if config.launch.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            ["launch.device: cuda, but torch finds no GPU here; use a machine with one, or cpu"]
        )
    return max(1, torch.cuda.device_count())


def stop_signals() -> list[signal.Signals]:
    """The signals after which a run saves and ends. Under nohup SIGHUP is not one of them."""
    hang_up = signal.SIGHUP
    ignored = signal.getsignal(hang_up) is signal.SIG_IGN
    return [number for number in _STOPPING if number != hang_up or not ignored]


class StopFlag:
    """Records that a stop signal came, so that the step in flight can be finished first."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        numbers = stop_signals()
        for number in numbers:
            signal.signal(number, self._remember)
        # `start_ranks` blocked them: what came before there was a handler arrives now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)


def exit_code(error: Exception) -> int:
    """The exit code of a command that ended with an error."""
    if isinstance(error, MistakeError | SupersededError):
        return EXIT_MISTAKE
    return EXIT_NO_PROGRESS if isinstance(error, NoProgressError) else 1


def leave(code: int) -> NoReturn:
    """End this rank with exit code `code`, its output flushed, without interpreter shutdown.

    A full disk under the output changes nothing.

    gloo's threads free a collective's tensors some time after it is done. One that needs the
    interpreter for that during shutdown is cancelled inside of C++, which aborts the process (torch
    2.13 on Python 3.11: in 17 of 100 launches of a finished run).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def start_ranks(command: Sequence[str], ranks: int) -> int:
    """Run `command` once per rank on this machine; return the exit code of the whole.

    Stop signals are forwarded to every rank. If a rank fails, the others are ended soon, and its
    code is returned. Ranks die with this process, even when it is killed with SIGKILL.
    """
    processes: list[subprocess.Popen[bytes]] = []
    numbers = stop_signals()

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        # A step and a save may take minutes, in which nothing else is said.
        with contextlib.suppress(RuntimeError):  # in the middle of another print
            name = signal.Signals(number).name
            say(f"{name}: the ranks finish their step and save")

    with tempfile.TemporaryDirectory(prefix="pretrain-") as directory:
        # torch's store would fail without a message for the user where it cannot lock its file.
        with (path := Path(directory) / "lock").open("w") as file:
            durable.lock(file, path, fcntl.LOCK_EX, "set TMPDIR to a directory on another one")
        # Inherited blocked: one that arrives while a rank starts waits for its StopFlag instead of
        # killing it.
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        previous = {number: signal.signal(number, forward) for number in numbers}
        try:
            for rank in range(ranks):
                environment = _environment(rank, ranks, Path(directory) / "store")
                processes.append(_start(command, environment))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            return _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A rank that dies with this process."""
    parent = os.getpid()
    return subprocess.Popen(
        command,
        env=environment,
        # Ctrl-C in the terminal reaches the launcher alone, which forwards it once.
        start_new_session=True,
        preexec_fn=lambda: children.end_with(parent),
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return when all have ended, or one has failed and the others had time to report it."""
    while True:
        codes = [process.poll() for process in processes]
        failed = {rank: code for rank, code in enumerate(codes) if code and code != EXIT_STOPPED}
        if failed:
            deadline = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < deadline and any(p.poll() is None for p in processes):
                time.sleep(_POLL_SECONDS)
            return _exit_code(failed)
        if None not in codes:
            return EXIT_STOPPED if EXIT_STOPPED in codes else 0
        time.sleep(_POLL_SECONDS)


def _exit_code(failed: Mapping[int, int]) -> int:
    """The smallest code of those that failed first: a killed one (code < 0) makes others fail."""
    rank, code = min(failed.items(), key=lambda item: item[1])
    if code > 0:
        return code
    known = {number.value: number.name for number in signal.Signals}  # few real-time signals
    print(
        f"rank {rank} was killed by {known.get(-code, f'signal {-code}')}; the same command "
        "resumes from the last good checkpoint",
        file=sys.stderr,
    )
    return 128 - code  # as the shell does it


def _environment(rank: int, ranks: int, store: Path) -> dict[str, str]:
    threads = max(1, cores.usable() // ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        # All ranks are on this machine: no need to guess the network interface.
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        _STORE: str(store),
    }
