"""Directories of runs as a trainer leaves them, written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIGURATION = "run: {directory: runs/a}\ntrain: {steps: 100}\noptim: {lr: 0.001}\n"
LOG = """\
07:00:00 attempt 1 began at 2026-11-01T06:00:00+00:00 on node1, 2 ranks, from step 0
07:00:05 1,068,940 parameters, 2 ranks on cpu, ZeRO stage 3, 4 lanes of 1024 tokens a step
07:00:30 step 10/100 | loss 5.0000 | grad 1.504
07:01:00 step 20/100 | loss 4.0000 | grad 1.504
07:01:00 checkpoint runs/a/checkpoints/step-00000020 in 0.1 s, training stalled for 0.02 s
07:01:10 straggler: rank 1 (node1) computes 2.1 times slower than others
07:01:30 step 30/100 | loss 3.5000 | grad 1.504
07:01:31 rank 1 failed
Traceback (most recent call last):
  RuntimeError: <b>lost</b> s3://me:hunter2@host
23:59:50 attempt 2 began at 2026-11-01T22:59:50+00:00 on node2, 2 ranks, from step 20
23:59:58 passed over checkpoint step-00000030: damaged
00:00:10 resumed from runs/a/checkpoints/step-00000020, step 20
00:00:20 step 30/100 | loss 3.6000 | grad 1.504
"""


def attempt(number: int, time: str, step: int) -> dict[str, Any]:
    return {
        **{"attempt": number, "time": time, "host": f"node{number}", "process": 1, "job": "77"},
        **{"restart": None, "ranks": 2, "step": step, "counts": True},
    }


def train(step: int, **more: Any) -> dict[str, Any]:
    """A record as the trainer writes it."""
    return {
        **{"kind": "train", "step": step, "loss": 8.0 / step, "grad_norm": 1.0, "lr": 1e-3},
        **{"gate_lr": 1e-2, "tokens_per_second": 1000.0 + step, "mfu": None, "data_wait": 0.01},
        **{"eta_seconds": 9.0, "seconds_per_step": 0.5, "memory_bytes": 1 << 30},
        **{"tokens": step * 4096, "epochs": {"novels": step / 10}, "skipped": 0},
        **{"gates": [[0.4, 0.6], [0.2, 0.4]], "memory_norm": [1.0 * step, 3.0 * step]},
        **{"stragglers": {}, **more},
    }


def written(
    directory: Path,
    records: Iterable[Mapping[str, Any]] = (),
    *,
    log: str = LOG,
    configuration: str = CONFIGURATION,
    end: Mapping[str, Any] | None = None,
) -> Path:
    """A run of two attempts."""
    (directory / "attempts").mkdir(parents=True)
    (directory / "checkpoints").mkdir()
    lines = [json.dumps(record) + "\n" for record in records]
    (directory / "metrics.jsonl").write_text("".join(lines))
    (directory / "log.txt").write_text(log)
    (directory / "config.yaml").write_text(configuration)
    for number, time, step in ((1, "06:00:00", 0), (2, "22:59:50", 20)):
        made = attempt(number, f"2026-11-01T{time}+00:00", step)
        (directory / "attempts" / f"{number:06d}.json").write_text(json.dumps(made))
    if end is not None:
        (directory / "exit.json").write_text(json.dumps(end))
    return directory
