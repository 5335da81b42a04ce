"""A small run that is written and loaded once; each test has a copy that it may change."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import trained
from pretrain.trained import Trained


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory, write_run: Any) -> Trained:
    """A run with delta memory, segments of 16 tokens and windows of four; no test may change it."""
    directory = tmp_path_factory.mktemp("loaded") / "run"
    write_run(directory)
    return trained.load(directory, torch.device("cpu"))


@pytest.fixture
def model(tmp_path: Path, loaded: Trained) -> Trained:
    """The run in a directory and with weights of the test's own."""
    directory = tmp_path / "run"
    shutil.copytree(loaded.run_directory, directory)
    return replace(
        loaded,
        model=copy.deepcopy(loaded.model),
        run_directory=directory,
        checkpoint_path=directory / "checkpoints" / loaded.checkpoint_path.name,
    )
