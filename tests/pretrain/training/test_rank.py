"""A rank before it trains: attempts are numbered and their end is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.attempts import claim


def test_attempts_without_progress_are_counted_unless_the_batch_script_does(
    tmp_path: Path, write_data_set: Callable[..., Any]
) -> None:
    write_data_set(tmp_path / "data", [np.arange(3, 10)] * 16, 8, 48)
    claim(tmp_path / "r", 3, 1000, 1)
    (tmp_path / "c.yaml").write_text("launch: {device: cpu}\n")

    def rank_of_three(**environment: str) -> subprocess.CompletedProcess[str]:
        words = ["run.directory=r", "data.train=data", "train.max_attempts_without_progress=1"]
        place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0",
                 "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "pretrain.cli", "train", "c.yaml", *words],
            cwd=tmp_path, env={**os.environ, **place, **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    counted = rank_of_three(PRETRAIN_STARTS_COUNTED="1")
    assert counted.returncode == 2 and "cannot be shared evenly by 3 ranks" in counted.stderr
    assert json.loads((tmp_path / "r" / "exit.json").read_text())["code"] == 2
    ended = rank_of_three()  # attempt 2 was a mistake, and no try
    assert ended.returncode == 78 and "no progress: attempts 1 to 1 " in ended.stderr
    assert json.loads((tmp_path / "r" / "exit.json").read_text())["code"] == 78
