"""Loading what the trainer wrote, and the stream's equality with the whole document."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tokenizer import contract, training
from data_prep.tokenizer.contract import TokenizerError
from pretrain import trained
from pretrain.checkpoint.attempts import claim
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.checkpoint.runs import TrainedError
from pretrain.config.memory import MemoryConfig
from tests.pretrain import kinds

CPU = torch.device("cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_the_checkpoints_masters(
    tmp_path: Path, write_run: Any, tied: bool
) -> None:
    model = write_run(tmp_path / "run", tied_embeddings=tied)
    loaded = trained.load(tmp_path / "run", CPU)
    expected, found = model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (loaded.model.lm_head.weight is loaded.model.embedding.weight) is tied
    assert not loaded.model.training
    assert loaded.step == 7 and loaded.config.train.window_segments == 4
    assert loaded.tokenizer.vocab_size == 320 and loaded.run_directory == tmp_path / "run"


def test_the_average_of_the_weights_is_taken_where_it_is_asked_for(
    tmp_path: Path, write_run: Any
) -> None:
    model = write_run(tmp_path / "run", averaged=True)
    loaded = trained.load(tmp_path / "run", CPU, "ema")
    expected, found = model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(expected[name] / 2, found[name]) for name in expected)
    assert loaded.weights == "ema"
    last = trained.load(tmp_path / "run", CPU)
    assert last.weights == "last"
    assert torch.equal(last.model.embedding.weight, model.embedding.weight)


def test_a_run_without_an_average_has_none_to_take(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(TrainedError, match="has no average of the weights, since the run has no"):
        trained.load(tmp_path / "run", CPU, "ema")


def test_the_newest_checkpoint_is_taken_or_the_one_that_is_named(
    tmp_path: Path, write_run: Any
) -> None:
    newest = write_run(tmp_path / "run", steps=(3, 5))
    assert trained.load(tmp_path / "run", CPU).step == 5
    older = trained.load(tmp_path / "run" / "checkpoints" / "step-00000003", CPU)
    assert older.step == 3
    assert older.run_directory == (tmp_path / "run").resolve()
    assert not torch.equal(older.model.embedding.weight, newest.embedding.weight)


def test_a_damaged_checkpoint_is_passed_over_and_logged(
    tmp_path: Path, write_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path / "run", steps=(3, 5))
    damaged = tmp_path / "run" / "checkpoints" / "step-00000005"
    _flip_a_bit(damaged / "rank-00000-of-00001.safetensors")
    with caplog.at_level(logging.WARNING, logger="pretrain.trained"):
        assert trained.load(tmp_path / "run", CPU).step == 3
    assert "step-00000005" in caplog.text and "sha256" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-00000005: is not a good checkpoint.*sha256"):
        trained.load(damaged, CPU)


def test_paths_without_a_model_are_distinguished(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    claim(tmp_path / "young", ranks=1, steps=1, most_without_progress=None)
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000007", tmp_path / "copy")
    for name, words in {
        "nowhere": "there is no such directory",
        "run/tokenizer.model": "is not a directory",
        "other": "neither a run directory .* nor a checkpoint",
        "young": "has no checkpoint yet",
        "copy": "is not in a run's checkpoints/",
    }.items():
        with pytest.raises(TrainedError, match=words):
            trained.load(tmp_path / name, CPU)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run")
    model = tmp_path / "run" / "tokenizer.model"
    training.train(["some other text, of fewer words"] * 3, model, 290)
    with pytest.raises(TrainedError, match=r"has 290 pieces, the model of .* has 320"):
        trained.load(tmp_path / "run", CPU)


def test_a_run_has_exactly_one_tokenizer(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"run: holds both of tokenizer\.model and tokeni"):
        trained.load(tmp_path / "run", CPU)
    for name in contract.FILES:
        (tmp_path / "run" / name).unlink()
    with pytest.raises(TokenizerError, match="run: holds none of"):
        trained.load(tmp_path / "run", CPU)


def test_a_run_with_a_gpu_s_kernels_is_read_on_a_cpu(tmp_path: Path, write_run: Any) -> None:
    memory = MemoryConfig(kind="delta", kernel="triton")
    write_run(tmp_path / "run", local_attention="flash", memory=memory)
    loaded = trained.load(tmp_path / "run", CPU)
    assert loaded.model.config.memory.kernel == "auto"
    tokens = torch.arange(20)[None]
    state = loaded.model.initial_state(1, CPU)
    output = loaded.model(tokens, torch.zeros_like(tokens, dtype=torch.bool), state)
    assert output.logits.isfinite().all()


@kinds.of_every_kind
@pytest.mark.parametrize("prompt", [16, 37])
def test_streamed_logits_equal_the_whole_documents_token_by_token(
    tmp_path: Path, write_run: Any, kind: str, prompt: int
) -> None:
    write_run(tmp_path / "run", memory=kinds.memory(kind))
    model = trained.load(tmp_path / "run", CPU).model
    tokens = torch.randint(0, 320, (1, 5 * 16 + 11), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    with torch.no_grad():
        whole = model(tokens, starts, model.initial_state(1, CPU)).logits
    logits, stream = model.extend(tokens[:, :prompt], model.open_stream(1, CPU))
    streamed = [logits]
    for place in range(prompt, tokens.shape[1]):
        logits, stream = model.extend(tokens[:, place : place + 1], stream)
        streamed.append(logits)
    torch.testing.assert_close(torch.cat(streamed, dim=1), whole, rtol=0, atol=1e-5)


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
