"""The work directory of an unfinished data set: the units of work, and which of them are done.

It lets a killed run continue: a unit of work writes a marker, durably, after its results, so each
unit is either done or will be done again. How the corpus is cut into units depends on the input
files alone, never on the number of workers or tasks.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.config import Config, differences
from data_prep.dataset import durable, shards
from data_prep.dataset.settings import MistakeError
from data_prep.dataset.shards import Manifest
from data_prep.dataset.wording import counted
from data_prep.pipeline.table import Tables
from data_prep.sources import inputs, readers, storage
from data_prep.sources.documents import LongDocument, RawDocument, Reject, Survey
from data_prep.sources.inputs import InputChangedError, InputFile
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer

T = TypeVar("T")

Record = RawDocument | LongDocument | Reject

# A unit has about this many bytes, or 1 / _UNITS of the corpus if that is more.
CUT_BYTES = 1 << 20
_UNITS = 4096
# Near the end a unit is 1 / _LAST_UNITS of what is left, but at least 1 / _SMALLER of a full unit.
_LAST_UNITS = 4
_SMALLER = 8
# Reading from the middle of a compressed file decompresses all before it: at most so many times.
_COMPRESSED_PARTS = 8
# Files are surveyed together up to this size or number, or 1 / _UNITS of the corpus.
_SURVEY_BYTES = 4 << 20
_SURVEY_FILES = 128
# How a data set is made; with `limit` also how files are surveyed for it.
_VERSION, _LIMITED = 12, 1
_LOCK_SECONDS = 10.0
# Files that are looked into for the keys of their records, where no document is left.
_LOOKED_INTO = 16
# Share of a crawl's bytes that is main text, about: of Common Crawl's pages some 3 in 100.
_PAGE_TEXT = 1 / 32


class WorkspaceError(MistakeError):
    """The output directory belongs to another configuration, corpus or process."""


class NothingLeftError(WorkspaceError):
    """There is no document to make a data set of."""


@dataclass(frozen=True)
class Part:
    """Records of one file that begin in [offset, stop); `line` is the number of the first.

    Or a whole group: `files` consecutive files beginning with `file`, of `stop` bytes together. At
    most `most` records are read; None: all.
    """

    file: int
    offset: int
    line: int
    stop: int
    files: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Work:
    """Paths and tables of a work directory, and the input files in their order."""

    output: Path
    files: list[InputFile]
    evaluation: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Evaluation files of each source, by name: documents that share text with them are dropped."""
    limit: int = 0
    """Records to take of each source; 0: all."""

    @property
    def evaluation_files(self) -> dict[str, Path]:
        """Those of all sources, by name."""
        return {name: path for own in self.evaluation.values() for name, path in own.items()}

    @property
    def directory(self) -> Path:
        """The work directory, inside of the output directory."""
        return self.output / "work"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data set's copy of the tokenizer."""
        return tokenizer.load(tokenizer.find(self.output))

    @property
    def jobs(self) -> Path:
        """The file of Slurm job ids by stage, where stages were submitted."""
        return self.directory / "jobs.json"

    @property
    def begun(self) -> Path:
        """The file that says what the data set is made of."""
        return self.directory / "begun.json"

    def marker(self, stage: str, unit: int) -> Path:
        """The file whose existence says that the unit is done; it holds the unit's result."""
        return self.directory / stage / f"{unit:06d}.json"

    def read(self, stage: str, unit: int) -> Any:
        """The result of a finished unit."""
        return json.loads(self.marker(stage, unit).read_bytes())

    def finish(self, stage: str, unit: int, value: Any) -> None:
        """Mark a unit as done, with its result. The files it wrote must be durable already."""
        path = self.marker(stage, unit)
        path.parent.mkdir(exist_ok=True)
        durable.write_json(path, value, indent=None)

    def tokens(self, unit: int) -> Path:
        """The file of the tokens of a unit's documents, one after the other."""
        return self.directory / "tokenize" / f"{unit:06d}.tokens"

    def documents(self, unit: int) -> Path:
        """The file of what is known of a unit's documents, but their tokens (see table.py)."""
        return self.directory / "tokenize" / f"{unit:06d}.documents"

    @cached_property
    def tables(self) -> Tables:
        """The documents of all units; all must be tokenized."""
        return Tables.of([self.documents(unit) for unit in range(len(self.units))])

    @property
    def recipe(self) -> Path:
        """The file of the documents in the order of the shards (see writing.py)."""
        return self.directory / "order" / "recipe"

    def part(self, part: int) -> Path:
        """The file of a part of a shard that several workers write."""
        return self.directory / "parts" / f"{part:06d}.part"

    def read_tokens(self, unit: int, first: int, count: int, dtype: str) -> np.ndarray:
        """`count` of a unit's tokens, beginning with token `first`: [count], little-endian."""
        kind = np.dtype(dtype).newbyteorder("<")
        ids = np.fromfile(self.tokens(unit), kind, count=count, offset=first * kind.itemsize)
        assert len(ids) == count, f"{self.tokens(unit)} is shorter than its marker says"
        return ids

    @cached_property
    def survey_units(self) -> list[range]:
        """Ranges of consecutive input files that are surveyed together.

        All are where there is a limit: which of them are needed, those before tell.
        """
        if self.limit and self.files:
            return [range(len(self.files))]
        most = max(_SURVEY_BYTES, sum(file.listed.bytes for file in self.files) // _UNITS)
        together = max(_SURVEY_FILES, len(self.files) // _UNITS)
        units, first, size = [], 0, 0
        for index, file in enumerate(self.files):
            size += file.listed.bytes
            if size >= most or index + 1 - first >= together:
                units.append(range(first, index + 1))
                first, size = index + 1, 0
        return [*units, range(first, len(self.files))] if first < len(self.files) else units

    @cached_property
    def surveys(self) -> list[Survey]:
        """The survey of each input file; the survey stage must be done."""
        return [
            Survey.of(fields)
            for unit in range(len(self.survey_units))
            for fields in self.read("survey", unit)
        ]

    @cached_property
    def units(self) -> list[list[Part]]:
        """The units of the corpus in its order: parts of files, of about equal size together.

        The last units are smaller, so that workers finish at about the same time.
        """
        ahead = sum(found.size for found in self.surveys)
        least = max(CUT_BYTES, ahead // _UNITS)
        units: list[list[Part]] = []
        open_bytes = wanted = 0
        left: dict[str, int] = {}
        for members in inputs.groups(self.files):
            if self.surveys[members.start].is_unread:
                continue
            for part in self._limited(self._parts(members, least), left):
                if open_bytes >= wanted and not (units and self._is_one(units[-1][-1], part)):
                    units.append([])
                    open_bytes = 0
                    wanted = min(least, max(ahead // _LAST_UNITS, least // _SMALLER))
                units[-1].append(part)
                open_bytes += part.stop - part.offset
                ahead -= part.stop - part.offset
        return units

    def _is_one(self, part: Part, following: Part) -> bool:
        """Whether `limit` may be reached anywhere in both parts, since they are of archives.

        How many records an archive has is not known before it is read.
        """
        one, other = self.files[part.file].source, self.files[following.file].source
        return one == other and one in self._uncounted

    @cached_property
    def _uncounted(self) -> set[str]:
        return {file.source for file in self.files if file.format == "warc" and self.limit}

    def _limited(self, parts: list[Part], left: dict[str, int]) -> Iterator[Part]:
        """The parts, or those within `limit`; `left` counts the records left by source.

        Those of archives are counted where they are read.
        """
        if not self.limit:
            yield from parts
            return
        found = self.surveys[parts[0].file]
        last = 2 if parts[0].files > 1 else found.records + 1
        lines = [*(part.line for part in parts[1:]), last]
        for part, following in zip(parts, lines, strict=True):
            source = self.files[part.file].source
            most = left.setdefault(source, self.limit)
            if most:
                is_counted = source not in self._uncounted
                left[source] = max(most - (following - part.line) * is_counted, 0)
                yield replace(part, most=most)

    def _parts(self, members: range, least: int) -> list[Part]:
        first = members.start
        if self.files[first].group:
            size = sum(self.surveys[index].size for index in members)
            return [Part(first, 0, 1, size, len(members))]
        found = self.surveys[first]
        if self.files[first].compression:
            least = max(least, found.size // _COMPRESSED_PARTS)
        starts = [found.cuts[0]]
        starts += [cut for cut in found.cuts[1:] if cut[0] - starts[-1][0] >= least]
        stops = [*(offset for offset, _ in starts[1:]), found.size]
        return [Part(first, *start, stop) for start, stop in zip(starts, stops, strict=True)]

    def records(self, unit: int) -> Iterator[tuple[int, Record]]:
        """(index of the file, record) for each record of the unit."""
        taken = Counter[str]()
        for part in self.units[unit]:
            members = slice(part.file, part.file + part.files)
            files, surveys = self.files[members], self.surveys[members]
            if files[0].group:
                for index, record in readers.group(files, surveys):
                    yield part.file + index, record
                continue
            start = (part.offset, part.line)
            found = readers.records(files[0], surveys[0], start, part.stop)
            source = files[0].source
            most = None if part.most is None else min(part.most, self.limit - taken[source])
            for record in itertools.islice(found, most):
                taken[source] += 1
                yield part.file, record

    def unit_sizes(self) -> list[int]:
        """Bytes that each unit reads, after decompression."""
        return [sum(part.stop - part.offset for part in unit) for unit in self.units]

    def text_bytes(self) -> float:
        """About how much text there is, in bytes: of a web page less than what is read."""
        shares = (_PAGE_TEXT if found.is_pages else 1.0 for found in self.surveys)
        return sum(found.size * share for found, share in zip(self.surveys, shares, strict=True))


def make_once(
    work: Work, finished: Callable[[], T | None], make: Callable[[], None]
) -> tuple[T, bool]:
    """The result of `finished`, after `make` if it returned None; and whether it was there already.

    Keeps other processes out meanwhile, and removes the work directory at the end.
    """
    found = finished()
    already = found is not None
    if found is None or work.directory.exists():
        with locked(work):
            # Another process may have finished it meanwhile, or was killed before it cleared.
            found = finished()
            already = found is not None
            if found is None:
                make()
                found = finished()
            clear(work)
    assert found is not None
    return found, already


@contextmanager
def locked(work: Work) -> Iterator[None]:
    """Keep other processes out of the output directory. Raises WorkspaceError."""
    work.directory.mkdir(parents=True, exist_ok=True)
    path = work.directory / "lock"
    with path.open("w") as file:
        # Workers hold the lock with their parent: those of a killed run end within moments.
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                how = fcntl.LOCK_EX | fcntl.LOCK_NB
                durable.lock(file, path, how, "give an output on another one")
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WorkspaceError(
                        f"{work.output}: another data-prep process is using this directory; wait "
                        "for it to end, or give another output"
                    ) from None
                time.sleep(0.1)
        _refuse_while_queued(work)
        yield


def _refuse_while_queued(work: Work) -> None:
    """Raise WorkspaceError while jobs submitted for this directory wait or run."""
    if not work.jobs.exists():
        return
    ids = ",".join(sorted(json.loads(work.jobs.read_bytes()).values(), key=int))
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={ids}"]
    # The user's own SQUEUE_PARTITION, SQUEUE_STATES, ... would leave jobs out.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        queue = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise WorkspaceError(
            f"{work.output}: was submitted as the Slurm jobs {ids}, and there is no squeue here "
            f"to check whether they have ended; if they have, remove {work.jobs}"
        ) from None
    if queue.stdout.strip():
        raise WorkspaceError(
            f"{work.output}: its Slurm jobs are still queued or running; wait for them, or: "
            f"scancel {ids.replace(',', ' ')}"
        )
    # Slurm forgets jobs some minutes after their end.
    if queue.returncode and "Invalid job id" not in queue.stderr:
        raise WorkspaceError(
            f"{work.output}: squeue cannot say whether its Slurm jobs {ids} have ended: "
            f"{queue.stderr.strip()}"
        )


def finished(output: Path, config: Config) -> Manifest | None:
    """The manifest of a finished data set; None if there is none.

    Raises WorkspaceError where it is of another configuration, DataError where it is damaged.
    """
    if not (output / shards.MANIFEST).exists():
        return None
    manifest = shards.read_manifest(output)
    _refuse_other(output, config, manifest.configuration)
    return manifest


def begin(work: Work, config: Config) -> None:
    """Record what this data set is made of, or check that it is what was started here.

    Settings that nothing done so far depends on may change. Raises WorkspaceError.
    """
    stale = stale_stages(work, config)
    for stage in stale:
        shutil.rmtree(work.directory / stage, ignore_errors=True)
    if "shards" in stale:
        for path in work.output.glob("shard-*.tar*"):
            path.unlink()
    durable.write_json(work.begun, _identity(work, config), indent=None)


def stale_stages(work: Work, config: Config) -> list[str]:
    """The stages that a run of this configuration has to do again in this directory.

    Raises WorkspaceError where it cannot continue what was started there.
    """
    if not work.begun.exists():
        return []
    ours, theirs = _identity(work, config), json.loads(work.begun.read_bytes())
    if theirs["version"] != ours["version"]:
        raise WorkspaceError(
            f"{work.output}: was started by another version of data-prep; finish it with that "
            "version, or give another output"
        )
    then, now = theirs["configuration"], ours["configuration"]
    stale = []
    if then["shards"] != now["shards"]:
        then["shards"] = now["shards"]
        stale += ["shards", "parts", "order"]
    if then["tokenizer"] != now["tokenizer"] and not work.marker("train", 0).exists():
        then["tokenizer"] = now["tokenizer"]
        stale.append("sample")
    _refuse_other(work.output, config, then)
    if theirs != ours:
        raise WorkspaceError(
            f"{work.output}: was started with other input or evaluation files; give them "
            "again, or another output"
        )
    return stale


def _identity(work: Work, config: Config) -> dict[str, Any]:
    limited = [_LIMITED] if config.limit else []
    return {
        # A unit's marker is valid only for the same cut of the corpus into units.
        "version": [_VERSION, CUT_BYTES, _UNITS, _COMPRESSED_PARTS, *limited],
        "configuration": config.identity(),
        "files": [[file.name, file.path] for file in work.files],
        "evaluation": {
            name: durable.sha256_of(path) for name, path in sorted(work.evaluation_files.items())
        },
    }


def _refuse_other(output: Path, config: Config, theirs: dict[str, Any]) -> None:
    """Raise WorkspaceError with what differs, unless `theirs` is this configuration."""
    if found := differences(config.identity(), theirs):
        raise WorkspaceError(
            f"{output}: holds a data set of another configuration ({'; '.join(found)}); give "
            "another output, or remove this one"
        )


def check_inputs(work: Work) -> None:
    """Raise InputChangedError unless every file that this run lists holds what was surveyed.

    One of another status than then, such as a restored one, is hashed; its survey takes the new
    status. The status in the list may be older than the survey.
    """
    for unit, members in enumerate(work.survey_units):
        then = [work.surveys[index] for index in members]
        now = [_unchanged(work.files[index], work.surveys[index]) for index in members]
        if now != then:
            work.finish("survey", unit, [asdict(found) for found in now])
    vars(work).pop("surveys")  # they are read anew


def _unchanged(file: InputFile, found: Survey) -> Survey:
    if file.listed == found.status:
        return found
    status = storage.status(file.path)
    if status == found.status:
        return found
    if found.is_unread:
        return Survey.unread(status)
    if status.bytes != found.bytes or storage.sha256_of(file.path) != found.sha256:
        raise InputChangedError(file.path)
    return replace(found, version=status.version)


def check_evaluation(work: Work) -> None:
    """Raise InputChangedError unless the evaluation files are those with which the run began.

    Raises OSError where one is missing. A dry run begins nothing.
    """
    files = work.evaluation_files
    if files and work.begun.exists():
        then = json.loads(work.begun.read_bytes())["evaluation"]
        for name, path in files.items():
            if durable.sha256_of(path) != then[name]:
                raise InputChangedError(str(path))


def nothing_left(work: Work, read: int, reasons: Counter[str], more: str = "") -> NothingLeftError:
    """Why there is no data set to make of `read` records, by the number of each reason."""
    if read:
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
        if any(reason.endswith(" missing") for reason in reasons):
            looked_into = map(readers.missing_field, work.files[:_LOOKED_INTO])
            why += "".join([f"; {missing}" for missing in looked_into if missing][:1])
        return NothingLeftError(
            f"{work.output}: no document is left of {counted(read, 'record')}: {why}{more}"
        )
    formats = sorted({file.format for file in work.files})
    warc = "; of WARC, responses and conversions are records" * ("warc" in formats)
    return NothingLeftError(
        f"{work.output}: no record was found in {counted(len(work.files), 'input file')} of format "
        f"{', '.join(formats)}, such as {work.files[0].path}{warc}; check `paths` and `format`"
    )


def clear(work: Work) -> None:
    """Remove the work directory of a finished data set."""
    shutil.rmtree(work.directory, ignore_errors=True)
