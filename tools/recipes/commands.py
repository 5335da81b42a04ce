"""Shared by the recipes: argument parsers, running our commands, and result files."""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data_prep.dataset import durable

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Not by their scripts, which a machine that has the sources on its path alone lacks.
_MODULES = {"pretrain": "pretrain.cli", "data-prep": "data_prep.cli"}

T = TypeVar("T")
R = TypeVar("R")


def parser(about: str | None, *positional: tuple[str, str], of: str) -> argparse.ArgumentParser:
    """A parser whose help is a recipe's docstring without its usage.

    The `positional` arguments are directories; after them come key=value settings for `of`.
    """
    title, _, *rest = (about or "").split("\n\n")
    found = argparse.ArgumentParser(
        description="\n\n".join([title, *rest]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, help in positional:
        found.add_argument(name, type=Path, help=help)
    found.add_argument("settings", nargs="*", help=f"key=value for {of}")
    return found


def number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type of an argument: a whole number of at least `low`, and at most `high`."""
    most = "" if high is None else f" and at most {high:,}"

    def read(word: str) -> int:
        with contextlib.suppress(ValueError):
            found = int(word)
            if low <= found and (high is None or found <= high):
                return found
        raise argparse.ArgumentTypeError(
            f"{word!r}: expected a whole number of at least {low:,}{most}"
        )

    return read


def numbers(low: int, high: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """A type of an argument: different numbers like those of `number`, with commas between them."""
    one = number(low, high)

    def listed(word: str) -> tuple[int, ...]:
        return tuple(_different([one(part) for part in word.split(",")]))

    return listed


def positive(word: str) -> float:
    """A number of more than 0, as a type of an argument."""
    with contextlib.suppress(ValueError):
        found = float(word)
        if 0 < found < math.inf:
            return found
    raise argparse.ArgumentTypeError(f"{word!r}: expected a number of more than 0")


def names(*known: str) -> Callable[[str], list[str]]:
    """A type of an argument: different names of `known`, with commas between them."""

    def listed(word: str) -> list[str]:
        found = word.split(",")
        if wrong := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r}: expected some of {','.join(known)}")
        return _different(found)

    return listed


def _different(found: list[T]) -> list[T]:
    """The list itself. What is named twice would be trained twice, at once in one directory."""
    twice = [one for number, one in enumerate(found) if one in found[:number]]
    if twice:
        raise argparse.ArgumentTypeError(f"{twice[0]} is named twice; name each once")
    return found


def run(command: str, *words: str | Path) -> None:
    """Print and run one of our commands; if it fails, exit with its code."""
    line = [sys.executable, "-P", "-m", _MODULES[command], *map(str, words)]
    print("$", command, *line[4:], flush=True)
    done = subprocess.run(line, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """The option `--jobs`, for `each`."""
    parser.add_argument(
        "--jobs",
        type=number(1),
        default=1,
        help="trainings at once (default 1); with more, set launch.ranks=1 and OMP_NUM_THREADS",
    )


def add_steps_share(parser: argparse.ArgumentParser) -> None:
    """The option `--steps-share`, for `stages.shortened`."""
    parser.add_argument(
        "--steps-share", type=positive, default=1.0, help="share of each stage's steps (default 1)"
    )


def each(jobs: int, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What `work` makes of each item, in their order, at most `jobs` at once.

    Once one has failed no other is begun, and its error is raised when those begun have ended.
    """
    with ThreadPoolExecutor(jobs) as pool:
        begun = [pool.submit(work, item) for item in items]
        try:
            return [one.result() for one in begun]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def prepare(recipe: str, root: Path, output: Path, *settings: str) -> Path:
    """Run configs/data/`recipe`.yaml on the texts under `root`; returns the output directory."""
    path = CONFIGS / "data" / f"{recipe}.yaml"
    run("data-prep", "run", path, f"root={root}", f"output={output}", *settings)
    return output


def prepare_both(corpus: str, root: Path, data: Path) -> tuple[Path, Path]:
    """The training and validation sets of a corpus, both with the tokenizer of the first."""
    train = prepare(f"{corpus}_train", root, data / f"{corpus}_train")
    own = f"tokenizer.path={train / 'tokenizer.model'}"
    return train, prepare(f"{corpus}_val", root, data / f"{corpus}_val", own)


def conclude(path: Path, text: str, numbers: Any = None) -> None:
    """Write a recipe's tables to `path`.md and its numbers to `path`.json; print the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if numbers is not None:
        durable.write_json(path.with_suffix(".json"), numbers)
    durable.write_bytes(path.with_suffix(".md"), text.encode())
    print(text)
