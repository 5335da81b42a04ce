"""What the needles recipe decides by itself: stages, documents, the table."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import evidence
import pytest
from needle_texts import PAIRS, WHOLE, Facts
from stages import Stage, documents_needed

from data_prep.dataset import shards
from data_prep.recall.tasks import TASKS
from pretrain.config import root as configuration
from tools.recipes import needles
from tools.recipes.needles import STAGES, table


def test_the_way_goes_from_pairs_in_a_segment_to_needles_in_books() -> None:
    for stage in STAGES:
        words = [*stage.settings(Path("data")), "run.directory=r"]
        config = configuration.load(needles.CONFIG, words)
        assert config.window <= 4096
    sets = {one for stage in STAGES for one, _ in stage.shares}
    assert len({one.name for one in sets}) == len(sets)
    assert [stage.segment for stage in STAGES[:6]] == [512, 64, 64, 64, 64, 0]
    (first, _), *_ = STAGES[0].shares
    assert isinstance(first, Facts) and first.wordings == (PAIRS,) and first.answers == "pairs"
    assert any(isinstance(one, needles.Prompts) for one, _ in STAGES[-1].shares)
    assert STAGES[-1].preface == needles.BOOKS
    assert set(needles.TASKS) <= set(TASKS)


def test_the_table_has_rulers_rule_first_and_tokens_in_brackets() -> None:
    def row(task: str, length: int, ruler: float, tokens: float) -> dict[str, object]:
        return {"task": task, "length": length, "ruler": ruler, "token_accuracy": tokens}

    rows = [
        row("single", 1024, 1.0, 1.0),
        row("single", 16384, 0.5, 0.75),
        row("multikey", 1024, 0.875, 0.96),
        row("multikey", 16384, 0.0, 0.25),
    ]
    assert table({"delta-1": {"state_bytes": 264192, "rows": rows}}).splitlines() == [
        "| memory and seed | bytes of state | task | 1,024 | 16,384 |",
        "|---|--:|---|--:|--:|",
        "| delta-1 | 264,192 | single | 100 (100) | 50 (75) |",
        "| delta-1 | 264,192 | multikey | 88 (96) | 0 (25) |",
    ]


def test_mistakes_are_reported_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        needles.main([str(tmp_path), str(tmp_path / "out"), "model.segmnt=32"])
    assert "model.segmnt" in str(stopped.value.code)
    with pytest.raises(SystemExit):
        needles.main([str(tmp_path), str(tmp_path / "out"), "--kinds", "linera"])
    assert "'linera': expected some of linear,delta," in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_without_novels_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        needles.main([str(tmp_path), str(tmp_path / "out")])
    assert stopped.value.code == (
        f"{tmp_path}: has no novels-train-*.jsonl.gz; give the directory of the novels"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_recipe_makes_a_table_from_novels_and_repeats_no_finished_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    letters = random.Random(1)
    words = ["".join(letters.choices("abcdefghilmnoprstu", k=3 + n % 5)) for n in range(4000)]
    novels = tmp_path / "novels"
    novels.mkdir()
    for number in range(32):
        text = ".\n".join(" ".join(letters.choices(words, k=12)) for _ in range(60))
        line = json.dumps({"id": str(number), "text": f"{text}."}) + "\n"
        for name in (f"novels-train-{number % 4:02d}", "novels-val"):
            with gzip.open(novels / f"{name}.jsonl.gz", "at") as file:
                file.write(line)
    facts, real = (
        Facts("facts", (WHOLE,), (2, 3), 200, scattered=True),
        needles.Prompts("real", 256, 512, ("single", "multikey")),
    )
    plan = (
        Stage("1_facts", ((facts, 1.0),), 3, 2, 4, 1e-3, 0.0),
        Stage("2_real", ((facts, 0.5), (real, 0.5)), 3, 2, 4, 1e-3, 0.0, preface=needles.BOOKS),
    )
    asked = ["--lengths", "512", "--samples", "2", "--kinds", "delta,linear"]
    small = ["model.d_model=32", "model.d_head=16", "model.d_ff=64"]
    needles.main([str(novels), str(tmp_path / "out"), *asked, *small], plan)
    first = (tmp_path / "out" / "needles.md").read_text()
    assert first in capfd.readouterr().out
    assert first.endswith(f"Commit {evidence.commit()}.\n")
    assert "| delta-1 | 4,352 | multikey |" in first and "| linear-1 | 4,352 | single |" in first
    made = shards.read_manifest(tmp_path / "out" / "data" / "facts")
    assert made.documents == documents_needed(plan, 128)[facts]
    elsewhere = [str(novels), str(tmp_path / "other"), *asked, *small]
    needles.main([*elsewhere, "--reports", str(tmp_path / "out" / "reports")], plan)
    assert "$" not in capfd.readouterr().out
    assert (tmp_path / "other" / "needles.md").read_text() == first
