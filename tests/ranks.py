"""Real ranks of a test file, which import its neighbours wherever pytest was started.

They are forked from a process that has imported what they need, once for all: it takes 4 s.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

_COMMAND = Path(__file__).parents[1] / "pretrain" / "cli" / "__main__.py"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.ranks_imports"])


def train(ranks: int, *words: str | Path) -> None:
    """`pretrain train` with these words, to its end, on ranks that no launcher started."""
    work(_COMMAND, ranks, "train", *words)


def work(file: str | Path, ranks: int, *words: str | Path) -> None:
    """Run `file` as the main program of every rank, to their end."""
    with tempfile.TemporaryDirectory() as directory:
        started: list[BaseProcess] = []
        try:
            for environment in _environments(ranks, Path(directory) / "store"):
                arguments = environment, Path.cwd(), [str(word) for word in (file, *words)]
                started.append(_FORKS.Process(target=_rank, args=arguments))
                started[-1].start()
            _wait(started)
        finally:
            for process in started:
                process.kill()
                process.join()


def _wait(started: list[BaseProcess]) -> None:
    """Until all have ended, or one has failed, for which its peers might wait forever."""
    running = list(started)
    while running:
        connection.wait([process.sentinel for process in running])
        ended = [process for process in running if process.exitcode is not None]
        assert [process.exitcode for process in ended] == [0] * len(ended)
        running = [process for process in running if process not in ended]


def _environments(ranks: int, store: Path) -> list[dict[str, str]]:
    """Of each rank, as `pretrain.jobs.launch.start_ranks` sets them."""
    return [
        {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "PRETRAIN_STORE": str(store),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for rank in range(ranks)
    ]


def _rank(environment: dict[str, str], place: Path, words: list[str]) -> None:
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
