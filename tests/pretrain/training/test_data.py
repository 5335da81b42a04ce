"""The data sets of a run, and settings that do nothing with them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.dataset.shards import DataError
from pretrain.config.root import load
from pretrain.training.data import RunData

_IDLE = ["data.prompt_weight=0.5", "data.cache.directory=scratch", "data.cache.gigabytes=9"]


def idle(*words: str) -> list[str]:
    """The settings that are said to have no effect."""
    config = load(None, ["run.directory=r", "data.lanes=2", *words])
    return [said.split(":")[0] for said in RunData(config).without_effect()]


def test_settings_of_prompts_and_of_a_cache_that_data_sets_have_not_are_named_where_a_run_begins(
    open_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pretrain.training.run"):
        open_run(*_IDLE)
    assert [
        record.message.split(",")[0]
        for record in caplog.records
        if record.name == "pretrain.training.run" and record.levelno == logging.WARNING
    ] == [
        "data.prompt_weight: 0.5 has no effect", "data.cache.directory: has no effect",
        "data.cache.gigabytes: has no effect",
    ]  # fmt: skip


def test_a_weight_of_prompts_has_an_effect_where_any_data_set_has_some(
    data_sets: dict[str, Path],
) -> None:
    plain, pairs = data_sets["train"], data_sets["pairs"]
    assert idle(f"data.train={plain}") == []
    assert idle(f"data.train={plain}", "data.prompt_weight=1") == ["data.prompt_weight"]
    assert idle(f"data.train={pairs}", "data.prompt_weight=1") == []
    assert idle(f"data.train={plain}", f"data.validation={pairs}", "data.prompt_weight=1") == []


def test_a_cache_has_an_effect_where_any_data_set_is_under_a_url(
    data_sets: dict[str, Path],
) -> None:
    words = [f"data.train={data_sets['train']}", "data.cache.gigabytes=9"]
    assert idle(*words) == ["data.cache.gigabytes"]
    remote = "train.evaluate=[{kind: perplexity, data: 'https://localhost/books'}]"
    assert idle(*words, remote) == []


def test_the_tokenizer_is_that_of_any_data_set_that_still_has_it(
    data_sets: dict[str, Path], tmp_path: Path
) -> None:
    retired = tmp_path / "retired"
    retired.mkdir()
    shutil.copy(data_sets["train"] / "manifest.json", retired)
    mix = f"data.mix=[{{data: {retired}, weight: 0}}, {{data: {data_sets['other']}}}]"
    config = load(None, ["run.directory=r", "data.lanes=2", mix])
    own = data_sets["other"] / "tokenizer.model"
    assert RunData(config).tokenizer_bytes() == own.read_bytes()
    alone = load(None, ["run.directory=r", "data.lanes=2", f"data.train={retired}"])
    with pytest.raises(DataError, match="cannot be read"):
        RunData(alone).tokenizer_bytes()
