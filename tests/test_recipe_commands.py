"""How the recipes run commands, and what their help says."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import commands
import pytest

from tools.recipes import language_modelling, needles, optimizers, passkey, recall_capacity


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


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        (passkey, ["--seeds", "0"], "--seeds: '0': expected a whole number of at least 1"),
        (passkey, ["--jobs", "0"], "--jobs: '0': expected a whole number of at least 1"),
        (passkey, ["--lengths", "512,1k"], "--lengths: '1k': expected a whole number of at"),
        (passkey, ["--lengths", "0"], "--lengths: '0': expected a whole number of at least 1"),
        (passkey, ["--samples", "0"], "--samples: '0': expected a whole number of at least 1"),
        (passkey, ["--kinds", "delta,delta"], "--kinds: delta is named twice; name each once"),
        (recall_capacity, ["--widths", "64,64"], "--widths: 64 is named twice; name each once"),
        (recall_capacity, ["--pairs", "4,513"], "'513': expected a whole number of at least 1 and"),
        (recall_capacity, ["--distances", "-1"], "'-1': expected a whole number of at least 0"),
        (recall_capacity, ["--answers=0"], "--answers: '0': expected a whole number of at least 1"),
        (needles, ["books", "--steps-share", "0"], "'0': expected a number of more than 0"),
        (needles, ["books", "--samples=-1"], "'-1': expected a whole number of at least 1"),
        (language_modelling, ["books", "--seeds", "0"], "expected a whole number of at least 1"),
        (language_modelling, ["books", "--documents=-1"], "'-1': expected a whole number of at"),
        (optimizers, ["books", "--search", "nan"], "--search: 'nan': expected a number of more"),
        (optimizers, ["books", "--budget", "inf"], "--budget: 'inf': expected a number of more"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused_before_anything_is_made(
    recipe: ModuleType,
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        recipe.main([*words, str(out)])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not out.exists()


def test_numbers_within_their_bounds_are_read_in_order() -> None:
    assert commands.numbers(0, 8)("8,0,3") == (8, 0, 3)
    assert commands.positive("0.25") == 0.25 and commands.number(1)("7") == 7
