"""The benchmark of the GPU path: that it runs, on small shapes, and what it says without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "tools/bench/gpu.py")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2() -> None:
    ran = subprocess.run(COMMAND, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1 and "no GPU" in ran.stderr


def test_the_dry_run_fills_every_row_that_a_cpu_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    told_file = tmp_path / "told.json"
    words = ["--tiny", "--device", "cpu", "--rounds", "1", "--json", str(told_file)]
    ran = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(told_file.read_text())
    runs = {"sdpa", "torch"}
    if importlib.util.find_spec("triton"):
        runs.add("triton")
    # Of two recipes: 3 kernels of the local attention, 5 of two parts of the memory, 5 steps.
    assert len(told["kernels"]) == 26 and len(told["steps"]) == 10
    for row in told["kernels"]:
        assert ("milliseconds" in row) == (row["kernel"] in runs), row
    for row in told["steps"]:
        assert ("tokens_per_second" in row) == (set(row["kernels"].split(", ")) <= runs), row
        assert "obstacle" in row or (row["of_products"] > 0 and row["of_peak"] is None)
    assert told["product_rate"] > 0 and {"commit", "torch", "device"} <= told["machine"].keys()
    assert all(row["part"] in ran.stdout for row in told["kernels"])
