"""The runner: every case is recorded once, whatever it does to its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.promises import campaign, ledgers, page
from tools.promises.campaign import BrokenError, Promise, Result, Room, UnavailableError
from tools.promises.listed import PROMISES


def case(seed: int, room: Room) -> dict[str, Any]:
    (room.here / "trace").write_text(str(seed))
    made = room.made("made", lambda path: path.mkdir())
    (made / str(seed)).touch()
    if seed == 1:
        raise BrokenError("one byte differs")
    if seed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == 3:
        time.sleep(60)
    if seed == 4:
        raise UnavailableError("no such program here")
    if seed == 5:
        raise KeyError("a bug")
    return {"number": seed, "ledgers": 1}


def promise(**more: Any) -> Promise:
    given: dict[str, Any] = {"cases": 8, "case": case, "limit": 1.0, **more}
    return Promise(99, "toy", "it holds", unit="toys", **given)


def test_every_case_is_recorded_whatever_it_does_to_its_process(tmp_path: Path) -> None:
    found = list(campaign.run(tmp_path, promise(), range(8), "abc"))
    assert [result.seed for result in found] == list(range(8))
    failures = {result.seed: result.failure for result in found if result.failure}
    assert failures.pop(1) == "one byte differs"
    assert failures.pop(2) == "the case's process ended with -9"
    assert failures.pop(3) == "no end within 1 s"
    assert "KeyError: 'a bug'" in failures.pop(5)
    assert failures == {}
    # What is needed to look at a failure is left, the rest goes.
    left = sorted(path.name for path in (tmp_path / "toy").glob("case-*"))
    assert left == ["case-000001", "case-000002", "case-000003", "case-000005"]
    assert len(list((tmp_path / "toy" / "shared" / "made").iterdir())) == 8
    assert campaign.results(tmp_path, promise(), "abc") == found


def test_a_case_ends_with_those_who_wait_for_it(tmp_path: Path) -> None:
    before = _children()
    found = campaign.run(tmp_path, promise(limit=60.0), [0, 3], "abc")
    assert next(found).seed == 0
    began = time.monotonic()
    found.close()
    assert time.monotonic() - began < 30  # of the case's 60
    assert _children() <= before
    assert [one.seed for one in campaign.results(tmp_path, promise(), "abc")] == [0]


def _children() -> set[str]:
    """The processes that this one started and has not seen end."""
    lists = Path("/proc/self/task").glob("*/children")
    return {number for each in lists for number in each.read_text().split()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["nosuch", "--cases", "-3", "--output", "/dev/null/x", "--page", "/dev/null/x.md"],
            [
                "no such promise: nosuch; expected some of checkpoint, ",
                "--cases -3: expected a number, or 0",
                "--output: /dev/null is no directory",
                "--page: /dev/null is no directory",
            ],
        ),
        (["shards", "--seed", "1000"], ["--seed 1000: shards has seeds 0 to 999"]),
        (["--seed", "3"], ["--seed: repeats a case of one promise; name it"]),
    ],
)
def test_mistakes_are_all_told_before_anything_runs(words: list[str], said: list[str]) -> None:
    tool = Path(campaign.__file__).parent
    done = subprocess.run([sys.executable, tool, *words], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert [one for one in said if one not in done.stderr] == []


def test_a_campaign_goes_on_where_it_was_and_starts_anew_for_another_commit(
    tmp_path: Path,
) -> None:
    assert [r.seed for r in campaign.run(tmp_path, promise(), range(2), "abc")] == [0, 1]
    with (tmp_path / "toy.jsonl").open("a") as file:
        file.write('{"seed": 6, "sec')  # a kill
    assert [r.seed for r in campaign.run(tmp_path, promise(), (0, 1, 7), "abc")] == [7]
    assert [r.seed for r in campaign.run(tmp_path, promise(), (0, 7), "def")] == [0, 7]
    assert len(campaign.results(tmp_path, promise(), "abc")) == 3
    again = list(campaign.run(tmp_path, promise(), [7], "abc", again=True))
    assert [r.seed for r in again] == [7] and len(campaign.results(tmp_path, promise(), "abc")) == 3


def result(seed: int, failure: str = "", **did: Any) -> Result:
    return Result(seed, 1.5 + seed, failure, did, "abc")


def test_a_case_is_tried_again_once_the_machine_has_what_it_lacked(tmp_path: Path) -> None:
    program = tmp_path / "program"

    def needs_it(seed: int, room: Room) -> dict[str, Any]:
        if not program.exists():
            raise UnavailableError("no program")
        return {"number": seed}

    toy = promise(case=needs_it)
    first = list(campaign.run(tmp_path / "out", toy, range(2), "abc"))
    assert [one.unavailable for one in first] == [True, True]
    program.touch()
    again = list(campaign.run(tmp_path / "out", toy, range(3), "abc"))
    assert [(one.seed, one.did) for one in again] == [(n, {"number": n}) for n in range(3)]
    assert list(campaign.run(tmp_path / "out", toy, range(3), "abc")) == []
    assert page.state_of(toy, campaign.results(tmp_path / "out", toy, "abc")) == "held, in part"


@pytest.mark.parametrize(
    ("found", "state"),
    [
        ([], "not run"),
        ([result(0, unavailable="no such program")], "not run (no such program)"),
        ([result(n) for n in range(7)], "held, in part"),
        ([result(n) for n in range(8)], "held"),
        ([result(n) for n in range(7)] + [result(7, "lost")], "BROKEN in 1"),
        ([result(0, "lost"), result(1, unavailable="x")], "BROKEN in 1"),
    ],
)
def test_what_was_not_run_never_counts_as_held(found: list[Result], state: str) -> None:
    assert page.state_of(promise(), found) == state


def test_the_page_says_what_was_run_where_and_what_failed(tmp_path: Path) -> None:
    found = [result(n) for n in range(3)] + [result(3, "Traceback\nlost step 4")]
    toy = promise(each=100, how="with care.")
    rows = page.write(tmp_path / "p.md", {"commit": "abc", "cores": 2}, [(toy, found)])
    expected = "| 99 | toy | it holds | 400 of 800 toys | 1 | 4.5 s | BROKEN in 1 |"
    assert rows[-1] == expected
    text = (tmp_path / "p.md").read_text()
    assert expected in text and "Run at: commit abc, cores 2." in text
    assert "- toy, seed 3: `lost step 4`" in text and "- **toy**: with care." in text
    plain = json.loads((tmp_path / "p.json").read_text())
    (line,) = plain["promises"]
    assert plain["machine"]["commit"] == "abc" and line["state"] == "BROKEN in 1"
    assert line["failures"] == [{"seed": 3, "failure": "Traceback\nlost step 4"}]


def test_ledgers_are_counted_from_the_runs_of_other_promises() -> None:
    others = [[result(0, ledgers=1), result(1)], [result(2, "ledger: lane 3"), result(3, "other")]]
    assert [one.seed for one in ledgers.counted(others)] == [0, 2]


def test_every_promise_has_a_number_a_name_and_says_how_it_is_tried() -> None:
    assert [one.number for one in PROMISES] == list(range(1, 18))
    assert len({one.name for one in PROMISES}) == 17
    assert all(one.how and one.cases > 0 and one.sentence[0].islower() for one in PROMISES)
