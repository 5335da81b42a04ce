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
CASES, KINDS = 4, 13
TEST = "tests/slurm/test_campaign.py::test_a_run_ends_in_the_same_weights_whatever_happens_to_it"


def ends_in_the_same_weights(seed: int, room: Room) -> dict[str, Any]:
    """A campaign of a fault of every kind, in an order and at moments that the seed draws."""
    environment = {**os.environ, "CAMPAIGN_SEED": str(seed), "CAMPAIGN_RESULTS": str(room.here)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "slow", "--timeout", "3600", TEST],
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
        CASES, "faults", ends_in_the_same_weights, each=KINDS, limit=3600.0,
        how=f"{CASES} jobs on three nodes, each struck by {KINDS} faults, one of a kind "
        "(tests/slurm/test_campaign.py): killed ranks, launchers and daemons, power, links, "
        "preemption, time limits, a full disk.",
    ),
)  # fmt: skip
