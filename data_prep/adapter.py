"""Write our shards at the end of your own datatrove pipeline.

    writer = InfiniShardWriter("data/mine", tokenizer="llama.model", shards=64)
    write = LocalPipelineExecutor([JsonlReader("raw"), MyFilter(), writer], tasks=100)
    finish = LocalPipelineExecutor([InfiniShardFinaliser(writer)], tasks=1, depends=write)
    finish.run()

The same works with SlurmPipelineExecutor. What the shards hold depends on the documents, their ids
and the settings alone; where ids are unique, not on the number of tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from data_prep.config import Config, ShardsConfig, SourceConfig, TokenizerConfig
from data_prep.dataset import durable
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from data_prep.pipeline import pipeline, workspace
from data_prep.pipeline.stages import Stage, Tokenize, TrainTokenizer
from data_prep.pipeline.workspace import Record, Work, WorkspaceError
from data_prep.sources.documents import RawDocument, Reject, Survey
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer


@dataclass(frozen=True)
class _Tasks(Work):
    """The work of the writer's tasks: each is a unit, and its token file counts as an input."""

    given: Path = Path()
    """The tokenizer, of which the finaliser puts a copy into the data set."""
    data: Iterable[Document] = ()
    """The documents of the task that is running."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer.load(self.given)

    @cached_property
    def units(self) -> list[Any]:
        return [[] for _ in self.files]

    @cached_property
    def surveys(self) -> list[Survey]:
        marks = [self.read(Tokenize.name, rank) for rank in range(len(self.files))]
        return [Survey(m["bytes"], "", m["sha256"], m["bytes"], [], "", 0) for m in marks]

    def records(self, unit: int) -> Iterator[tuple[int, Record]]:
        for line, document in enumerate(self.data, 1):
            yield unit, _record(document, line)


class _TokenizeTask(Tokenize):
    """The stage of a local run; its result identifies the task's inputs."""

    def do(self, unit: int) -> Any:
        path = self.work.tokens(unit)
        return {
            **super().do(unit),
            "bytes": path.stat().st_size,
            "sha256": durable.sha256_of(path),
            **_identity(self.config, len(self.work.files)),
        }


class InfiniShardWriter(PipelineStep):  # type: ignore[misc]
    """The last step of a pipeline: tokenizes the documents of each task and stores them durably.

    A task that has ended is not done again. `tokenizer` is a SentencePiece model or tokenizer.json;
    `seed` decides the order of documents; `shards` is their number, 0: one for every
    `shard_tokens`; `source` is the name that the documents carry. Raises SettingsError with all
    that is wrong with these, and TokenizerError; when it runs, WorkspaceError where the directory
    was started with other settings or another number of tasks, or holds files of something else
    that a data set would replace.
    """

    type = "data-prep"
    name = "shard writer"

    def __init__(
        self,
        output_dir: str | Path,
        tokenizer: str | Path,
        seed: int = 1,
        shards: int = 0,
        shard_tokens: int = 32_000_000,
        source: str = "datatrove",
    ) -> None:
        super().__init__()
        least = {"seed": (seed, 0), "shards": (shards, 0), "shard_tokens": (shard_tokens, 1)}
        if problems := _problems(str(output_dir), source, least):
            raise SettingsError(problems)
        self.config = Config(
            output=str(Path(output_dir).expanduser().absolute()),
            seed=seed,
            sources=[SourceConfig(name=source)],
            tokenizer=TokenizerConfig(path=str(Path(tokenizer).expanduser().absolute())),
            shards=ShardsConfig(count=shards, tokens=shard_tokens),
        )
        pipeline.check_lossless(Path(self.config.tokenizer.path))

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Any:
        """Tokenize the documents of task `rank` of `world_size`, unless it is done."""
        work = _work(self.config, world_size)
        if workspace.finished(work.output, self.config) is not None:
            logger.warning(f"{work.output} is a finished data set already: nothing is written")
            return
        ended = next((work.directory / Tokenize.name).glob("*.json"), None)
        if ended is not None:
            _refuse_other(work, int(ended.stem), self.config)
        if reason := pipeline.would_replace(work.output):
            raise WorkspaceError(reason)
        work.directory.mkdir(parents=True, exist_ok=True)
        with self.track_time():
            _TokenizeTask(self.config, replace(work, data=data)).run_task(rank, world_size)
        mark = work.read(Tokenize.name, rank)
        self.stat_update("documents", value=mark["documents"])
        self.stat_update("rejects", value=len(mark["rejects"]))


class InfiniShardFinaliser(PipelineStep):  # type: ignore[misc]
    """One task after all of the writer's: order, shards, manifest; it may be killed and run again.

    Raises WorkspaceError where a task of the writer is missing or belongs to another run.
    """

    type = "data-prep"
    name = "shard finaliser"

    def __init__(self, writer: InfiniShardWriter) -> None:
        super().__init__()
        self.config = writer.config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Make the directory a data set, unless it is one already."""
        if world_size != 1:
            raise WorkspaceError(f"InfiniShardFinaliser: runs as one task, not {world_size}")
        marks = Path(self.config.output) / "work" / Tokenize.name
        ended = next(marks.glob("*.json"), None)
        work = _work(self.config, json.loads(ended.read_bytes())["tasks"] if ended else 0)
        if workspace.finished(work.output, self.config) is None:
            _check_tasks(work, self.config)
            workspace.begin(work, self.config)
            stages = pipeline.stages(self.config)
            after: list[type[Stage]] = [TrainTokenizer, *stages[stages.index(Tokenize) + 1 :]]
            for stage in after:
                stage(self.config, work).run_task(0, 1)
        workspace.clear(work)
        return data


def _problems(output: str, source: str, least: Mapping[str, tuple[int, int]]) -> list[str]:
    """What is wrong with arguments; of numbers `least` has the value and its lower bound."""
    reason = durable.obstacle(Path(output).expanduser(), directory=True) if output else "not set"
    found = [f"output_dir: {reason}"] if reason else []
    found += [] if source else ["source: not set; documents carry it, e.g. source='web'"]
    return found + [
        f"{name}: expected at least {low}, found {value}"
        for name, (value, low) in least.items()
        if value < low
    ]


def _work(config: Config, tasks: int) -> _Tasks:
    output, source = Path(config.output), config.sources[0]
    bare = Work(output, [])
    files = [
        InputFile(source, str(bare.tokens(rank)), f"task-{rank:06d}", "text", None)
        for rank in range(tasks)
    ]
    return _Tasks(output, files, given=Path(config.tokenizer.path))


def _identity(config: Config, tasks: int) -> dict[str, Any]:
    tokenizer = durable.sha256_of(Path(config.tokenizer.path))
    source = config.sources[0].name
    return {"tasks": tasks, "tokenizer": tokenizer, "source": source, "seed": config.seed}


def _refuse_other(work: Work, rank: int, config: Config) -> None:
    theirs = work.read(Tokenize.name, rank)
    for key, ours in _identity(config, len(work.files)).items():
        if theirs[key] != ours:
            raise WorkspaceError(
                f"{work.output}: was started with {key}={theirs[key]}, now it is {ours}; continue "
                "with the former, or remove the directory"
            )


def _check_tasks(work: Work, config: Config) -> None:
    missing = [r for r in range(len(work.files)) if not work.marker(Tokenize.name, r).exists()]
    if missing or not work.files:
        raise WorkspaceError(
            f"{work.output}: of {counted(len(work.files), 'task')} of InfiniShardWriter "
            f"{counted(len(missing), 'has', 'have')} not ended here, the first {missing[:3]}; run "
            "them again (with skip_completed=False, if datatrove counts them as completed)"
        )
    for rank in range(len(work.files)):
        _refuse_other(work, rank, config)


def _record(document: Document, line: int) -> RawDocument | Reject:
    """The document as a record, whose line is its number in the task."""
    text = document.text
    if not text:
        return Reject(line, 0, "empty text", str(document.id))
    try:
        size, id = len(text.encode()), str(document.id)
        id.encode()
    except UnicodeEncodeError as error:
        return Reject(line, 0, "lone surrogate", repr(error.object[error.start]))
    return RawDocument(id, line, 0, size, text)
