"""The tables of docs/results.md are what the recipes make of the reports beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.recipes import recall_capacity

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_table_of_recall_capacity_is_that_of_its_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A report that is missing, or of other settings, fails here instead of being made.
    monkeypatch.setattr("commands.run", lambda *words: sys.exit(f"would run {words}"))
    words = ["--kinds", "linear,delta", "--widths", "64", "--seeds", "2"]
    reports = DOCS / "results" / "reports" / "recall_capacity"
    recall_capacity.main([str(tmp_path), *words, "--reports", str(reports)])
    made = (tmp_path / "capacity.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in made if line.startswith("|")]
    assert len(rows) == 8
    assert set(rows) <= set((DOCS / "results.md").read_text(encoding="utf-8").splitlines())
