"""Promise 16: two starts of one configuration at one directory are one run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tools.promises import data_sets
from tools.promises.campaign import Promise, Room, check
from tools.promises.states import differences, stored

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
_PATIENCE = 500  # seconds for both
_CONFIG = f"""
model: {{d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 2, d_head: 8, d_ff: 16, segment: 8}}
data: {{lanes: 2}}
train: {{steps: {STEPS}, window_segments: 2, log_every: 1, validate_every: 0}}
optim: {{warmup_steps: 1}}
checkpoint: {{every: 2}}
wandb: {{mode: disabled}}
launch: {{device: cpu, ranks: 1}}
"""


def _start(config: Path, data: Path, run: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = ["train", str(config), f"data.train={data}", f"run.directory={run}"]
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain.cli", *words], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _alone(path: Path, data: Path) -> None:
    path.mkdir()
    (path / "c.yaml").write_text(_CONFIG)
    process = _start(path / "c.yaml", data, path / "run")
    said, _ = process.communicate(timeout=_PATIENCE)
    check(process.returncode == 0, said)


def is_one_run(seed: int, room: Room) -> dict[str, Any]:
    """A second start while the first one starts or trains: the first one stops with its reason."""
    from pretrain.checkpoint.manifest import step_name
    from pretrain.training import ledger

    choose = random.Random(seed)
    data = room.made("data", lambda path: data_sets.small(path, seed=1))
    alone = room.made("alone", lambda path: _alone(path, data))
    config, run = alone / "c.yaml", room.here / "run"
    one = _start(config, data, run)
    wanted = choose.choice([None, 0, 4, 10])  # the checkpoint that the first one has by then
    if wanted is None:
        time.sleep(choose.random() * 3)
    else:
        # Step 0 has none: then the directory of checkpoints is what there is.
        there = run / "checkpoints" / (step_name(wanted) if wanted else "")
        while one.poll() is None and not there.exists():
            time.sleep(0.01)
    other = _start(config, data, run)
    said = [process.communicate(timeout=_PATIENCE)[0] for process in (one, other)]
    codes = [one.returncode, other.returncode]
    check(sorted(code == 0 for code in codes) == [False, True], f"they ended with {codes}: {said}")
    loser = said[0] if codes[1] == 0 else said[1]
    check("was superseded: attempt" in loser, f"no reason: {loser[-600:]}")
    check("Traceback" not in loser, f"a traceback: {loser[-2000:]}")
    name = Path("checkpoints") / step_name(STEPS)
    wrong = differences(stored(run / name), stored(alone / "run" / name))
    check(not wrong, f"other weights than of one start: {wrong[:5]}")
    problems = ledger.check(run)
    check(not problems, f"ledger: {problems}")
    ending = json.loads((run / "exit.json").read_text())
    check(ending["code"] == 0, f"exit.json: {ending}")
    return {"second_at": wanted, "codes": codes, "ledgers": 1}


PROMISES = (
    Promise(
        16, "one-run", "two runs of one configuration are one run",
        20, "pairs of starts", is_one_run, limit=1200.0,
        how="a second `pretrain train` at the same directory while the first one starts or "
        "trains; one ends with the weights of a single start, the other stops with its reason.",
    ),
)  # fmt: skip
