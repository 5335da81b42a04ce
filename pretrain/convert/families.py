"""Which models of transformers are ours without memory: by an allow-list of what they say.

Every key of a config.json must be known here, with a value under which our model computes the same.
An unknown key is refused whatever it does, since many variants of Llama differ by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INFINI = "infini_llama"
"""Our own model type, as `export` writes it."""


@dataclass(frozen=True)
class Family:
    """A model type that is our model without memory, as far as local attention spans."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers take for keys that a config.json lacks, where not all families agree."""
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    """Keys of its own: the values with which it is our model, and what ours has instead."""
    chooses_layers: bool = False
    """Whether `use_sliding_window` and `layer_types` say which layers have a sliding window."""


_NO_BIAS = ((False, None), "our projection of the heads has no bias")
_SWITCHES = {
    "use_sliding_window": ((True, False), "true or false"),
    # As Qwen2.5's own files say; transformers read it in none of these types.
    "use_mrope": ((False, None), "our rotary embedding has one position for each token"),
}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        defaults={"max_position_embeddings": 2048},
        only={
            "attention_bias": _NO_BIAS,
            "mlp_bias": ((False, None), "our feed-forward has no biases"),
            "rope_interleaved": ((False,), "our rotary embedding turns the halves of a head"),
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", qkv_bias=True, defaults=_QWEN, only=_SWITCHES, chooses_layers=True
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        defaults={**_QWEN, "head_dim": 128},
        only={**_SWITCHES, "attention_bias": _NO_BIAS},
        chooses_layers=True,
    ),
}  # fmt: skip

OTHERS = {
    "apertus": "its activation is xIELU, and it has no gate",
    "arcee": "its feed-forward is ReLU squared, without a gate",
    "bitnet": "norms lie inside attention and feed-forward, and weights are ternary",
    "cohere": "LayerNorm, attention beside the feed-forward, interleaved rotation, scaled logits",
    "cohere2": "as Cohere, and layers without positions",
    "diffllama": "attention is the difference of two",
    "ernie4_5": "its rotation is interleaved",
    "exaone4": "norms come after attention and feed-forward",
    "falcon": "LayerNorm, and attention beside the feed-forward",
    "gemma": "norms weigh by 1 + w, embeddings are scaled, the feed-forward is GELU's",
    "gemma2": "as Gemma, with norms after each part, soft caps and sliding windows",
    "gemma3_text": "as Gemma, with norms after each part and two rotary bases",
    "glm": "part of a head is rotated, interleaved",
    "glm4": "as GLM, with norms after each part",
    "gpt2": "LayerNorm, learned positions, GELU",
    "gpt_neox": "LayerNorm, attention beside the feed-forward, partial rotation",
    "granite": "embeddings, attention, residuals and logits are multiplied by constants",
    "helium": "its rotation is interleaved",
    "hunyuan_v1_dense": "queries and keys are normed after the rotation",
    "ministral": "layers differ in their attention",
    "mixtral": "its feed-forward is a mixture of experts",
    "nemotron": "LayerNorm weighed by 1 + w, ReLU squared, partial rotation",
    "olmo": "LayerNorm without weights",
    "olmo2": "norms come after attention and feed-forward; those of queries span all heads",
    "olmo3": "as OLMo 2, with sliding windows",
    "persimmon": "LayerNorm, ReLU squared, partial rotation",
    "phi": "LayerNorm, attention beside the feed-forward, partial rotation",
    "phi3": "queries, keys and values are one matrix, gate and up another",
    "qwen2_moe": "its feed-forward is a mixture of experts",
    "qwen3_moe": "its feed-forward is a mixture of experts",
    "seed_oss": "its projection of the heads may have a bias and dropout",
    "smollm3": "some layers have no rotary embedding",
    "stablelm": "LayerNorm and partial rotation",
    "starcoder2": "LayerNorm, biases everywhere, GELU",
}
"""Model types that look like Llama or are often asked for, and what they compute otherwise."""

# What `model_config` reads, or `problems` judges by itself.
_READ = {
    "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "hidden_act",
    "max_position_embeddings", "original_max_position_embeddings", "initializer_range",
    "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "sliding_window", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
# What says nothing of what the model computes: storage, training, generation and other tasks.
_IDLE = {
    "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path", "name_or_path",
    "_commit_hash", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
    "attention_dropout", "pretraining_tp", "output_attentions", "output_hidden_states",
    "return_dict", "return_dict_in_generate", "output_scores", "is_decoder", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "sep_token_id",
    "decoder_start_token_id", "is_llama_config", "transformers.js_config", "unsloth_version",
    "unsloth_fixed", "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "keep_quantized_weights", "max_sequence_length",
    "model_max_length", "neftune_noise_alpha", "_flash_attn_2_enabled",
}  # fmt: skip
# What transformers obey in every family.
_ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "our feed-forward is SwiGLU, with silu"),
    "is_causal": ((True,), "our attention is causal"),
    "is_encoder_decoder": ((False, None), "our model is a decoder alone"),
    "add_cross_attention": ((False, None), "our model is a decoder alone"),
    "tie_encoder_decoder": ((False, None), "our model is a decoder alone"),
    "cross_attention_hidden_size": ((None,), "our model is a decoder alone"),
    "chunk_size_feed_forward": ((0, None), "0"),
    "pruned_heads": (({}, None), "our layers have all heads"),
    "per_layer_config": (({}, None), "our layers are all alike"),
    "partial_rotary_factor": ((1, None), "our rotary embedding turns whole heads"),
}


def family_of(plain: Mapping[str, Any]) -> Family | None:
    """The family of a config.json; of what `export` wrote, with what it says of itself. None:
    another architecture."""
    kind = plain.get("model_type")
    if kind == INFINI:
        bias, norm = plain.get("qkv_bias") is True, plain.get("qk_norm") is True
        keys = dict.fromkeys(("qkv_bias", "qk_norm"), ((True, False), "true or false"))
        taken = {key: ((plain.get(key),), "") for key in ("infini", "auto_map")}
        return Family("InfiniLlamaForCausalLM", bias, norm, only={**keys, **taken})
    return FAMILIES.get(kind) if isinstance(kind, str) else None


def problems(plain: Mapping[str, Any], family: Family | None, span: int, segment: int) -> list[str]:
    """What a config.json says that our model, whose attention spans `span` tokens, is not."""
    if family is None:
        kind = plain.get("model_type")
        known = OTHERS.get(kind) if isinstance(kind, str) else None
        about = f" ({known})" if known else ""
        expected = ", ".join([*FAMILIES, INFINI])
        return [f"model_type: {kind!r} is another architecture{about}; expected one of {expected}"]
    only = {**_ONLY, **family.only}
    found = [
        f"{key}: {plain[key]!r}; {instead}"
        for key, (values, instead) in only.items()
        if key in plain and not any(_same(plain[key], value) for value in values)
    ]
    if plain.get("architectures") not in (None, [], [family.architecture]):
        found.append(f"architectures: {plain['architectures']}; expected [{family.architecture!r}]")
    if plain.get("quantization_config") is not None:
        found.append("quantization_config: quantized weights cannot be trained; take those before")
    found += _sliding(plain, family, span, segment)
    layers = {"layer_types", "max_window_layers"} if family.chooses_layers else set()
    unknown = sorted(plain.keys() - _READ - _IDLE - only.keys() - layers)
    return found + [
        f"{key}: is no key of {family.architecture} that is known here, so it may change what the "
        "model computes; remove it if it does not"
        for key in unknown
    ]


def _sliding(plain: Mapping[str, Any], family: Family, span: int, segment: int) -> list[str]:
    """Why the attention within a span is not all of it: a sliding window that is shorter."""
    window = plain.get("sliding_window", family.defaults.get("sliding_window"))
    if family.chooses_layers:
        switched, types = plain.get("use_sliding_window", False), plain.get("layer_types")
        if not isinstance(types, list | None):
            return [f"layer_types: expected a list or null, found {types!r}"]
        slides = switched if types is None else "sliding_attention" in types
        if any(one not in ("full_attention", "sliding_attention") for one in types or []):
            return [f"layer_types: {types!r}; our layers all have full attention"]
        if slides and not switched:
            return ["layer_types: names sliding_attention, and use_sliding_window is false"]
        window = window if slides else None
    if window is None or (isinstance(window, int) and window >= span):
        return []
    if not isinstance(window, int):
        return [f"sliding_window: expected a whole number or null, found {window!r}"]
    of = "a segment" if span == segment else "memory.full.segments segments"
    return [
        f"sliding_window: {window} tokens are fewer than the {span} of {of}; choose "
        f"segment={window * segment // span} or less, within which it cuts nothing"
    ]


def _same(found: Any, allowed: Any) -> bool:
    """Whether the values are equal, 0 and false apart."""
    return bool(found == allowed) and isinstance(found, bool) == isinstance(allowed, bool)
