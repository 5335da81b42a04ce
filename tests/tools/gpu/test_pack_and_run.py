"""The folder for a GPU machine without a network: what is in it, and what a run leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def ran(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed without wheels, which are installed here; the sources are those being tested."""
    base = tmp_path_factory.mktemp("packed")
    for name in ("wheels", "data"):
        (base / name).mkdir()
    (base / "data" / "manifest.json").write_text("{}")
    packed = base / "folder"
    for part in ("data", "model", "documents"):
        (base / "continued" / part).mkdir(parents=True)
        (base / "continued" / part / "file").write_text("x" * 1000)
    words = packed, "--wheels", base / "wheels", "--data", base / "data"
    words = *words, "--continued", base / "continued"
    told = ran(ROOT / "tools/gpu/pack", *words)
    assert told.returncode == 0, told.stderr
    assert re.search(r"^in all .* and 0.0 MB of a model$", told.stdout, re.MULTILINE)
    for package in ("pretrain", "data_prep", "tools"):
        (packed / "source" / package).rename(packed / f"{package} of the commit")
        (packed / "source" / package).symlink_to(ROOT / package)
    return packed


def test_the_folder_holds_the_commit_with_its_configurations(folder: Path) -> None:
    archived = subprocess.run(
        ["git", "-C", ROOT, "archive", "HEAD", "configs"], capture_output=True, check=True
    )
    with tarfile.open(fileobj=BytesIO(archived.stdout)) as files:
        names = {name for name in files.getnames() if name.endswith(".yaml")}
    assert names and all((folder / "source" / name).is_file() for name in names)
    assert (folder / "source/COMMIT").read_text().strip()
    assert (folder / "data/manifest.json").exists() and (folder / "run").exists()


def summary(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())
    return found


def test_each_measurement_leaves_its_result_and_what_became_of_it(
    folder: Path, tmp_path: Path
) -> None:
    words = "--device", "cpu", "--tiny", "--only", "products", "--out", tmp_path / "out"
    told = ran(folder / "run", *words)
    assert told.returncode == 0, told.stdout + (tmp_path / "out/products.txt").read_text()
    (one,) = summary(tmp_path / "out")
    assert (one["name"], one["outcome"]) == ("products", "done") and one["seconds"] > 0
    figures = json.loads((tmp_path / "out/products.json").read_text())
    assert figures["product_rate"] > 0 and figures["copy_rate"] > 0
    assert figures["machine"]["commit"] and figures["kernels"] == []


def test_what_has_no_time_left_is_not_reached_and_costs_nothing(
    folder: Path, tmp_path: Path
) -> None:
    words = "--device", "cpu", "--minutes", "0.1", "--out", tmp_path / "out"
    told = ran(folder / "run", *words)
    assert told.returncode == 0
    outcomes = {one["name"]: one["outcome"] for one in summary(tmp_path / "out")}
    assert list(outcomes)[:3] == ["tests", "products", "attention"]
    assert set(outcomes.values()) == {"not reached"}
    # What the recipe reads lies there, and no more.
    assert {path.name for path in (folder / "continued").iterdir()} == {"data", "model"}
    assert (folder / "continued/data/file").read_text() == "x" * 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_nothing_on_the_gpu(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = "--device", "cpu", "--tiny", "--only", "products", "--out", str(tmp_path / "out")
    with subprocess.Popen(
        [sys.executable, folder / "run", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        while not (found := children.read_text().split()):
            time.sleep(0.01)
        time.sleep(0.5)  # until it is another program
        run.send_signal(number)
        _, told = run.communicate(timeout=30)
    assert (run.returncode, told) == (128 + number, b"")
    assert not Path(f"/proc/{found[0]}").exists()


def test_the_measurements_fit_into_ten_minutes_in_the_order_of_their_worth() -> None:
    import runpy

    measurements = runpy.run_path(str(ROOT / "tools/gpu/run"))["MEASUREMENTS"]
    names = [one.name for one in measurements]
    assert names == [
        *("tests", "products", "attention", "memory", "step_1b_32k", "step_1b_8k"),
        *("step_1b_128k", "step_8b_32k", "continued"),
    ]
    assert sum(one.seconds for one in measurements[:-1]) < 600
    assert all((ROOT / word).exists() for one in measurements for word in one.words[:1]
               if word.endswith(".py"))  # fmt: skip


def test_a_folder_that_is_in_use_and_a_data_set_that_is_missing_are_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    told = ran(ROOT / "tools/gpu/pack", tmp_path / "full")
    assert told.returncode == 2 and "not empty" in told.stderr
    told = ran(ROOT / "tools/gpu/pack", tmp_path / "new", "--data", tmp_path / "none")
    assert told.returncode == 2 and "no such directory" in told.stderr
    assert not (tmp_path / "new").exists()
