"""Another number of shards for a finished data set, without tokenizing again.

The documents keep their order and are cut as `data-prep run` cuts them: every file, the manifest
included, is the same to the byte as if that command had made it with this shards.count. It may be
killed at any moment: the same command continues with the first shard that is not done.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep import accounts
from data_prep.dataset import durable, shards
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError, Document, Manifest, ShardInfo
from data_prep.dataset.wording import counted
from data_prep.pipeline import order, workspace
from data_prep.pipeline.progress import Progress
from data_prep.pipeline.workspace import Work, WorkspaceError

_STAGE = "shards"


def run(directory: Path, output: Path, count: int) -> bool:
    """Make `output` from the documents in `directory`; False if it is finished already.

    Holds one document, and the lengths of all. Raises SettingsError and WorkspaceError, and
    DataError where the data set in `directory` is damaged.
    """
    source = shards.read_manifest(directory)
    _check(directory, output, count, source)
    wanted = _wanted(source, count)
    begun = {"version": "reshard", "of": dataclasses.asdict(source), "shards": count}
    work = Work(output, [])

    def make() -> None:
        durable.write_json(work.begun, begun)
        _carry_over(directory, source, output)
        _write(directory, source, work, wanted, count)

    _, already = workspace.make_once(work, lambda: _finished(work, wanted, begun), make)
    return not already


def _check(directory: Path, output: Path, count: int, source: Manifest) -> None:
    problems = []
    if not 1 <= count <= source.documents:
        problems.append(
            f"--shards: {counted(count, 'shard')} cannot be made of "
            f"{counted(source.documents, 'document')}, since a document is never cut; choose 1 to "
            f"{source.documents}"
        )
    finished = (output / shards.MANIFEST).exists()  # nothing is written, so it may be read-only
    if not finished and (reason := durable.obstacle(output, directory=True)):
        problems.append(f"--output: {reason}")
    if output.resolve().is_relative_to(directory.resolve()):
        problems.append(f"--output: {output} lies in {directory}; give a directory outside of it")
    if problems:
        raise SettingsError(problems)


def _wanted(source: Manifest, count: int) -> Manifest:
    """The manifest of the same data set with another shards.count, without its shards."""
    cut = {**source.configuration.get("shards", {}), "count": count}
    return replace(source, configuration={**source.configuration, "shards": cut}, shards=[])


def _finished(work: Work, wanted: Manifest, begun: dict[str, Any]) -> Manifest | None:
    """The manifest of the finished data set; None if there is none.

    Raises WorkspaceError where the directory holds anything but what this command made or started.
    """
    if (work.output / shards.MANIFEST).exists():
        manifest = shards.read_manifest(work.output)
        if replace(manifest, shards=[]) == wanted:
            return manifest
        raise WorkspaceError(
            f"{work.output}: holds another data set; give another --output, or remove this one"
        )
    if work.begun.exists():
        ours = json.loads(work.begun.read_bytes()) == begun
    else:
        entries = work.output.iterdir() if work.output.exists() else iter(())
        ours = all(entry == work.directory for entry in entries)
    if not ours:
        raise WorkspaceError(
            f"{work.output}: is not empty, and not what this command started; give another "
            "--output, or remove this one"
        )
    return None


def _carry_over(directory: Path, source: Manifest, output: Path) -> None:
    """Copy the tokenizer and the reports: every file but the shards and the manifest.

    Raises DataError where the tokenizer, the accounts or the list of rejects is damaged.
    """
    model = directory / source.tokenizer.file
    if not model.is_file() or durable.sha256_of(model) != source.tokenizer.sha256:
        raise DataError(f"{model}: is missing, or is not the manifest's; copy the data set again")
    if problems := accounts.problems(directory, source):
        raise DataError("\n".join(problems))
    for path in sorted(directory.iterdir()):
        made_anew = path.name == shards.MANIFEST or path.suffix in (".tar", ".tmp")
        if path.is_file() and not made_anew:
            with path.open("rb") as file, durable.replacing(output / path.name) as out:
                shutil.copyfileobj(file, out)


def _write(directory: Path, source: Manifest, work: Work, wanted: Manifest, count: int) -> None:
    cuts = order.cut(_lengths(directory, source), count)
    done = next((n for n in range(count) if not work.marker(_STAGE, n).exists()), count)
    documents = _documents(directory, source, sum(len(run) for run in cuts[:done]))
    written = [ShardInfo(**work.read(_STAGE, shard)) for shard in range(done)]
    size = sum(info.bytes for info in source.shards)
    with closing(Progress("writing shards", size, sum(info.bytes for info in written))) as progress:
        for shard in range(done, count):
            path = work.output / shards.shard_name(shard)
            own = itertools.islice(documents, len(cuts[shard]))
            info = shards.write_shard(path, own, wanted.dtype)
            work.finish(_STAGE, shard, dataclasses.asdict(info))
            written.append(info)
            progress.show(sum(info.bytes for info in written[done:]), 0)
    manifest = replace(wanted, shards=written)
    assert sum(info.documents for info in written) == manifest.documents
    assert sum(info.tokens for info in written) == manifest.tokens
    shards.write_manifest(work.output, manifest)


def _lengths(directory: Path, source: Manifest) -> array[int]:
    """Tokens of each document. Reads and checks every shard; raises DataError."""
    lengths, read = array("q"), 0
    size = sum(info.bytes for info in source.shards)
    with closing(Progress("checking shards", size, 0)) as progress:
        for info in source.shards:
            path = directory / info.name
            shards.check_shard(path, info)
            lengths.extend(len(document.tokens) for document in shards.read_shard(path, info))
            read += info.bytes
            progress.show(read, 0)
    return lengths


def _documents(directory: Path, source: Manifest, skip: int) -> Iterator[Document]:
    """All documents in their order but the first `skip`."""
    for info in source.shards:
        if skip < info.documents:
            yield from shards.read_shard(directory / info.name, info, skip)
        skip = max(0, skip - info.documents)
