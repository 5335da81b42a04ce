"""Commands in this process, and data sets for them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoint.attempts import claim
from pretrain.cli.main import main


@pytest.fixture(scope="package")
def data(
    tmp_path_factory: pytest.TempPathFactory, write_data_set: Callable[..., Any]
) -> dict[str, Path]:
    """A data set of 8 shards, and one of 3."""
    root = tmp_path_factory.mktemp("data")
    documents = [np.arange(3, 10)] * 16
    write_data_set(root / "train", documents, 8, 48)
    write_data_set(root / "few", documents, 3, 48)
    return {name: root / name for name in ("train", "few")}


@pytest.fixture
def pretrain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `pretrain` in this process, in a directory with c.yaml and a run without checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("launch: {device: cpu}\n")
    claim(tmp_path / "run", ranks=1, steps=1, most_without_progress=None)
    (tmp_path / "run/checkpoints").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        code = ended.value.code
        assert isinstance(code, int)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, said.out, said.err)

    return run
