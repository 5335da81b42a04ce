"""GGUF files, llama.cpp's: their metadata as a config.json, their tensors under Hugging Face's
names, dequantized.

llama.cpp rotates neighbouring components of a head in its `llama` architecture (Llama, Mistral,
SmolLM2), so its converter puts the halves of each head's query and key rows one between another;
here that is undone. Its `qwen2` and `qwen3` rotate halves, as we do, and their rows lie as ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from data_prep.tokenizer.contract import FILES
from data_prep.tokenizer.hugging_face import HuggingFace
from data_prep.tokenizer.sentencepiece import SentencePiece
from pretrain.checkpoint.manifest import TensorInfo
from pretrain.convert import beside, gguf_tokenizer
from pretrain.convert.source import Source, Stored

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_PERMUTED = ("llama",)
_SHAPE = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""Keys of an architecture, and those of config.json."""
_REQUIRED = (
    "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)  # fmt: skip
_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_IDLE = ("rope.scaling.finetuned", "expert_used_count")
_ONLY: Mapping[str, Any] = {
    "attention.causal": True,
    "use_parallel_residual": False,
    "expert_count": 0,
    "rope.scale_linear": 1.0,
}
"""Keys with the one value under which our model computes the same."""
_NAMED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FACTORS = "rope_freqs.weight"
# Llama 3.1's scaling, of which a GGUF file has the factor of each frequency instead.
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192
_STORED = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_PLAIN = {"F32": np.float32, "F16": np.float16}
"""Types whose numbers are read as they are."""
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def of_file(path: Path, tokenizer_path: Path | None) -> Source:
    """The model in a GGUF file. Raises SettingsError where it is none."""
    reader, metadata = _read(path)
    source = Source(path, path)
    kind = metadata.get("general.architecture")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise SettingsError(
            [f"{path.name}: general.architecture: {kind!r}; expected one of {known}"]
        )
    source.plain = source.attempt(lambda: _config(path, kind, metadata, reader), {})
    heads = {
        "self_attn.q_proj": source.plain.get("num_attention_heads"),
        "self_attn.k_proj": source.plain.get("num_key_value_heads"),
    }
    source.stored = {
        name: _stored(path, one, _heads(name, heads) if kind in _PERMUTED else None)
        for one in reader.tensors
        if one.name != _FACTORS
        for name in [_their_name(one.name)]
    }
    source.problems += _unread(path, reader)
    if tokenizer_path is None:
        source.attempt(lambda: _take_tokenizer(source, metadata), None)
    else:
        source.attempt(lambda: source.take_tokenizer(tokenizer_path), None)
    source.beside = source.attempt(lambda: _beside(path, metadata), {})
    return source


def _read(path: Path) -> tuple[gguf.GGUFReader, dict[str, Any]]:
    """The file, and its metadata. Raises SettingsError."""
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: one.contents() for key, one in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise SettingsError([f"{path}: is not a whole GGUF file ({error})"]) from None
    if metadata.get("split.count", 1) > 1:
        raise SettingsError(
            [f"{path}: is one of several parts; join them first (llama-gguf-split --merge)"]
        )
    if metadata.get("general.type", "model") != "model":
        raise SettingsError(
            [f"{path}: general.type: {metadata['general.type']!r}; expected 'model'"]
        )
    return reader, metadata


def _unread(path: Path, reader: gguf.GGUFReader) -> list[str]:
    """Which tensors are of a type that the `gguf` package does not dequantize."""
    found = []
    for kind in dict.fromkeys(one.tensor_type for one in reader.tensors):
        names = [one.name for one in reader.tensors if one.tensor_type == kind]
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            gguf.quants.dequantize(block.view(_PLAIN.get(kind.name, np.uint8)), kind)
        except NotImplementedError:
            more = f" and {counted(len(names) - 1, 'more tensor')}" if len(names) > 1 else ""
            found.append(
                f"{path.name}: {names[0]}{more}: of type {kind.name}, which the gguf package does "
                "not dequantize; take the model in another type, such as F16 or Q8_0"
            )
    return found


def _config(
    path: Path, kind: str, metadata: Mapping[str, Any], reader: gguf.GGUFReader
) -> dict[str, Any]:
    """The config.json that the metadata are. Raises SettingsError with all that is wrong."""
    own = {
        key.removeprefix(f"{kind}."): _shortest(value)
        for key, value in metadata.items()
        if key.startswith(f"{kind}.")
    }
    strange = [
        key
        for key in metadata
        if key.partition(".")[0] not in ("GGUF", "general", "tokenizer", "quantize", "split", kind)
    ]
    strange += [
        f"{kind}.{key}"
        for key in own.keys() - _SHAPE.keys() - _SCALING.keys() - _ONLY.keys() - set(_IDLE)
        if key not in ("rope.dimension_count", "attention.value_length")
    ]
    problems = [
        f"{key}: is no key that is known here, so it may change what the model computes"
        for key in sorted(strange)
    ]
    problems += [
        f"{kind}.{key}: {own[key]!r}; expected {value!r}"
        for key, value in _ONLY.items()
        if own.get(key, value) != value
    ]
    problems += [f"{kind}.{key}: missing" for key in _REQUIRED if key not in own]
    problems += _uneven(kind, own)
    if problems:
        raise SettingsError([f"{path.name}: {text}" for text in problems])
    plain = {theirs: own[key] for key, theirs in _SHAPE.items() if key in own}
    tensors = {one.name: one for one in reader.tensors}
    heads = plain["num_attention_heads"]
    # What llama.cpp takes for keys that a file lacks.
    size = own.get("rope.dimension_count", plain["hidden_size"] // max(heads, 1))
    others = {"head_dim": size, "num_key_value_heads": heads, "rope_theta": 10000.0}
    plain |= {key: value for key, value in others.items() if key not in plain}
    if "sliding_window" in plain and kind != "llama":
        plain["use_sliding_window"] = True
    theta = plain.pop("rope_theta")
    scaling = _scaling(path, own, tensors.get(_FACTORS), theta)
    plain["rope_parameters"] = {"rope_theta": theta, **scaling}
    return {**plain, "model_type": kind, "tie_word_embeddings": "output.weight" not in tensors}


def _uneven(kind: str, own: Mapping[str, Any]) -> list[str]:
    """Heads or layers that are not all alike, or heads that are rotated in part."""
    found = [
        f"{kind}.{key}: differs from layer to layer; our layers are all alike"
        for key, value in own.items()
        if isinstance(value, list)
    ]
    size = own.get("attention.key_length", own.get("rope.dimension_count"))
    found += [
        f"{kind}.{key}: {own[key]!r} is not the size of a head, {size}"
        for key in ("rope.dimension_count", "attention.value_length")
        if own.get(key, size) != size
    ]
    return found


def _scaling(
    path: Path, own: Mapping[str, Any], factors: gguf.ReaderTensor | None, theta: float
) -> dict[str, Any]:
    """`rope_parameters` of scaled frequencies. Raises SettingsError."""
    # llama.cpp takes a factor without a type as linear.
    bare = "none" if own.get("rope.scaling.factor", 1.0) == 1 else "linear"
    kind = own.get("rope.scaling.type", bare)
    if kind == "none":
        return {} if factors is None else _llama3(path, _dense(factors), theta)
    if factors is not None:
        raise SettingsError(
            [f"{path.name}: {_FACTORS}: cannot be combined with another scaling of positions"]
        )
    return {"rope_type": kind} | {new: own[key] for key, new in _SCALING.items() if key in own}


def _llama3(path: Path, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling, of whose frequencies these must be the divisors [d_head / 2].

    Raises SettingsError.
    """
    factor = float(factors.max())
    frequencies = theta ** -(np.arange(factors.size) / factors.size)
    turns = _ORIGINAL * frequencies / (2 * math.pi)
    kept = np.clip((turns - _LOW) / (_HIGH - _LOW), 0, 1)
    if not np.allclose(factors, 1 / ((1 - kept) / factor + kept), rtol=1e-4):
        raise SettingsError(
            [f"{path.name}: {_FACTORS}: divides frequencies otherwise than Llama 3.1, whose "
             f"original length is {_ORIGINAL}, which is not computed here"]
        )  # fmt: skip
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _ORIGINAL,
    }


def _take_tokenizer(source: Source, metadata: Mapping[str, Any]) -> None:
    """Use the tokenizer that the metadata hold. Raises TokenizerError."""
    name, data = gguf_tokenizer.of_metadata(source.path, metadata)
    kind = HuggingFace if name == FILES[1] else SentencePiece
    source.tokenizer, source.tokenizer_file = kind(source.path, data), (name, data)


def _beside(path: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The chat templates and the ids that end a text. Raises SettingsError."""
    first = "tokenizer.chat_template"
    templates = {
        "default" if key == first else key.removeprefix(f"{first}."): text
        for key, text in metadata.items()
        if key.startswith(first) and isinstance(text, str)
    }
    # A file gets the name of its template.
    if wrong := [name for name in templates if name in ("", ".", "..") or Path(name).name != name]:
        raise SettingsError(
            [f"{path.name}: {first}.{name}: {name!r} is no name of a file" for name in wrong]
        )
    roles = ("eos_token_id", "eot_token_id", "eom_token_id")
    given = [metadata.get(f"tokenizer.ggml.{role}") for role in roles]
    ends = list(dict.fromkeys(id for id in given if id is not None))
    eos = ends if len(ends) > 1 else ends[0] if ends else None
    return beside.files(templates, {} if eos is None else {"eos_token_id": eos})


def _their_name(name: str) -> str:
    """Hugging Face's name of a tensor; the same name where it has none."""
    if name.startswith("blk."):
        _, layer, part, kind = [*name.split("."), "", ""][:4]
        return f"model.layers.{layer}.{_PARTS[part]}.{kind}" if part in _PARTS else name
    return _NAMED.get(name, name)


def _shortest(value: Any) -> Any:
    """A number of the file's float32 as people wrote it: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _heads(name: str, heads: Mapping[str, Any]) -> int | None:
    """The heads whose rows are permuted in this tensor; None: they are not."""
    return next((count for part, count in heads.items() if f".{part}." in name), None)


def _stored(path: Path, one: gguf.ReaderTensor, heads: int | None) -> Stored:
    dtype = _STORED.get(one.tensor_type.name, "F32")
    shape = tuple(int(size) for size in reversed(one.shape))
    return Stored(path, TensorInfo(dtype, shape), partial(_tensor, one, shape, dtype, heads))


def _tensor(one: gguf.ReaderTensor, shape: Sequence[int], dtype: str, heads: int | None) -> Tensor:
    """The tensor, rows of its heads laid as ours."""
    dense = torch.from_numpy(np.array(_dense(one))).to(_TORCH[dtype]).reshape(tuple(shape))
    if heads is None:
        return dense
    pairs = dense.reshape(heads, -1, 2, *shape[1:])
    return pairs.transpose(1, 2).reshape(tuple(shape))


def _dense(one: gguf.ReaderTensor) -> np.ndarray:
    """Its numbers in float32."""
    numbers: np.ndarray = gguf.quants.dequantize(one.data, one.tensor_type)
    return numbers
