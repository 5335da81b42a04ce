"""Speed of a training step on this machine's CPU, in comparisons.

    python tools/bench/training.py peer --json out.json

    rate    the step's FLOPs per second, against plain matrix products of its shapes
    peer    against infini-transformer-pytorch, also with the gradient through all segments
    loop    our model over the whole window, against the same model called segment by segment
    llama   against a Llama of the same size in transformers with full attention
    memory  with a memory, against `memory.kind: none`
    length  seconds per token and peak memory for windows of 4 Ki to 256 Ki tokens
    heap    with and without the heap's settings of pretrain.training.heap
    compile with and without `train.compile`
    prompts with the loss on one token in 16, as of answers to prompts, against all tokens

Each contestant is a separate process; they take turns of one step while the others wait. A ratio is
the median over pairs of steps next to each other in time, so that other load on the machine affects
both. The first steps are warm-up, since the heap needs some steps to reach its full size. A group
with windows of 64 Ki tokens or more runs one contestant at a time, after a single warm-up step, for
half the rounds. Peers are installed into a separate environment under .cache; they are measured
unmodified, and infini-transformer-pytorch also with our heap settings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine

LARGE = {"d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "d_head": 64,
         "d_ff": 1365, "segment": 256}  # fmt: skip
SMALL = {"d_model": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 4, "d_head": 64,
         "d_ff": 682, "segment": 64}  # fmt: skip
PEERS = ("infini-transformer-pytorch==0.2.1", "transformers==5.24.0")
_WARM_UP = 3  # steps
_LONG = 65_536  # tokens of a window
_PEERS_HOME = machine.ROOT / ".cache/bench-peers"


@dataclass
class Contestant:
    """A process that trains a step on request."""

    name: str
    settings: dict[str, Any]
    packages: Path | None = None
    """A directory of packages of its own, beside those of this environment."""
    found: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    state: int = 0
    """Bytes of the memory after a step."""

    def start(self, warm_up: int) -> None:
        """Start the process, build its model and take `warm_up` steps."""
        alone = self.settings["who"] in ("infini-transformer-pytorch", "llama")
        peer = alone and self.packages is None
        paths = [path for path in (self.packages, machine.ROOT) if path]
        self._process = subprocess.Popen(
            [_peers_python() if peer else sys.executable, Path(__file__).parent / "contestants.py",
             json.dumps(self.settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        )  # fmt: skip
        self.found = self._answer()
        for _ in range(warm_up):
            self.step()

    def step(self) -> dict[str, Any]:
        """Train one step; returns the process's answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has exited, which `_answer` reports
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return self._answer()

    def measure(self) -> None:
        """Train one step and store its figures."""
        answer = self.step()
        self.seconds.append(answer["seconds"])
        self.peaks.append(answer["peak"])
        self.state = answer["state"]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _peers_python() -> Path:
    """Python of the peers' environment, which is created on the first call."""
    python = _PEERS_HOME / "bin/python"
    done = _PEERS_HOME / "installed"
    if not done.exists() or done.read_text() != " ".join(PEERS):
        venv.create(_PEERS_HOME, with_pip=True, clear=True)
        constraints = machine.ROOT / "constraints.txt"
        torch = next(x for x in constraints.read_text().split() if x.startswith("torch=="))
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch, *PEERS], check=True)
        done.write_text(" ".join(PEERS))
    return python


def _settings(shape: dict[str, int], window: int, threads: int, **more: Any) -> dict[str, Any]:
    vocab_size = 32_000 if shape is LARGE else 8_192
    return {"who": "ours", "memory": "linear", "shape": shape, "vocab_size": vocab_size,
            "window": window, "threads": threads, **more}  # fmt: skip


def _groups(what: str, threads: int) -> list[list[Contestant]]:
    """Groups of contestants that take turns; each is compared with the first of its group."""

    def one(name: str, shape: dict[str, int], window: int, **more: Any) -> Contestant:
        return Contestant(name, _settings(shape, window, threads, **more))

    peer = "infini-transformer-pytorch"
    as_it_comes = {"who": peer, "keep_freed_memory": False}
    if what == "rate":
        return [[one("plain products", LARGE, 4096, who="products"),
                 *(one(f"ours, {kind}{how}", LARGE, 4096, memory=kind, compile=bool(how))
                   for kind in ("linear", "delta") for how in ("", ", compiled")),
                 one(peer, LARGE, 4096, **as_it_comes)]]  # fmt: skip
    if what == "peer":
        return [[one(f"{peer}, {kind}", SMALL, window, memory=kind, **as_it_comes),
                 one(f"{peer}, {kind}, our heap", SMALL, window, who=peer, memory=kind),
                 one(f"ours, {kind}", SMALL, window, memory=kind)]
                for window in (4096, 16384) for kind in ("linear", "delta")]  # fmt: skip
    if what == "loop":
        return [[one("loop over segments", SMALL, 4096, who="loop"), one("ours", SMALL, 4096)]]
    if what == "llama":
        return [[one("Llama, full attention", SMALL, window, who="llama"),
                 *(one(f"ours, {kind}", SMALL, window, memory=kind)
                   for kind in ("linear", "delta"))]
                for window in (4096, 16384, 65536)]  # fmt: skip
    if what == "memory":
        return [[one(f"ours, {kind}", LARGE, 4096, memory=kind)
                 for kind in ("none", "linear", "delta")]]  # fmt: skip
    if what == "length":
        return [[one("ours, full checkpointing", SMALL, window, checkpointing="full")
                 for window in (4096, 16384, 65536, 262144)]]  # fmt: skip
    if what == "heap":
        return [[one("ours, as the C library has it", LARGE, 4096, keep_freed_memory=False),
                 one("ours, freed memory kept", LARGE, 4096)]]  # fmt: skip
    if what == "prompts":
        return [[one("ours, every token in the loss", LARGE, 4096),
                 one("ours, one token in 16", LARGE, 4096, answers=16)]]  # fmt: skip
    assert what == "compile"
    return [[one("ours", shape, 4096), one("ours, compiled", shape, 4096, compile=True)]
            for shape in (LARGE, SMALL)]  # fmt: skip


def main() -> None:
    """Measure, print a table, write the JSON."""
    parsed = _parser().parse_args()
    rows = []
    for group in _groups(parsed.what, parsed.threads):
        # Long windows would not fit into memory together, since each heap stays at its peak size.
        alone = max(contestant.settings["window"] for contestant in group) >= _LONG
        if not alone:
            for contestant in group:
                contestant.start(_WARM_UP)
        for number in range(max(1, parsed.rounds // 2) if alone else parsed.rounds):
            for contestant in group:
                if alone:
                    contestant.start(1)
                contestant.measure()
                print(f"{number + 1}: {contestant.name}, {contestant.settings['window']}: "
                      f"{contestant.seconds[-1]:.2f} s", file=sys.stderr)  # fmt: skip
                if alone:
                    contestant.stop()
        for contestant in group:
            if not alone:
                contestant.stop()
            rows.append(_row(contestant, group[0]))
    found = {"what": parsed.what, "machine": machine.described(), "rows": rows}
    lines = _table(found)
    if parsed.what == "length":
        found["slope"] = _slope(rows)
        lines += [
            "peak memory grows by {measured:,.0f} bytes per token; the inputs of the layers need "
            "at least {bound:,.0f}".format(**found["slope"])
        ]
    machine.report(found, lines, parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument(
        "what",
        choices=("rate", "peer", "loop", "llama", "memory", "length", "heap", "compile", "prompts"),
        help="the comparison",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def _row(contestant: Contestant, first: Contestant) -> dict[str, Any]:
    window = contestant.settings["window"]
    a_token = [seconds / window for seconds in contestant.seconds]
    beside = [seconds / first.settings["window"] for seconds in first.seconds]
    row = {
        "who": contestant.name,
        "settings": contestant.settings,
        **contestant.found,
        "seconds": contestant.seconds,
        "tokens_per_second": 1 / statistics.median(a_token),
        "times_as_fast": statistics.median(b / a for a, b in zip(a_token, beside, strict=True)),
        "peak_bytes": max(contestant.peaks),
    }
    if "flops" in contestant.found:
        flops = contestant.found["flops"]
        row["flops_per_second"] = flops / statistics.median(contestant.seconds)
        if "flops" in first.found:
            row["of_rate"] = statistics.median(
                flops / a / (first.found["flops"] / b)
                for a, b in zip(contestant.seconds, first.seconds, strict=True)
            )
    return row


def _slope(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Growth of peak memory in bytes per token, shortest to longest window, and a lower bound."""
    short, *_, long = sorted(rows, key=lambda row: row["settings"]["window"])
    tokens = long["settings"]["window"] - short["settings"]["window"]
    shape = long["settings"]["shape"]
    return {
        "measured": (long["peak_bytes"] - short["peak_bytes"]) / tokens,
        "bound": shape["n_layers"] * shape["d_model"] * 4,
    }


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| who | window | s/step, median (least to most) | tokens/s | times the first "
        "| GFLOP/s | of the first's | peak, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        taken = row["seconds"]
        spread = f"{statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f})"
        rate = f"{row['flops_per_second'] / 1e9:.0f}" if "flops_per_second" in row else ""
        share = f"{row['of_rate']:.0%}" if "of_rate" in row else ""
        lines.append(
            f"| {row['who']} | {row['settings']['window']:,} | {spread} "
            f"| {row['tokens_per_second']:,.0f} | {row['times_as_fast']:.2f} | {rate} | {share} "
            f"| {row['peak_bytes'] / 2**20:,.0f} |"
        )
    return lines


if __name__ == "__main__":
    main()
