"""The files of rank 0: what a run directory needs beside its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.config import load
from pretrain.training.metrics import read_records
from pretrain.training.records import Records


def test_a_run_directory_has_its_configuration_and_its_tokenizer(
    open_run: Any, data_sets: dict[str, Path]
) -> None:
    run = open_run("optim.lr=0.125")
    Records(run.attempt, 1, run.config, run.data, 0).close()
    directory = run.attempt.directory
    assert load(directory / "config.yaml") == run.config
    stored = (directory / "tokenizer.model").read_bytes()
    assert stored == (data_sets["train"] / "tokenizer.model").read_bytes()


def test_lines_of_both_files_after_the_resumed_step_are_dropped(open_run: Any) -> None:
    run = open_run()
    first = Records(run.attempt, 3, run.config, run.data, 0)
    for step in (1, 2, 3):
        first.add("train", {"step": step})
        first.commit(step, [f"history {step}"])
    first.close()
    Records(run.attempt, 3, run.config, run.data, 2).close()
    lines, ledger = (
        read_records(run.attempt.directory / name) for name in ("metrics.jsonl", "ledger.jsonl")
    )
    assert lines == [{"kind": "train", "step": 1}, {"kind": "train", "step": 2}]
    assert ledger == [
        {
            "step": step, "attempt": 1, "ranks": 3, "window": 32, "weights": [1.0],
            "histories": [f"history {step}"],
        }
        for step in (1, 2)
    ]  # fmt: skip
