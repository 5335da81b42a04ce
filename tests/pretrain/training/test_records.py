"""The files of rank 0: what a run directory needs beside its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.attempts import Attempt, SupersededError, claim
from pretrain.config.root import load
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


def test_an_older_attempt_that_comes_late_changes_no_file_of_the_newer_one(
    open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run()
    directory = run.attempt.directory
    older, newer = (claim(directory, 1, 24, None) for _ in range(2))
    records = Records(newer, 1, run.config, run.data, 0)
    for step in (1, 2, 3):
        records.add("train", {"step": step})
        records.commit(step, [f"history {step}"])
    # It may be superseded before it begins, or while it reads what it would replace.
    asked = [older.superseded(), None, older.superseded()]
    for answers in (asked[:1], asked[1:]):
        told = iter(answers)
        with monkeypatch.context() as patch:
            patch.setattr(Attempt, "superseded", lambda attempt, told=told: next(told))
            with pytest.raises(SupersededError, match=r"attempt 1 .* superseded: attempt 2"):
                Records(older, 1, run.config, run.data, 2)
    records.add("train", {"step": 4})
    records.commit(4, ["history 4"])
    records.close()
    for name in ("metrics.jsonl", "ledger.jsonl"):
        found = read_records(directory / name)
        assert [record["step"] for record in found] == [1, 2, 3, 4]
