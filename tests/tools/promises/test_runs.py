"""Promises about runs in small, and faults that turn them red."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import load, manifest
from pretrain.checkpoint.pieces import LaneRecord
from pretrain.training import ledger
from tests.tools.promises.failures import failures
from tools.promises import clusters, hangs, ledgers, on_ranks
from tools.promises.campaign import Room, UnavailableError

COPIED_RUN, FILES_OF_THE_FUTURE = 1, 8


# tests/pretrain/jobs/test_watchdog.py is the quick one.
@pytest.mark.slow
def test_a_hang_ends_within_its_limit(tmp_path: Path) -> None:
    assert failures(tmp_path, "hangs", [1]) == {}


@pytest.mark.slow
def test_a_watchdog_that_is_late_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "RANK", hangs.RANK.replace("float(limit)", "8 * float(limit)"))
    assert "s of" in failures(tmp_path, "hangs", [0])[0]


@pytest.mark.slow
def test_a_copied_run_goes_on_as_the_first_one(tmp_path: Path) -> None:
    assert failures(tmp_path, "places", [COPIED_RUN]) == {}


@pytest.mark.slow
def test_a_checkpoint_that_is_passed_over_for_its_clock_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_past(root: Path) -> list[int]:
        names = {step: root / manifest.step_name(step) for step in manifest.steps_in(root)}
        return [step for step, path in names.items() if path.stat().st_mtime < time.time()]

    monkeypatch.setattr(load, "steps_in", of_the_past)
    (failure,) = failures(tmp_path, "places", [FILES_OF_THE_FUTURE]).values()
    assert "resumed at step 0" in failure


@pytest.mark.slow
def test_a_memory_that_is_lost_in_a_resume_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = load.Checkpoint.lane

    def forgets(checkpoint: load.Checkpoint, number: int) -> LaneRecord:
        record = lane(checkpoint, number)
        return LaneRecord(record.place, {n: torch.zeros_like(t) for n, t in record.tensors.items()})

    monkeypatch.setattr(load.Checkpoint, "lane", forgets)
    found = failures(tmp_path, "resume", [3])  # the delta rule
    assert "differ at first: ['memory 0 0'" in found[3]


@pytest.mark.slow
def test_a_ledger_that_does_not_prove_its_run_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "check", lambda directory: ["lane 3: a window is missing"])
    (failure,) = failures(tmp_path, "places", [COPIED_RUN]).values()
    assert failure.startswith(ledgers.WRONG) and "lane 3" in failure


def planted(path: Path, code: str) -> str:
    """A program of a rank with a fault in it."""
    path.write_text(
        f"import sys\nfrom pathlib import Path\n{code}\n"
        "from tools.promises import on_ranks\non_ranks.be_a_rank(sys.argv[1], Path(sys.argv[2]))\n"
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_layout_keeps_the_state_and_one_that_does_not_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failures(tmp_path, "layouts", [0]) == {}
    code = (
        "from pretrain.checkpoint.load import Checkpoint\n"
        "read = Checkpoint.read\n"
        "Checkpoint.read = lambda *a, **k: read(*a, **k) * (1 + 2.0**-20)\n"
    )
    monkeypatch.setattr(on_ranks, "PROGRAM", planted(tmp_path / "rank.py", code))
    assert "the state differs" in failures(tmp_path, "layouts", [1])[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bad_gradients_are_kept_out_and_one_that_is_applied_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failures(tmp_path, "gradients", [3]) == {}
    code = (
        "import torch\n"
        "from pretrain.training.engine import Engine\n"
        "step = Engine.step\n"
        "def applied(engine, *given):\n"
        "    found = step(engine, *given)\n"
        "    if not found.applied:\n"
        "        for piece in engine.pieces():\n"
        "            piece.values.add_(1.0)\n"
        "            break\n"
        "    return found\n"
        "Engine.step = applied\n"
    )
    monkeypatch.setattr(on_ranks, "PROGRAM", planted(tmp_path / "rank.py", code))
    assert "changed" in failures(tmp_path, "gradients", [0])[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_starts_are_one_run_and_an_older_one_that_goes_on_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failures(tmp_path, "one-run", [0]) == {}
    (tmp_path / "sitecustomize.py").write_text(
        "import pretrain.checkpoint.attempts as attempts\n"
        "attempts.Attempt.superseded = lambda self: None\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    assert failures(tmp_path, "one-run", [1])


@pytest.mark.slow
def test_a_campaign_on_slurm_that_fails_or_is_skipped_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = tmp_path / "test_campaign.py"
    room = Room(tmp_path, tmp_path)
    monkeypatch.setattr(clusters, "TEST", str(test))
    test.write_text("import pytest\n@pytest.mark.slow\ndef test_a(): pytest.skip('no cluster')\n")
    with pytest.raises(UnavailableError, match="no Slurm cluster"):
        clusters.ends_in_the_same_weights(0, room)
    test.write_text(
        "import pytest\n@pytest.mark.slow\ndef test_a(): assert 'weights' == 'others'\n"
    )
    with pytest.raises(clusters.BrokenError, match="weights"):
        clusters.ends_in_the_same_weights(0, room)
