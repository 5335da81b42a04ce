"""How the recipes run commands, and what their help says."""

from __future__ import annotations

import sys
import threading
import time
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


def test_as_many_at_once_as_asked_for_and_results_in_order() -> None:
    # Each waits for the other: with one at a time this would never end.
    meeting = threading.Barrier(2, timeout=30)

    def meet(number: int) -> int:
        meeting.wait()
        return number * number

    assert commands.each(2, meet, [3, 2, 1, 0]) == [9, 4, 1, 0]


def test_after_a_failure_no_other_is_begun_and_the_recipe_ends_with_its_code() -> None:
    begun: list[int] = []

    def fail(number: int) -> None:
        begun.append(number)
        if number == 0:
            sys.exit(7)
        time.sleep(0.05)

    with pytest.raises(SystemExit) as ended:
        commands.each(1, fail, range(100))
    assert ended.value.code == 7 and len(begun) < 100


def test_help_is_the_docstring_without_its_usage() -> None:
    about = "What it does.\n\n    python it.py OUT\n\nHow.\n\nWhy."
    parser = commands.parser(about, ("out", "where it goes"), of="all")
    assert parser.description == "What it does.\n\nHow.\n\nWhy."
    assert "where it goes" in parser.format_help()
    assert parser.parse_args(["there"]).out == Path("there")
