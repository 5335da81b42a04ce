"""The parts of a stage that run side by side, as datatrove steps: see pipeline.stages.

A step does the units that it is dealt, or those of its task in turn, and skips those whose marker
stands, so it may be run again, with any number of tasks, on one machine or as an array of jobs over
one output directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from datatrove.pipeline.base import PipelineStep

from data_prep.accounts import Accounts
from data_prep.config import Config
from data_prep.dataset import durable, shards
from data_prep.dataset.keyed import keyed
from data_prep.dataset.shards import Document, StoredDocument
from data_prep.pipeline import duplicates, progress, workspace
from data_prep.pipeline.cleaning import Cleaner
from data_prep.pipeline.duplicates import Signature
from data_prep.pipeline.workspace import Work, WorkspaceError
from data_prep.sources import inputs, readers
from data_prep.sources.documents import BadRecordError, LongDocument, RawDocument, Reject
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import contract, tokenizer, training

# Long documents are sampled in passages, so that a sample is drawn from all of them.
_PASSAGE = 16_384
# Passages are drawn with this margin over the wanted size, since not all that is read is text of a
# document, and a few more, since few may be missing by chance; then they are cut to the size.
_MARGIN = 4.0
_SPARE = 16 * _PASSAGE
# Tokens of a document that are in memory at a time while it is written.
_BLOCK = 1 << 22


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

    def records(self, unit: int) -> Iterator[tuple[int, RawDocument | LongDocument | Reject]]:
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

    def cleaner(self, file: int) -> Cleaner:
        """Cleans documents of this file, as its source says."""
        name = self.work.files[file].source
        if name not in self._cleaners:
            (source,) = (source for source in self.config.sources if source.name == name)
            evaluation = tuple(inputs.evaluation_files(self.config, source).values())
            self._cleaners[name] = Cleaner(source.cleaning, evaluation)
        return self._cleaners[name]


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
            if not isinstance(record, Reject):
                # One that cannot be read to its end is no document.
                with contextlib.suppress(BadRecordError):
                    drawn += list(self._drawn(file, record, limit))
        return drawn

    def _drawn(
        self, file: int, record: RawDocument | LongDocument, limit: int
    ) -> Iterator[list[str]]:
        begun = 0
        for text in itertools.chain(record.passages(), [record.answer]):
            keys = self._keys(file, record, range(begun, begun + len(text), _PASSAGE), limit)
            for start, key in keys.items():
                # Alone: to clean all of a long document for some passages takes long.
                cleaned = self.cleaner(file)(text[start - begun :][:_PASSAGE])
                if not cleaned.dropped:
                    yield [key, cleaned.text]
            begun += len(text)

    def _keys(
        self, file: int, record: RawDocument | LongDocument, starts: range, limit: int
    ) -> dict[int, str]:
        """Which of these passages have a hash within the limit, and that hash."""
        name, line = self.work.files[file].name, str(record.line)
        keys = {
            start: keyed(self.config.seed, "sample", name, line, str(start)) for start in starts
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
        name = contract.FILES[0]
        if self.config.tokenizer.path:
            name, data = given(self.config)
            tokenizer.write(self.work.output, name, data)
        else:
            tokenizer.clear(self.work.output)
            wanted = self.config.tokenizer
            path = self.work.output / name
            training.train(self._sample(), path, wanted.vocab_size, wanted.character_coverage)
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


class _DroppedError(Exception):
    """Cleaning leaves the document out."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclasses.dataclass
class _Written:
    """What was written of a document; `changed` names the steps of cleaning that altered it."""

    signature: Signature
    bytes: int = 0
    tokens: int = 0
    prompt: int = 0
    changed: set[str] = dataclasses.field(default_factory=set)

    def add(self, text: str, size: int, tokens: int) -> None:
        """The next part of it, which has so many bytes and tokens."""
        self.signature.add(text)
        self.bytes += size
        self.tokens += tokens


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
        self.rejects.append([file, *dataclasses.astuple(reject)[:4]])
        self.accounts.of(self.files[file].source).rejected += 1

    def drop(self, file: int, record: RawDocument | LongDocument, reason: str) -> None:
        """Cleaning leaves the document out."""
        source, name = self.files[file].source, self.files[file].name
        self.accounts.of(source).dropped[reason] += 1
        text = next(record.passages())
        self.accounts.sample(source, reason, record.id, name, record.line, text)

    def accept(self, file: int, record: RawDocument | LongDocument, written: _Written) -> None:
        """The document is in the data set."""
        size = [written.bytes, written.tokens, written.prompt]
        self.documents.append([record.id, file, record.line, *size])
        if fingerprint := written.signature.fingerprint:
            self.fingerprints.append(fingerprint)
        self.accounts.of(self.files[file].source).accepted += 1

    def plain(self) -> dict[str, Any]:
        """`documents` are [id, file, line, bytes, tokens, tokens of the prompt].

        `rejects` are [file, line, offset, ...].
        """
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
        signer = duplicates.Signer(self.work.directory, self.config.duplicates)
        path = self.work.tokens(unit)
        path.parent.mkdir(exist_ok=True)
        with durable.replacing(path) as out:
            signer.write(self._accepted(unit, out, outcome, signer), unit)
        return outcome.plain()

    def _accepted(
        self, unit: int, out: BinaryIO, outcome: _Outcome, signer: duplicates.Signer
    ) -> Iterator[Signature]:
        """The signatures of what is accepted, each after its tokens were written."""
        for file, record in self.records(unit):
            outcome.accounts.of(self.work.files[file].source).read += 1
            written = _Written(signer.document())
            if isinstance(record, Reject):
                outcome.reject(file, record)
            elif self._is_accepted(file, record, out, written, outcome):
                yield written.signature
            progress.count(record.read - written.bytes)

    def _is_accepted(
        self,
        file: int,
        record: RawDocument | LongDocument,
        out: BinaryIO,
        written: _Written,
        outcome: _Outcome,
    ) -> bool:
        """Write the document's tokens, or nothing of it and account for why it is left out."""
        begun = out.tell()
        try:
            self._write(self._cleaned(file, record, written), out, written)
            if record.answer:
                # Each of its own, so that no token lies on both sides of where one begins.
                if question := self.work.files[file].config.question:
                    self._write(iter([question]), out, written)
                written.prompt = written.tokens
                self._write(iter([record.answer]), out, written)
        except _DroppedError as dropped:
            outcome.drop(file, record, dropped.reason)
        except BadRecordError as bad:
            outcome.reject(file, bad.at(record.line, record.offset, record.read))
        else:
            outcome.accept(file, record, written)
            return True
        finally:
            outcome.accounts.of(self.work.files[file].source).changed.update(written.changed)
        out.seek(begun)
        out.truncate()
        return False

    def _cleaned(
        self, file: int, record: RawDocument | LongDocument, written: _Written
    ) -> Iterator[str]:
        """The document's text after cleaning. Raises _DroppedError, BadRecordError on the way."""
        cleaner = self.cleaner(file)
        passages = record.passages()
        done = cleaner.long(passages) if record.is_long else map(cleaner, passages)
        for cleaned in done:
            written.changed.update(cleaned.changed)
            if cleaned.dropped:
                raise _DroppedError(cleaned.dropped)
            yield cleaned.text

    def _write(self, texts: Iterator[str], out: BinaryIO, written: _Written) -> None:
        """Write the tokens of a text. Raises BadRecordError where they do not give it back."""
        model = self.work.tokenizer
        dtype = np.dtype(shards.dtype_of(model.vocab_size)).newbyteorder("<")
        for part, ids in model.encode_parts(texts, inside=written.bytes > 0):
            data = part.encode()
            if model.decode_bytes(ids, inside=written.bytes > 0) != data:
                detail = "the tokenizer does not give this text back exactly"
                raise BadRecordError("not lossless", detail)
            out.write(ids.astype(dtype).tobytes())
            written.add(part, len(data), len(ids))
            progress.count(len(data), len(ids))


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

    def _documents(self, recipe: list[Any], dtype: str) -> Iterator[Document | StoredDocument]:
        for id, source, size, prompt, unit, first, count in recipe:
            if count <= _BLOCK:
                tokens = self.work.read_tokens(unit, first, count, dtype)
                yield Document(id, source, size, tokens, prompt)
            else:
                blocks = (
                    self.work.read_tokens(unit, start, min(_BLOCK, first + count - start), dtype)
                    for start in range(first, first + count, _BLOCK)
                )
                yield StoredDocument(id, source, size, count, blocks, prompt)
            progress.count(size, count)
