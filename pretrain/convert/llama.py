"""Models in: a Hugging Face directory or a GGUF file as a checkpoint to start a run from.

    OUT/config.yaml
    OUT/tokenizer.model or tokenizer.json
    OUT/chat_template.jinja, generation_config.json    as far as the model has them
    OUT/checkpoints/step-00000000/     one tensor after another, in the dtype that it has there

`train.start_from`, `pretrain eval`, `generate` and `export` read it as they read a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.dataset import durable, settings
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import any_of, counted
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer
from pretrain.checkpoint.alone import write_checkpoint
from pretrain.checkpoint.manifest import CHECKPOINTS, CheckpointError, TensorInfo, step_name
from pretrain.checkpoint.ranks import SoloRanks
from pretrain.checkpoint.runs import write_beside
from pretrain.checkpoint.verify import verify
from pretrain.config.memory import MEMORY_KINDS, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config, ImportConfig
from pretrain.config.run import CONFIG_FILE, RunConfig
from pretrain.config.training import TrainConfig
from pretrain.convert import beside
from pretrain.convert.families import INFINI
from pretrain.convert.hugging_face import chosen_there, model_config, their_name
from pretrain.convert.source import Source, Stored, of_directory
from pretrain.model.memories.kinds import attention_of, is_of_memory
from pretrain.model.transformer import Transformer, on_meta

_EMBEDDINGS = ("embedding.weight", "lm_head.weight")
_HEAD = "lm_head.weight"
_COMPUTED = "rotary_emb.inv_freq"
"""The end of names of frequencies, which older versions of transformers stored."""
_DTYPES = ("F32", "BF16", "F16")
_KIND, _GATE = "memory.kind=", "memory.initial_gate="


def run(source: Path, out: Path, overrides: Sequence[str], tokenizer_path: Path | None) -> int:
    """Import the model in `source`, a directory or a GGUF file, into the new directory `out`; 0.

    `overrides` are `key=value` settings of `ImportConfig`. Raises SettingsError with all that is
    wrong, before anything is written, or CheckpointError where what was written is not as meant.
    """
    plan = _plan(source, overrides, tokenizer_path)
    with durable.new_directory(out, "importing") as writing:
        broken = _write(writing, plan, plan.config(out))
    print(plan.summary(out))
    if broken:
        print(_not_finite(broken))
    return 0


def _write(directory: Path, plan: Plan, config: Config) -> list[str]:
    """All files of the import; names, as they are there, of tensors that are not finite.

    Raises CheckpointError.
    """
    tokenizer.write(directory, *plan.source.tokenizer_file)
    write_beside(directory, plan.source.beside)
    durable.write_bytes(directory / CONFIG_FILE, settings.to_yaml(config).encode())
    checkpoint = directory / CHECKPOINTS / step_name(0)
    trainer = {
        "step": 0,
        "vocab_size": plan.tokenizer.vocab_size,
        "configuration": settings.to_plain(config),
        "imported": plan.origin(),
    }
    masters = {f"{name}/param": info for name, info in plan.tensors.items()}
    broken: list[str] = []

    def read(name: str) -> Tensor:
        own = name.removesuffix("/param")
        tensor = plan.read(own)
        if not tensor.isfinite().all():
            broken.append(their_name(own))
        return tensor

    write_checkpoint(checkpoint, 0, masters, read, trainer)
    if reason := verify(checkpoint, SoloRanks()):
        raise CheckpointError(f"{checkpoint}: cannot be read back: {reason}")
    return broken


@dataclass(frozen=True)
class Plan:
    """An import that has nothing against it."""

    source: Source
    model: ModelConfig
    chosen: ImportConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, TensorInfo]
    rows: int
    """Rows of the embedding there; those past the tokenizer's ids are left out."""

    def read(self, name: str) -> Tensor:
        """Our parameter `name`."""
        theirs = their_name(name)
        if theirs not in self.source.stored:
            return self._initial(name)
        tensor = self.source.stored[theirs].read()
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

    def origin(self) -> dict[str, Any]:
        """Where the weights came from, for the checkpoint's manifest."""
        files = sorted({one.file for one in self.source.stored.values()})
        return {
            "path": str(self.source.path.resolve()),
            "config_sha256": durable.sha256_of(self.source.config_file),
            "bytes": {file.name: file.stat().st_size for file in files},
            "rows_left_out": self.rows - self.tokenizer.vocab_size,
        }

    def summary(self, out: Path) -> str:
        """What was imported, in a few lines."""
        count = sum(torch.Size(info.shape).numel() for info in self.tensors.values())
        lines = [f"imported: {counted(len(self.tensors), 'tensor')}, {count:,} weights, into {out}"]
        if left := self.rows - self.tokenizer.vocab_size:
            lines.append(f"left out: {counted(left, 'row')} of the embeddings, for no token")
        if computed := [name for name in self.source.stored if name.endswith(_COMPUTED)]:
            lines.append(
                f"left out: {counted(len(computed), 'tensor')} of rotary frequencies, which are "
                "computed from the configuration"
            )
        if self.source.plain.get("tie_word_embeddings") and not self.model.tied_embeddings:
            lines.append(
                f"taken: {_HEAD}, which differs from the embedding, though tie_word_embeddings is "
                "true; so the model has model.tied_embeddings=false"
            )
        lines += self.source.notes
        if self.source.beside:
            lines.append(f"kept: {', '.join(sorted(self.source.beside))}")
        if new := [name for name in self.tensors if their_name(name) not in self.source.stored]:
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


def _not_finite(names: Sequence[str]) -> str:
    """A line of the summary about tensors that hold NaN or infinity."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"not finite: {counted(len(names), 'tensor')} with NaN or infinity, so that the model's "
        f"outputs may be NaN: {', '.join(names[:5])}{more}; compare the files with the original"
    )


def _plan(path: Path, overrides: Sequence[str], tokenizer_path: Path | None) -> Plan:
    """Look at everything but the tensors' values. Raises SettingsError with all that is wrong."""
    read = of_directory if path.is_dir() else _gguf()
    source = read(path, tokenizer_path)
    problems, own, stored = source.problems, source.tokenizer, source.stored
    chosen, model = source.attempt(lambda: _model(source, overrides), (None, None))
    rows = own.vocab_size if own else 0
    tensors: dict[str, TensorInfo] = {}
    if model is not None and stored:
        embedding = stored.get(their_name("embedding.weight"))
        rows = embedding.info.shape[0] if embedding and embedding.info.shape else rows
        model = replace(model, tied_embeddings=model.tied_embeddings and not _has_own_head(stored))
        tensors, wrong = _tensors(model, rows, stored)
        problems += wrong
        if source.plain.get("vocab_size", rows) != rows:
            said = source.plain["vocab_size"]
            problems.append(f"vocab_size: {said!r}, and the embedding has {rows} rows")
    if own is not None and rows < own.vocab_size:
        problems.append(
            f"{own.path}: has {own.vocab_size} pieces and the embedding {rows} rows: it is "
            "another model's"
        )
    if own is not None:
        problems += beside.unknown_ends(source.beside, own)
    if problems or own is None or model is None or chosen is None:
        raise SettingsError(problems)
    for name in set(tensors) & set(_EMBEDDINGS):
        tensors[name] = TensorInfo(tensors[name].dtype, (own.vocab_size, model.d_model))
    return Plan(source, model, chosen, own, tensors, rows)


def _gguf() -> Callable[[Path, Path | None], Source]:
    """What reads a GGUF file; the library takes a while to import."""
    from pretrain.convert.gguf_file import of_file

    return of_file


def _has_own_head(stored: Mapping[str, Stored]) -> bool:
    """Whether there is an output projection that is not the embedding, whatever config.json says of
    `tie_word_embeddings`: as transformers, we then take it."""
    head, embedding = (stored.get(name) for name in (_HEAD, their_name("embedding.weight")))
    if head is None or embedding is None or head.info != embedding.info:
        return head is not None
    return not torch.equal(head.read(), embedding.read())


def _model(source: Source, overrides: Sequence[str]) -> tuple[ImportConfig, ModelConfig]:
    """What was chosen, and our model of a configuration. Raises SettingsError."""
    problems: list[str] = []
    plain = source.plain
    # Where a setting is wrong no segment is known, and nothing is said of it.
    chosen, model = ImportConfig(segment=1), ModelConfig()
    try:
        kinds = [word.removeprefix(_KIND) for word in overrides if word.startswith(_KIND)]
        there = chosen_there(plain, kinds[-1] if kinds else None)
        chosen = settings.load(ImportConfig, None, [*there, *overrides])
        problems += [f"memory.{problem}" for problem in chosen.memory.problems_of_new()]
        problems += _drops_memory(plain, chosen.memory)
    except SettingsError as error:
        problems += error.problems
    chooses_gate = any(word.startswith(_GATE) for word in overrides)
    if chooses_gate and their_name("layers.0.attention.gate") in source.stored:
        problems.append(
            "memory.initial_gate: has no effect, since the model has gates of its own; remove it"
        )
    try:
        if plain:
            model = model_config(plain, chosen)
    except SettingsError as error:
        problems += [f"{source.config_file.name}: {text}" for text in error.problems]
    if problems or not plain:  # a file that cannot be read is reported already
        raise SettingsError(problems)
    return chosen, model


def _drops_memory(plain: Mapping[str, Any], memory: MemoryConfig) -> list[str]:
    """Why a model that `export` wrote with its memory cannot have another kind at once."""
    if plain.get("model_type") != INFINI or memory.traits.exported_as == INFINI:
        return []
    kept = any_of([name for name, traits in MEMORY_KINDS.items() if traits.exported_as == INFINI])
    return [
        f"memory.kind: {memory.kind} has no place for the model's gates; import it with {kept}, "
        f"and set model.memory.kind={memory.kind} in the run that has it as train.start_from"
    ]


def _tensors(
    model: ModelConfig, rows: int, stored: Mapping[str, Stored]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """What our parameters will be, and which tensors are missing, too many or of another shape."""
    if model.n_layers > len(stored):  # of billions the names alone would fill the memory
        return {}, [
            f"num_hidden_layers: {model.n_layers} layers, and there are "
            f"{counted(len(stored), 'tensor')} in all"
        ]
    ours = on_meta(model, rows)
    wanted = {name: (their_name(name), tuple(p.shape)) for name, p in ours.named_parameters()}
    unused = set(stored) - {theirs for theirs, _ in wanted.values()}
    if model.tied_embeddings:
        unused.discard(_HEAD)  # it is the embedding
    unused = {name for name in unused if not name.endswith(_COMPUTED)}
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
                f"{theirs}: has shape {list(there.info.shape)}, the configuration makes "
                f"{list(shape)}"
            )
        elif there.info.dtype not in _DTYPES:
            problems.append(
                f"{theirs}: is {there.info.dtype}, expected one of {', '.join(_DTYPES)}"
            )
        else:
            found[name] = there.info
    more = [f"and {counted(len(problems) - 8, 'more tensor')}"] if len(problems) > 8 else []
    return found, problems[:8] + more
