"""The recipe's constant answer and its table, by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import root as configuration
from pretrain.evaluate import rouge
from tools.recipes import summaries


def test_the_constant_answer_has_the_names_that_most_answers_have(tmp_path: Path) -> None:
    answers = [
        " Ann, Bob, Cid, Dan, Eve",
        " Bob, Ann, Fay",
        " Ann, Eve, Gil",
        " Dan, Cid, Eve, Bob",
    ]
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    asked = [" Bob, Zoe", " Kim, Ann"]
    lines = [json.dumps({"answer": answer}) for answer in asked]
    (tmp_path / "passages.jsonl").write_text("\n".join(lines))
    found = summaries.frequent(tmp_path)
    # Three times each, in the order they were met in; then twice.
    assert found["answer"] == "Ann, Bob, Eve, Cid, Dan"
    # One of five words, one of two: F is 2 / 7.
    assert found["rouge"]["rouge1"]["value"] == pytest.approx(200 / 7)


def test_the_table_has_its_references_beside_it() -> None:
    def report(value: float, *shares: float) -> dict[str, Any]:
        each = {kind: {"value": value, "interval": [value - 1, value + 1]}
                for kind in (*rouge.KINDS, "overall")}  # fmt: skip
        rows = [{"share": share, "read": 1000 * share, "rouge": each} for share in shares]
        return {"step": 9, "documents": 4, "rows": rows, "lead": {"words": 5, "rouge": each}}

    constant = {"answer": "Ann, Bob", "rouge": report(3.0)["lead"]["rouge"]}
    text = summaries.table(report(1.0, 1.0), report(2.0, 1.0), constant, report(4.0, 0.1, 1.0))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        "| names by", "| the first 5 words", "| the same for all: Ann, Bob",
        "| before any pair was seen", "| after 9 steps on pairs",
        "| share of the book (tokens)", "| 10% (100)", "| 100% (1,000)",
    ]  # fmt: skip
    assert [row[1] for row in rows[1:5]] == [
        "2.0 (1.0 to 3.0)", "3.0 (2.0 to 4.0)", "1.0 (0.0 to 2.0)", "2.0 (1.0 to 3.0)"
    ]  # fmt: skip


def test_the_model_is_first_trained_without_pairs_for_fewer_steps() -> None:
    words = ["data.train=d", "run.directory=r"]
    base, tuned = (
        configuration.load(summaries.CONFIGS / "summaries_cpu.yaml", [*words, *more])
        for more in (summaries.BASE, ())
    )
    assert (base.model, base.optim.lr) == (tuned.model, tuned.optim.lr)
    assert base.train.start_from == "" and tuned.train.start_from == "runs/base"
    assert (base.train.steps, base.optim.warmup_steps) == (300, 30)
    assert base.window * base.data.lanes == tuned.window * tuned.data.lanes == 8192


def test_mistakes_in_settings_are_reported_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        summaries.main([str(tmp_path), str(tmp_path / "out"), "model.d_modle=8"])
    assert "model.d_modle: unknown key" in str(stopped.value.code)
    assert not (tmp_path / "out").exists()
