"""The stages of a run whose units are done in parallel.

A stage does the units that it is given, or those of its task, and skips units with a marker. So it
may run again, with any number of tasks, on one machine or as an array of Slurm jobs over one output
directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.accounts import Account, Accounts
from data_prep.config import Config
from data_prep.dataset import durable, shards
from data_prep.dataset.keyed import keyed
from data_prep.dataset.wording import counted
from data_prep.pipeline import duplicates, progress, workspace
from data_prep.pipeline.cleaning import Cleaned, Cleaner
from data_prep.pipeline.duplicates import Signature
from data_prep.pipeline.sample import Lowest, Sample
from data_prep.pipeline.table import Rows
from data_prep.pipeline.workspace import NothingLeftError, Record, Work, WorkspaceError
from data_prep.sources import inputs, readers
from data_prep.sources.documents import BadRecordError, LongDocument, RawDocument, Reject, Survey
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import contract, tokenizer, training
from data_prep.tokenizer.contract import NFC_REMEDY, TokenizerError, difference

# Characters of a passage: long documents are sampled in passages, not as a whole.
_PASSAGE = 16_384
# More passages are drawn than are needed, since not all text is kept, and a few more since the
# number of small samples varies by chance; training takes the first up to the size.
_MARGIN = 4.0
_SPARE = 16 * _PASSAGE


class Stage(ABC):
    """A stage cut into units. `sizes` are bytes of each, for the progress shown under `label`.

    A `serial` stage has one unit. The results of earlier stages must exist when it is created.
    """

    name = ""
    label = ""
    serial = False

    def __init__(self, config: Config, work: Work) -> None:
        self.config, self.work = config, work
        self.sizes = self.measure()
        self._cleaners: dict[str, Cleaner] = {}

    def measure(self) -> list[int]:
        """Bytes that each unit reads, after decompression."""
        return [0] if self.serial else self.work.unit_sizes()

    def check(self) -> None:  # noqa: B027  (most stages check nothing)
        """Raise what the user can fix; called before the units, also if all are done."""

    def done(self) -> list[bool]:
        """Whether each unit is done."""
        return [self.work.marker(self.name, unit).exists() for unit in range(len(self.sizes))]

    def run(self, units: Iterable[int]) -> None:
        """Do those of the units that are not done."""
        for unit in units:
            if not self.work.marker(self.name, unit).exists():
                self.work.finish(self.name, unit, self.do(unit))

    def run_task(self, rank: int, world_size: int) -> None:
        """Do the units of one of `world_size` tasks."""
        self.run(range(rank, len(self.sizes), world_size))

    @abstractmethod
    def do(self, unit: int) -> Any:
        """Do a unit, durably; returns its result for the marker."""

    def cleaner(self, file: int) -> Cleaner:
        """The cleaning of this file's source. Raises InputChangedError, OSError."""
        source = self.work.files[file].config
        if source.name not in self._cleaners:
            own = self.work.evaluation.get(source.name, {})
            if own:
                workspace.check_evaluation(self.work)
            self._cleaners[source.name] = Cleaner(source.cleaning, tuple(own.values()))
        return self._cleaners[source.name]


class SurveyFiles(Stage):
    """Hash and measure the input files; a unit's result are the fields of each Survey.

    With `limit` no more of each source is read than its first records need.
    """

    name = "survey"
    label = "reading the input"

    def measure(self) -> list[int]:
        return [
            sum(self.work.files[file].listed.bytes for file in unit)
            for unit in self.work.survey_units
        ]

    def do(self, unit: int) -> Any:
        found = []
        files = [self.work.files[index] for index in self.work.survey_units[unit]]
        left = dict.fromkeys((file.source for file in files), self.work.limit or None)
        for members in inputs.groups(files):
            source, records = files[members.start].source, 1
            for index in members:
                survey = self._survey(files[index], left[source])
                # As the units count them: a group is one.
                records = survey.records if len(members) == 1 else 1
                found.append(dataclasses.asdict(survey))
                progress.count(survey.bytes)
            if (most := left[source]) is not None:
                left[source] = max(most - records, 0)
        return found

    def _survey(self, file: InputFile, most: int | None) -> Survey:
        if most == 0:
            return Survey.unread(file.listed)
        return readers.survey(file, workspace.CUT_BYTES, most)


class DrawSample(Stage):
    """Draw passages to train the tokenizer on, by a hash of their place: a Sample."""

    name = "sample"
    label = "drawing the sample"

    def check(self) -> None:
        """Raise InputChangedError where inputs changed."""
        workspace.check_inputs(self.work)

    def do(self, unit: int) -> Any:
        found = Sample(Lowest(self.config.tokenizer.sample_bytes))
        for file, record in self.work.records(unit):
            progress.count(record.read)
            found.read += 1
            if why := self._draw(file, record, found.drawn):
                found.left_out[why] += 1
        return found.plain()

    @cached_property
    def _highest(self) -> int:
        """The highest hash, as an integer of 64 bits, of a passage that is drawn."""
        if self.config.limit:
            # The sizes are those of whole files: the records taken may be a tiny part of them.
            return 1 << 64
        wanted = _MARGIN * self.config.tokenizer.sample_bytes + _SPARE
        return int(min(wanted / max(self.work.text_bytes(), 1.0), 1.0) * (1 << 64))

    def _draw(self, file: int, record: Record, drawn: Lowest) -> str:
        """Add passages of a document; returns why the record is none that is kept, or ""."""
        if isinstance(record, Reject):
            return f"rejected: {record.reason}"
        # A record that cannot be read to its end is not a document.
        own, dropped = Lowest(self.config.tokenizer.sample_bytes, drawn.bound), ""
        try:
            for key, cleaned in self._cleaned(file, record, own):
                if cleaned.dropped:
                    dropped = dropped or f"dropped: {cleaned.dropped}"
                else:
                    own.add(key, cleaned.text)
        except BadRecordError as bad:
            return f"rejected: {bad.reason}"
        passages = own.passages
        for key, text in passages:
            drawn.add(key, text)
        return "" if passages else dropped

    def _cleaned(
        self, file: int, record: RawDocument | LongDocument, drawn: Lowest
    ) -> Iterator[tuple[str, Cleaned]]:
        """The document's passages whose hash is within the limit and low enough to be needed."""
        name, line, offset = self.work.files[file].name, str(record.line), 0
        for text in itertools.chain(record.passages(), record.replies):
            for start in range(0, len(text), _PASSAGE):
                key = keyed(self.config.seed, "sample", name, line, str(offset + start))
                if int.from_bytes(key[:8]) <= self._highest and drawn.wants(key.hex()):
                    # The passage alone: cleaning all of a long document would take long.
                    yield key.hex(), self.cleaner(file)(text[start : start + _PASSAGE])
            offset += len(text)


def given_tokenizer(config: Config) -> tuple[str, bytes]:
    """Name and bytes of the tokenizer that the configuration gives. Raises TokenizerError."""
    wanted = config.tokenizer
    return tokenizer.standalone(Path(wanted.path).expanduser(), wanted.eos_token)


class TrainTokenizer(Stage):
    """Train the tokenizer on passages with the lowest hashes, or copy the given one."""

    name = "train"
    label = "making the tokenizer"
    serial = True

    def check(self) -> None:
        """Raise InputChangedError or WorkspaceError where inputs or the tokenizer changed."""
        workspace.check_inputs(self.work)
        if not self.work.marker(self.name, 0).exists():
            return
        expected = self.work.read(self.name, 0)["sha256"]
        copy = tokenizer.find(self.work.output)
        found = {str(copy): copy.read_bytes()}
        if self.config.tokenizer.path:
            _, found[self.config.tokenizer.path] = given_tokenizer(self.config)
        for path, data in found.items():
            if hashlib.sha256(data).hexdigest() != expected:
                raise WorkspaceError(
                    f"{path}: is not the tokenizer that this data set was started with; restore "
                    "it, or give another output"
                )

    def do(self, unit: int) -> Any:
        name = contract.FILES[0]
        if self.config.tokenizer.path:
            name, data = given_tokenizer(self.config)
            tokenizer.write(self.work.output, name, data)
        else:
            tokenizer.clear(self.work.output)
            wanted = self.config.tokenizer
            path = self.work.output / name
            training.train(self._sample(), path, wanted.vocab_size, wanted.character_coverage)
        return {"sha256": durable.sha256_of(self.work.output / name)}

    def _sample(self) -> list[str]:
        """The texts to train on. Raises NothingLeftError and TokenizerError where there is none."""
        left = self.config.tokenizer.sample_bytes
        found = Sample(Lowest(left))
        for unit in range(len(self.work.units)):
            found.add(self.work.read(DrawSample.name, unit))
        if not found.drawn.passages:
            raise self._why_nothing(found)
        texts = []
        for _, text in found.drawn.passages:
            data = text.encode()[:left]
            texts.append(data.decode(errors="ignore"))
            left -= len(data)
        return texts

    def _why_nothing(self, found: Sample) -> NothingLeftError | TokenizerError:
        if not found.undrawn:
            return workspace.nothing_left(self.work, found.read, found.left_out)
        others = "".join(f", {count:,} {why}" for why, count in found.left_out.most_common(5))
        return TokenizerError(
            f"the tokenizer has no text to train on: of {counted(found.read, 'record')} "
            f"{found.undrawn:,} were not drawn{others}; raise tokenizer.sample_bytes, or give a "
            "tokenizer.path"
        )


class _DroppedError(Exception):
    """Cleaning drops the document."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclasses.dataclass
class Written:
    """The part of a document written so far; `changed` names the cleaning steps that altered it.

    `turns` counts the tokens before each answer and each further prompt.
    """

    out: BinaryIO
    signature: Signature
    bytes: int = 0
    tokens: int = 0
    turns: list[int] = dataclasses.field(default_factory=list)
    changed: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class _Outcome:
    """What became of a unit's records: the rows of its documents; `plain` is for its marker."""

    files: list[InputFile]
    seed: int
    documents: Rows = dataclasses.field(default_factory=Rows)
    rejects: list[list[Any]] = dataclasses.field(default_factory=list)
    accounts: Accounts = dataclasses.field(default_factory=Accounts)

    def account(self, file: int) -> Account:
        """The account of the file's source."""
        return self.accounts.of(self.files[file].source)

    def reject(self, file: int, record: Record, reason: str, detail: str) -> None:
        """Count a record that cannot be used."""
        self.rejects.append([file, record.line, record.offset, reason, detail])
        self.account(file).rejected += 1

    def drop(
        self, file: int, record: RawDocument | LongDocument, reason: str, cleaner: Cleaner
    ) -> None:
        """Count a document that cleaning drops, and keep a sample of it, masked."""
        self.account(file).dropped[reason] += 1
        source, name = self.files[file].source, self.files[file].name
        if self.accounts.wants_sample(source, reason):
            text = cleaner.masked(next(record.passages()))
            self.accounts.sample(source, reason, record.id, name, record.line, text)

    def accept(self, file: int, record: RawDocument | LongDocument, written: Written) -> None:
        """Count a document that was written."""
        key, place = keyed(self.seed, record.id), (file, record.line)
        size = (written.bytes, written.tokens)
        fingerprint = written.signature.fingerprint
        self.documents.add(record.id, key, fingerprint, place, size, written.turns)
        self.account(file).accepted += 1

    def plain(self) -> dict[str, Any]:
        """`rejects` are [file, line, offset, reason, detail]."""
        return {
            "documents": len(self.documents),
            "rejects": self.rejects,
            "accounts": self.accounts.plain(),
        }


class Tokenize(Stage):
    """Clean and tokenize records, reject text that its tokens do not restore exactly."""

    name = "tokenize"
    label = "tokenizing"

    def do(self, unit: int) -> Any:
        outcome = _Outcome(self.work.files, self.config.seed)
        signer = duplicates.Signer(self.work.directory, self.config.duplicates)
        path = self.work.tokens(unit)
        path.parent.mkdir(exist_ok=True)
        with durable.replacing(path) as out:
            signer.write(self._accepted(unit, out, outcome, signer), unit)
        outcome.documents.write(self.work.documents(unit))
        return outcome.plain()

    def _accepted(
        self, unit: int, out: BinaryIO, outcome: _Outcome, signer: duplicates.Signer
    ) -> Iterator[Signature]:
        """Write tokens of accepted documents; yields the signature of each."""
        for file, record in self.work.records(unit):
            outcome.account(file).read += 1
            written = Written(out, signer.document())
            if isinstance(record, Reject):
                outcome.reject(file, record, record.reason, record.detail)
            elif self._is_accepted(file, record, written, outcome):
                yield written.signature
            progress.count(record.read - written.bytes)

    def _is_accepted(
        self, file: int, record: RawDocument | LongDocument, written: Written, outcome: _Outcome
    ) -> bool:
        """Write the document's tokens; if it is left out, count why and write nothing."""
        start = written.out.tell()
        try:
            self.write(self._cleaned(file, record, written), written)
            self._write_replies(record.replies, self.work.files[file].config.question, written)
            outcome.accept(file, record, written)
            return True
        except _DroppedError as dropped:
            outcome.drop(file, record, dropped.reason, self.cleaner(file))
        except BadRecordError as bad:
            outcome.reject(file, record, bad.reason, bad.detail)
        finally:
            outcome.account(file).changed.update(written.changed)
        written.out.seek(start)
        written.out.truncate()
        return False

    def _write_replies(self, replies: Sequence[str], question: str, written: Written) -> None:
        """Write answers and further prompts, each alone: no token crosses from one to another."""
        for number, reply in enumerate(replies):
            if number % 2 == 0 and question:
                self.write([question], written)
            written.turns.append(written.tokens)
            self.write([reply], written)

    def _cleaned(
        self, file: int, record: RawDocument | LongDocument, written: Written
    ) -> Iterator[str]:
        """The cleaned text, part by part. Raises _DroppedError and BadRecordError meanwhile."""
        for cleaned in self.cleaner(file).passages(record.passages()):
            written.changed.update(cleaned.changed)
            if cleaned.dropped:
                raise _DroppedError(cleaned.dropped)
            yield cleaned.text

    def write(self, texts: Iterable[str], written: Written) -> None:
        """Write the tokens of a text. Raises BadRecordError where they do not restore it."""
        model = self.work.tokenizer
        dtype = np.dtype(shards.dtype_of(model.vocab_size)).newbyteorder("<")
        for part, ids in model.encode_parts(texts, inside=written.bytes > 0):
            data = part.encode()
            restored = model.decode_bytes(ids, inside=written.bytes > 0)
            if restored != data:
                raise BadRecordError("not lossless", _why_lossy(part, restored))
            written.out.write(ids.astype(dtype).tobytes())
            written.signature.add(part)
            written.bytes += len(data)
            written.tokens += len(ids)
            progress.count(len(data), len(ids))


def _why_lossy(text: str, restored: bytes) -> str:
    """What a tokenizer changes in a text, and what keeps it."""
    found = restored.decode(errors="replace")
    if found == unicodedata.normalize("NFC", text):
        return (
            f"the tokenizer composes characters (Unicode NFC); {NFC_REMEDY} does so before and "
            "keeps the text (prompts and answers: compose them beforehand)"
        )
    return f"the tokenizer does not give this text back exactly: {difference(text, found)}"


class MatchDuplicates(Stage):
    """Find pairs of documents whose signatures match; a unit is a bucket."""

    name = "match"
    label = "matching near duplicates"

    def measure(self) -> list[int]:
        return [0] * self.config.duplicates.buckets

    def do(self, unit: int) -> Any:
        duplicates.match(unit, self.work.directory, self.config.duplicates)
