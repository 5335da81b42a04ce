"""From input files to a data set: survey, sample, train, tokenize, order, write, manifest.

Every stage may be killed at any moment: the same command goes on where it was. The bytes of the
data set depend on the input files, the configuration and the seed alone.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep import durable, inputs, order, report, shards, tokenizer, workspace
from data_prep.config import Config
from data_prep.engine import run_stage
from data_prep.order import Placed
from data_prep.settings import SettingsError
from data_prep.shards import InputInfo, Manifest, ShardInfo, TokenizerInfo
from data_prep.stages import DrawSample, SurveyFiles, Tokenize, TrainTokenizer, WriteShards
from data_prep.tokenizer import TokenizerError
from data_prep.workspace import Work, WorkspaceError

# Runs of spaces, line ends and tabs, with and without a space before the first word: what a
# normaliser that loses text changes first.
_PROBES = ("a  b\n\n\tc \r\n", " a")


@dataclass(frozen=True)
class Outcome:
    """A finished data set: `already` where there was nothing to do."""

    manifest: Manifest
    seconds: float
    already: bool


def run(config: Config, part: Literal["all", "shards"] = "all") -> Outcome:
    """Make the data set, or go on making it. `part="shards"` needs the tokenizer to be there.

    Raises what the user can help: SettingsError, WorkspaceError, TokenizerError,
    InputChangedError; DataError where a finished data set's manifest is damaged.
    """
    begun = time.monotonic()
    work = _work(config)
    manifest = _finished(config, work)
    if manifest is not None and not work.directory.exists():
        return Outcome(manifest, 0.0, already=True)
    with workspace.claimed(work):
        # Another process may have finished it meanwhile, or was killed before it cleared.
        manifest = _finished(config, work)
        already = manifest is not None
        if manifest is None:
            manifest = _make(config, work, part)
        workspace.clear(work)
    return Outcome(manifest, time.monotonic() - begun, already)


def run_tokenizer(config: Config) -> Path:
    """Train or copy the tokenizer alone; `run` goes on from there."""
    work = _work(config)
    if _finished(config, work) is None:
        with workspace.claimed(work):
            _survey(config, work)
            _tokenizer(config, work)
    return tokenizer.find(work.output)


def _work(config: Config) -> Work:
    output, model = Path(config.output).expanduser(), Path(config.tokenizer.path).expanduser()
    problems = []
    if output.exists() and not output.is_dir():
        problems.append(f"output: {output} is a file; give a directory")
    if config.tokenizer.path and not model.is_file():
        problems.append(f"tokenizer.path: {model} does not exist; prepare or copy it first")
    files = inputs.find(config, problems)
    if problems:
        raise SettingsError(problems)
    if config.tokenizer.path:
        _check_lossless(model)
    return Work(output, files)


def _workers(config: Config) -> int:
    if config.workers:
        return config.workers
    # Under Slurm a job may use a few of the machine's cores.
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _finished(config: Config, work: Work) -> Manifest | None:
    """The manifest of the finished data set, None if there is none; refuses another's."""
    if not (work.output / shards.MANIFEST).exists():
        return None
    manifest = shards.read_manifest(work.output)
    workspace.refuse_other(work.output, config, manifest.configuration)
    now = {file.name: file.path.stat().st_size for file in work.files}
    then = {file.path: file.bytes for file in manifest.inputs}
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if changed:
        raise WorkspaceError(
            f"{work.output}: was made of other input files: {changed[0]} and "
            f"{len(changed) - 1} others differ; give another output"
        )
    if config.tokenizer.path:
        _, given = _given(config)
        if hashlib.sha256(given).hexdigest() != manifest.tokenizer.sha256:
            raise WorkspaceError(f"{work.output}: was made with another tokenizer.path file")
    return manifest


def _make(config: Config, work: Work, part: Literal["all", "shards"]) -> Manifest:
    if part == "shards" and not work.marker("train", 0).exists():
        raise WorkspaceError(
            f"{work.output}: has no tokenizer yet; run `data-prep tokenizer` with the same "
            "configuration first"
        )
    _survey(config, work)
    _tokenizer(config, work)
    return _shards(config, work)


def _survey(config: Config, work: Work) -> None:
    workspace.begin(work, config)
    run_stage(SurveyFiles(config, work), _workers(config), "reading the input")
    workspace.check_inputs(work)


def _tokenizer(config: Config, work: Work) -> None:
    marker = work.marker("train", 0)
    if marker.exists():
        copy = tokenizer.find(work.output)
        there = {str(copy): copy.read_bytes()}
        if config.tokenizer.path:
            _, there[config.tokenizer.path] = _given(config)
        stated = work.read("train", 0)["sha256"]
        for path, data in there.items():
            if hashlib.sha256(data).hexdigest() != stated:
                raise WorkspaceError(
                    f"{path}: is not the tokenizer that this data set was begun with; restore "
                    "it, or give another output"
                )
        return
    # A run that was killed may have left one of the other kind.
    for name in tokenizer.FILES:
        (work.output / name).unlink(missing_ok=True)
    if config.tokenizer.path:
        name, data = _given(config)
        durable.write_bytes(work.output / name, data)
        work.finish("train", 0, {"sha256": hashlib.sha256(data).hexdigest()})
        return
    run_stage(DrawSample(config, work), _workers(config), "drawing the sample")
    run_stage(TrainTokenizer(config, work), 1, "training the tokenizer")


def _given(config: Config) -> tuple[str, bytes]:
    return tokenizer.standalone(Path(config.tokenizer.path).expanduser())


def _check_lossless(path: Path) -> None:
    model = tokenizer.load(path)
    if any(model.decode(model.encode(probe)) != probe for probe in _PROBES):
        raise TokenizerError(
            f"tokenizer.path: {path} changes white space, so texts would not come back; "
            "give one that does not normalise (as Llama 2's and Llama 3's), or leave it "
            "empty to train one"
        )


def _shards(config: Config, work: Work) -> Manifest:
    run_stage(Tokenize(config, work), _workers(config), "tokenizing")
    documents = order.shuffled(list(_tokenized(work)), config.seed)
    rejected = _write_rejects(work)
    if not documents:
        raise WorkspaceError(
            f"{work.output}: none of {rejected} records was accepted; the reasons are in "
            f"{work.output / report.REJECTS}"
        )
    sizes = _write_recipes(config, work, documents)
    # Seconds long: here it is imported once, for all workers that are forked from this process.
    importlib.import_module("webdataset")
    run_stage(WriteShards(config, work, sizes), _workers(config), "writing shards")
    return _finish(config, work, documents, len(sizes), rejected)


def _tokenized(work: Work) -> Iterator[Placed]:
    for unit in range(len(work.units)):
        first = 0
        for id, file, line, size, tokens in work.read(Tokenize.stage, unit)["documents"]:
            source, name = work.files[file].source, work.files[file].name
            yield Placed(id, source, name, line, size, tokens, unit, first)
            first += tokens


def _write_rejects(work: Work) -> int:
    """Write the rejected records, in the order of the corpus, and count them."""
    rejects = [
        (file, line, offset, reason, detail)
        for unit in range(len(work.units))
        for file, line, offset, reason, detail in work.read(Tokenize.stage, unit)["rejects"]
    ]
    keys = ("file", "line", "offset", "reason", "detail")
    with durable.replacing(work.output / report.REJECTS) as out:
        for file, *rest in sorted(rejects):
            record = dict(zip(keys, (work.files[file].name, *rest), strict=True))
            out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    return len(rejects)


def _write_recipes(config: Config, work: Work, documents: list[Placed]) -> list[int]:
    """Write which documents each shard holds; returns the bytes of text of each shard."""
    tokens = [document.tokens for document in documents]
    wanted = config.shards
    count = order.shard_count(sum(tokens), len(tokens), wanted.count, wanted.tokens)
    ids = order.unique_ids(documents)
    sizes = []
    for shard, run in enumerate(order.cut(tokens, count)):
        recipe = []
        for index in run:
            document = documents[index]
            place = (document.unit, document.first, document.tokens)
            recipe.append((ids[index], document.source, document.bytes, *place))
        work.finish("recipes", shard, recipe)
        sizes.append(sum(documents[index].bytes for index in run))
    return sizes


def _finish(
    config: Config, work: Work, documents: list[Placed], shard_count: int, rejected: int
) -> Manifest:
    written = [ShardInfo(**work.read(WriteShards.stage, shard)) for shard in range(shard_count)]
    path = tokenizer.find(work.output)
    model = tokenizer.load(path)
    manifest = Manifest(
        format_version=shards.FORMAT_VERSION,
        tokenizer=TokenizerInfo(
            file=path.name,
            sha256=work.read("train", 0)["sha256"],
            vocab_size=model.vocab_size,
            bos_id=model.bos_id,
            eos_id=model.eos_id,
            pad_id=model.pad_id,
            unk_id=model.unk_id,
        ),
        dtype=shards.dtype_of(model.vocab_size),
        configuration=config.identity(),
        inputs=[
            InputInfo(file.name, found.bytes, found.sha256)
            for file, found in zip(work.files, work.surveys, strict=True)
        ],
        shards=written,
        documents=sum(info.documents for info in written),
        tokens=sum(info.tokens for info in written),
        text_bytes=sum(document.bytes for document in documents),
        rejected=rejected,
    )
    assert manifest.documents == len(documents)
    shards.write_manifest(work.output, manifest)
    return manifest
