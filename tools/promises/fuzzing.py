"""Promise 15: inputs of a fuzzer break no parser."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.promises import fuzz_targets
from tools.promises.campaign import BrokenError, Promise, Room, UnavailableError

INPUTS = 10_000  # of a case
_HUNG = 300  # seconds of an input by the clock, of which other work takes its share
_MEGABYTES = 2048  # of the process, torch included
_LONGEST = 1 << 14  # bytes of an input
_PROGRAM = Path(__file__).with_name("fuzz_one.py")


def parses(seed: int, room: Room) -> dict[str, Any]:
    """Ten thousand inputs to one parser; what reaches new branches is kept for the next case."""
    if importlib.util.find_spec("atheris") is None:
        raise UnavailableError("atheris is not installed; pip install '.[fuzz]'")
    names = list(fuzz_targets.TARGETS)
    name = names[seed % len(names)]
    corpus = room.made(f"corpus-{name}", lambda path: _write(path, fuzz_targets.seeds(name)))
    options = [
        f"-atheris_runs={INPUTS}", f"-seed={seed + 1}", f"-timeout={_HUNG}",
        f"-rss_limit_mb={_MEGABYTES}", f"-max_len={_LONGEST}", f"-artifact_prefix={room.here}/",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), name, *options, str(corpus)],
        env={**os.environ, "FUZZ_SCRATCH": str(room.here)},
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    said = done.stdout + done.stderr
    # What happens while the interpreter is taken apart afterwards is of no interest.
    broke = [*room.here.glob("crash-*"), *room.here.glob("timeout-*"), *room.here.glob("oom-*")]
    if f"Done {INPUTS} in " not in said or broke:
        (room.here / "output.txt").write_text(said)
        raise BrokenError(f"{name}: {_cause(said)}; output.txt and the input lie in {room.here}")
    covered = re.findall(r"cov: (\d+)", said)
    return {"target": name, "inputs": INPUTS, "branches": int(covered[-1]) if covered else 0}


def _cause(said: str) -> str:
    found = re.findall(r"^(?:\w*Error|\w*Exception|==\d+== ERROR)[^\n]*", said, re.MULTILINE)
    return found[0] if found else said.strip()[-300:]


def _write(directory: Path, seeds: Sequence[bytes]) -> None:
    directory.mkdir()
    for number, data in enumerate(seeds):
        (directory / f"seed-{number}").write_bytes(data)


def mutated(data: bytes, choose: random.Random) -> bytes:
    """The input with a few random changes; for where no fuzzer is installed."""
    changed = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        place = choose.randrange(len(changed) + 1)
        kind = choose.randrange(4)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del changed[place : place + choose.choice([1, 4, 64])]
        elif kind == 2:
            changed[place:place] = choose.choice(
                [b"[" * 5000, b"\0", b"\xff", b"9" * 30, b"-1", b"\r\n\r\n", b"&a *a", b"${a}"]
            )
        else:
            start = choose.randrange(len(changed) + 1)
            changed[place:place] = changed[start : start + choose.choice([2, 16, 200])]
    return bytes(changed)


PROMISES = (
    Promise(
        15, "fuzzing", "parsers survive fuzzing: no traceback, no hang, bounded memory",
        104, "inputs", parses, each=INPUTS, limit=1800.0,
        how=f"atheris (libFuzzer guided by the branches of our code), {INPUTS:,} inputs a case, at "
        f"most {_LONGEST:,} bytes, {fuzz_targets.CPU_SECONDS} s of CPU time and {_MEGABYTES:,} MB, "
        "over " + ", ".join(fuzz_targets.TARGETS) + ".",
    ),
)  # fmt: skip
