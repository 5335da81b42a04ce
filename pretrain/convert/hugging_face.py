"""What Hugging Face's Llama family calls the parts of our model, in weights and configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from pretrain.config.memory import MEMORY_KINDS
from pretrain.config.model import ModelConfig
from pretrain.config.root import ImportConfig
from pretrain.convert import families, rope
from pretrain.convert.families import FAMILIES, INFINI

_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
}
# The keys of what may be left out there.
_MORE_KEYS = {
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_PARTS = {
    **{f"attention.{x}_proj.weight": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attention.{x}_proj.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    **{f"attention.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"},
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
# `max_position_embeddings`: tools take it for the longest text that a model accepts, and ours has
# no such limit.
_LONGEST = 2**20


def their_name(name: str) -> str:
    """Hugging Face's name of our parameter `name`; the same name where they have no such part."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, part = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
    return f"model.layers.{layer}.{_PARTS[part]}" if part in _PARTS else name


def chosen_there(plain: Mapping[str, Any], kind: str | None) -> list[str]:
    """Of a model that `export` wrote, what was chosen for it, as overrides for `ImportConfig`.

    With another `kind` of memory (None: its own), as far as that kind reads it.
    """
    own = plain.get("infini") if plain.get("model_type") == INFINI else None
    if not isinstance(own, Mapping):
        return []
    memory = own.get("memory", {})
    overrides = [f"{key}={own[key]}" for key in ("segment", "window_segments") if key in own]
    if not isinstance(memory, Mapping):
        return overrides
    kind = kind or str(memory.get("kind"))
    read = MEMORY_KINDS[kind].settings if kind in MEMORY_KINDS else ()
    idle = {name for traits in MEMORY_KINDS.values() for name in traits.settings} - {*read}
    if kind == "linear":
        idle.add("normaliser")
    return overrides + [f"memory.{key}={value}" for key, value in memory.items() if key not in idle]


def model_config(plain: Mapping[str, Any], chosen: ImportConfig) -> ModelConfig:
    """Our model of a config.json. Raises SettingsError with all that our model cannot be."""
    family = families.family_of(plain)
    span = ModelConfig(segment=chosen.segment, memory=chosen.memory).span
    found = families.problems(plain, family, span, chosen.segment)
    if family is None:
        raise SettingsError(found)
    given = {**family.defaults, **plain}
    rotary, rope_problems = rope.imported(plain, family.defaults.get("max_position_embeddings"))
    heads, head = given.get("num_attention_heads"), given.get("head_dim")
    if head is None and isinstance(heads, int) and isinstance(given.get("hidden_size"), int):
        head = given["hidden_size"] // max(heads, 1)
    values = {ours: given[theirs] for ours, theirs in _KEYS.items() if theirs in given}
    missing = [theirs for ours, theirs in _KEYS.items() if ours not in values]
    found += [f"{key}: missing" for key in missing] + rope_problems
    kv_heads = given.get("num_key_value_heads")
    optional = {
        "n_kv_heads": heads if kv_heads is None else kv_heads,
        "d_head": head,
        "norm_eps": given.get("rms_norm_eps", 1e-6),
        "tied_embeddings": given.get("tie_word_embeddings", False),
        "init_std": given.get("initializer_range", 0.02),
        **rotary,
    }
    values |= {key: value for key, value in optional.items() if value is not None}
    try:
        model: ModelConfig = settings.from_plain(ModelConfig, values)
    except SettingsError as error:
        raise SettingsError(found + [_in_their_words(text) for text in error.problems]) from None
    model = replace(
        model,
        segment=chosen.segment,
        memory=chosen.memory,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )
    if not missing:
        found += [_in_their_words(text) for text in model.problems()]
    if found:
        raise SettingsError(found)
    return model


def plain_type(model: ModelConfig) -> str | None:
    """The model type without memory that has this model's biases and norms; None: no one has."""
    kinds = ((kind, (family.qkv_bias, family.qk_norm)) for kind, family in FAMILIES.items())
    return next((kind for kind, own in kinds if own == (model.qkv_bias, model.qk_norm)), None)


def config_json(
    model: ModelConfig,
    vocab_size: int,
    window_segments: int,
    special: Mapping[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """The config.json of our model, of a kind of memory that is exported; that of its
    `plain_type`, which must be some, where it has no memory.

    Llama's attention has no segments, so it is our model for texts of one span at most.
    """
    scaling = rope.exported(model)
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
        kind = plain_type(model)
        assert kind is not None, "the caller has looked"
        return {
            "model_type": kind,
            "architectures": [FAMILIES[kind].architecture],
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
            "AutoModel": f"{module}.InfiniLlamaModel",
            "AutoModelForCausalLM": f"{module}.InfiniLlamaForCausalLM",
        },
        "infini": {
            "segment": model.segment, "window_segments": window_segments, "memory": memory
        },
        "max_position_embeddings": _LONGEST,
        "qkv_bias": model.qkv_bias,
        "qk_norm": model.qk_norm,
        **common,
    }  # fmt: skip


def _in_their_words(problem: str) -> str:
    """A problem with one of our settings, under the name that config.json has for it."""
    for ours, theirs in (_KEYS | _MORE_KEYS).items():
        problem = re.sub(rf"\b{ours}\b", theirs, problem)
    return problem
