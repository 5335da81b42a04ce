"""Imported models against transformers' own on the same weights."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from pretrain import trained
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.runs import TrainedError
from pretrain.config.memory import MEMORY_KINDS
from pretrain.config.root import ImportConfig, load
from pretrain.convert import llama
from pretrain.convert.hugging_face import model_config
from pretrain.evaluate import generate
from pretrain.evaluate.questions import Sampling
from pretrain.model import local_attention, rotary
from pretrain.model.memories.kinds import is_of_memory
from pretrain.model.transformer import Transformer
from tests import ranks
from tests.data_prep.tokenizer.conftest import byte_level
from tests.pretrain import kinds
from tests.pretrain.convert.conftest import LLAMA3, YARN, random_tokens
from tests.pretrain.jobs.test_origin import words as words_of

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SEGMENT = 64
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5e0c\nsize 134\n"


def imported(tmp_path: Path, *words: str) -> Transformer:
    """The model of `tmp_path`/hub, as it is read for evaluation."""
    llama.run(tmp_path / "hub", tmp_path / "out", [f"segment={SEGMENT}", *words], None)
    return trained.load(tmp_path / "out", CPU).model


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor, **options: Any) -> Tensor:
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    output = model(tokens, starts, model.initial_state(len(tokens), CPU), **options)
    return output.logits


@torch.no_grad()
def theirs(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def assert_equal_logits(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "a head for each query": {"num_key_value_heads": 4},
    "one key/value head": {"num_key_value_heads": 1},
    "tied embeddings": {"tie_word_embeddings": True},
    "heads of another size": {"head_dim": 20},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "factor": 3.0,
                                           "rope_theta": 1000.0}},
    "llama3 scaling": {"rope_parameters": LLAMA3},
    "many files": {"shard": "40KB"},
    "Mistral": {"kind": "Mistral", "sliding_window": None},
    "a sliding window of a segment": {"kind": "Mistral", "sliding_window": SEGMENT},
    "SmolLM2": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True,
                "is_llama_config": True, "rope_interleaved": False},
    "Qwen2": {"kind": "Qwen2"},
    "Qwen2.5": {"kind": "Qwen2", "use_mrope": False, "max_window_layers": 24,
                "use_sliding_window": False, "sliding_window": 32},
    "Qwen2 with a sliding window of a segment in layer 1": {
        "kind": "Qwen2", "use_sliding_window": True, "sliding_window": SEGMENT,
        "max_window_layers": 1},
    "Qwen3": {"kind": "Qwen3", "head_dim": 20, "tie_word_embeddings": True},
    "yarn": {"rope_parameters": YARN},
    "Qwen2 with yarn": {"kind": "Qwen2", "rope_parameters": YARN},
    "yarn with all its keys": {"rope_parameters": {
        **YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3}},
    "yarn with DeepSeek's scales": {"rope_parameters": {
        **YARN, "mscale": 0.7, "mscale_all_dim": 0.4}},
}  # fmt: skip


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_without_memory_logits_are_transformers_own_up_to_a_segment(
    tmp_path: Path, save_model: Any, changes: dict[str, Any]
) -> None:
    model = save_model(tmp_path / "hub", **changes)
    ours, tokens = imported(tmp_path, "memory.kind=none"), random_tokens(SEGMENT)
    assert ours.config.tied_embeddings is changes.get("tie_word_embeddings", False)
    assert_equal_logits(logits(ours, tokens), theirs(model, tokens))
    # Beyond, each segment is a text of its own to the local attention.
    more = random_tokens(2 * SEGMENT + 9)
    parts = [theirs(model, part) for part in more.split(SEGMENT, dim=1)]
    if "rope_parameters" not in changes:
        assert_equal_logits(logits(ours, more)[:, :SEGMENT], parts[0])
        assert float((logits(ours, more) - theirs(model, more)).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_an_empty_memory_that_reads_as_the_local_attention_keeps_the_first_segment(
    tmp_path: Path, save_model: Any, kind: str
) -> None:
    model = save_model(tmp_path / "hub")
    words = [f"memory.kind={kind}", "memory.when_empty=local", "memory.initial_gate=-1"]
    ours, tokens = imported(tmp_path, *words), random_tokens(SEGMENT + 20)
    expected = theirs(model, tokens[:, :SEGMENT])
    found = logits(ours, tokens)
    assert_equal_logits(found[:, :SEGMENT], expected)
    # In streaming and decoding, too.
    streamed, stream = ours.extend(tokens[:, :50], ours.open_stream(2, CPU))
    assert_equal_logits(streamed, expected[:, :50])
    more, _ = ours.extend(tokens[:, 50:], stream)
    assert_equal_logits(more, found[:, 50:])
    # With nothing read, as `pretrain eval` masks it, memory is off at every length.
    (tmp_path / "none").mkdir()
    save_model(tmp_path / "none/hub")
    off = logits(imported(tmp_path / "none", "memory.kind=none"), tokens)
    assert_equal_logits(logits(ours, tokens, read_memory=False), off)


def test_an_empty_memory_that_reads_as_0_scales_the_first_segment_by_the_gate(
    tmp_path: Path, save_model: Any
) -> None:
    model, tokens = save_model(tmp_path / "hub"), random_tokens(SEGMENT)
    expected = theirs(model, tokens)
    off = float(
        (logits(imported(tmp_path, "memory.initial_gate=0"), tokens) - expected).abs().max()
    )
    assert off > 0.1
    # Attention's output, scaled by 1 - g, is what the output projection can make up for.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.5)
    scaled = trained.load(tmp_path / "out", CPU).model
    assert_equal_logits(logits(scaled, tokens), theirs(model, tokens))


@kinds.of_every_kind
def test_a_model_is_imported_with_any_memory_and_keeps_the_logits_that_need_none(
    tmp_path: Path, save_model: Any, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = save_model(tmp_path / "hub")
    choices = kinds.words(kind, "memory")
    infini = "when_empty" in MEMORY_KINDS[kind].settings
    ours = imported(tmp_path, *choices, *["memory.when_empty=local"] * infini)
    assert ours.config.memory.kind == kind
    tokens = random_tokens(2 * ours.config.span + 20)
    found = logits(ours, tokens)
    span = ours.config.span
    assert span == SEGMENT * (2 if kind == "full" else 1)
    assert_equal_logits(found[:, :span], theirs(model, tokens[:, :span]))
    assert found.isfinite().all()
    # What the memory has of its own is as in a new model.
    own = [name for name, _ in ours.named_parameters() if is_of_memory(name)]
    said = f"initialized: {counted(len(own), 'tensor')} of the memory" in capsys.readouterr().out
    assert said == bool(own)
    for name in own:
        values = ours.get_parameter(name).flatten()
        assert values.isfinite().all() and values.std() < 1


def test_the_segments_of_full_attention_are_chosen_to_divide_the_window(
    tmp_path: Path, save_model: Any
) -> None:
    save_model(tmp_path / "hub")
    assert refused(tmp_path, "memory.kind=full", "memory.full.segments=3") == [
        "memory.full.segments: 3 does not divide window_segments=16; choose a divisor of it"
    ]
    sliding = save_model(tmp_path / "sliding/hub", "Mistral", sliding_window=SEGMENT)
    assert sliding.config.sliding_window == SEGMENT
    (problem,) = refused(
        tmp_path / "sliding", f"segment={SEGMENT}", "memory.kind=full", "memory.full.segments=4"
    )
    assert problem.startswith("config.json: sliding_window: 64 tokens are fewer than the 256 of ")
    assert problem.endswith("choose segment=16 or less, within which it cuts nothing")


def test_gates_begin_as_chosen_and_weights_keep_their_bits_and_dtype(
    tmp_path: Path, save_model: Any
) -> None:
    model = save_model(tmp_path / "hub").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hub")
    imported(tmp_path, "memory.initial_gate=-2.5")
    with Checkpoint(tmp_path / "out/checkpoints/step-00000000") as checkpoint:
        name = "layers.1.attention.q_proj.weight/param"
        weight = model.model.layers[1].self_attn.q_proj.weight
        assert torch.equal(checkpoint.tensor(name, torch.bfloat16), weight)
        gates = checkpoint.tensor("layers.0.attention.gate/param", torch.float32)
        assert torch.equal(gates, torch.full((4,), -2.5))
        assert checkpoint.trainer["imported"]["path"] == str((tmp_path / "hub").resolve())
        assert checkpoint.lanes() == 0
    # On a GPU it is evaluated in the precision that it came in.
    assert trained.load(tmp_path / "out", CPU).config.train.precision == "bf16"


def test_the_average_that_an_import_lacks_is_no_reason_to_resume_it(
    tmp_path: Path, save_model: Any
) -> None:
    save_model(tmp_path / "hub")
    imported(tmp_path)
    with pytest.raises(TrainedError, match="since it is an imported model") as refused:
        trained.load(tmp_path / "out", CPU, "ema")
    assert str(refused.value).endswith("leave out --weights ema")


@pytest.mark.parametrize("kind", ["rmt", "autocompressor"])
def test_learned_vectors_begin_random_or_as_the_embedding_of_eos(
    tmp_path: Path, save_model: Any, kind: str
) -> None:
    save_model(tmp_path / "hub")
    imported(tmp_path, f"memory.kind={kind}", f"memory.{kind}.vectors=5")
    model = trained.load(tmp_path / "out", CPU).model
    assert model.recurrence is not None
    learned, embedding = model.recurrence.learned(), model.embedding.weight
    if kind == "autocompressor":
        assert torch.equal(learned, embedding[2].expand(5, -1))
    else:
        assert (torch.pdist(learned) > 0.01).all() and 0.07 < learned.std() < 0.13
    tokens = torch.randint(3, 320, (1, 40))
    _, stream = model.extend(tokens, model.open_stream(1, CPU))
    assert stream.recurrence is not None


def test_two_ranks_begin_with_an_imported_model(
    tmp_path: Path, save_model: Any, write_data_set: Any, tokenizer_model: Path
) -> None:
    shape = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 48}
    save_model(tmp_path / "hub", **shape).to(torch.bfloat16).save_pretrained(tmp_path / "hub")
    words = ["segment=8", "memory.initial_gate=-2"]
    llama.run(tmp_path / "hub", tmp_path / "old", words, None)
    documents = np.random.default_rng(0).integers(3, 320, size=(8, 90))
    write_data_set(tmp_path / "data", list(documents), 4, 320, tokenizer=tokenizer_model)
    same = ("model.tied_embeddings=false", "model.norm_eps=1e-6", "train.steps=1")
    (tmp_path / "empty.yaml").write_text("{}\n")
    ranks.train(2, tmp_path / "empty.yaml", *words_of(tmp_path, *same))
    source = Checkpoint(tmp_path / "old/checkpoints/step-00000000")
    begun = Checkpoint(tmp_path / "new/checkpoints/step-00000001")
    for name in source.names():
        assert torch.equal(begun.tensor(name), source.tensor(name).float()), name
    assert begun.trainer["origin"]["sha256"] == source.sha256


def test_the_recipe_of_the_papers_passkey_model_is_llamas_shape() -> None:
    # config.json of meta-llama/Llama-3.2-1B.
    plain = {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048, "head_dim": 64,
        "initializer_range": 0.02, "intermediate_size": 8192, "attention_bias": False,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        }, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 128256,
    }  # fmt: skip
    chosen = settings.load(ImportConfig, None, ["segment=2048", "memory.when_empty=local"])
    for name in ("passkey_1b", "passkey_1b_tune"):
        assert load(ROOT / f"configs/{name}.yaml").model == model_config(plain, chosen)


def test_rows_without_a_token_are_left_out(
    tmp_path: Path, save_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokens = save_model(tmp_path / "hub", vocab_size=384), random_tokens(40)
    ours = imported(tmp_path, "memory.kind=none")
    assert "left out: 64 rows of the embeddings" in capsys.readouterr().out
    assert_equal_logits(logits(ours, tokens), theirs(model, tokens)[..., :320])


def test_rows_of_tokens_that_are_named_beside_the_tokenizer_are_kept(
    tmp_path: Path, save_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokens = save_model(tmp_path / "hub", vocab_size=406), random_tokens(40) + 86
    (tmp_path / "hub/tokenizer.model").unlink()
    byte_level(tmp_path / "hub/tokenizer.json")
    added = {"<|im_start|>": 404, "<|im_end|>": 405}
    (tmp_path / "hub/added_tokens.json").write_text(json.dumps(added))
    change(tmp_path / "hub/generation_config.json", eos_token_id=[401, 405])
    ours = imported(tmp_path, "memory.kind=none")
    assert_equal_logits(logits(ours, tokens), theirs(model, tokens))
    assert logits(ours, tokens).shape[2] == 406
    said = capsys.readouterr().out
    assert "added to tokenizer.json: <|im_start|>, <|im_end|>" in said and "left out" not in said
    assert trained.load(tmp_path / "out", CPU).ends == {401, 405}


def test_an_end_of_text_that_is_no_token_is_refused(tmp_path: Path, save_model: Any) -> None:
    save_model(tmp_path / "hub", vocab_size=324)
    change(tmp_path / "hub/generation_config.json", eos_token_id=[2, 320, 323])
    assert refused(tmp_path) == [
        f"eos_token_id: {id} is no token of {tmp_path / 'hub/tokenizer.model'}, which has 320; "
        "name the tokenizer that has it: --tokenizer FILE"
        for id in (320, 323)
    ]


def test_a_text_is_continued_as_by_transformers(
    tmp_path: Path, save_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "hub")
    imported(tmp_path, "memory.when_empty=local")
    own = trained.load(tmp_path / "out", CPU)
    prompt = own.tokenizer.encode("It is a truth")
    logits, stream = generate.prefill(own, prompt, print)
    found = list(generate.sampled(own, logits, stream, Sampling(max_tokens=12, temperature=0)))
    laid_out = torch.tensor([[own.tokenizer.bos_id, *prompt.tolist()]])
    expected = model.generate(laid_out, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert len(found) == 12
    assert found == expected[0, laid_out.shape[1] :].tolist()


def interleaved(x: Tensor, table: rotary.Rotary) -> Tensor:
    """Rotary embedding of neighbouring components, as GPT-J's."""
    first, second = x[..., ::2], x[..., 1::2]
    cosine, sine = table
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, dim=-1).flatten(-2)


def scrambled_groups(queries: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
    """Query head h reads key/value head h % K, as where heads were repeated, not interleaved."""
    times = queries.shape[2] // keys.shape[2]
    keys, values = keys.repeat(1, 1, times, 1), values.repeat(1, 1, times, 1)
    return local_attention._scaled_dot_product(queries, keys, values, **options)


def test_parity_sees_a_wrong_rotation_and_a_wrong_grouping_of_heads(
    tmp_path: Path, save_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = save_model(tmp_path / "hub"), random_tokens(SEGMENT)
    ours, expected = imported(tmp_path, "memory.kind=none"), theirs(model, tokens)
    with monkeypatch.context() as planted:
        planted.setattr("pretrain.model.window.rotate", interleaved)
        assert float((logits(ours, tokens) - expected).abs().max()) > 0.01
    with monkeypatch.context() as planted:
        planted.setattr(
            local_attention, "_causal", lambda q, k, v: scrambled_groups(q, k, v, is_causal=True)
        )
        assert float((logits(ours, tokens) - expected).abs().max()) > 0.01
    assert_equal_logits(logits(ours, tokens), expected)


def refused(tmp_path: Path, *words: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        imported(tmp_path, *words)
    assert not (tmp_path / "out").exists()
    return caught.value.problems


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_everything_that_cannot_be_imported_is_reported_at_once(
    tmp_path: Path, save_model: Any
) -> None:
    save_model(tmp_path / "hub")
    change(
        tmp_path / "hub/config.json", hidden_act="gelu", attention_bias=True, sliding_window=32,
        num_attention_heads="four", quantization_config={},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4},
    )  # fmt: skip
    (tmp_path / "hub/tokenizer.json").write_text("{}")
    said = "\n".join([*refused(tmp_path), *refused(tmp_path, "segmant=3")])
    for what in (
        "holds both of tokenizer.model and tokenizer.json", "--tokenizer FILE",
        "attention_bias: True; our projection of the heads has no bias", "hidden_act: 'gelu'",
        "sliding_window: 32 tokens are fewer than the 64 of a segment",
        "quantization_config: quantized", "rope_type: 'dynamic' is not computed here",
        "num_attention_heads: expected a whole number, found 'four'", "segmant: unknown key; did",
    ):  # fmt: skip
        assert what in said, said


OBEYED: dict[str, Any] = {
    "is_causal": False,
    "per_layer_config": {"0": {"num_attention_heads": 2}},
    "mlp_bias": True,
    "add_cross_attention": True,
    "partial_rotary_factor": 0.5,
    "auto_map": {"AutoModelForCausalLM": "modeling.Other"},
    "architectures": ["LlamaForSequenceClassification"],
    "residual_multiplier": 0.5,
    "no_rope_layers": [1, 0],
    "logit_scale": 2.0,
    "use_bidirectional_attention": True,
    "vocab_size": 384,
}
"""Keys that change what a model computes, or may."""


def test_every_key_that_may_change_what_is_computed_is_refused(
    tmp_path: Path, save_model: Any
) -> None:
    save_model(tmp_path / "hub")
    change(tmp_path / "hub/config.json", **OBEYED)
    said = [text.removeprefix("config.json: ").partition(":")[0] for text in refused(tmp_path)]
    assert sorted(said) == sorted(OBEYED.keys() - {"vocab_size"})
    # The tensors are looked at where the configuration is sound.
    (tmp_path / "other").mkdir()
    save_model(tmp_path / "other/hub")
    change(tmp_path / "other/hub/config.json", vocab_size=384)
    assert refused(tmp_path / "other") == ["vocab_size: 384, and the embedding has 320 rows"]


def test_keys_of_the_first_llamas_and_of_trainers_that_no_model_reads_are_taken(
    tmp_path: Path, save_model: Any
) -> None:
    from transformers import AutoModelForCausalLM

    save_model(tmp_path / "hub")
    more = {"max_sequence_length": 32, "model_max_length": 16, "neftune_noise_alpha": 5.0}
    change(tmp_path / "hub/config.json", _flash_attn_2_enabled=True, **more)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    ours, tokens = imported(tmp_path, "memory.kind=none"), random_tokens(SEGMENT)
    assert_equal_logits(logits(ours, tokens), theirs(model, tokens))


NEWER: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "llama3, its own base": {**LLAMA3, "rope_theta": 300.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn of the longest text": {"rope_type": "yarn", "factor": 4.0},
}


@pytest.mark.parametrize("scaling", NEWER.values(), ids=NEWER)
@pytest.mark.parametrize("beside", [{}, {"rope_theta": 2000.0}], ids=str)
def test_an_older_rope_scaling_replaces_all_of_the_newer_key_as_in_transformers(
    tmp_path: Path, save_model: Any, scaling: dict[str, Any], beside: dict[str, Any]
) -> None:
    from transformers import LlamaForCausalLM

    save_model(tmp_path / "hub", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    change(tmp_path / "hub/config.json", rope_scaling=scaling, **beside)
    model, tokens = LlamaForCausalLM.from_pretrained(tmp_path / "hub"), random_tokens(SEGMENT)
    assert_equal_logits(logits(imported(tmp_path, "memory.kind=none"), tokens),
                        theirs(model, tokens))  # fmt: skip


@pytest.mark.parametrize("own", [True, False], ids=["another head", "the same head"])
def test_a_head_in_the_file_is_taken_where_it_is_not_the_embedding(
    tmp_path: Path, save_model: Any, capsys: pytest.CaptureFixture[str], own: bool
) -> None:
    from transformers import LlamaForCausalLM

    save_model(tmp_path / "hub", tie_word_embeddings=True)
    path = tmp_path / "hub/model.safetensors"
    tensors = load_file(path)
    head = torch.randn(320, 48, generator=torch.manual_seed(4)) / 10
    tensors["lm_head.weight"] = head if own else tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    model, tokens = LlamaForCausalLM.from_pretrained(tmp_path / "hub"), random_tokens(SEGMENT)
    ours = imported(tmp_path, "memory.kind=none")
    assert_equal_logits(logits(ours, tokens), theirs(model, tokens))
    assert ours.config.tied_embeddings is not own
    said = "taken: lm_head.weight, which differs from the embedding" in capsys.readouterr().out
    assert said is own


def test_frequencies_that_older_files_hold_are_left_out_aloud(
    tmp_path: Path, save_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "hub")
    path = tmp_path / "hub/model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path), name: torch.ones(6)}, path, metadata={"format": "pt"})
    imported(tmp_path)
    assert "left out: 1 tensor of rotary frequencies" in capsys.readouterr().out


def test_defaults_that_a_configuration_leaves_out_are_the_familys_own() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1}
    chosen = settings.load(ImportConfig, None, ["segment=64"])
    heads = {"num_attention_heads": 64}
    found = {
        kind: model_config({"model_type": kind, **shape, **heads}, chosen)
        for kind in ("llama", "mistral", "qwen2", "qwen3")
    }
    shapes = {kind: (model.n_kv_heads, model.d_head) for kind, model in found.items()}
    # Those of transformers' LlamaConfig(), MistralConfig(), ...
    assert shapes == {"llama": (64, 4), "mistral": (8, 4), "qwen2": (32, 4), "qwen3": (32, 128)}
    chosen = settings.load(ImportConfig, None, ["segment=8192"])
    with pytest.raises(SettingsError, match="sliding_window: 4096 tokens are fewer than the 8192"):
        model_config({"model_type": "mistral", **shape, **heads}, chosen)


def test_tensors_that_are_missing_too_many_or_misshapen_are_named(
    tmp_path: Path, save_model: Any
) -> None:
    save_model(tmp_path / "hub")
    path = tmp_path / "hub/model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.extra"] = torch.zeros(2)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    assert sorted(refused(tmp_path)) == [
        "lm_head.weight: is I8, expected one of F32, BF16, F16",
        "model.layers.0.extra: our model has no such tensor",
        "model.layers.1.mlp.up_proj.weight: has shape [3, 4], the configuration makes [80, 48]",
        "model.norm.weight: missing",
    ]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda hub: (hub / "config.json").unlink(), "hub: has no config.json; expected a"),
        (lambda hub: (hub / "tokenizer.model").unlink(), "holds none of tokenizer.model and "
         "tokenizer.json; give one with --tokenizer FILE, where there are other files of a "),
        (lambda hub: (hub / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda hub: (hub / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors: can"),
        (lambda hub: change(hub / "config.json", hidden_size=1.5), "hidden_size: expected a"),
        (lambda hub: (hub / "model.safetensors").write_bytes(POINTER), "model.safetensors: is a "
         "Git LFS pointer; fetch the file that it stands for (git lfs pull)"),
        (lambda hub: (hub / "tokenizer.model").write_bytes(POINTER), "tokenizer.model: is a Git L"),
        (lambda hub: (hub / "model.safetensors").rename(hub / "pytorch_model.bin"),
         "index.json, and pytorch_model.bin is not read, since pickles can run code; expected"),
    ],
)  # fmt: skip
def test_a_directory_that_is_not_whole_is_refused(
    tmp_path: Path, save_model: Any, spoil: Callable[[Path], Any], said: str
) -> None:
    save_model(tmp_path / "hub")
    spoil(tmp_path / "hub")
    assert any(said in text for text in refused(tmp_path)), refused(tmp_path)


def test_a_missing_file_of_the_index_is_reported(tmp_path: Path, save_model: Any) -> None:
    save_model(tmp_path / "hub", shard="40KB")
    lost = sorted((tmp_path / "hub").glob("model-*.safetensors"))[0]
    lost.unlink()
    assert any(lost.name in text for text in refused(tmp_path))


def test_another_models_tokenizer_is_refused(tmp_path: Path, save_model: Any) -> None:
    save_model(tmp_path / "hub", vocab_size=300)
    (found,) = refused(tmp_path)
    assert "has 320 pieces and the embedding 300 rows" in found


def test_a_directory_without_a_model_is_one_mistake(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    assert refused(tmp_path) == [
        f"{tmp_path / 'hub'}: has no config.json; expected a model as save_pretrained writes it, "
        "or a GGUF file"
    ]


def test_what_a_killed_import_left_is_written_over(tmp_path: Path, save_model: Any) -> None:
    save_model(tmp_path / "hub")
    (tmp_path / "out.importing/checkpoints/step-00000000").mkdir(parents=True)
    imported(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]


def test_an_import_that_fails_leaves_nothing_behind(tmp_path: Path, save_model: Any) -> None:
    save_model(tmp_path / "hub")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights have more
    try:
        with pytest.raises(OSError, match="File too large"):
            imported(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


MEASURED = """
import resource, sys
from pathlib import Path
from pretrain.convert import export, llama

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

llama.run(Path(sys.argv[1]), Path(sys.argv[3] + "/warm"), ["segment=64"], None)
export.run(Path(sys.argv[3] + "/warm"), Path(sys.argv[3] + "/warm-hub"), "stored")
before = peak()
llama.run(Path(sys.argv[2]), Path(sys.argv[3] + "/out"), ["segment=64"], None)
between = peak()
export.run(Path(sys.argv[3] + "/out"), Path(sys.argv[3] + "/hub"), "stored")
print("peak", between - before, peak() - before)
"""


def test_neither_way_holds_more_than_a_few_tensors_at_a_time(
    tmp_path: Path, save_model: Any
) -> None:
    save_model(tmp_path / "small")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    save_model(tmp_path / "large", **shape)
    size = (tmp_path / "large/model.safetensors").stat().st_size
    paths = [str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, check=True
    )
    _, importing, both = done.stdout.strip().splitlines()[-1].split()
    # 16 layers of seven matrices, the largest of 4 MB; the library's mapping included.
    assert size > 200e6
    assert int(importing) < size / 8 and int(both) < size / 8, done.stdout


def test_tensors_that_are_not_finite_are_named(
    tmp_path: Path, save_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "hub", vocab_size=384)
    path = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(path)
    imported(tmp_path)
    tensors["model.embed_tokens.weight"][320:] = torch.nan  # for no token, so left out
    tensors["model.norm.weight"][3] = torch.nan
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    assert "not finite" not in capsys.readouterr().out
    llama.run(tmp_path / "hub", tmp_path / "damaged", [f"segment={SEGMENT}"], None)
    line = capsys.readouterr().out.splitlines()[-1]
    named = line.partition("NaN: ")[2].partition(";")[0].split(", ")
    assert line.startswith("not finite: 2 tensors ")
    assert sorted(named) == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
