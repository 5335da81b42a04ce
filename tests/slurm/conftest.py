"""A data set, a configuration and a site file, and how to submit with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

# In place of the site's interpreter: the checks at submission run as they are. What a job would run
# is recorded, one file per process, and then ends as the file `end` in the run directory says.
RECORDER = f"""#!/usr/bin/env bash
here=$(dirname "$0")
case " $* " in *" check "*) exec {sys.executable} "$@";; esac
[ "$2" != pretrain.cli ] || exit 0 # preflight
record=$here/$SLURM_JOB_ID.$SLURM_PROCID.${{SLURM_RESTART_COUNT:-0}}
printf '%s\\0' "$SLURM_JOB_ID" "$PWD" "$@" >"$record"
end=${{!#}}/end # the last argument is run.directory=DIRECTORY
[ ! -f "${{end#run.directory=}}" ] || . "${{end#run.directory=}}"
"""

Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]) -> Path:
    """A directory with a data set of 12 shards, a configuration of 12 lanes and two sites."""
    root = tmp_path_factory.mktemp("slurm")
    rng = np.random.default_rng(3)
    documents = [rng.integers(3, 48, size=60) for _ in range(48)]
    write_data_set(root / "data", documents, 12, 48)
    (root / "c.yaml").write_text(
        "run: {directory: run}\n"
        "data: {train: data, lanes: 12}\n"
        "model: {d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, d_head: 8, d_ff: 16,"
        " segment: 8}\n"
        "train: {steps: 60, window_segments: 2, log_every: 1, validate_every: 0,"
        " max_attempts_without_progress: 2}\n"
        "optim: {warmup_steps: 1}\n"
        "checkpoint: {every: 1000}\n"
        "wandb: {mode: disabled}\n"
        "launch: {device: cpu, ranks: 1}\n"
    )
    common = (
        "CPU_PARTITION=main GPUS_PER_NODE=0 GRACE_SECONDS=60\n"
        # Other work on this machine is no fault of a node.
        "PREFLIGHT_OPTIONS=(--slow-factor=1000)\nexport OMP_NUM_THREADS=1\n"
    )
    (root / "site.env").write_text(f"{common}PYTHON={sys.executable}\n")
    (root / "record").mkdir()
    recorder = root / "record" / "python"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    (root / "recorder.env").write_text(f"{common}PYTHON={recorder}\n")
    return root


@pytest.fixture
def dry(place: Path) -> Submit:
    """slurm/submit --dry-run, where there is no Slurm."""

    def run(verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [ROOT / "slurm" / "submit", verb, words[0], "--dry-run", "--site", "site.env"]
        return subprocess.run(
            [*command, *words[1:]],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    return run
