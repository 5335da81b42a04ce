"""What `make setup` would run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU = "https://download.pytorch.org/whl/cpu"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose environment has torch's CPU build; its requirements have changed since."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.torch_index").write_text(f"{CPU}\n")
    installed = tmp_path / ".venv/.installed"
    installed.touch()
    os.utime(installed, (1, 1))
    return tmp_path


def set_up(project: Path, *words: str) -> list[str]:
    """The calls of tools/set_up."""
    done = subprocess.run(
        ["make", "-n", "setup", *words],
        cwd=project, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if line.startswith("tools/set_up")]


def test_an_update_keeps_the_build_of_torch_that_was_chosen(project: Path) -> None:
    assert set_up(project) == [f"tools/set_up python3 .venv {CPU}"]


def test_another_build_of_torch_is_installed_where_it_is_asked_for(project: Path) -> None:
    (project / ".venv/.installed").touch()
    assert set_up(project) == set_up(project, f"TORCH_INDEX={CPU}") == []
    assert set_up(project, "TORCH_INDEX=https://a.b") == ["tools/set_up python3 .venv https://a.b"]
    assert [line.rstrip() for line in set_up(project, "TORCH_INDEX=")] == [
        "tools/set_up python3 .venv"
    ]
