"""What Hugging Face's Llama family calls the parts of our model, in weights and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from pretrain.config import ImportConfig, ModelConfig, RopeScalingConfig

PLAIN = ("llama", "mistral")
"""The model types that are our model without memory, as far as local attention spans."""
INFINI = "infini_llama"
"""Our own model type, as `export` writes it."""

_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}
_PARTS = {
    **{f"attention.{x}_proj.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"feed_forward.{x}_proj": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    "attention.gate": "self_attn.gate",
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
# Tools take it for the longest text that a model is given, and ours has none.
_LONGEST = 2**20


def their_name(name: str) -> str:
    """Hugging Face's name of our parameter `name`; the same name where they have no such part."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, part = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
    return f"model.layers.{layer}.{_PARTS[part]}" if part in _PARTS else name


def chosen_there(plain: Mapping[str, Any]) -> list[str]:
    """Of a model that `export` wrote, what was chosen for it, as overrides for `ImportConfig`."""
    own = plain.get("infini") if plain.get("model_type") == INFINI else None
    if not isinstance(own, Mapping):
        return []
    memory = own.get("memory", {})
    overrides = [f"{key}={own[key]}" for key in ("segment", "window_segments") if key in own]
    return overrides + [f"memory.{key}={value}" for key, value in memory.items()]


def model_config(plain: Mapping[str, Any], chosen: ImportConfig) -> ModelConfig:
    """Our model of a config.json. Raises SettingsError with all that our model cannot be."""
    found = _strangeness(plain, chosen)
    rope, rope_problems = _rope(plain)
    heads = plain.get("num_attention_heads")
    head = plain.get("head_dim")
    if head is None and isinstance(heads, int) and isinstance(plain.get("hidden_size"), int):
        head = plain["hidden_size"] // max(heads, 1)
    values = {ours: plain[theirs] for ours, theirs in _KEYS.items() if theirs in plain}
    missing = [theirs for ours, theirs in _KEYS.items() if ours not in values]
    found += [f"{key}: missing" for key in missing] + rope_problems
    kv_heads = plain.get("num_key_value_heads")
    optional = {
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "d_head": head,
        "norm_eps": plain.get("rms_norm_eps", 1e-6),
        "tied_embeddings": plain.get("tie_word_embeddings", False),
        "init_std": plain.get("initializer_range", 0.02),
        **rope,
    }
    values |= {key: value for key, value in optional.items() if value is not None}
    try:
        model: ModelConfig = settings.from_plain(ModelConfig, values)
    except SettingsError as error:
        raise SettingsError(found + [_in_their_words(text) for text in error.problems]) from None
    model = replace(model, segment=chosen.segment, memory=chosen.memory)
    if not missing:
        found += [_in_their_words(text) for text in model.problems()]
    if found:
        raise SettingsError(found)
    return model


def config_json(
    model: ModelConfig,
    vocab_size: int,
    window_segments: int,
    special: Mapping[str, int | None],
    dtype: str,
) -> dict[str, Any]:
    """The config.json of our model, of a kind of memory that is exported; plain Llama's where it
    has none.

    Llama's attention has no segments, so it is our model for texts of one span at most.
    """
    scaling = _rope_scaling(model)
    common = {
        **{theirs: getattr(model, ours) for ours, theirs in _KEYS.items()},
        **special,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.d_head,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default", **scaling},
        "vocab_size": vocab_size,
        "dtype": dtype,
    }
    if model.memory.traits.exported_as != INFINI:
        return {
            "model_type": model.memory.traits.exported_as,
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": model.span,
            # Where programs before transformers 5 look for them.
            "rope_theta": model.rope_theta,
            "rope_scaling": scaling or None,
            "torch_dtype": dtype,
            **common,
        }
    # What a memory's kernel computes is no property of the model.
    own = {"kind", *model.memory.traits.settings} - {"kernel"}
    memory = {key: value for key, value in asdict(model.memory).items() if key in own}
    module = "modeling_infini_llama"
    return {
        "model_type": INFINI,
        "architectures": ["InfiniLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.InfiniLlamaConfig",
            "AutoModelForCausalLM": f"{module}.InfiniLlamaForCausalLM",
        },
        "infini": {
            "segment": model.segment, "window_segments": window_segments, "memory": memory
        },
        "max_position_embeddings": _LONGEST,
        **common,
    }  # fmt: skip


def _rope_scaling(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of scaled frequencies; nothing where they are not."""
    scaling = model.rope_scaling
    if scaling.kind == "none":
        return {}
    linear = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return linear
    return {
        **linear,
        "low_freq_factor": scaling.low_turns,
        "high_freq_factor": scaling.high_turns,
        "original_max_position_embeddings": scaling.original_length,
    }


def _strangeness(plain: Mapping[str, Any], chosen: ImportConfig) -> list[str]:
    """What the model has, and ours has not."""
    found = []
    kind = plain.get("model_type")
    if kind not in (*PLAIN, INFINI):
        biases = " (Qwen2's query, key and value projections have biases)" * (kind == "qwen2")
        found.append(
            f"model_type: {kind!r} is another architecture{biases}; expected {', '.join(PLAIN)} or "
            f"{INFINI}"
        )
    for key in ("attention_bias", "mlp_bias"):
        if plain.get(key):
            found.append(f"{key}: our projections have no biases")
    activation = plain.get("hidden_act", "silu")
    if activation != "silu":
        found.append(f"hidden_act: {activation!r}; our feed-forward is SwiGLU, with silu")
    sliding = plain.get("sliding_window")
    span = ModelConfig(segment=chosen.segment, memory=chosen.memory).span
    if isinstance(sliding, int) and sliding < span and plain.get("use_sliding_window", True):
        of = "a segment" if span == chosen.segment else "memory.full.segments segments"
        found.append(
            f"sliding_window: {sliding} tokens are fewer than the {span} of {of}; choose "
            f"segment={sliding * chosen.segment // span} or less, within which it cuts nothing"
        )
    if "quantization_config" in plain:
        found.append("quantization_config: quantized weights cannot be trained; take those before")
    return found


def _rope(plain: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our settings of the rotary embedding, and what is wrong with it."""
    given: dict[str, Any] = {"rope_theta": plain.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        part = plain.get(key) or {}
        if not isinstance(part, Mapping):
            return {}, [f"{key}: expected an object, found {part!r}"]
        given |= part
    kind = given.get("rope_type", given.get("type", "default"))
    scaling: dict[str, Any] = {}
    found = []
    if given.get("partial_rotary_factor", 1.0) != 1.0 or plain.get("partial_rotary_factor"):
        found.append("partial_rotary_factor: our rotary embedding turns whole heads")
    if kind in ("linear", "llama3"):
        scaling = {"kind": kind, "factor": given.get("factor")}
    elif kind != "default":
        found.append(f"rope_type: {kind!r} is not computed here; expected default, linear, llama3")
    if kind == "llama3":
        scaling |= {
            "low_turns": given.get("low_freq_factor"),
            "high_turns": given.get("high_freq_factor"),
            "original_length": given.get("original_max_position_embeddings"),
        }
    missing = [key for key, value in scaling.items() if value is None]
    found += [f"rope scaling {kind}: its {key} is missing" for key in missing]
    scaling = {key: value for key, value in scaling.items() if value is not None}
    if not found and kind in ("linear", "llama3"):
        try:
            built: RopeScalingConfig = settings.from_plain(RopeScalingConfig, scaling)
            found += [f"rope scaling {kind}: {text}" for text in built.problems()]
        except SettingsError as error:
            found += [f"rope scaling {kind}: {text}" for text in error.problems]
    values = {"rope_theta": given["rope_theta"], "rope_scaling": {} if found else scaling}
    return values, found


def _in_their_words(problem: str) -> str:
    """A problem with one of our settings, under the name that config.json has for it."""
    key, _, text = problem.partition(":")
    return f"{_KEYS.get(key, key)}:{text}"
