"""The whole pipeline on Python's own standard library: `make demo`.

Prepares shards, trains on two ZeRO-3 ranks, kills the run with SIGKILL half way, resumes it with
the same command, evaluates, generates, plots, and ends with a summary of the results.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.config import root as configuration

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CONFIG = "configs/demo.yaml"
RUN = Path("runs/demo")
TRAIN, VALIDATION = Path("data/stdlib"), Path("data/stdlib_val")
PROMPT = 'def read_lines(path):\n    """Return the lines of a file."""\n'


def main() -> None:
    """Run every part; if one fails, exit with its code."""
    os.chdir(ROOT)
    started = time.monotonic()
    for directory in (RUN, TRAIN, VALIDATION):
        shutil.rmtree(directory, ignore_errors=True)
    said = [
        *_prepare(),
        *_train_killed_and_resumed(),
        *_evaluate(),
        *_generate(),
        *_plot(),
    ]
    print("\nThe demo in figures")
    for line in said:
        print(f"  {line}")
    print(f"  whole demo: {time.monotonic() - started:.0f} s; the run is in {RUN}")


def _prepare() -> list[str]:
    _title("Raw text to shards")
    for recipe in ("stdlib", "stdlib_val"):
        _run("data-prep", "run", f"configs/data/{recipe}.yaml")
    _run("data-prep", "verify", TRAIN)
    manifest = json.loads((TRAIN / "manifest.json").read_text(encoding="utf-8"))
    return [
        f"prepared: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in "
        f"{len(manifest['shards'])} shards, {manifest['text_bytes'] / manifest['tokens']:.2f} "
        f"bytes per token, {manifest['rejected']} rejected; every checksum verified"
    ]


def _train_killed_and_resumed() -> list[str]:
    _title("Train on two ZeRO-3 ranks, to be killed half way")
    command = [str(BIN / "pretrain"), "train", CONFIG]
    steps = configuration.load(Path(CONFIG)).train.steps
    kill_at = steps // 2 + 20  # past a checkpoint, so that steps are lost and must be repeated
    print("$", *command[1:], flush=True)
    with subprocess.Popen(command) as process:
        while process.poll() is None and _last_step() < kill_at:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    killed = _records()
    if process.returncode != -signal.SIGKILL or not killed:
        sys.exit(process.returncode or 1)
    print(f"killed with SIGKILL after step {killed[-1]['step']}", flush=True)

    _title("Resume with the same command")
    _run("pretrain", "train", CONFIG)
    records = _records()
    again = {(r["kind"], r["step"]): r["loss"] for r in records}
    resumed_from = _resumed_step()
    lost = [r for r in killed if r["step"] > resumed_from]
    equal = sum(again[r["kind"], r["step"]] == r["loss"] for r in lost)
    if equal != len(lost):
        sys.exit("the resumed run's losses differ from the killed run's")
    train = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation"]
    wandb = sorted((RUN / "wandb").glob("offline-run-*"))
    return [
        f"trained: {train[-1]['step']} steps, {train[-1]['tokens']:,} tokens, loss "
        f"{train[0]['loss']:.2f} -> {train[-1]['loss']:.2f}, validation "
        f"{validation[-1]['loss']:.2f}, {_median([r['tokens_per_second'] for r in train]):,.0f} "
        "tokens/s (median)",
        f"killed after step {killed[-1]['step']}, resumed from the checkpoint of step "
        f"{resumed_from}: {equal} of {len(lost)} losses recorded twice are equal to the bit",
        f"wandb: {len(wandb)} offline parts of one run, id {wandb[-1].name.rsplit('-', 1)[-1]}",
    ]


def _evaluate() -> list[str]:
    _title("Bits per byte on unseen files, each streamed whole")
    _run("pretrain", "eval", "perplexity", RUN, "--data", VALIDATION)
    (path,) = RUN.glob("eval-*.json")
    total = json.loads(path.read_text(encoding="utf-8"))["total"]["bits_per_byte"]
    return [
        f"evaluated: {total['memory']:.4f} bits per byte with memory, {total['masked']:.4f} with "
        "memory reads masked"
    ]


def _generate() -> list[str]:
    _title("Generate")
    text = _run(
        "pretrain", "generate", RUN, "--prompt", PROMPT, "--max-tokens", "120", capture=True
    )
    print(PROMPT + text)
    return [f"generated: {len(text)} characters after a prompt of {len(PROMPT)}"]


def _plot() -> list[str]:
    _title("Plot")
    paths = _run("pretrain", "plot", RUN, capture=True).split()
    print(*paths, sep="\n")
    return [f"plotted: {', '.join(Path(path).name for path in paths)} in {RUN / 'plots'}"]


def _run(command: str, *arguments: str | Path, capture: bool = False) -> str:
    line: Sequence[str] = [str(BIN / command), *map(str, arguments)]
    print("$", command, *line[1:], flush=True)
    done = subprocess.run(line, check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout if capture else ""


def _records() -> list[dict[str, Any]]:
    """The run's records with a loss; a line still being written is left out."""
    path = RUN / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def _last_step() -> int:
    records = _records()
    return int(records[-1]["step"]) if records else 0


def _resumed_step() -> int:
    log = (RUN / "log.txt").read_text(encoding="utf-8")
    (line,) = (line for line in log.splitlines() if "resumed from" in line)
    return int(line.rsplit(" ", 1)[1])


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
