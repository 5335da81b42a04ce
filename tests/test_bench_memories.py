"""The benchmark of all kinds of memory: that it runs, on a small shape and without the peers."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset import settings
from pretrain.config.memory import MEMORY_KINDS
from pretrain.config.model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "tools/bench/memories.py"), "--small", "--without-peers"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    return importlib.import_module("memories")


def test_the_dry_run_fills_a_row_and_states_the_ratios(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    words = ["--kinds", "transformer_xl", "--rounds", "2", "--lanes", "2", "--threads", "1"]
    words += ["--json", str(file)]
    ran = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    ours, none = row["transformer_xl"], row["none"]
    assert (ours["state_bytes"], none["state_bytes"]) == (2 * 4 * (16 * 32 * 4 + 16), 0)
    ratios = [a / b for a, b in zip(ours["seconds"], none["seconds"], strict=True)]
    assert row["times_none"] == pytest.approx(sum(ratios) / 2) and len(ratios) == 2
    rates = [
        ours["flops"] / own / (row["plain products"]["flops"] / plain)
        for own, plain in zip(ours["seconds"], row["plain products"]["seconds"], strict=True)
    ]
    assert row["of_products"] == pytest.approx(sum(rates) / 2)
    assert ours["settings"]["carry"]
    assert row["flops_per_token"] == ours["flops"] / (2 * 64) and "peer" not in row
    median = statistics.median(2 * 64 / seconds for seconds in ours["seconds"])
    assert f"| transformer_xl | {median:,.0f} (" in ran.stdout
    assert {"commit", "processor", "torch"} <= found["machine"].keys()


def test_an_unknown_kind_is_reported() -> None:
    ran = subprocess.run([*COMMAND, "--kinds", "lstm"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and "--kinds: unknown: lstm; known: " in ran.stderr


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_each_kind_and_its_peer_get_settings_that_fit_the_shape(kind: str, bench: Any) -> None:
    shape = bench.Shape(bench.training.SMALL, 4096, 1, 8192, 2)
    group = bench.Group.of(kind, shape, with_peers=True)
    sizes = [f"{name}={size}" for name, size in shape.sizes.items()]
    words = [f"memory.kind={kind}", *group.ours.settings["settings"]]
    config = settings.load(ModelConfig, None, [*sizes, *words])
    own = settings.to_plain(config.memory).get(kind, {})
    assert shape.settings_of(kind).items() <= own.items()
    published = {"linear", "delta", "compressive", "memorizing", "rmt"}
    assert (group.peer is not None) == (kind in published)
    if group.peer is not None:
        assert group.peer.settings["of_peer"] == shape.settings_of(kind)
        assert any(pin.startswith(f"{group.peer.name}==") for pin in bench.PACKAGES)
