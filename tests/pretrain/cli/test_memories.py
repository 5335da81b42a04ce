"""`pretrain memories`: settings of every kind in one command, and its mistakes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.config.memory import MEMORY_KINDS

Run = Callable[..., subprocess.CompletedProcess[str]]
NEEDED = ("run.directory=r", "data.train=d", "model.memory.memorizing.capacity=512")


def compared(pretrain: Run, *words: str) -> dict[str, Any]:
    ended = pretrain("memories", "c.yaml", *NEEDED, *words, "--length", "1k", "--out", "out")
    assert (ended.returncode, ended.stderr) == (0, "")
    report = json.loads(Path("out/memories.json").read_text())
    assert report["length"] == 1024
    return {row["kind"]: row for row in report["kinds"]}


def test_settings_of_every_kind_may_be_given(pretrain: Run) -> None:
    found = compared(
        pretrain, "model.memory.rmt.vectors=3", "model.memory.normaliser=paper",
        "model.memory.transformer_xl.cache=7",
    )  # fmt: skip
    assert list(found) == list(MEMORY_KINDS)
    assert found["rmt"]["numbers"] == 3 * 256
    assert found["transformer_xl"]["numbers"] == 7 * 256 * 4
    assert found["delta"]["settings"]["normaliser"] == "paper"
    assert found["memorizing"]["settings"]["memorizing"]["capacity"] == 512


def test_the_files_settings_of_its_kind_hold_and_an_override_changes_one_of_them(
    pretrain: Run,
) -> None:
    Path("c.yaml").write_text(
        "model: {memory: {kind: memorizing, memorizing: {neighbours: 5, capacity: 1024}}}\n"
    )
    found = compared(pretrain)
    chosen = found["memorizing"]["settings"]["memorizing"]
    assert (chosen["neighbours"], chosen["capacity"]) == (5, 512)
    assert found["delta"]["settings"]["normaliser"] == "inclusive"


def test_full_attention_spans_a_window_unless_it_is_set(pretrain: Run) -> None:
    found = compared(pretrain, "train.window_segments=2")
    assert found["full"]["settings"]["full"]["segments"] == 2
    given = compared(pretrain, "train.window_segments=2", "model.memory.full.segments=1")
    assert given["full"]["reach"] == given["none"]["reach"] == 256
    Path("c.yaml").write_text("model: {memory: {kind: full, full: {segments: 2}}}\n")
    assert compared(pretrain)["full"]["reach"] == 512


def test_mistakes_of_all_kinds_are_reported_together(pretrain: Run) -> None:
    ended = pretrain(
        "memories", "c.yaml", "run.directory=r", "data.train=d", "model.memory.memorizing.layer=9",
        "model.memory.compressive.rate=3", "model.memory.rmt.vectors=0",
        "model.memory.normaliser=papr",
    )  # fmt: skip
    assert ended.returncode == 2
    keys = [line.removeprefix("  - ").split(":")[0] for line in ended.stderr.splitlines()[1:]]
    assert keys == [
        "model.memory.normaliser",
        "model.memory.compressive.rate",
        "model.memory.memorizing.layer",
        "model.memory.rmt.vectors",
    ]


def test_an_unknown_setting_is_answered_with_a_near_one(pretrain: Run) -> None:
    ended = pretrain("memories", "c.yaml", *NEEDED, "model.memory.rmd.vectors=3")
    assert ended.returncode == 2
    assert "model.memory.rmd: unknown key; did you mean model.memory.rmt?" in ended.stderr
