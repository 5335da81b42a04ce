"""What the recipe that continues a language model decides by itself: stages, tokens, time."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import evidence
import pytest

from pretrain.checkpoint.alone import write_checkpoint
from pretrain.config import root as configuration
from pretrain.config.root import Config
from pretrain.model import flops
from tools.recipes import continue_llm
from tools.recipes.continue_llm import ALL, STAGES, announced, shortened

# SmolLM2-135M's.
SHAPE = (
    *("model.d_model=576", "model.n_layers=30", "model.n_heads=9", "model.n_kv_heads=3"),
    *("model.d_head=64", "model.d_ff=1536"),
)
VOCABULARY = 49_152


@pytest.fixture(scope="module")
def config() -> Config:
    return configuration.load(continue_llm.CONFIG, SHAPE)


def test_it_reads_a_hundred_million_tokens_in_less_than_ten_minutes_as_assumed(
    config: Config,
) -> None:
    tokens = sum(one.steps for one in STAGES) * config.data.lanes * config.window
    assert 95e6 < tokens < 105e6
    seconds = sum(continue_llm._seconds(config, VOCABULARY, one) for one in STAGES)
    assert 300 < seconds < 600


def test_what_it_will_do_is_said_with_tokens_and_the_assumed_time(config: Config) -> None:
    first, near, far, last = announced(config, VOCABULARY, list(STAGES))
    # Hugging Face's count of SmolLM2-135M, and a gate per head and layer.
    assert first.startswith(f"{134_515_008 + 30 * 9:,} parameters, memory linear")
    assert "460 steps, 60.3 million tokens, " in near and "s at 30% (assumed)" in near
    assert "as many of the preface" in far and "as many" not in near
    assert "passkey.md" in last


def test_a_preface_takes_the_time_of_a_forward_without_logits(config: Config) -> None:
    near, far = replace(STAGES[0], steps=STAGES[1].steps), STAGES[1]
    near_seconds, far_seconds = (
        continue_llm._seconds(config, VOCABULARY, one) for one in (near, far)
    )
    # The parts of a forward for a vocabulary of none.
    body = sum(flops.forward_flops(config.model, 0, config.window).values()) / config.window
    tokens = far.steps * config.data.lanes * config.window
    assert far_seconds - near_seconds == pytest.approx(tokens * body / (0.3 * 989e12))


def test_less_time_is_fewer_steps_of_each_stage(config: Config) -> None:
    whole = sum(continue_llm._seconds(config, VOCABULARY, one) for one in STAGES)
    half = shortened(config, VOCABULARY, ALL, whole / 120)
    assert [one.steps for one in half] == [230, 150]
    assert shortened(config, VOCABULARY, ALL, 1e3) == list(STAGES)


def test_the_steps_asked_for_are_shared_by_the_stages_two_each_at_least(config: Config) -> None:
    # 460 and 300 of 760.
    assert [one.steps for one in shortened(config, VOCABULARY, 380, None)] == [230, 150]
    assert [one.steps for one in shortened(config, VOCABULARY, 4, None)] == [2, 2]


@pytest.mark.parametrize("steps", [2, 3, 460])
def test_warm_up_and_decay_fit_into_any_number_of_steps(steps: int) -> None:
    parsed = argparse.Namespace(out=Path("o"), device="cpu", tiny=True, settings=[])
    for stage in STAGES:
        words = continue_llm._words(parsed, replace(stage, steps=steps), None)
        found = configuration.load(continue_llm.CONFIG, words)
        assert found.optim.warmup_steps + found.optim.decay_steps <= steps == found.train.steps
        assert bool(found.data.preface) == stage.preface


def test_without_a_model_it_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["continue_llm.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        continue_llm.main()
    assert ended.value.code == 2
    assert "give --model, a GGUF file or a directory" in capsys.readouterr().err


def test_another_model_than_the_one_that_was_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = {"imported": {"path": str(tmp_path / "a.gguf")}}
    source = tmp_path / "out" / "model"
    write_checkpoint(source / "checkpoints" / "step-00000000", 0, {}, pytest.fail, imported)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["continue_llm.py", "out", "--model", "b.gguf"])
    with pytest.raises(SystemExit) as ended:
        continue_llm.main()
    assert ended.value.code == 2
    assert f"--model: out/model is {tmp_path / 'a.gguf'}; leave --model out" in (
        capsys.readouterr().err
    )
    continue_llm._import(Path("a.gguf"), source)


def test_documents_of_another_length_than_asked_for_are_not_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence.begin(tmp_path / "out", {"tiny": True, "longest": 300})
    monkeypatch.setattr("sys.argv", ["continue_llm.py", str(tmp_path / "out"), "--tiny"])
    with pytest.raises(SystemExit, match="out was begun with other longest"):
        continue_llm.main()
