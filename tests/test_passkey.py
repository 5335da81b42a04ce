"""What the passkey recipe decides by itself: stages, documents, questions, the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from stages import TIMES, Stage, documents_needed, shortened

from pretrain.config import root as configuration
from pretrain.data.lanes import Dataset
from tools.recipes import passkey
from tools.recipes.passkey import (
    LENGTHS,
    STAGES,
    Documents,
    overview,
    passkeys,
    samples_at,
    table,
)


def test_windows_are_of_8_ki_tokens_at_most_and_documents_grow() -> None:
    longest = []
    for stage in STAGES:
        words = [*stage.settings(Path("data")), "run.directory=r"]
        config = configuration.load(passkey.CONFIG, words)
        assert config.window <= 8192
        # The short documents are there to learn on: windows hold several of them.
        assert config.window * config.data.lanes >= 2 * min(one.mean for one, _ in stage.shares)
        longest.append(max(one.high for one, _ in stage.shares))
    assert longest == sorted(longest)
    # Those of the last stages are at all distances that are asked for.
    assert [bool(stage.preface) for stage in STAGES] == [False] * 4 + [True] * 2
    assert max(LENGTHS) == 2**20


def test_a_stage_says_what_it_reads_and_how_its_rate_goes() -> None:
    sets = (Documents("a", 8, 16), Documents("b", 16, 64))
    shares = ((sets[0], 1.0), (sets[1], 3.0))
    stage = Stage("s", shares, 40, 4, 2, 3e-4, 0.05, decay=0.5, weight_decay=0.02, preface="far")
    words = [*stage.settings(Path("d")), "run.directory=r"]
    config = configuration.load(passkey.CONFIG, words)
    assert [(one.data, one.weight) for one in config.data.mix] == [("d/a", 1.0), ("d/b", 3.0)]
    assert (config.data.lanes, config.train.window_segments, config.train.steps) == (4, 2, 40)
    assert (config.optim.lr, config.optim.warmup_steps, config.optim.decay_steps) == (3e-4, 20, 20)
    assert (config.data.prompt_weight, config.optim.gate_lr) == (0.05, pytest.approx(6e-3))
    assert (config.data.preface, config.optim.weight_decay) == ("d/far", 0.02)
    assert config.model.segment == 64
    longer = [*replace(stage, segment=256).settings(Path("d")), "run.directory=r"]
    assert configuration.load(passkey.CONFIG, longer).model.segment == 256
    # However few the steps, warm-up and decay fit into them.
    for stage, whole in zip(shortened(STAGES, 0.001), STAGES, strict=True):
        assert stage.steps == max(2, round(whole.steps / 1000))
        configuration.load(passkey.CONFIG, [*stage.settings(Path("d")), "run.directory=r"])


@pytest.mark.parametrize("kind", passkey.KINDS)
def test_each_kind_can_be_trained_and_reads_a_preface_if_it_has_a_memory(kind: str) -> None:
    model = passkey.Model(kind, 2)
    prefaces = []
    for stage in model.stages(STAGES):
        words = [*stage.settings(Path("data")), *model.settings, "run.directory=r"]
        config = configuration.load(passkey.CONFIG, words)
        assert (config.model.memory.kind, config.run.seed) == (kind, 2)
        prefaces.append(bool(config.data.preface))
    assert prefaces == [False] * 4 + [kind != "none"] * 2


def test_documents_are_as_many_as_the_stages_read() -> None:
    short, long = Documents("short", 100, 200), Documents("long", 1000, 8000)
    assert short.mean == pytest.approx(100 / math.log(2))
    plan = [
        Stage("1", ((short, 1.0),), 100, 4, 10, 1e-3, 0.1),
        Stage("2", ((short, 1.0), (long, 3.0)), 200, 2, 50, 1e-3, 0.1),
    ]
    needed = documents_needed(plan, 64)
    first, second = 100 * 4 * 10 * 64, 200 * 2 * 50 * 64
    assert TIMES == 2
    assert needed[short] == math.ceil((first + second / 4) / short.mean / 2)
    assert needed[long] == math.ceil(second * 3 / 4 / long.mean / 2)
    assert documents_needed([replace(plan[0], segment=640)], 64)[short] == math.ceil(
        10 * first / short.mean / 2
    )
    # Every shard has a document, however little is read.
    assert documents_needed([Stage("1", ((long, 1.0),), 2, 1, 2, 1e-3, 0.1)], 64)[long] == 16


def test_a_fifth_of_the_preface_is_of_short_texts() -> None:
    longest, *short = passkey.preface_lengths()
    assert longest == 1.5 * max(LENGTHS)
    assert (min(short), max(short)) == (64, 8192)
    assert sorted(short)[len(short) // 2] == pytest.approx(math.sqrt(64 * 8192), rel=0.02)
    assert 0.19 < sum(short) / (longest + sum(short)) < 0.22


def test_shorter_prompts_are_asked_more_often_for_as_many_tokens() -> None:
    assert samples_at(2**20, 2**20, 4) == 4
    assert samples_at(2**19, 2**20, 4) == 8
    assert samples_at(2**9, 2**20, 4) == passkey.MOST_SAMPLES
    assert samples_at(512, 512, 40) == 40
    parts = passkeys((2**20, 512), 2)
    assert [(one.lengths, one.samples) for one in parts] == [((512,), 10), ((2**20,), 2)]


def test_the_table_has_a_row_a_length_and_a_column_a_depth() -> None:
    def row(length: int, depth: float, right: float, exact: float) -> dict:
        common = {"task": "passkey", "samples": 4, "seconds": 9.6, "resident_bytes": 300 * 2**20}
        return {"length": length, "depth": depth, "token_accuracy": right, "exact": exact, **common}

    rows = [
        row(512, 0.0, 1.0, 0.75),
        row(512, 1.0, 0.5, 0.0),
        row(2**20, 0.0, 0.96, 0.9),
        row(2**20, 1.0, 1.0, 1.0),
    ]
    assert table("linear", rows).splitlines() == [
        "| memory linear | tokens | 0% | 100% | samples | seconds | resident MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| passkey | 512 | 100 (75) | 50 (0) | 4 | 10 | 300 |",
        "| passkey | 1,048,576 | 96 (90) | 100 (100) | 4 | 10 | 300 |",
    ]


def test_the_overview_has_the_mean_over_depths_and_the_worst_depth_of_each_length() -> None:
    def rows(*shares: float) -> list[dict]:
        cells = [(512, 0.0), (512, 1.0), (2**20, 0.0), (2**20, 1.0)]
        return [
            {"length": length, "depth": depth, "token_accuracy": share}
            for (length, depth), share in zip(cells, shares, strict=True)
        ]

    found = {
        "delta-1": {"state_bytes": 33792, "rows": rows(1.0, 1.0, 0.9, 0.8)},
        "none-1": {"state_bytes": 0, "rows": rows(1.0, 0.0, 0.1, 0.1)},
    }
    assert overview(found).splitlines() == [
        "| memory and seed | bytes of state | 512 | 1,048,576 |",
        "|---|--:|--:|--:|",
        "| delta-1 | 33,792 | 100 (100) | 85 (80) |",
        "| none-1 | 0 | 50 (0) | 10 (10) |",
    ]


def test_mistakes_are_reported_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        passkey.main([str(tmp_path / "out"), "model.segmnt=32", "--kinds", "linear"])
    assert "model.segmnt" in str(stopped.value.code)
    assert not (tmp_path / "out").exists()


def test_lengths_that_have_no_room_for_the_question_are_refused_before_a_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passkey, "_FIRST_COUNT", 40)
    with pytest.raises(SystemExit) as stopped:
        passkey.main([str(tmp_path), "--kinds", "linear", "--lengths", "8,512,9"])
    short, shorter = sorted(str(stopped.value.code).splitlines(), reverse=True)
    assert short.startswith(
        "--lengths: 9 tokens are fewer than passkey has without any filler; ask"
    )
    assert shorter.startswith("--lengths: 8 tokens are fewer than passkey has without any filler")
    assert not (tmp_path / "documents" / "short").exists()
    assert "$ pretrain train" not in capfd.readouterr().out


@pytest.mark.slow
def test_the_recipe_makes_a_table_from_no_data_and_repeats_no_finished_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passkey, "_FAR", 3000)
    monkeypatch.setattr(passkey, "_CLOSE", (64, 400))
    monkeypatch.setattr(passkey, "_CLOSE_COUNT", 3)
    sets = (Documents("short", 70, 160), Documents("long", 600, 2000))
    plan = (
        Stage("1_short", ((sets[0], 1.0),), 3, 4, 4, 1e-3, 0.1),
        Stage(
            *("2_long", ((sets[0], 0.5), (sets[1], 0.5)), 3, 1, 8, 1e-3, 0.0),
            decay=0.5,
            preface=passkey.PREFACE,
        ),
    )
    words = [str(tmp_path), "--kinds", "linear", "--seeds", "2", "--samples", "2"]
    words += ["--lengths", "512,2048"]
    passkey.main(words, plan)
    first = (tmp_path / "passkey.md").read_text()
    assert first in capfd.readouterr().out
    report = json.loads((tmp_path / "passkey.json").read_text())
    assert [row["samples"] for row in report["linear-1"]["rows"]] == [8] * 5 + [2] * 5
    assert report["linear-1"]["state_bytes"] == 2 * 4 * 32 * 33 * 4
    assert report["linear-2"]["rows"] != report["linear-1"]["rows"]
    for name in ("passkey-linear-1", "passkey-linear-2"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    settings = (tmp_path / "runs" / "linear-1" / "2_long" / "config.yaml").read_text()
    assert f"start_from: {tmp_path / 'runs' / 'linear-1' / '1_short'}" in settings
    fillers = Dataset(tmp_path / "data" / "preface").documents()
    assert sorted(len(one.tokens) for one in fillers) == pytest.approx(
        [64, 160, 400, 3000], rel=0.1
    )
    elsewhere = [str(tmp_path / "other"), "--reports", str(tmp_path / "reports"), *words[1:]]
    passkey.main(elsewhere, plan)
    again = capfd.readouterr()
    assert "$" not in again.out and "recall:" not in again.err, "nothing is done twice"
    # The seconds that each part took are of its first time.
    assert (tmp_path / "other" / "passkey.md").read_text() == first
