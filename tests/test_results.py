"""The tables of docs/results.md are what the recipes make of the reports beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pretrain.config.memory import MEMORY_KINDS
from tools.recipes import language_modelling, needles, passkey, recall_capacity

DOCS = Path(__file__).resolve().parents[1] / "docs"
REPORTS = DOCS / "results" / "reports"


@pytest.fixture(autouse=True)
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that is missing, or of other settings, fails instead of being made."""
    monkeypatch.setattr("commands.run", lambda *words: sys.exit(f"would run {words}"))


def _are_in_the_docs(table: Path, rows: int) -> None:
    made = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(made) == rows
    assert set(made) <= set((DOCS / "results.md").read_text(encoding="utf-8").splitlines())


def test_the_tables_of_recall_capacity_are_those_of_their_reports_and_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = str(REPORTS / "recall_capacity")
    recall_capacity.main([str(tmp_path), "--widths", "64", "--reports", reports])
    _are_in_the_docs(tmp_path / "capacity.md", 22)
    assert capsys.readouterr().out.count("Of 4 pairs, by distance") == 1


@pytest.mark.parametrize(
    ("kinds", "seeds", "rows"),
    [("linear,delta", 3, 8), ("none,transformer_xl,compressive,rmt", 1, 6)],
)
def test_the_overview_of_passkeys_is_that_of_their_reports(
    tmp_path: Path, kinds: str, seeds: int, rows: int
) -> None:
    words = ["--kinds", kinds, "--seeds", str(seeds), "--reports", str(REPORTS / "passkey")]
    passkey.main([str(tmp_path), *words])
    overview, _, _ = (tmp_path / "passkey.md").read_text(encoding="utf-8").partition("\n\n")
    (tmp_path / "overview.md").write_text(overview, encoding="utf-8")
    _are_in_the_docs(tmp_path / "overview.md", rows)


def test_the_table_of_needles_is_that_of_its_report(tmp_path: Path) -> None:
    reports = str(REPORTS / "needles")
    needles.main([str(tmp_path / "novels"), str(tmp_path), "--reports", reports])
    _are_in_the_docs(tmp_path / "needles.md", 5)


@pytest.mark.parametrize(
    ("kinds", "seeds", "rows"), [(",".join(MEMORY_KINDS), 1, 11), ("linear,delta,rmt", 2, 6)]
)
def test_the_tables_of_language_models_are_those_of_their_reports_and_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kinds: str, seeds: int, rows: int
) -> None:
    words = ["--corpora", "repositories", "--whole-windows", "--kinds", kinds]
    words += ["--seeds", str(seeds), "--reports", str(REPORTS / "language_modelling")]
    language_modelling.main([str(tmp_path / "corpus"), str(tmp_path), *words])
    _are_in_the_docs(tmp_path / "repositories" / "comparison.md", rows)
    assert capsys.readouterr().out.count("10 whole documents") == 1
