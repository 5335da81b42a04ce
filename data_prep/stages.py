"""The stages of making a data set, as datatrove steps: survey, sample, train, tokenize, write.

A step deals its units to tasks in turn and skips those whose marker stands, so it may be run again,
with any number of tasks, on one machine or as an array of jobs over one output directory.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from data_prep import documents, durable, progress, shards, tokenizer, workspace
from data_prep.config import Config
from data_prep.documents import RawDocument, Reject
from data_prep.order import keyed
from data_prep.shards import Document
from data_prep.workspace import Work

# Long documents are sampled in passages, so that a sample is drawn from all of them.
_PASSAGE = 16_384
# Passages are drawn with this margin over the wanted size, since not all that is read is text of a
# document, and a few more, since few may be missing by chance; then they are cut to the size.
_MARGIN = 4.0
_SPARE = 16 * _PASSAGE


class UnitStep(PipelineStep):  # type: ignore[misc]
    """A stage cut into units. `sizes` are bytes a unit, for the progress shown."""

    type = "data-prep"
    stage = ""

    def __init__(self, config: Config, work: Work, sizes: list[int]) -> None:
        super().__init__()
        self.name = self.stage
        self.config, self.work, self.sizes = config, work, sizes

    def done(self) -> list[bool]:
        """Whether each unit is done."""
        return [self.work.marker(self.stage, unit).exists() for unit in range(len(self.sizes))]

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Do the units of task `rank` of `world_size` that are not done."""
        for unit in range(rank, len(self.sizes), world_size):
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
            file, found = self.work.files[part.file], self.work.surveys[part.file]
            start = (part.offset, part.line)
            for record in documents.records(file, found, start, part.stop):
                yield part.file, record


class SurveyFiles(UnitStep):
    """Hash and measure the input files."""

    stage = "survey"

    def __init__(self, config: Config, work: Work) -> None:
        sizes = [
            sum(work.files[file].path.stat().st_size for file in unit) for unit in work.survey_units
        ]
        super().__init__(config, work, sizes)

    def do(self, unit: int) -> Any:
        """Survey the files of the unit."""
        found = []
        for index in self.work.survey_units[unit]:
            survey = documents.survey(self.work.files[index], workspace.CUT_BYTES)
            found.append(dataclasses.asdict(survey))
            progress.count(survey.bytes)
        return found


class DrawSample(UnitStep):
    """Draw passages to train the tokenizer on, each by a hash of its own."""

    stage = "sample"

    def __init__(self, config: Config, work: Work) -> None:
        super().__init__(config, work, work.unit_sizes())

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
            name, line = self.work.files[file].name, str(record.line)
            for start in range(0, len(record.text), _PASSAGE):
                key = keyed(self.config.seed, "sample", name, line, str(start))
                if int.from_bytes(key[:8]) <= limit:
                    drawn.append([key.hex(), record.text[start : start + _PASSAGE]])
        return drawn


class TrainTokenizer(UnitStep):
    """Train the tokenizer on the sample; one unit."""

    stage = "train"

    def __init__(self, config: Config, work: Work) -> None:
        super().__init__(config, work, [0])

    def do(self, unit: int) -> Any:
        """Train on the passages that come first by their hash, up to the sample's size."""
        wanted = self.config.tokenizer
        path = self.work.output / tokenizer.FILES[0]
        tokenizer.train(self._sample(), path, wanted.vocab_size, wanted.character_coverage)
        return {"sha256": durable.sha256_of(path)}

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


class Tokenize(UnitStep):
    """Turn records into tokens; what does not come back exactly is rejected."""

    stage = "tokenize"

    def __init__(self, config: Config, work: Work) -> None:
        super().__init__(config, work, work.unit_sizes())

    def do(self, unit: int) -> Any:
        """Write the unit's tokens; returns [id, file, line, bytes, tokens] of each document."""
        model = self.work.tokenizer
        dtype = np.dtype(shards.dtype_of(model.vocab_size)).newbyteorder("<")
        accepted, rejects = [], []
        path = self.work.tokens(unit)
        path.parent.mkdir(exist_ok=True)
        with durable.replacing(path) as out:
            for file, record in self.records(unit):
                if isinstance(record, RawDocument):
                    ids = model.encode(record.text)
                    if model.decode(ids) == record.text:
                        size = len(record.text.encode())
                        out.write(ids.astype(dtype).tobytes())
                        accepted.append([record.id, file, record.line, size, len(ids)])
                        progress.count(record.read, len(ids))
                        continue
                    record = self._lossy(file, record)
                rejects.append([file, *dataclasses.astuple(record)[1:5]])
                progress.count(record.read)
        return {"documents": accepted, "rejects": rejects}

    def _lossy(self, file: int, record: RawDocument) -> Reject:
        detail = "the tokenizer does not give this text back exactly"
        name = self.work.files[file].name
        return Reject(name, record.line, record.offset, "not lossless", detail, record.read)


class WriteShards(UnitStep):
    """Write each shard after its recipe."""

    stage = "shards"

    def do(self, unit: int) -> Any:
        """Write the shard; returns its ShardInfo."""
        model = self.work.tokenizer
        dtype = shards.dtype_of(model.vocab_size)
        recipe = self.work.read("recipes", unit)
        path = self.work.output / shards.shard_name(unit)
        return dataclasses.asdict(shards.write_shard(path, self._documents(recipe, dtype), dtype))

    def _documents(self, recipe: list[Any], dtype: str) -> Iterator[Document]:
        kind = np.dtype(dtype).newbyteorder("<")
        for id, source, size, unit, first, count in recipe:
            ids = np.fromfile(
                self.work.tokens(unit), kind, count=count, offset=first * kind.itemsize
            )
            assert len(ids) == count, f"{self.work.tokens(unit)} is shorter than its marker says"
            progress.count(size, count)
            yield Document(id, source, size, ids)
