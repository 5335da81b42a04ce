"""Exit codes, and how an error is printed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from pretrain.checkpoint.attempts import NoProgressError, SupersededError
from pretrain.cli import outcome
from pretrain.jobs.watchdog import WatchdogError


def failing(error: Exception) -> int:
    def action() -> int:
        raise error

    return outcome.code("pretrain train", action)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SettingsError(["a: b"]), 2, "pretrain train: this command cannot run:\n  - a: b\n"),
        (SupersededError("newer"), 2, "pretrain train: newer\n"),
        (NoProgressError("none"), 78, "pretrain train: none\n"),
        (DataError("cut"), 1, "pretrain train: cut\n"),
        (WatchdogError("it was killed"), 1, "pretrain train: it was killed\n"),
        (PermissionError(13, "Not allowed", "/a"), 1, "pretrain train: /a: Not allowed\n"),
        (OSError(28, "No space left on device"), 1, "pretrain train: No space left on device\n"),
    ],
)  # fmt: skip
def test_an_error_of_the_user_is_one_message(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    assert capsys.readouterr().err == said


def test_a_rank_says_which_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert failing(DataError("cut")) == failing(OSError(5, "I/O error")) == 1
    assert capsys.readouterr().err == (
        "pretrain train: rank 3: cut\npretrain train: rank 3: I/O error\n"
    )


def test_a_bug_shows_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(ValueError("of Python's")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_is_gone_ends_a_command_silently() -> None:
    program = (
        "import sys; from pretrain.cli import outcome\n"
        "sys.exit(outcome.code('x', lambda: [print(n, flush=True) for n in range(9**9)] and 0))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
