"""What a measurement says of its machine and its commit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import machine


def test_the_commit_of_a_measurement_is_unknown_without_git_or_outside_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine._commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._commit() == "unknown"
    (tmp_path / "COMMIT").write_text("abc123\n")
    assert machine._commit() == "abc123"
