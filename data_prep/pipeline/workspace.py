"""The work directory of a data set in the making: what is to be done and what is done.

It makes a killed run continue: every unit of work leaves a marker, written durably after what it
stands for, so a unit is done or not begun. Units are laid down once and depend on the input files
alone, never on the number of workers or tasks.
"""

from __future__ import annotations

import fcntl
import functools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import Config, differences
from data_prep.dataset import durable
from data_prep.sources import inputs
from data_prep.sources.documents import Survey
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import Tokenizer

# Units have this size, or what makes _UNITS of the corpus if that is more.
CUT_BYTES = 1 << 20
_UNITS = 4096
# The last units: as many as share what is left of the corpus, down to a part of a unit's size.
_LAST_UNITS = 4
_SMALLER = 8
# Reading from inside of a compressed file decompresses all before: at most so many times.
_COMPRESSED_PARTS = 8
# Files are surveyed together up to this size or number, or what makes _UNITS of the corpus.
_SURVEY_BYTES = 4 << 20
_SURVEY_FILES = 128
_VERSION = 4
_LOCK_SECONDS = 10.0


@functools.cache
def _loaded(path: Path, changed: int) -> Tokenizer:
    # A worker keeps it over its tasks: its tables take longer to make than a unit to encode.
    return tokenizer.load(path)


class WorkspaceError(ValueError):
    """The output directory belongs to another configuration, corpus or process."""


@dataclass(frozen=True)
class Part:
    """Records of one file that begin in [offset, stop); `line` is the number of the first.

    Or a whole group: `files` of them from `file` on, whose sizes sum to `stop`. `most` is how many
    records of it are taken; None: all.
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
    evaluation: dict[str, Path] = field(default_factory=dict)
    """Files that documents must share no text with, by name."""
    limit: int = 0
    """Records to take of each source; 0: all."""

    @property
    def directory(self) -> Path:
        """The work directory, inside of the output directory."""
        return self.output / "work"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The data set's copy of the tokenizer, read once a process."""
        path = tokenizer.find(self.output)
        return _loaded(path, path.stat().st_mtime_ns)

    @property
    def jobs(self) -> Path:
        """Slurm job ids by stage, where stages were submitted."""
        return self.directory / "jobs.json"

    def marker(self, stage: str, unit: int) -> Path:
        """The file that stands for a unit being done, and says what it found."""
        return self.directory / stage / f"{unit:06d}.json"

    def read(self, stage: str, unit: int) -> Any:
        """What the marker of a finished unit says."""
        return json.loads(self.marker(stage, unit).read_bytes())

    def finish(self, stage: str, unit: int, value: Any) -> None:
        """Mark a unit as done. What it stands for must be durable already."""
        path = self.marker(stage, unit)
        path.parent.mkdir(exist_ok=True)
        durable.write_json(path, value, indent=None)

    def tokens(self, unit: int) -> Path:
        """The tokens of a unit's documents, one after the other."""
        return self.directory / "tokenize" / f"{unit:06d}.tokens"

    def read_tokens(self, unit: int, first: int, count: int, dtype: str) -> np.ndarray:
        """`count` of a unit's tokens from the number `first` on."""
        kind = np.dtype(dtype).newbyteorder("<")
        ids = np.fromfile(self.tokens(unit), kind, count=count, offset=first * kind.itemsize)
        assert len(ids) == count, f"{self.tokens(unit)} is shorter than its marker says"
        return ids

    @cached_property
    def survey_units(self) -> list[range]:
        """Runs of consecutive input files that are surveyed together."""
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
        """What each input file is, after the survey."""
        plain = (
            item for unit in range(len(self.survey_units)) for item in self.read("survey", unit)
        )
        return [
            Survey(**{**item, "cuts": [(offset, line) for offset, line in item["cuts"]]})
            for item in plain
        ]

    @cached_property
    def units(self) -> list[list[Part]]:
        """Parts of files in the order of the corpus, of about equal size together.

        The last ones are smaller, so that workers come to the end at about the same time.
        """
        ahead = sum(found.size for found in self.surveys)
        least = max(CUT_BYTES, ahead // _UNITS)
        units: list[list[Part]] = []
        open_bytes = wanted = 0
        left: dict[str, int] = {}
        for members in inputs.groups(self.files):
            for part in self._limited(self._parts(members, least), left):
                if open_bytes >= wanted:
                    units.append([])
                    open_bytes = 0
                    wanted = min(least, max(ahead // _LAST_UNITS, least // _SMALLER))
                units[-1].append(part)
                open_bytes += part.stop - part.offset
                ahead -= part.stop - part.offset
        return units

    def _limited(self, parts: list[Part], left: dict[str, int]) -> Iterator[Part]:
        """The parts, or what `limit` leaves of them; `left` counts by source."""
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
                left[source] = max(most - (following - part.line), 0)
                yield replace(part, most=most)

    def _parts(self, members: range, least: int) -> list[Part]:
        first = members.start
        if not self.files[first].group:
            return _parts(first, self.files[first], self.surveys[first], least)
        size = sum(self.surveys[index].size for index in members)
        return [Part(first, 0, 1, size, len(members))]

    def unit_sizes(self) -> list[int]:
        """Bytes that each unit reads, after decompression."""
        return [sum(part.stop - part.offset for part in unit) for unit in self.units]


def _parts(index: int, file: InputFile, found: Survey, least: int) -> list[Part]:
    if file.compression:
        least = max(least, found.size // _COMPRESSED_PARTS)
    starts = [found.cuts[0]]
    for cut in found.cuts[1:]:
        if cut[0] - starts[-1][0] >= least:
            starts.append(cut)
    stops = [*(offset for offset, _ in starts[1:]), found.size]
    return [
        Part(index, offset, line, stop) for (offset, line), stop in zip(starts, stops, strict=True)
    ]


@contextmanager
def claimed(work: Work) -> Iterator[None]:
    """Keep other processes out of the output directory. Raises WorkspaceError."""
    work.directory.mkdir(parents=True, exist_ok=True)
    with (work.directory / "lock").open("w") as file:
        # Workers hold the lock with their parent: a killed run's last ones end within moments.
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise WorkspaceError(
                        f"{work.output}: another data-prep is at work in this directory"
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
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise WorkspaceError(
            f"{work.output}: was submitted as the Slurm jobs {ids}, and there is no squeue here "
            f"to ask whether they have ended; if they have, remove {work.jobs}"
        ) from None
    if asked.stdout.strip():
        raise WorkspaceError(
            f"{work.output}: its Slurm jobs are still queued or running; wait for them, or: "
            f"scancel {ids.replace(',', ' ')}"
        )
    # Slurm forgets jobs some minutes after their end.
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise WorkspaceError(
            f"{work.output}: whether its Slurm jobs {ids} have ended is not known: "
            f"{asked.stderr.strip()}"
        )


def begin(work: Work, config: Config) -> None:
    """Note what this data set is, or refuse to continue another one. Raises WorkspaceError."""
    path = work.directory / "begun.json"
    ours: dict[str, Any] = {
        # What is done rests on how the corpus is cut into units.
        "version": [_VERSION, CUT_BYTES, _UNITS, _COMPRESSED_PARTS],
        "configuration": config.identity(),
        "files": [[file.name, file.path] for file in work.files],
        "evaluation": {
            name: durable.sha256_of(path) for name, path in sorted(work.evaluation.items())
        },
    }
    if path.exists():
        theirs = json.loads(path.read_bytes())
        if theirs["version"] != ours["version"]:
            raise WorkspaceError(
                f"{work.output}: was begun by another version of data-prep; finish it with that "
                "one, or give another output"
            )
        _take_over(work, theirs["configuration"], ours["configuration"])
        refuse_other(work.output, config, theirs["configuration"])
        if theirs != ours:
            raise WorkspaceError(
                f"{work.output}: was begun with other input or evaluation files; give them "
                "again, or another output"
            )
    durable.write_json(path, ours, indent=None)


def _take_over(work: Work, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Let a user mend settings that what is done does not rest on, or that let it fail."""
    if theirs["shards"] != ours["shards"]:
        theirs["shards"] = ours["shards"]
        for stage in ("shards", "recipes", "order"):
            shutil.rmtree(work.directory / stage, ignore_errors=True)
        for path in work.output.glob("shard-*.tar*"):
            path.unlink()
    if theirs["tokenizer"] != ours["tokenizer"] and not work.marker("train", 0).exists():
        theirs["tokenizer"] = ours["tokenizer"]
        shutil.rmtree(work.directory / "sample", ignore_errors=True)


def refuse_other(output: Path, config: Config, theirs: dict[str, Any]) -> None:
    """Raise WorkspaceError, naming what differs, unless `theirs` is this configuration."""
    if found := differences(config.identity(), theirs):
        raise WorkspaceError(
            f"{output}: holds a data set of another configuration ({'; '.join(found)}); give "
            "another output, or remove this one"
        )


def check_inputs(work: Work) -> None:
    """Raise InputChangedError unless every file was surveyed as it was listed by this run."""
    for file, found in zip(work.files, work.surveys, strict=True):
        if file.listed != found.status:
            raise inputs.changed(file.path)


def clear(work: Work) -> None:
    """Remove the work directory of a finished data set."""
    shutil.rmtree(work.directory, ignore_errors=True)
