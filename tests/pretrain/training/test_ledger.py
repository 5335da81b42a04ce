"""The ledger: a run that consumed other tokens than the schedule's is found out."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.dataset import settings
from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.commit import save
from pretrain.checkpoint.pieces import LaneRecord, Piece
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.config.root import Config, load
from pretrain.data.lanes import Dataset, Lane, Mix
from pretrain.training import ledger
from pretrain.training.ledger import Ledger, check, extended
from pretrain.training.metrics import read_records

LANES, WINDOW = 3, 32
TOOL = Path(__file__).parents[3] / "tools" / "check_ledger.py"
Windows = Iterator[list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]) -> Config:
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(1)
    for name in ("one", "two"):
        documents = [rng.integers(3, 48, size=int(size)) for size in rng.integers(1, 90, size=30)]
        write_data_set(root / name, documents, 4, 48)
    mix = f"data.mix=[{{data: {root / 'one'}, weight: 2}}, {{data: {root / 'two'}}}]"
    return load(None, [mix, "run.directory=r", f"data.lanes={LANES}", "model.segment=8",
                       "train.window_segments=4"])  # fmt: skip


class Run:
    """A run that consumes windows without a model."""

    def __init__(self, directory: Path, config: Config) -> None:
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(settings.to_yaml(config))
        self.directory, self.config = directory, config
        sources = config.data.sources.values()
        mix = Mix([Dataset(Path(s.data)) for s in sources], [s.schedule for s in sources])
        self.lanes = [Lane(mix, index, LANES, config.run.seed) for index in range(LANES)]
        self.histories = [""] * LANES
        self.ledger = Ledger(Attempt(directory, 1), 1, config, 0)
        self.step = 0

    def consume(self, windows: int = 1) -> None:
        for _ in range(windows):
            read = [lane.window(WINDOW) for lane in self.lanes]
            self.histories = [
                extended(history, tokens, starts)
                for history, (tokens, _, starts, _) in zip(self.histories, read, strict=True)
            ]
            self.step += 1

    def commit(self, attempt: int = 1) -> None:
        newest = Attempt(self.directory, attempt)
        self.ledger = Ledger(newest, 1, self.config, self.step)
        self.ledger.add(self.step, self.histories)
        lanes = {
            lane: LaneRecord({**asdict(self.lanes[lane].place), "history": history}, {})
            for lane, history in enumerate(self.histories)
        }
        trainer = {"step": self.step, "tokens": self.step * LANES * WINDOW}
        root, piece = self.directory / "checkpoints", Piece("w", (1,), 0, torch.zeros(1))
        save(root, self.step, [piece], lanes, trainer, SoloRanks(), 2, 0, newest)


@pytest.fixture
def run(tmp_path: Path, config: Config) -> Run:
    """A run that has committed steps 4 and 9."""
    run = Run(tmp_path / "run", config)
    for windows in (4, 5):
        run.consume(windows)
        run.commit()
    return run


def test_a_run_that_followed_the_schedule_is_proven(run: Run) -> None:
    assert check(run.directory) == []
    for attempt in (2, 2, 5):
        run.consume(7)
        run.commit(attempt)
    assert check(run.directory) == []


def test_a_window_that_is_skipped_is_found_in_its_lane(run: Run) -> None:
    run.lanes[1].window(WINDOW)
    run.consume(3)
    run.commit()
    problems = check(run.directory)
    assert problems[0] == (
        "lane 1: what steps 10 to 12 consumed is not what the schedule has there"
    )
    assert all(problem.startswith("lane 1: ") for problem in problems)


def test_a_window_that_comes_twice_is_found_in_its_lane(run: Run, config: Config) -> None:
    before = run.lanes[2].place
    run.consume(2)
    mix = Mix([Dataset(Path(s.data)) for s in config.data.sources.values()], [2.0, 1.0])
    run.lanes[2] = Lane(mix, 2, LANES, config.run.seed, before)
    run.consume(1)
    run.commit()
    assert check(run.directory)[0].startswith("lane 2: what steps 10 to 12 consumed")


def test_windows_in_another_order_are_found(run: Run) -> None:
    run.lanes[0], run.lanes[1] = run.lanes[1], run.lanes[0]
    run.consume(1)
    run.commit()
    found = [problem[:7] for problem in check(run.directory)]
    assert "lane 0:" in found and "lane 1:" in found and "lane 2:" not in found


def test_one_token_that_differs_is_found(run: Run) -> None:
    tokens, _, starts, _ = run.lanes[0].window(WINDOW)
    right = extended(run.histories[0], tokens, starts)
    tokens[5] += 1
    assert extended(run.histories[0], tokens, starts) != right
    tokens[5] -= 1
    assert extended(run.histories[0], tokens, ~starts) != right
    assert extended(run.histories[1], tokens, starts) != right


def test_a_step_that_is_committed_twice_or_by_an_older_attempt_is_found(run: Run) -> None:
    run.consume(1)
    run.commit(3)
    lines = (run.directory / "ledger.jsonl").read_text().splitlines()
    stale = json.dumps({**json.loads(lines[-1]), "attempt": 2, "step": 11})
    (run.directory / "ledger.jsonl").write_text("\n".join([*lines, lines[-1], stale]) + "\n")
    assert check(run.directory) == [
        "step 10 of attempt 3 comes after step 10 of attempt 3",
        "step 11 of attempt 2 comes after step 10 of attempt 3",
    ]


def test_a_checkpoint_that_is_not_at_the_ledgers_end_is_found(run: Run) -> None:
    lines = (run.directory / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run.directory / "ledger.jsonl").write_text(lines[0])
    assert check(run.directory) == [
        "the newest checkpoint is of step 9, the ledger ends with step 4"
    ]


def test_a_line_of_the_ledger_that_cannot_be_read_is_found_and_kept(run: Run) -> None:
    path = run.directory / "ledger.jsonl"
    first, last = path.read_text().splitlines(keepends=True)
    path.write_text(first + "\n" + last)
    assert check(run.directory) == []
    for line in ('{"step": 5}', "{cut"):
        path.write_text(f"{first}{line}\n{last}")
        assert check(run.directory) == ["ledger.jsonl: line 2 cannot be read"]
    Ledger(Attempt(run.directory, 2), 1, run.config, 9).close()
    assert path.read_text() == first + "{cut\n" + last


def test_uncommitted_lines_are_dropped_on_a_resume(run: Run) -> None:
    run.ledger.add(12, run.histories)
    with (run.directory / "ledger.jsonl").open("a") as file:
        file.write('{"step": 15, "half')
    Ledger(Attempt(run.directory, 2), 1, run.config, 9).close()
    assert [line["step"] for line in read_records(run.directory / "ledger.jsonl")] == [4, 9]
    # Whoever still has the file open writes into one that has no name any more.
    run.ledger.add(13, run.histories)
    assert [line["step"] for line in read_records(run.directory / "ledger.jsonl")] == [4, 9]
    assert check(run.directory) == []


def test_weights_and_windows_that_changed_between_commits_are_followed(
    tmp_path: Path, config: Config
) -> None:
    run = Run(tmp_path / "run", config)
    run.consume(3)
    run.commit()
    changed = load(None, [
        f"data.mix=[{{data: {config.data.mix[0].data}}}, {{data: {config.data.mix[1].data}, "
        "weight: 9}]", "run.directory=r", f"data.lanes={LANES}", "model.segment=8",
        "train.window_segments=4",
    ])  # fmt: skip
    places = [lane.place for lane in run.lanes]
    mix = Mix([Dataset(Path(s.data)) for s in changed.data.sources.values()], [1.0, 9.0])
    run.lanes = [Lane(mix, g, LANES, config.run.seed, place) for g, place in enumerate(places)]
    run.config = changed
    run.consume(20)
    run.commit()
    assert check(run.directory) == []


def test_a_schedule_of_weights_is_followed_and_another_is_found(
    tmp_path: Path, config: Config
) -> None:
    one, two = (source.data for source in config.data.mix)
    scheduled = load(None, [
        f"data.mix=[{{data: {one}, weights: [[0, 2], [7, 0]]}}, {{data: {two}, weights: [[0, 1], "
        "[12, 9]]}]", "run.directory=r", f"data.lanes={LANES}", "model.segment=8",
        "train.window_segments=4",
    ])  # fmt: skip
    run = Run(tmp_path / "run", scheduled)
    for windows in (3, 6, 1, 20):
        run.consume(windows)
        run.commit()
    assert check(run.directory) == []
    path = run.directory / "ledger.jsonl"
    text = path.read_text()
    path.write_text(text.replace("[7.0, 0.0]", "[8.0, 0.0]"))
    assert path.read_text() != text
    assert (
        "what steps 4 to 9 consumed is not what the schedule has there" in check(run.directory)[0]
    )


def test_the_tool_tells_what_it_found_by_its_exit_code(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(run.directory)])

    def failure() -> object:
        """What it exits with: a text goes to stderr, and the exit code is 1."""
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code

    runpy.run_path(str(TOOL), run_name="__main__")
    assert capsys.readouterr().out == (
        f"{run.directory}: 2 commits up to step 9, of attempt 1: every token once, in order\n"
    )
    run.lanes[1].window(WINDOW)
    run.consume(3)
    run.commit()
    assert "lane 1: what steps 10 to 12 consumed" in str(failure())
    shutil.rmtree(run.directory / "checkpoints")
    (run.directory / "config.yaml").unlink()
    mistake = (
        f"{run.directory}: cannot be checked:\n  - {run.directory}/config.yaml: cannot be read"
    )
    assert str(failure()).startswith(mistake)


def test_a_run_without_a_commit_has_consumed_nothing(tmp_path: Path, config: Config) -> None:
    assert ledger.check(Run(tmp_path / "run", config).directory) == []
