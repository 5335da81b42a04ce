"""What is checked before a rank is launched, without torch: all problems at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from data_prep.dataset import durable, shards
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError, Manifest
from data_prep.dataset.wording import counted
from data_prep.recall import tasks
from data_prep.sources.storage import is_url
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import FILES, Tokenizer, TokenizerError
from pretrain.checkpoint.attempts import committed_step
from pretrain.checkpoint.manifest import CHECKPOINTS, steps_in
from pretrain.checkpoint.runs import HUGGING_FACE, is_run
from pretrain.config.root import Config
from pretrain.config.run import CONFIG_FILE
from pretrain.data.files import UnreachableError, files_of, incomplete, manifest_of
from pretrain.jobs import origin, resumable


def check_start(config: Config, ranks: int) -> None:
    """Raise SettingsError with every reason why a run on `ranks` ranks cannot start."""
    problems = config.rank_problems(ranks)
    if config.model.local_attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        problems.append(
            "model.local_attention: flash-attn is not installed; install the extra `gpu` (README), "
            "or set it to auto or sdpa"
        )
    problems += new_run_problems(config) + tracking_problems(config)
    problems += directory_problems(config)
    problems += origin.problems(config) + resumable.problems(config)
    refuse(problems, config)


def refuse(problems: Sequence[str], config: Config, made_before: Sequence[Path] = ()) -> None:
    """Raise SettingsError with `problems` and those of the data sets, if there are any.

    Raises UnreachableError where there is no mistake, but a server that does not answer.
    """
    found = [*problems]
    try:
        found += data_problems(config, made_before)
    except UnreachableError as error:
        if not found:
            raise
        found.append(str(error))
    if found:
        raise SettingsError(found)


def new_run_problems(config: Config) -> list[str]:
    """What a run may not begin with, though one that did can still be resumed."""
    if steps_in(Path(config.run.directory) / CHECKPOINTS):
        return []
    return config.problems_of_new()


def tracking_problems(config: Config) -> list[str]:
    """Why TensorBoard's files cannot be written."""
    if not config.tensorboard.enabled or importlib.util.find_spec("tensorboard"):
        return []
    return [
        "tensorboard.enabled: tensorboard is not installed; install the extra `tensorboard` "
        "(README), or set it to false"
    ]


def directory_problems(config: Config, made_before: Sequence[Path] = ()) -> list[str]:
    """Why no run can be in `run.directory`; an earlier job makes data sets in `made_before`."""
    directory = Path(config.run.directory)
    reason = durable.obstacle(directory, directory=True) or no_place_for_a_run(directory)
    if directory.resolve() in {one.resolve() for one in made_before}:
        reason = f"{directory} is where an earlier job makes a data set; give another directory"
    return [f"run.directory: {reason}"] if reason else []


def no_place_for_a_run(path: Path) -> str:
    """Why training at `path` would replace or mix up files of something else; empty: it is a run,
    or has none of the files that a run begins with."""
    resolved = path.resolve()
    for one in (resolved, *resolved.parents):
        if one.name == CHECKPOINTS and is_run(one.parent):
            return f"{path} is in the {CHECKPOINTS}/ of the run {one.parent}; give another place"
    if is_run(path):
        return ""
    if (path / shards.MANIFEST).is_file():
        return f"{path} is a data set, whose tokenizer would be replaced; give a new directory"
    if (path / HUGGING_FACE).is_file():
        return (
            f"{path} is a Hugging Face model, whose tokenizer would be replaced; give a new "
            "directory"
        )
    replaced = [name for name in (CONFIG_FILE, *FILES) if (path / name).exists()]
    if not replaced:
        return ""
    return (
        f"{path} is no run, and its {' and '.join(replaced)} would be replaced; give a new "
        "directory, or move what is there away"
    )


def moved_problems(path: Path, overrides: Sequence[str], config: Config) -> list[str]:
    """Why a run's own configuration at `path` does not name the run that it lies in.

    A run that was moved, copied, or is named from another directory would else be resumed,
    or begin again, elsewhere without a word. An override of `run.directory` says what is meant.
    """
    run, named = path.parent, config.run.directory
    said = any(word.startswith(("run.directory=", "run=")) for word in overrides)
    if said or path.name != CONFIG_FILE or not is_run(run):
        return []
    if Path(named).is_dir() and run.samefile(named):
        return []
    return [
        f"run.directory: {path} is the configuration of the run in {run}, but names {named}: the "
        f"run was moved or copied, or {named} is not seen from here; give run.directory={run} to "
        f"continue the run in {run}, or run.directory={named}"
    ]


def data_problems(config: Config, made_before: Sequence[Path] = ()) -> list[str]:
    """Why the data sets cannot be read, or not together.

    Those in `made_before`, which an earlier job makes, need not exist yet. Raises UnreachableError
    where that is all and a server does not answer: a job that is started again then is not to end
    as one with a mistake does.
    """
    directories = {key: source.data for key, source in config.data.sources.items()}
    directories |= {"data.preface": config.data.preface, "data.validation": config.data.validation}
    evaluated = {
        f"train.evaluate[{index}].data": one.data for index, one in enumerate(config.train.evaluate)
    }
    directories |= evaluated
    later = {directory.absolute() for directory in made_before}
    # Of a data set that is retired, or not begun, no file is read.
    step = committed_step(Path(config.run.directory))
    idle = {key for key, one in config.data.sources.items() if not one.weight_after(step)}
    problems, unreachable, manifests = [], [], {}
    for key, directory in directories.items():
        if not directory or Path(directory).absolute() in later:
            continue
        try:
            manifest = manifests[key] = manifest_of(directory)
        except UnreachableError as error:
            unreachable.append(f"{key}: {error}")
            continue
        except DataError as error:
            problems.append(f"{key}: {error}")
            continue
        if key not in idle:
            problems += [f"{key}: {reason}" for reason in incomplete(directory, manifest)]
            problems += _cache_problems(directory, manifest, config)
        if key not in evaluated and len(manifest.shards) < config.data.lanes:
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
    if any(one.lengths for one in config.train.evaluate):
        problems += _question_problems(config, later)
    if unreachable and not problems:
        raise UnreachableError(unreachable[0])
    return problems + unreachable


def _cache_problems(directory: str, manifest: Manifest, config: Config) -> list[str]:
    """Why the cache can hold no shard of the data set; more may be needed, as lanes are shared."""
    cache = config.data.cache
    largest = max((shard.bytes for shard in manifest.shards), default=0)
    if not is_url(directory) or largest <= cache.bytes:
        return []
    return [
        f"data.cache.gigabytes: {cache.gigabytes:g}, but {directory} has a shard of "
        f"{largest / 1e9:.3g} GB, and the cache has to hold one per lane of the node and source; "
        "raise it"
    ]


def _question_problems(config: Config, later: Collection[Path]) -> list[str]:
    """Why questions in training (`train.evaluate`) cannot be asked."""
    problems = []
    own: Tokenizer | None = None
    try:
        own = _tokenizer(config)
    except TokenizerError as error:
        problems.append(f"train.evaluate: {error}")
    for index, one in enumerate(config.train.evaluate):
        key = f"train.evaluate[{index}]"
        if one.filler and Path(one.filler).absolute() not in later:
            try:
                lacking = incomplete(one.filler, shards.read_manifest(Path(one.filler)))
            except DataError as error:
                lacking = [str(error)]
            problems += [f"{key}.filler: {reason}" for reason in lacking]
        for task in one.tasks_asked if own else ():
            assert own is not None
            short = tasks.too_short(
                task, own, one.lengths, seed=one.seed, samples=one.samples, depths=one.depths_asked
            )
            problems += [f"{key}.lengths: {reason}" for reason in short]
    return problems


def _tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of the first data set that has its file. Raises TokenizerError.

    None where none has it: `data_problems` says so, or an earlier job makes it.
    """
    for source in config.data.sources.values():
        with suppress(DataError):
            files = files_of(source.data, config.data.cache)
            path = Path(files.location) / files.manifest.tokenizer.file
            return tokenizer.of_bytes(path, files.tokenizer())
    return None
