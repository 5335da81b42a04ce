"""Command lines from dataclasses: values, all mistakes at once, and the help."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Literal

import pytest

from data_prep.dataset import command
from data_prep.dataset.command import (
    DIRECTORY,
    TOKENS,
    Command,
    CommandError,
    Configured,
    Program,
    one_of,
    option,
    word,
)


class Tried(Command):
    def run(self) -> int:
        return 0


class Make(Tried):
    """Make a thing.

    Made of what is given, 100 % of it.
    """

    source: Path = word("file to read")
    words: list[str] = word("overrides", [], metavar="key=value")
    count: int = option(3, "things", low=1, high=9)
    share: float = option(0.5, "of each", above=0, high=1)
    lengths: list[int] = option([4096, 1 << 20], "tokens", kind=TOKENS, low=1, unique=True)
    way: Literal["fast", "slow"] = option("slow", "how")
    dry: bool = option(False, "only look")
    before: list[str] = option([], "what was made", many="again")
    tasks: list[str] = option([], "names", many="words", otherwise="all")
    limit: int | None = option(None, "at most so many")
    other: str | None = option(None, "another limit", instead_of="limit")

    def problems(self) -> list[str]:
        return ["--count: more than 6 bring no luck"] if self.count > 6 else []


class Ask(Tried):
    """Ask for things."""

    where: Path = option(MISSING, "directory of things", kind=DIRECTORY, metavar="DIR")
    thing: str = option(MISSING, "thing", kind=one_of(["cup", "hat"]))
    name: str = option("", "of the thing")
    low: int = option(0, "at least")


class Set(Configured):
    """Set things up."""

    often: int = option(1, "times")

    @property
    def wanted(self) -> None:
        return None

    def run(self) -> int:
        return 0


PROGRAM = Program(
    "prog",
    "What it does.",
    {"make": Make, "ask cup": Ask, "set": Set},
    {"ask": "Questions.\n\nOf a kind."},
)


def made(*words: str) -> Make:
    name, found = command.parse(PROGRAM, ["make", *words])
    assert name == "prog make" and isinstance(found, Make)
    return found


def mistakes(*words: str) -> Sequence[str]:
    with pytest.raises(CommandError) as caught:
        command.parse(PROGRAM, words)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("prog") and first.endswith(": this command cannot run:")
    assert lines == [f"  - {problem}" for problem in caught.value.problems]
    return caught.value.problems


def test_the_version_is_that_of_the_installed_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.parse(PROGRAM, ["--version"])
    assert ended.value.code == 0
    pyproject = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert capsys.readouterr().out == f"prog {pyproject['project']['version']}\n"


def test_what_is_not_given_has_its_default() -> None:
    assert made("a") == Make(source=Path("a"))
    assert made("a").lengths == [4096, 1048576]


def test_words_become_values_of_the_fields_types() -> None:
    found = made(
        "a", "k=v", "--count=5", "--share", "1", "--lengths", "17,32k,2M", "--way", "fast", "--dry",
        "--before", "x", "--before", "y", "--tasks", "t", "u", "--limit", "-2",
    )  # fmt: skip
    assert found == Make(
        source=Path("a"), words=["k=v"], count=5, share=1.0, lengths=[17, 32768, 2 << 20],
        way="fast", dry=True, before=["x", "y"], tasks=["t", "u"], limit=-2,
    )  # fmt: skip


def test_a_list_of_arguments_continues_after_options() -> None:
    assert made("a", "k=v", "--dry", "l=w", "--count", "2", "m=x").words == ["k=v", "l=w", "m=x"]


def test_every_mistake_is_reported_at_once() -> None:
    assert mistakes(
        "make", "--count", "many", "--share", "0", "--lengths", "0,1mm,4k,4096", "--way", "f",
        "--limit", "1", "--other", "x", "--cuont=2", "--limit=x",
    ) == [
        "--cuont=2: unknown option; did you mean --count?",
        "source: not given; expected the file to read",
        "--count: expected a whole number, found 'many'",
        "--share: expected more than 0 and at most 1, found 0",
        "--lengths: expected at least 1, found 0",
        "--lengths: expected tokens as 4096, 32k or 1m, found '1mm'",
        "--lengths: 4k is given twice",
        "--way: expected one of fast, slow, found 'f'",
        "--limit: expected a whole number, found 'x'",
        "--other, --limit: both are given; give one of the two",
    ]  # fmt: skip
    assert mistakes("make", "a", "--count", "10", "--share", "nan") == [
        "--count: expected at least 1 and at most 9, found 10",
        "--share: expected a number, found 'nan'",
    ]


def test_a_setting_that_is_given_as_an_option_is_said_to_be_none() -> None:
    assert mistakes("set", "c.yaml", "--train.steps", "3") == [
        "--train.steps: unknown option; settings are given without dashes, as key=value; "
        "known: --often"
    ]
    assert mistakes("set", "c.yaml", "--oftn=3") == [
        "--oftn=3: unknown option; did you mean --often?"
    ]
    assert mistakes("make", "a", "--x") == [
        "--x: unknown option; known: --count, --share, --lengths, --way, --dry, --before, "
        "--tasks, --limit, --other"
    ]


def test_what_must_be_given_is_asked_for_together_with_other_mistakes(tmp_path: Path) -> None:
    assert mistakes("ask", "cup", "--low", "x", "more") == [
        "'more': unexpected argument; this command takes no more",
        "--where: not given; expected the directory of things",
        "--thing: not given; expected the thing",
        "--low: expected a whole number, found 'x'",
    ]
    assert mistakes("ask", "cup", "--where", str(tmp_path / "no"), "--thing", "tea") == [
        f"--where: {tmp_path / 'no'}: there is no such directory",
        "--thing: expected one of cup, hat, found 'tea'",
    ]
    words = ["--where", str(tmp_path), "--thing", "hat"]
    expected = ("prog ask cup", Ask(where=tmp_path, thing="hat"))
    assert command.parse(PROGRAM, ["ask", "cup", *words]) == expected


def test_a_commands_own_problems_are_asked_for_but_not_where_a_value_is_wrong() -> None:
    assert mistakes("make", "a", "--count", "7", "--way", "f") == [
        "--way: expected one of fast, slow, found 'f'",
        "--count: more than 6 bring no luck",
    ]


def test_what_argparse_says_is_a_mistake_of_the_same_form() -> None:
    assert mistakes("make", "a", "--count") == ["--count: expected one argument"]


def test_an_unknown_or_missing_command_is_answered_with_the_known_ones() -> None:
    assert mistakes("mkae") == ["COMMAND: there is no 'mkae'; did you mean make?"]
    assert mistakes("zzz") == ["COMMAND: there is no 'zzz'; known: make, ask, set"]
    assert mistakes("ask", "cpu") == ["KIND: there is no 'cpu'; did you mean cup?"]
    assert mistakes() == ["COMMAND: not given; expected one of make, ask, set"]
    assert mistakes("ask") == ["KIND: not given; expected one of cup"]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        command.parse(PROGRAM, [*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_help_has_each_meaning_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(capsys, "make")
    for line in (
        "usage: prog make [-h] [--count N] [--share X] [--lengths N,...] [--way {fast,slow}]",
        "Make a thing.\n\nMade of what is given, 100 % of it.",
        "  source               file to read",
        "  key=value            overrides",
        "  --count N            things (default 3)",
        "  --lengths N,...      tokens (default 4k,1m)",
        "  --dry                only look\n",
        "  --tasks [TASKS ...]  names (default: all)",
        "  --limit N            at most so many\n",
    ):
        assert line in text
    assert "usage: prog ask cup [-h] --where DIR --thing THING [--name NAME] [--low N]" in shown(
        capsys, "ask", "cup"
    )
    assert "--low N        at least (default 0)" in shown(capsys, "ask", "cup")
    assert "  make      make a thing\n" in shown(capsys)
    assert "  cup       ask for things\n" in shown(capsys, "ask")


BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
PRINTING = """
import sys
from data_prep.dataset import command
try:
    for _ in range(99999):
        print("a line", flush=True)
except OSError as error:
    closed = command.is_closed_pipe(error)
    print(closed, command.explained(error), file=sys.stderr)
    sys.exit(closed)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_closed_pipe_is_distinguished_from_a_full_disk() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=BUFFERED,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "True Broken pipe\n"
    assert process.wait() == 1
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", PRINTING], stdout=full, stderr=subprocess.PIPE, text=True,
            env=BUFFERED,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "False No space left on device\n")


def test_an_error_of_another_pipe_is_no_closed_stdout() -> None:
    assert not command.is_closed_pipe(BrokenPipeError(32, "Broken pipe"))
    assert command.explained(PermissionError(13, "Permission denied", "/a")) == (
        "/a: Permission denied"
    )


def test_a_path_may_begin_at_a_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert made("~/x").source == tmp_path / "x"  # as in --where=~/x, which a shell leaves alone
    _, found = command.parse(PROGRAM, ["ask", "cup", "--where=~/", "--thing", "hat"])
    assert isinstance(found, Ask) and found.where == tmp_path
    (problem,) = mistakes("make", "~nobody-here/x")
    assert problem == "source: expected a path, found '~nobody-here/x'"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("utf-8", "é \u4e2d \\udcff".encode()), ("latin-1", b"\xe9 \\u4e2d \\udcff")],
)
def test_what_stdout_cannot_encode_is_escaped(encoding: str, printed: bytes) -> None:
    program = (
        "from data_prep.dataset import command\n"
        "from tests.data_prep.dataset.test_command import PROGRAM\n"
        "command.parse(PROGRAM, ['make', 'x'])\n"
        "print('\\xe9 \\u4e2d \\udcff')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert done.stdout == printed + b"\n"
