"""Results in files: what they are called, what they replace, and where they cannot be written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pretrain.checkpoint.manifest import MANIFEST
from pretrain.evaluate import results
from pretrain.evaluate.questions import EvaluationError, ResultError


def _publish(directory: Path, found: float = 1.5, **asked: Any) -> None:
    report = {"step": 7, "tasks": ("a", "b"), **asked, "rows": [found]}
    results.publish(directory, "asked-7", report, measured=("rows",), table=f"| {found} |")


def _stored(directory: Path) -> dict[str, Any]:
    return {
        path.name: json.loads(path.read_text())["rows"] for path in sorted(directory.glob("*.json"))
    }


def test_a_result_says_when_and_by_which_code_it_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _publish(tmp_path)
    report = json.loads((tmp_path / "asked-7.json").read_text())
    assert (report["step"], report["tasks"], report["rows"]) == (7, ["a", "b"], [1.5])
    assert report["code"].startswith("0.1.0")
    assert datetime.fromisoformat(report["written"]).tzinfo is not None
    assert capsys.readouterr().out == f"| 1.5 |\nwritten to {tmp_path / 'asked-7.json'}\n"


def test_a_result_never_replaces_that_of_another_question(tmp_path: Path) -> None:
    _publish(tmp_path, 1.0)
    _publish(tmp_path, 2.0, tasks=["a"])
    _publish(tmp_path, 3.0, step=8)
    expected = {"asked-7.json": [1.0], "asked-7-2.json": [2.0], "asked-7-3.json": [3.0]}
    assert _stored(tmp_path) == expected
    # The same question again, by whatever code and whenever, has its file already.
    _publish(tmp_path, 4.0, tasks=["a"])
    assert _stored(tmp_path) == {**expected, "asked-7-2.json": [4.0]}


def test_a_file_of_before_or_that_is_no_report_stays(tmp_path: Path) -> None:
    old = '{"rows": [9], "step": 7}'
    (tmp_path / "asked-7.json").write_text(old)
    (tmp_path / "asked-7-2.json").write_text("[cut")
    _publish(tmp_path)
    assert (tmp_path / "asked-7.json").read_text() == old
    assert (tmp_path / "asked-7-2.json").read_text() == "[cut"
    assert json.loads((tmp_path / "asked-7-3.json").read_text())["rows"] == [1.5]


def test_lines_and_figure_have_the_name_of_their_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    for step in (7, 8):
        results.publish(
            *(tmp_path, "some", {"step": step}),
            measured=(), table="", lines=b"%d\n" % step, figure=figure,
        )  # fmt: skip
    for stem, step in (("some", b"7\n"), ("some-2", b"8\n")):
        assert (tmp_path / f"{stem}.jsonl").read_bytes() == step
        assert (tmp_path / "plots" / f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"written to {tmp_path / stem}.jsonl" in capsys.readouterr().out or step == b"8\n"
    assert not list(tmp_path.rglob("*.tmp"))


def test_where_writing_fails_at_the_end_the_whole_result_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResultError, match=r"gone.*: cannot be written \(No such file"):
        _publish(tmp_path / "gone", 2.5)
    printed = capsys.readouterr().out
    assert printed.startswith("| 2.5 |\n")
    assert json.loads(printed.removeprefix("| 2.5 |\n"))["rows"] == [2.5]
    with pytest.raises(ResultError):
        results.publish(
            tmp_path / "gone", "some", {}, measured=(), table="", lines='{"text": "é"}\n'.encode()
        )
    assert capsys.readouterr().out.endswith('}\n{"text": "é"}\n')


@contextmanager
def _forbidden(directory: Path) -> Iterator[None]:
    """Within the block this process may read the directory and not write into it."""
    directory.chmod(0o555)
    user = os.geteuid()
    if user == 0:  # whom no mode stops
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        directory.chmod(0o755)


def test_a_run_that_may_not_be_written_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    # No checkpoint is there: to look for one would be another error.
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000007").mkdir(parents=True)
    (run / "checkpoints" / "step-00000007" / MANIFEST).touch()
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o55 != 0o55:  # pytest's own, below a temporary directory
            parent.chmod(parent.stat().st_mode | 0o55)
    for path in (run, run / "checkpoints" / "step-00000007"):
        with (
            _forbidden(run),
            pytest.raises(EvaluationError, match=r"run: results cannot be written"),
        ):
            results.open_model(path)


def test_a_heat_map_says_of_each_share_what_it_is_given() -> None:
    shares, said = np.array([[0.0, 1.0], [0.25, 0.5]]), np.array([["a", "b"], ["c", "d"]])
    figure = results.heat_map(shares, said, ("x", ["1", "2"]), ("y", ["p", "q"]), "title", "share")
    axes = figure.axes[0]
    found = {text.get_position(): text.get_text() for text in axes.texts}
    assert found == {(0, 0): "a", (1, 0): "b", (0, 1): "c", (1, 1): "d"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2"]
    assert axes.images[0].get_array().tolist() == shares.tolist()
