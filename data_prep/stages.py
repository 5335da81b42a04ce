"""The parts of a stage that run side by side, as datatrove steps: see pipeline.stages.

A step does the units that it is dealt, or those of its task in turn, and skips those whose marker
stands, so it may be run again, with any number of tasks, on one machine or as an array of jobs over
one output directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datatrove.pipeline.base import PipelineStep

from data_prep import duplicates, durable, inputs, progress, readers, shards, tokenizer, workspace
from data_prep.accounts import Accounts
from data_prep.cleaning import Cleaned, Cleaner, fingerprint
from data_prep.config import Config
from data_prep.documents import RawDocument, Reject
from data_prep.inputs import InputFile
from data_prep.order import keyed
from data_prep.shards import Document
from data_prep.workspace import Work, WorkspaceError

# Long documents are sampled in passages, so that a sample is drawn from all of them.
_PASSAGE = 16_384
# Passages are drawn with this margin over the wanted size, since not all that is read is text of a
# document, and a few more, since few may be missing by chance; then they are cut to the size.
_MARGIN = 4.0
_SPARE = 16 * _PASSAGE


class UnitStep(PipelineStep):  # type: ignore[misc]
    """A stage cut into units. `sizes` are bytes a unit, for the progress shown under `label`.

    A `serial` stage has one unit. What the stages before it found is read when the step is made.
    """

    type = "data-prep"
    stage = ""
    label = ""
    serial = False

    def __init__(self, config: Config, work: Work) -> None:
        super().__init__()
        self.name = self.stage
        self.config, self.work = config, work
        self.sizes = self.measure()
        self._cleaners: dict[str, Cleaner] = {}

    @classmethod
    def is_needed(cls, config: Config) -> bool:
        """Whether a run of this configuration has the stage."""
        return True

    def measure(self) -> list[int]:
        """Bytes that each unit reads, after decompression."""
        return [0] if self.serial else self.work.unit_sizes()

    def check(self) -> None:
        """Raise what the user can help; called before the units are done, and if they are."""

    def done(self) -> list[bool]:
        """Whether each unit is done."""
        return [self.work.marker(self.stage, unit).exists() for unit in range(len(self.sizes))]

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do the units in `data`; None: those of task `rank` of `world_size`; but for done ones."""
        units = range(rank, len(self.sizes), world_size) if data is None else data
        for unit in units:
            if not self.work.marker(self.stage, unit).exists():
                with self.track_time():
                    self.work.finish(self.stage, unit, self.do(unit))
                self.stat_update("units")
        return data

    @abstractmethod
    def do(self, unit: int) -> Any:
        """Do a unit, durably, and return what its marker says."""

    def records(self, unit: int) -> Iterator[tuple[int, RawDocument | Reject]]:
        """(index of the file, record) of the unit's parts."""
        for part in self.work.units[unit]:
            members = slice(part.file, part.file + part.files)
            files, surveys = self.work.files[members], self.work.surveys[members]
            if files[0].group:
                for index, record in readers.group(files, surveys):
                    yield part.file + index, record
                continue
            start = (part.offset, part.line)
            found = readers.records(files[0], surveys[0], start, part.stop)
            for record in itertools.islice(found, part.most):
                yield part.file, record

    def clean(self, file: int, text: str) -> Cleaned:
        """The text of a document of this file, cleaned as its source says."""
        name = self.work.files[file].source
        if name not in self._cleaners:
            (source,) = (source for source in self.config.sources if source.name == name)
            evaluation = tuple(inputs.evaluation_files(self.config, source).values())
            self._cleaners[name] = Cleaner(source.cleaning, evaluation)
        return self._cleaners[name](text)


class SurveyFiles(UnitStep):
    """Hash and measure the input files."""

    stage = "survey"
    label = "reading the input"

    def measure(self) -> list[int]:
        """Bytes of the unit's files."""
        return [
            sum(self.work.files[file].listed.bytes for file in unit)
            for unit in self.work.survey_units
        ]

    def do(self, unit: int) -> Any:
        """Survey the files of the unit."""
        found = []
        for index in self.work.survey_units[unit]:
            survey = readers.survey(self.work.files[index], workspace.CUT_BYTES)
            found.append(vars(survey))
            progress.count(survey.bytes)
        return found


class DrawSample(UnitStep):
    """Draw passages to train the tokenizer on, each by a hash of its own."""

    stage = "sample"
    label = "drawing the sample"

    @classmethod
    def is_needed(cls, config: Config) -> bool:
        """Where no tokenizer is given."""
        return not config.tokenizer.path

    def do(self, unit: int) -> Any:
        """Draw the unit's passages: [hash, text] each."""
        wanted = _MARGIN * self.config.tokenizer.sample_bytes + _SPARE
        share = wanted / max(sum(self.sizes), 1)
        limit = int(min(share, 1.0) * 2**64)
        drawn = []
        for file, record in self.records(unit):
            progress.count(record.read)
            if isinstance(record, Reject):
                continue
            keys = self._keys(file, record, limit)
            # Most documents give nothing: they are not cleaned.
            cleaned = self.clean(file, record.text) if keys else None
            if cleaned and not cleaned.dropped:
                drawn += [
                    [key, cleaned.text[start : start + _PASSAGE]] for start, key in keys.items()
                ]
        return drawn

    def _keys(self, file: int, record: RawDocument, limit: int) -> dict[int, str]:
        """Where passages begin whose hash is within the limit, and that hash."""
        name, line = self.work.files[file].name, str(record.line)
        keys = {
            start: keyed(self.config.seed, "sample", name, line, str(start))
            for start in range(0, len(record.text), _PASSAGE)
        }
        return {start: key.hex() for start, key in keys.items() if int.from_bytes(key[:8]) <= limit}


def given(config: Config) -> tuple[str, bytes]:
    """Name and bytes of the tokenizer that the configuration gives. Raises TokenizerError."""
    return tokenizer.standalone(Path(config.tokenizer.path).expanduser())


class TrainTokenizer(UnitStep):
    """Train the tokenizer on the sample, or copy the one that is given."""

    stage = "train"
    label = "making the tokenizer"
    serial = True

    def check(self) -> None:
        """Refuse input files and a tokenizer that changed since."""
        workspace.check_inputs(self.work)
        if not self.work.marker(self.stage, 0).exists():
            return
        stated = self.work.read(self.stage, 0)["sha256"]
        copy = tokenizer.find(self.work.output)
        there = {str(copy): copy.read_bytes()}
        if self.config.tokenizer.path:
            _, there[self.config.tokenizer.path] = given(self.config)
        for path, data in there.items():
            if hashlib.sha256(data).hexdigest() != stated:
                raise WorkspaceError(
                    f"{path}: is not the tokenizer that this data set was begun with; restore "
                    "it, or give another output"
                )

    def do(self, unit: int) -> Any:
        """Train on the passages that come first by their hash, up to the sample's size."""
        name = tokenizer.FILES[0]
        if self.config.tokenizer.path:
            name, data = given(self.config)
            tokenizer.write(self.work.output, name, data)
        else:
            tokenizer.clear(self.work.output)
            wanted = self.config.tokenizer
            path = self.work.output / name
            tokenizer.train(self._sample(), path, wanted.vocab_size, wanted.character_coverage)
        return {"sha256": durable.sha256_of(self.work.output / name)}

    def _sample(self) -> Iterator[str]:
        drawn = [
            (key, text)
            for unit in range(len(self.work.units))
            for key, text in self.work.read("sample", unit)
        ]
        left = self.config.tokenizer.sample_bytes
        for _, text in sorted(drawn):
            if left <= 0:
                return
            data = text.encode()[:left]
            yield data.decode(errors="ignore")
            left -= len(data)


@dataclasses.dataclass
class _Outcome:
    """What became of a unit's records; `plain` is what its marker says."""

    files: list[InputFile]
    documents: list[list[Any]] = dataclasses.field(default_factory=list)
    fingerprints: list[str] = dataclasses.field(default_factory=list)
    rejects: list[list[Any]] = dataclasses.field(default_factory=list)
    accounts: Accounts = dataclasses.field(default_factory=Accounts)

    def reject(self, file: int, reject: Reject) -> None:
        """The record cannot be used."""
        self.rejects.append([file, *dataclasses.astuple(reject)[1:5]])
        self.accounts.of(self.files[file].source).rejected += 1

    def drop(self, file: int, record: RawDocument, reason: str) -> None:
        """Cleaning leaves the document out."""
        source, name = self.files[file].source, self.files[file].name
        self.accounts.of(source).dropped[reason] += 1
        self.accounts.sample(source, reason, record.id, name, record.line, record.text)

    def accept(self, file: int, record: RawDocument, size: int, tokens: int) -> None:
        """The document has so many bytes and tokens."""
        self.documents.append([record.id, file, record.line, size, tokens])
        self.accounts.of(self.files[file].source).accepted += 1

    def plain(self) -> dict[str, Any]:
        """`documents` are [id, file, line, bytes, tokens], `rejects` [file, line, offset, ...]."""
        return {
            "documents": self.documents,
            "fingerprints": self.fingerprints,
            "rejects": self.rejects,
            "accounts": self.accounts.plain(),
        }


class Tokenize(UnitStep):
    """Clean records and turn them into tokens; what does not come back exactly is rejected."""

    stage = "tokenize"
    label = "tokenizing"

    def do(self, unit: int) -> Any:
        """Write the unit's tokens and signatures; returns what became of its records."""
        outcome = _Outcome(self.work.files)
        path = self.work.tokens(unit)
        path.parent.mkdir(exist_ok=True)
        with durable.replacing(path) as out:
            texts = self._accepted(unit, out, outcome)
            duplicates.sign(texts, unit, self.work.directory, self.config.duplicates)
        return outcome.plain()

    def _accepted(self, unit: int, out: BinaryIO, outcome: _Outcome) -> Iterator[str]:
        """The texts that are accepted, each after its tokens were written."""
        model = self.work.tokenizer
        dtype = np.dtype(shards.dtype_of(model.vocab_size)).newbyteorder("<")
        for file, record in self.records(unit):
            tokens = 0
            outcome.accounts.of(self.work.files[file].source).read += 1
            if isinstance(record, Reject):
                outcome.reject(file, record)
            elif text := self._cleaned(file, record, outcome):
                ids, data = model.encode(text), text.encode()
                if model.decode_bytes(ids) == data:
                    tokens = len(ids)
                    out.write(ids.astype(dtype).tobytes())
                    outcome.accept(file, record, len(data), tokens)
                    if self.config.duplicates.wanted:
                        outcome.fingerprints.append(fingerprint(text))
                    yield text
                else:
                    outcome.reject(file, self._lossy(file, record))
            progress.count(record.read, tokens)

    def _cleaned(self, file: int, record: RawDocument, outcome: _Outcome) -> str:
        """The document's text after cleaning; empty where it is dropped, which is accounted for."""
        cleaned = self.clean(file, record.text)
        outcome.accounts.of(self.work.files[file].source).changed.update(cleaned.changed)
        if cleaned.dropped:
            outcome.drop(file, record, cleaned.dropped)
            return ""
        return cleaned.text

    def _lossy(self, file: int, record: RawDocument) -> Reject:
        detail = "the tokenizer does not give this text back exactly"
        name = self.work.files[file].name
        return Reject(name, record.line, record.offset, "not lossless", detail, record.read)


class MatchDuplicates(UnitStep):
    """Find the documents whose signatures meet, a bucket a unit."""

    stage = "match"
    label = "matching near duplicates"

    @classmethod
    def is_needed(cls, config: Config) -> bool:
        """Where near duplicates are left out."""
        return config.duplicates.near

    def measure(self) -> list[int]:
        """No size is known."""
        return [0] * self.config.duplicates.buckets

    def do(self, unit: int) -> Any:
        """Match the documents of a bucket."""
        duplicates.match(unit, self.work.directory, self.config.duplicates)


class ClusterDuplicates(UnitStep):
    """Join the documents that met in any bucket."""

    stage = "cluster"
    label = "clustering near duplicates"
    serial = True

    @classmethod
    def is_needed(cls, config: Config) -> bool:
        """Where near duplicates are left out."""
        return config.duplicates.near

    def do(self, unit: int) -> Any:
        """Cluster all pairs."""
        duplicates.cluster(self.work.directory, self.config.duplicates)


class WriteShards(UnitStep):
    """Write each shard after its recipe."""

    stage = "shards"
    label = "writing shards"

    def measure(self) -> list[int]:
        """Bytes of text in each shard."""
        sizes: list[int] = self.work.read("order", 0)["sizes"]
        return sizes

    def do(self, unit: int) -> Any:
        """Write the shard; returns its ShardInfo."""
        model = self.work.tokenizer
        dtype = shards.dtype_of(model.vocab_size)
        recipe = self.work.read("recipes", unit)
        path = self.work.output / shards.shard_name(unit)
        return dataclasses.asdict(shards.write_shard(path, self._documents(recipe, dtype), dtype))

    def _documents(self, recipe: list[Any], dtype: str) -> Iterator[Document]:
        for id, source, size, unit, first, count in recipe:
            progress.count(size, count)
            yield Document(id, source, size, self.work.read_tokens(unit, first, count, dtype))
