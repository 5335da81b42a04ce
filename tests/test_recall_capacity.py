"""What the recipe of recall capacity decides by itself: stages, models, summaries, tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import evidence
import numpy as np
import pytest
from stages import Stage, documents_needed

from data_prep.dataset import shards
from data_prep.recall.mqar import MOST_PAIRS
from pretrain.config import root as configuration
from pretrain.config.memory import MEMORY_KINDS
from tools.recipes import recall_capacity
from tools.recipes.recall_capacity import DISTANCES, PAIRS, Documents, Model, Plans


def test_stages_fit_every_kind_and_width_and_reach_what_is_asked_for() -> None:
    for kind in MEMORY_KINDS:
        for stage in Plans().of(kind):
            words = [*stage.settings(Path("d")), *Model(kind, 128).settings(stage.segments)]
            config = configuration.load(recall_capacity.CONFIG, [*words, "run.directory=r"])
            assert config.model.n_heads * config.model.d_head == 128
            assert config.model.memory.kind == kind
            assert config.window * config.data.lanes in (4096, 8192)
        last = Plans().of(kind)[-1]
        pairs, gaps = zip(*[(one.pairs, one.gap) for one, _ in last.shares], strict=True)
        assert max(map(max, pairs)) == max(PAIRS) and max(gaps) >= 64 * max(DISTANCES)


def test_all_kinds_read_as_many_tokens_and_end_with_the_same_stages() -> None:
    plans = [Plans().of(kind) for kind in ("linear", "rmt", "full")]
    for plan in plans:
        assert sum(s.steps * s.lanes * s.segments * (s.segment or 64) for s in plan) == 12_697_600
        assert [(s.name, s.steps) for s in plan[-2:]] == [("5_many", 300), ("6_most", 150)]
        assert len({stage.name for stage in plan}) == len(plan)


def test_all_but_infini_learn_from_values_with_all_symbols_before_the_memory() -> None:
    for kind, symbols in (("rmt", [32, 128, 512]), ("full", [32, 64, 128, 256, 512])):
        plan = Plans().of(kind)
        assert {one.answers for stage in plan for one, _ in stage.shares} == {"values"}
        near = [stage for stage in plan if stage.segment]
        assert [one.symbols for stage in near for one, _ in stage.shares] == symbols
        assert symbols[-1] == MOST_PAIRS


def test_sets_are_in_directories_of_their_own_and_as_large_whichever_kinds_are_trained() -> None:
    made = Plans().documents(64)
    assert len({one.name for one in made}) == len(made) == 13
    for kind in MEMORY_KINDS:
        for one, count in documents_needed(Plans().of(kind), 64).items():
            assert made[one] >= count
    longest = documents_needed(Plans().of("full"), 64)
    [longer] = [one for one in made if one.name == "all_longer"]
    assert made[longer] == longest[longer] > documents_needed(Plans().of("rmt"), 64)[longer]


def test_the_mean_length_is_that_of_pairs_questions_and_a_log_uniform_gap() -> None:
    documents = Documents("a", (2, 6), 99)
    drawn = np.exp(np.random.default_rng(0).random(100_000) * np.log(100))
    assert documents.mean == pytest.approx(4 * 4 + drawn.mean(), rel=0.02)


def _report(*accuracies: float) -> dict:
    rows = [{"accuracy": share} for share in accuracies]
    about = {"step": 7, "memory_kind": "delta", "state_bytes": 2048, "segment": 64}
    return {**about, "pairs": [4, 128], "distances": [0, 1, 64], "rows": rows}


REPORTS = [_report(1.0, 1.0, 0.5, 0.75, 0.25, 0.25), _report(1.0, 0.5, 0.5, 0.75, 0.25, 0.0)]


def test_a_summary_leaves_out_what_no_memory_is_needed_for() -> None:
    found = recall_capacity.summary(Model("delta", 64), REPORTS)
    assert found["accuracies"] == [[0.75, 0.25], [0.5, 0.125]]
    assert (found["state_bytes"], found["pairs"]) == (2048, [4, 128])
    assert found["by_distance"] == [[1.0, 1.0, 0.5], [1.0, 0.5, 0.5]]
    assert mean_row(recall_capacity.mean(REPORTS)) == [1.0, 0.75, 0.5, 0.75, 0.25, 0.125]


def mean_row(report: dict) -> list[float]:
    return [row["accuracy"] for row in report["rows"]]


def test_the_table_has_means_and_ranges_over_seeds() -> None:
    rows = [
        recall_capacity.summary(Model("delta", 64), REPORTS),
        recall_capacity.summary(Model("none", 128), [{**REPORTS[0], "state_bytes": 0}]),
    ]
    assert recall_capacity.table(rows).splitlines() == [
        "| memory | width | bytes of state | 4 | 128 | seeds |",
        "|---|--:|--:|--:|--:|--:|",
        "| delta | 64 | 2,048 | 62 (50 to 75) | 19 (12 to 25) | 2 |",
        "| none | 128 | 0 | 75 | 25 | 1 |",
        "",
        "Of 4 pairs, by distance in segments:",
        "",
        "| memory | width | bytes of state | 0 | 1 | 64 | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| delta | 64 | 2,048 | 100 (100 to 100) | 75 (50 to 100) | 50 (50 to 50) | 2 |",
        "| none | 128 | 0 | 100 | 100 | 50 | 1 |",
    ]
    assert len(recall_capacity.curves(rows).axes) == 2


def test_mistakes_are_reported_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recall_capacity.main([str(tmp_path / "out"), "model.segmnt=32", "--kinds", "linear"])
    assert "model.segmnt" in str(stopped.value.code)
    with pytest.raises(SystemExit):
        recall_capacity.main([str(tmp_path / "out"), "--kinds", "linera"])
    assert "'linera': expected some of linear,delta," in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_set_whose_making_ended_before_its_tokenizer_was_written_is_finished(
    tmp_path: Path,
) -> None:
    few = Documents("few", (2, 4), 16)
    recall_capacity._documents(tmp_path, few, 16, 1)
    made, tokenizer = tmp_path / "data/few", tmp_path / "documents/few/mqar.tokenizer.json"
    tokenizer.unlink()
    shutil.rmtree(made)
    recall_capacity._documents(tmp_path, few, 16, 1)
    assert shards.read_manifest(made).documents == 16 and tokenizer.exists()


@pytest.mark.slow
def test_the_recipe_makes_tables_from_no_data_and_repeats_no_finished_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = (Documents("few", (2, 4), 16), Documents("some", (4, 8), 64))
    stages = (
        Stage("1_few", ((sets[0], 1.0),), 3, 4, 4, 1e-3, 0.0),
        Stage("2_some", ((sets[0], 0.5), (sets[1], 0.5)), 3, 2, 8, 1e-3, 0.0, 0.5),
    )
    plans = Plans(stages, stages, stages)
    words = [str(tmp_path), "--kinds", "linear,none", "--widths", "32", "--seeds", "1"]
    words += ["--pairs", "4,16", "--distances", "0,2", "--answers", "8"]
    recall_capacity.main(words, plans)
    first = (tmp_path / "capacity.md").read_text()
    assert first in capfd.readouterr().out
    assert first.endswith(f"\n\nCommit {evidence.commit()}.\n")
    numbers = json.loads((tmp_path / "capacity.json").read_text())
    assert [(row["kind"], row["state_bytes"]) for row in numbers["rows"]] == [
        ("linear", 2 * 32 * 33 * 4),
        ("none", 0),
    ]
    assert np.shape(numbers["rows"][0]["accuracies"]) == (1, 2)
    for name in ("capacity", "capacity-linear-32", "capacity-none-32"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    settings = (tmp_path / "runs" / "linear-32-1" / "2_some" / "config.yaml").read_text()
    assert f"start_from: {tmp_path / 'runs' / 'linear-32-1' / '1_few'}" in settings
    # With the reports alone, somewhere else: nothing is made, trained or asked again.
    elsewhere = [str(tmp_path / "other"), "--reports", str(tmp_path / "reports"), *words[1:]]
    recall_capacity.main(elsewhere, plans)
    again = capfd.readouterr()
    assert "$" not in again.out and "mqar:" not in again.err
    assert (tmp_path / "other" / "capacity.md").read_text() == first
    with pytest.raises(SystemExit, match=r"linear-32-1\.json is of other settings"):
        recall_capacity.main([*words, "model.init_std=0.05"], plans)
