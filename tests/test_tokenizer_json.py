"""From text to a continuation with a tokenizer.json, by the commands that a person types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data_prep.dataset.shards import read_manifest
from data_prep.tokenizer import tokenizer
from pretrain.cli.main import main

TEXT = "The segment reads the memory, \U0001f600 and then the segment writes <|eot|> to it.\n" * 9
TRAINING = (
    *("data.lanes=2", "model.d_model=32", "model.n_layers=2", "model.n_heads=4"),
    *("model.n_kv_heads=2", "model.d_head=8", "model.d_ff=48", "model.segment=8"),
    *("train.steps=2", "train.window_segments=2", "train.micro_batch=1", "optim.warmup_steps=1"),
    *("launch.device=cpu", "launch.ranks=1", "wandb.mode=disabled"),
)


def typed(module: str, *words: str) -> str:
    """What the command says; a failure shows all of it."""
    ended = subprocess.run(
        [sys.executable, "-m", module, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "parallelism" not in ended.stderr
    return ended.stdout


def here(capfd: pytest.CaptureFixture[str], *words: str) -> None:
    """`pretrain` with these words, without a process of its own, whose imports take longest."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capfd.readouterr()
    assert ended.value.code == 0, told.out + told.err
    assert "parallelism" not in told.err


def test_a_model_is_trained_evaluated_and_sampled_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([TEXT], trainer)
    model.add_special_tokens([AddedToken(name, special=True) for name in ("<|eot|>", "<|pad|>")])
    (tmp_path / "hub").mkdir()
    model.save(str(tmp_path / "hub/tokenizer.json"))
    stated = {"bos_token": None, "eos_token": {"content": "<|eot|>"}, "pad_token": "<|pad|>"}
    (tmp_path / "hub/tokenizer_config.json").write_text(json.dumps(stated))
    (tmp_path / "in.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n" * 6)

    eot, pad = model.token_to_id("<|eot|>"), model.token_to_id("<|pad|>")
    data, run = tmp_path / "data", tmp_path / "run"
    (tmp_path / "c.yaml").write_text("{}\n")
    words = (
        *(str(tmp_path / "c.yaml"), f"root={tmp_path}", "sources=[{name: s, paths: [in.jsonl]}]"),
        "shards.count=2",
    )
    making = ("data_prep.cli", "run", *words, f"output={data}", "workers=2")
    given = f"tokenizer.path={tmp_path}/hub/tokenizer.json"
    told = typed(*making, given)
    assert f"tokenizer: tokenizer.json, no BOS, EOS is {eot}" in told
    assert "nothing to do" in typed(*making, given)
    manifest = read_manifest(data)
    info = manifest.tokenizer
    assert (info.bos_id, info.eos_id, info.pad_id, info.unk_id) == (None, eot, pad, None)
    assert (manifest.documents, manifest.rejected) == (6, 0)
    # The copy needs nothing beside it: a set made with it has the same tokenizer.
    typed(
        *("data_prep.cli", "run", *words, f"output={tmp_path / 'more'}"),
        f"tokenizer.path={data / 'tokenizer.json'}",
    )
    assert read_manifest(tmp_path / "more").tokenizer == info
    assert "byte fallback" in typed("data_prep.cli", "stats", str(data))

    typed(
        *("pretrain.cli", "train", str(tmp_path / "c.yaml"), *TRAINING),
        *(f"data.train={data}", f"data.validation={tmp_path / 'more'}", f"run.directory={run}"),
    )
    kept = tokenizer.load(tokenizer.find(run))
    assert kept.path == run / "tokenizer.json" and kept.eos_id == eot
    assert kept.path.read_bytes() == (data / "tokenizer.json").read_bytes()
    here(capfd, "eval", "perplexity", str(run), "--data", str(tmp_path / "more"))
    (report,) = run.glob("eval-*.json")
    measured = json.loads(report.read_text())
    # The first token is no target without a BOS, so its bytes are not counted by position.
    first = len(kept.pieces[int(kept.encode(TEXT)[0])])
    assert measured["text_bytes"] == 6 * len(TEXT.encode())
    assert sum(row["bytes"] for row in measured["positions"]) == 6 * (len(TEXT.encode()) - first)
    here(capfd, "generate", str(run), "--prompt", "The \U0001f600", "--max-tokens", "5")
