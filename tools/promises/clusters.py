"""Promise 11: whatever part of a Slurm job is lost, the run ends in the same weights.

The campaign is the tests' (tests/slurm/test_campaign.py), which needs a cluster in namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.promises.campaign import BrokenError, Promise, Room, UnavailableError

ROOT = Path(__file__).resolve().parents[2]
FAULTS = 50
TEST = "tests/slurm/test_campaign.py::test_a_run_ends_in_the_same_weights_whatever_happens_to_it"


def ends_in_the_same_weights(seed: int, room: Room) -> dict[str, Any]:
    """The whole campaign, of faults of every kind in an order that its own seed draws."""
    environment = {**os.environ, "CAMPAIGN_FAULTS": str(FAULTS), "CAMPAIGN_RESULTS": str(room.here)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "slow", "--timeout", "14400", TEST],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    (room.here / "output.txt").write_text(done.stdout + done.stderr)
    if "1 skipped" in done.stdout:
        raise UnavailableError("no Slurm cluster here; see tools/system_packages")
    if done.returncode:
        raise BrokenError(f"{done.stdout[-1500:]}; output.txt in {room.here}")
    files = sorted(room.here.glob("*.json"))
    found = json.loads(files[0].read_text()) if files else {}
    return {"faults": len(found.get("faults", [])), "ledgers": 1}


PROMISES = (
    Promise(
        11, "slurm", "loss of any part of a Slurm job ends in the same weights; one writer",
        1, "faults", ends_in_the_same_weights, each=FAULTS, limit=14400.0,
        how=f"one job on three nodes, {FAULTS} faults of 13 kinds (tests/slurm/test_campaign.py): "
        "killed ranks, launchers and daemons, power, links, preemption, time limits, a full disk.",
    ),
)  # fmt: skip
