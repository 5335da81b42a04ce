"""Models in: a Hugging Face directory of the Llama family as a checkpoint to start a run from.

    OUT/config.yaml
    OUT/tokenizer.model or tokenizer.json
    OUT/checkpoints/step-00000000/     one tensor after another, in the dtype that it has there

`train.start_from`, `pretrain eval`, `generate` and `export` read it as they read a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.dataset import durable, settings
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer, TokenizerError
from pretrain.checkpoint.alone import write_checkpoint
from pretrain.checkpoint.manifest import CHECKPOINTS, CheckpointError, TensorInfo, step_name
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.checkpoint.verify import verify
from pretrain.config import CONFIG_FILE, Config, ImportConfig, ModelConfig, RunConfig, TrainConfig
from pretrain.convert.hugging_face import (
    chosen_there,
    model_config,
    their_name,
)
from pretrain.model.memories.kinds import attention_of, is_of_memory
from pretrain.model.transformer import Transformer, on_meta

_EMBEDDINGS = ("embedding.weight", "lm_head.weight")
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what it is."""

    file: Path
    info: TensorInfo

    def read(self, name: str) -> Tensor:
        """The tensor `name`, mapped while it is used and no longer."""
        with safe_open(self.file, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def run(source: Path, out: Path, overrides: Sequence[str], tokenizer_path: Path | None) -> int:
    """Import the model in `source` into the new directory `out`; the exit code, 0.

    `overrides` are `key=value` settings of `ImportConfig`. Raises SettingsError with all that is
    wrong, before anything is written, or CheckpointError where what was written is not as meant.
    """
    plan = _plan(source, out, overrides, tokenizer_path)
    writing = out.with_name(f"{out.name}.importing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    tokenizer.write(writing, *tokenizer.standalone(plan.tokenizer.path))
    configuration = settings.to_yaml(plan.config(out))
    durable.write_bytes(writing / CONFIG_FILE, configuration.encode())
    checkpoint = writing / CHECKPOINTS / step_name(0)
    trainer = {
        "step": 0,
        "vocab_size": plan.tokenizer.vocab_size,
        "configuration": settings.to_plain(plan.config(out)),
        "imported": plan.origin(source),
    }
    masters = {f"{name}/param": info for name, info in plan.tensors.items()}
    write_checkpoint(
        checkpoint, 0, masters, lambda name: plan.read(name.removesuffix("/param")), trainer
    )
    if reason := verify(checkpoint, SoloRanks()):
        raise CheckpointError(f"{checkpoint}: cannot be read back: {reason}")
    writing.rename(out)
    durable.sync_directory(out.parent)
    print(plan.summary(out))
    return 0


@dataclass(frozen=True)
class Plan:
    """An import that has nothing against it."""

    model: ModelConfig
    chosen: ImportConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, TensorInfo]
    stored: Mapping[str, Stored]
    rows: int
    """Rows of the embedding there; those past the tokenizer's ids are left out."""

    def read(self, name: str) -> Tensor:
        """Our parameter `name`."""
        theirs = their_name(name)
        if theirs not in self.stored:
            return self._initial(name)
        tensor = self.stored[theirs].read(theirs)
        return tensor[: self.tokenizer.vocab_size] if name in _EMBEDDINGS else tensor

    def _initial(self, name: str) -> Tensor:
        """The initial value of our parameter `name`, which belongs to the memory."""
        outside, eos = replace(self.model, n_layers=0), self.tokenizer.eos_id
        if eos is not None and name in on_meta(outside, 1).begins_as_eos():
            row = self.read("embedding.weight")[eos].float()
            return row.expand(self.tensors[name].shape).contiguous()
        _, layer, own = name.split(".", 2) if name.startswith("layers.") else ("", "0", name)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(layer))
            if own == name:
                return Transformer(outside, 1).get_parameter(name)
            attention = attention_of(self.model.memory).of_layer(self.model, int(layer))
            return attention.get_parameter(own.removeprefix("attention."))

    def config(self, out: Path) -> Config:
        """The configuration of the directory, as a run has one."""
        half = self.tensors["embedding.weight"].dtype == "BF16"
        train = TrainConfig(
            window_segments=self.chosen.window_segments, precision="bf16" if half else "float32"
        )
        return Config(run=RunConfig(directory=str(out)), model=self.model, train=train)

    def origin(self, source: Path) -> dict[str, Any]:
        """Where the weights came from, for the checkpoint's manifest."""
        files = sorted({one.file for one in self.stored.values()})
        return {
            "path": str(source.resolve()),
            "config_sha256": durable.sha256_of(source / "config.json"),
            "bytes": {file.name: file.stat().st_size for file in files},
            "rows_left_out": self.rows - self.tokenizer.vocab_size,
        }

    def summary(self, out: Path) -> str:
        """What was imported, in a few lines."""
        count = sum(torch.Size(info.shape).numel() for info in self.tensors.values())
        lines = [f"imported: {counted(len(self.tensors), 'tensor')}, {count:,} weights, into {out}"]
        if left := self.rows - self.tokenizer.vocab_size:
            lines.append(f"left out: {counted(left, 'row')} of the embeddings, for no token")
        if new := [name for name in self.tensors if their_name(name) not in self.stored]:
            lines.append(
                f"initialized: {counted(len(new), 'tensor')} of the memory, which the model lacks"
            )
        memory = self.model.memory
        if "when_empty" in memory.traits.settings and memory.when_empty == "zero":
            lines.append(
                "a document's first segment: its local attention is scaled by 1 - g; with "
                "memory.when_empty=local its logits stay the imported model's"
            )
        return "\n".join(lines)


def _plan(source: Path, out: Path, overrides: Sequence[str], tokenizer_path: Path | None) -> Plan:
    """Look at everything but the tensors' values. Raises SettingsError with all that is wrong."""
    if not (source / _CONFIG).is_file():
        raise SettingsError(
            [f"{source}: has no {_CONFIG}; expected a model as save_pretrained writes it"]
        )
    problems: list[str] = []
    own = _attempted(problems, lambda: _tokenizer(source, tokenizer_path))
    stored = _attempted(problems, lambda: _stored(source)) or {}
    plain = _attempted(problems, lambda: _json(source / _CONFIG))
    chosen, model = _attempted(problems, lambda: _model(plain or {}, overrides)) or (None, None)
    rows = own.vocab_size if own else 0
    tensors: dict[str, TensorInfo] = {}
    if model is not None and stored:
        embedding = stored.get(their_name("embedding.weight"))
        rows = embedding.info.shape[0] if embedding and embedding.info.shape else rows
        tensors, wrong = _tensors(model, rows, stored)
        problems += wrong
    if own is not None and rows < own.vocab_size:
        problems.append(
            f"{own.path}: has {own.vocab_size} pieces and the embedding {rows} rows: it is "
            "another model's"
        )
    if problems or own is None or model is None or chosen is None:
        raise SettingsError(problems)
    for name in set(tensors) & set(_EMBEDDINGS):
        tensors[name] = TensorInfo(tensors[name].dtype, (own.vocab_size, model.d_model))
    return Plan(model, chosen, own, tensors, stored, rows)


def _model(plain: Mapping[str, Any], overrides: Sequence[str]) -> tuple[ImportConfig, ModelConfig]:
    """What was chosen, and our model of a config.json. Raises SettingsError."""
    problems: list[str] = []
    # Where a setting is wrong no segment is known, and nothing is said of it.
    chosen, model = ImportConfig(segment=1), ModelConfig()
    try:
        chosen = settings.load(ImportConfig, None, [*chosen_there(plain), *overrides])
    except SettingsError as error:
        problems += error.problems
    try:
        if plain:
            model = model_config(plain, chosen)
    except SettingsError as error:
        problems += [f"config.json: {text}" for text in error.problems]
    if problems or not plain:  # a file that cannot be read is reported already
        raise SettingsError(problems)
    return chosen, model


def _attempted(problems: list[str], action: Callable[[], Any]) -> Any:
    """What `action` gives; None where it raised what belongs to the problems."""
    try:
        return action()
    except (SettingsError, TokenizerError) as error:
        problems += error.problems if isinstance(error, SettingsError) else [str(error)]
        return None


def _tensors(
    model: ModelConfig, rows: int, stored: Mapping[str, Stored]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """What our parameters will be, and which tensors are missing, too many or of another shape."""
    ours = on_meta(model, rows)
    wanted = {name: (their_name(name), tuple(p.shape)) for name, p in ours.named_parameters()}
    unused = set(stored) - {theirs for theirs, _ in wanted.values()}
    if model.tied_embeddings:
        unused.discard("lm_head.weight")
    # Frequencies, which older versions of transformers stored.
    unused = {name for name in unused if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"{name}: our model has no such tensor" for name in sorted(unused)]
    # A model without this memory has none of its parameters; they are then initialized.
    lacks_memory = not any(is_of_memory(name) and their_name(name) in stored for name in wanted)
    found = {}
    for name, (theirs, shape) in wanted.items():
        there = stored.get(theirs)
        if there is None and is_of_memory(name) and lacks_memory:
            found[name] = TensorInfo("F32", shape)
        elif there is None:
            problems.append(f"{theirs}: missing")
        elif there.info.shape != shape:
            problems.append(
                f"{theirs}: has shape {list(there.info.shape)}, config.json makes {list(shape)}"
            )
        elif there.info.dtype not in _DTYPES:
            problems.append(
                f"{theirs}: is {there.info.dtype}, expected one of {', '.join(_DTYPES)}"
            )
        else:
            found[name] = there.info
    more = [f"and {counted(len(problems) - 8, 'more tensor')}"] if len(problems) > 8 else []
    return found, problems[:8] + more


def _stored(source: Path) -> dict[str, Stored]:
    """Every tensor of the directory by its name. Raises SettingsError."""
    if (source / _WEIGHTS).is_file():
        index, files = None, [_WEIGHTS]
    elif (source / _INDEX).is_file():
        index = _json(source / _INDEX).get("weight_map")
        names = list(index.values()) if isinstance(index, dict) else []
        files = sorted({name for name in names if isinstance(name, str)})
        if not files or len(names) != sum(isinstance(name, str) for name in names):
            raise SettingsError([f"{_INDEX}: expected weight_map to name a file a tensor"])
    else:
        raise SettingsError(
            [
                f"{source}: holds neither {_WEIGHTS} nor {_INDEX}; expected weights as safetensors "
                "(save_pretrained writes them)"
            ],
        )
    problems: list[str] = []
    found: dict[str, Stored] = {}
    for name in files:
        if Path(name).name != name:
            problems.append(f"{_INDEX}: {name} is not a file of the directory")
            continue
        found |= _attempted(problems, partial(_listed, source / name)) or {}
    if index is not None and not problems:
        listed = {key: one.file.name for key, one in found.items()}
        wrong = sorted(key for key in {*index, *listed} if index.get(key) != listed.get(key))
        problems += [f"{key}: is not in the file that {_INDEX} says" for key in wrong[:8]]
    if problems:
        raise SettingsError(problems)
    return found


def _listed(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises SettingsError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                info = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                found[name] = Stored(path, info)
            return found
    except (OSError, SafetensorError) as error:
        raise SettingsError([f"{path.name}: cannot be read ({error})"]) from None


def _tokenizer(source: Path, path: Path | None) -> Tokenizer:
    """Raises TokenizerError."""
    if path is None:
        try:
            path = tokenizer.find(source)
        except TokenizerError as error:
            raise TokenizerError(
                f"{error}; or name the one that data sets are prepared with: --tokenizer FILE"
            ) from None
    return tokenizer.load(path)


def _json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises SettingsError."""
    reason = "expected a JSON object"
    with suppress(ValueError):
        try:
            plain = json.loads(path.read_bytes())
            if isinstance(plain, dict):
                return plain
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
    raise SettingsError([f"{path.name}: {reason}"])
