"""What is checked before a rank is launched, without torch: all problems at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from data_prep.dataset.wording import counted
from pretrain.config import Config
from pretrain.data.files import manifest_of
from pretrain.jobs import origin


def check_start(config: Config, ranks: int) -> None:
    """Raise SettingsError with every reason why a run on `ranks` ranks cannot start."""
    problems = config.rank_problems(ranks)
    if config.model.local_attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        problems.append(
            "model.local_attention: flash-attn is not installed; install the extra `gpu` (README), "
            "or set it to auto or sdpa"
        )
    problems += directory_problems(config) + data_problems(config) + origin.problems(config)
    if problems:
        raise SettingsError(problems)


def directory_problems(config: Config) -> list[str]:
    """Why no run can be in `run.directory`."""
    reason = durable.obstacle(Path(config.run.directory), directory=True)
    return [f"run.directory: {reason}"] if reason else []


def data_problems(config: Config, made_before: Sequence[Path] = ()) -> list[str]:
    """Why the data sets cannot be read, or not together.

    Those in `made_before`, which an earlier job makes, need not exist yet.
    """
    directories = {key: source.data for key, source in config.data.sources.items()}
    directories |= {"data.preface": config.data.preface, "data.validation": config.data.validation}
    later = {directory.absolute() for directory in made_before}
    problems, manifests = [], {}
    for key, directory in directories.items():
        if not directory or Path(directory).absolute() in later:
            continue
        try:
            manifest = manifests[key] = manifest_of(directory)
        except DataError as error:
            problems.append(f"{key}: {error}")
            continue
        if len(manifest.shards) < config.data.lanes:
            problems.append(
                f"{key}: {directory} has {counted(len(manifest.shards), 'shard')} for "
                f"data.lanes={config.data.lanes}, and each lane needs at least one; cut it "
                "into more (data-prep reshard), or lower data.lanes"
            )
    first = next(iter(manifests), "")
    problems += [
        f"{key}: its tokenizer differs from {first}'s; prepare it with "
        f"tokenizer.path={directories[first]}/{manifests[first].tokenizer.file}"
        for key, manifest in manifests.items()
        if manifest.tokenizer.sha256 != manifests[first].tokenizer.sha256
    ]
    return problems
