"""Models out: a directory that Hugging Face's transformers load, with the memory as its cache.

OUT/config.json, generation_config.json
OUT/chat_template.jinja            if the run began with an imported model that has one
OUT/model.safetensors, or parts of it and their index
OUT/modeling_infini_llama.py       the model, unless it has no memory and is a plain Llama
OUT/tokenizer.model or tokenizer.json, and tokenizer_config.json
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import any_of, counted
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer
from data_prep.tokenizer.hugging_face import HuggingFace
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.manifest import CheckpointError, TensorInfo
from pretrain.checkpoint.pieces import DTYPES, dtype_name, stream_tensors
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.checkpoint.runs import GENERATION, files_beside, write_beside
from pretrain.config.memory import MEMORY_KINDS
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.config.run import Weights
from pretrain.convert import beside
from pretrain.convert.families import FAMILIES, INFINI
from pretrain.convert.hugging_face import config_json, plain_type, their_name
from pretrain.model.transformer import Transformer, on_meta
from pretrain.trained import configuration_of, kind_of, locate, tokenizer_of

MODELING = "modeling_infini_llama.py"
_PART_BYTES = 5_000_000_000
_WRITTEN = {"float32": "F32", "bf16": "BF16"}
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def run(path: Path, out: Path, dtype: str, weights: Weights = "last") -> int:
    """Export a run's newest checkpoint, or one checkpoint, into the new directory `out`; 0.

    dtype: "stored", "float32" or "bf16". Raises TrainedError, CheckpointError or TokenizerError.
    """
    run_directory, checkpoint_path = locate(path, SoloRanks())
    with Checkpoint(checkpoint_path) as checkpoint:
        config = configuration_of(checkpoint)
        _check(config.model)
        own = tokenizer_of(run_directory, checkpoint)
        kind = kind_of(checkpoint, weights)
        exported = Exported(checkpoint, config, own.vocab_size, _WRITTEN.get(dtype), kind)
        with durable.new_directory(out, "exporting") as writing:
            _write(writing, exported, own, run_directory)
    print(_summary(out, exported))
    return 0


def _write(directory: Path, exported: Exported, own: Tokenizer, run_directory: Path) -> None:
    """All files of the export. Raises CheckpointError."""
    _write_weights(directory, exported)
    write_beside(directory, files_beside(run_directory))
    _write_configuration(directory, exported, own)
    if exported.config.model.memory.traits.exported_as == INFINI:
        durable.write_bytes(directory / MODELING, _modeling())
    _write_tokenizer(directory, own)
    _verify(directory, exported)


def _check(model: ModelConfig) -> None:
    """Raises SettingsError for a model that transformers have none of."""
    memory = model.memory
    if memory.traits.exported_as == INFINI:
        return
    if memory.traits.exported_as:
        if plain_type(model) is None:
            raise SettingsError(
                [
                    "model.qkv_bias: transformers have no model without memory that has biases and "
                    "the norms of model.qk_norm; one with linear or delta memory can be exported"
                ]
            )
        return
    exported = any_of([name for name, traits in MEMORY_KINDS.items() if traits.exported_as])
    problem = f"transformers have no model with the memory {memory.kind}; a model with {exported} "
    raise SettingsError([f"model.memory.kind: {problem}can be exported"])


@dataclass(frozen=True)
class Exported:
    """The weights that are exported, under Hugging Face's names."""

    checkpoint: Checkpoint
    config: Config
    vocab_size: int
    dtype: str | None
    """What matrices and norms are written in; None: as they are stored."""
    kind: str
    """Of the checkpoint's tensors: the masters, or their average."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What is written, by name, in the order of the model."""
        return {their_name(name): info for name, info in self._ours.items()}

    @property
    def gates(self) -> set[str]:
        """Names of what is written as it is stored, whatever `dtype`."""
        return {their_name(name) for name in self._model.gates()}

    @cached_property
    def _model(self) -> Transformer:
        return on_meta(self.config.model, self.vocab_size)

    @property
    def _ours(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(self._dtype(name), tuple(parameter.shape))
            for name, parameter in self._model.named_parameters()
        }

    def _dtype(self, name: str) -> str:
        stored = dtype_name(self.checkpoint.dtype(f"{name}/{self.kind}"))
        return stored if self.dtype is None or name in self._model.gates() else self.dtype

    def reader(self) -> Callable[[str], Tensor]:
        """Reads a tensor by its name; of the checkpoint no more than that stays mapped."""
        ours = {their_name(name): (name, info) for name, info in self._ours.items()}

        def read(theirs: str) -> Tensor:
            name, info = ours[theirs]
            tensor = self.checkpoint.tensor(f"{name}/{self.kind}").to(DTYPES[info.dtype])
            self.checkpoint.close()
            return tensor

        return read


def _write_weights(directory: Path, exported: Exported) -> None:
    """One file, or parts of at most 5 GB and their index."""
    tensors, read = exported.tensors, exported.reader()
    parts = _parts(tensors)
    names = ["model.safetensors"]
    if len(parts) > 1:
        count = len(parts)
        names = [f"model-{part:05d}-of-{count:05d}.safetensors" for part in range(1, count + 1)]
    for name, part in zip(names, parts, strict=True):
        stream_tensors(directory / name, part, read, {"format": "pt"})
    if len(parts) > 1:
        files = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        total = sum(map(_bytes, tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        durable.write_json(directory / "model.safetensors.index.json", index)


def _parts(tensors: Mapping[str, TensorInfo]) -> list[dict[str, TensorInfo]]:
    """The tensors in order, in parts of at most `_PART_BYTES` or of one tensor."""
    parts: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if parts[-1] and size + _bytes(info) > _PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = info
        size += _bytes(info)
    return parts


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * DTYPES[info.dtype].itemsize


def _write_configuration(directory: Path, exported: Exported, own: Tokenizer) -> None:
    special = {"bos_token_id": own.bos_id, "eos_token_id": own.eos_id, "pad_token_id": own.pad_id}
    generation = beside.generation(directory, special, exported.vocab_size)
    dtypes = [info.dtype for name, info in exported.tensors.items() if name not in exported.gates]
    config = config_json(
        exported.config.model,
        exported.vocab_size,
        exported.config.train.window_segments,
        {key: generation[key] for key in special},
        _NAMES[max(set(dtypes), key=dtypes.count)],
    )
    durable.write_json(directory / "config.json", config)
    durable.write_json(directory / GENERATION, generation)


def _write_tokenizer(directory: Path, own: Tokenizer) -> None:
    """The run's own file, and what AutoTokenizer reads beside it: it lays BOS, as training did,
    before each text, and no EOS after it."""
    data = own.laying if isinstance(own, HuggingFace) else own.path.read_bytes()
    tokenizer.write(directory, own.path.name, data)
    durable.write_json(directory / "tokenizer_config.json", _tokenizer_config(own))


def _tokenizer_config(own: Tokenizer) -> dict[str, Any]:
    ids = {"bos": own.bos_id, "eos": own.eos_id, "unk": own.unk_id, "pad": own.pad_id}
    if own.pad_id is None:
        # Texts of several lengths are padded to one with a token; the unknown one is in no text.
        ids["pad"] = own.unk_id
    tokens = {f"{role}_token": own.name(id) for role, id in ids.items() if id is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": own.bos_id is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **tokens,
    }


def _modeling() -> bytes:
    return resources.files("pretrain.convert").joinpath(MODELING).read_bytes()


def _verify(directory: Path, exported: Exported) -> None:
    """Read back names, shapes and dtypes of all that was written. Raises CheckpointError."""
    found: dict[str, TensorInfo] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                found[name] = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
    wanted = exported.tensors
    wrong = sorted(
        name for name in {*found, *wanted} if found.get(name) != wanted.get(name)
    )  # fmt: skip
    if wrong:
        raise CheckpointError(
            f"{directory}: differs from what should have been written: {wrong[0]} was read back as "
            f"{found.get(wrong[0])}, expected {wanted.get(wrong[0])}"
        )


def _plain_name(model: ModelConfig) -> str:
    """Llama, or what transformers call the model otherwise."""
    kind = plain_type(model)
    return "" if kind is None else FAMILIES[kind].architecture.removesuffix("ForCausalLM")


def _summary(out: Path, exported: Exported) -> str:
    tensors = exported.tensors
    count = sum(torch.Size(info.shape).numel() for info in tensors.values())
    lines = [f"exported: {counted(len(tensors), 'tensor')}, {count:,} weights, into {out}"]
    model = exported.config.model
    if model.memory.traits.exported_as != INFINI:
        reach = "a segment" if model.span == model.segment else "what its attention spans"
        lines.append(
            f"a plain {_plain_name(model)}: it has the same logits for texts of at most "
            f"{model.span} tokens, "
            f"{reach}, and attends to more than the model was trained with beyond"
        )
    else:
        lines.append(
            f"AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True) loads it"
        )
    return "\n".join(lines)
