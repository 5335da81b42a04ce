"""Whether a run can resume from its newest checkpoint; torch-free, so known before a rank starts.

A checkpoint's state is only meaningful with some of its settings and with its data sets: changes of
these are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.dataset import settings
from data_prep.dataset.shards import DataError
from data_prep.dataset.wording import counted
from pretrain.checkpoint import manifest
from pretrain.checkpoint.manifest import CHECKPOINTS, CheckpointError, step_name, steps_in
from pretrain.config.root import Config
from pretrain.data.files import manifest_of

Fingerprints = Mapping[str, Sequence[Sequence[str] | None] | None]
"""The sha256 of every shard of the `sources`, and of the `preface`; None: not known."""


def problems(config: Config, made_before: Sequence[Path] = ()) -> list[str]:
    """Why the run in `run.directory` cannot be resumed; empty where it can, or has no checkpoint.

    Looks at the newest checkpoint whose manifest can be read, and not at the bytes of its tensors:
    only the trainer reads all of them. Data sets in `made_before` need not exist yet.
    """
    directory = Path(config.run.directory)
    root, passed_over = directory / CHECKPOINTS, []
    for name in map(step_name, steps_in(root)):
        try:
            trainer = manifest.read_manifest(root / name)[0].trainer
        except CheckpointError as error:
            passed_over.append((name, str(error)))
            continue
        if reason := imported(trainer, directory):
            return [reason]
        return refused(trainer, config, _fingerprints(config, made_before))
    return [manifest.none_good(root, passed_over)] if passed_over else []


def imported(trainer: Mapping[str, Any], directory: Path) -> str:
    """Why a checkpoint of `directory` is no state of a training; empty: it is one."""
    if "optimizer_steps" in trainer:
        return ""
    return (
        f"run.directory: {directory} is an imported model and cannot be resumed; set "
        f"train.start_from={directory} and a new run.directory"
    )


def refused(trainer: Mapping[str, Any], config: Config, fingerprints: Fingerprints) -> list[str]:
    """What has changed since the checkpoint that holds `trainer` and may not."""
    found = [text for key, text in changes(trainer, config).items() if _is_fixed(key)]
    found += _changed_data(trainer, fingerprints, list(config.data.sources))
    return [
        f"{text}: the run's checkpoint needs the former; set it back, or start a new run in "
        "another run.directory"
        for text in found
    ]


def changes(trainer: Mapping[str, Any], config: Config) -> dict[str, str]:
    """The settings that have changed since the checkpoint that holds `trainer`, by their keys."""
    # A version that lacks a setting did what is its default now.
    defaults = settings.to_plain(Config())
    before = {**dict(_leaves(defaults)), **dict(_leaves(trainer["configuration"]))}
    now = dict(_leaves(settings.to_plain(config)))
    items_before, items_now = set(map(_item, before)), set(map(_item, now))

    def changed(key: str) -> bool:
        if key in before and key in now:
            return bool(before[key] != now[key])
        # A setting that is no more, or new in a list's items, is no change; an item of a list is.
        return (_item(key) in items_before) != (_item(key) in items_now)

    def shown(leaves: Mapping[str, Any], key: str) -> str:
        return repr(leaves[key]) if key in leaves else "none"

    return {
        key: f"{key}: {shown(before, key)} -> {shown(now, key)}"
        for key in {**before, **now}
        if changed(key)
    }


def _item(key: str) -> str:
    """The item of a list that a setting belongs to, `train.evaluate[0`; empty: to none."""
    return key.rpartition("].")[0]


def _fingerprints(config: Config, made_before: Sequence[Path]) -> Fingerprints:
    later = {directory.absolute() for directory in made_before}

    def of(directory: str) -> list[str] | None:
        if Path(directory).absolute() in later:
            return None
        try:
            return [shard.sha256 for shard in manifest_of(directory).shards]
        except DataError:
            return None  # `data_problems` says so

    sources = [of(source.data) for source in config.data.sources.values()]
    preface = of(config.data.preface) if config.data.preface else None
    unknown = bool(config.data.preface) and preface is None
    return (
        {"sources": sources} if unknown else {"sources": sources, "preface": preface and [preface]}
    )


def _changed_data(
    trainer: Mapping[str, Any], fingerprints: Fingerprints, keys: Sequence[str]
) -> list[str]:
    """Which data sets differ from the checkpoint's; `keys` are the sources' settings.

    Their weights may change: new ones apply from the next document of each lane.
    """
    before, now = trainer.get("sources"), fingerprints["sources"]
    assert now is not None
    if before is None:
        found = ["data: the lanes' places were written by a version without data.mix; resume the "
                 "run with that version"]  # fmt: skip
    elif len(now) != len(before):
        found = [f"data.mix: {counted(len(before), 'data set')} -> {len(now)}"]
    else:
        found = [
            f"{key}: the data set's shards differ from the checkpoint's"
            for key, ours, theirs in zip(keys, now, before, strict=True)
            if ours not in (None, theirs)
        ]
    if "preface" in fingerprints and trainer.get("preface") != fingerprints["preface"]:
        found.append("data.preface: its shards differ from the checkpoint's, or it had none")
    return found


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted key."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for index, each in enumerate(item):
                yield from _leaves(each, f"{prefix}{key}[{index}].")
        else:
            yield f"{prefix}{key}", item


def _is_fixed(key: str) -> bool:
    """Whether a checkpoint cannot be resumed with another value of this setting."""
    kernels = ("model.local_attention", "model.memory.kernel")
    model = key.startswith("model.") and key not in kernels
    return model or key in ("data.lanes", "run.seed", "train.start_from", "optim.name")
