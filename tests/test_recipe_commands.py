"""How the recipes run commands, and what their help says."""

from __future__ import annotations

from pathlib import Path

import commands
import pytest


def test_a_command_that_fails_ends_the_recipe_with_its_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    commands.run("data-prep", "--help")
    with pytest.raises(SystemExit) as ended:
        commands.run("data-prep", "verify", tmp_path / "no set")
    assert ended.value.code not in (None, 0)
    out, err = capfd.readouterr()
    # The line shown is what a person types.
    assert f"$ data-prep verify {tmp_path / 'no set'}" in out
    assert "no set" in err


def test_help_is_the_docstring_without_its_usage() -> None:
    about = "What it does.\n\n    python it.py OUT\n\nHow.\n\nWhy."
    parser = commands.parser(about, ("out", "where it goes"), of="all")
    assert parser.description == "What it does.\n\nHow.\n\nWhy."
    assert "where it goes" in parser.format_help()
    assert parser.parse_args(["there"]).out == Path("there")
