"""The plan of a run and an estimate of its result, from a sample; nothing is written.

The sample is drawn by key: some files of each source, and some records of these. They go through
the run's own stages in a temporary directory: passages are drawn, a tokenizer is trained, records
are cleaned and tokenized. Counts and times are scaled by the bytes on disk that were sampled.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import Config, DuplicatesConfig, SourceConfig
from data_prep.dataset import shards
from data_prep.dataset.keyed import keyed
from data_prep.dataset.wording import counted
from data_prep.pipeline import order, pipeline, table, workspace
from data_prep.pipeline.stages import DrawSample, Stage, Tokenize, TrainTokenizer, Written
from data_prep.pipeline.workspace import NothingLeftError, Record, Work
from data_prep.sources import compression, inputs, parquet, readers, storage
from data_prep.sources.compression import UNSUPPORTED, UnsupportedError
from data_prep.sources.documents import BadRecordError, LongDocument, RawDocument, Reject, Survey
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import marks, tokenizer
from data_prep.tokenizer.contract import NFC_REMEDY, TokenizerError

# Bytes that are read of the corpus after decompression, and of those that a tokenizer is trained
# on: this takes seconds.
_READ_BYTES = 4_000_000
_TRAINED_BYTES = 2_000_000
# The sample has at least 1 / _LEAST_SHARE of its bytes from each source, from _FILES files or more.
_LEAST_SHARE, _FILES = 32, 8
# Bytes per token of English at some ten thousand pieces; used where nothing could be measured.
_ASSUMED = 4.0
# Two tar headers, the metadata and the array's header with their padding to blocks of 512 bytes.
_DOCUMENT_BYTES = 1920
_START_SECONDS = 3.0
_END = 1 << 62


@dataclass
class SourceSample:
    """The sample of a source: `records`, each with the index of its file.

    They cover `covered` of its `disk` bytes. `accepted` of them are documents, which have `bytes`
    of text and `counted` tokens.
    """

    name: str
    files: int
    disk: int
    most: float = math.inf
    """Documents at most: a text file is one, however little of it was read."""
    records: list[tuple[int, Record]] = field(default_factory=list)
    covered: float = 0
    accepted: int = 0
    bytes: int = 0
    counted: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """Bytes of the records, after decompression."""
        return sum(record.read for _, record in self.records)

    @property
    def scale(self) -> float:
        """The size of the source over that of its sample."""
        return self.disk / self.covered if self.covered else 0.0

    @property
    def documents(self) -> float:
        """Estimated documents of the whole source."""
        return min(self.accepted * self.scale, self.most)

    @property
    def tokens(self) -> float:
        """Estimated tokens of the whole source."""
        return self.counted * self.scale


@dataclass
class Estimate:
    """The plan of a run: `seconds` of computing by stage; `how` tokens were counted."""

    config: Config
    stages: list[str]
    finished: bool
    vocab_size: int
    """Of the tokenizer that is given, or that the run trains."""
    sources: list[SourceSample] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    how: str = ""
    marks: list[str] = field(default_factory=list)
    """What begins and ends a text for the tokenizer, if there is one."""
    trained: int = 0
    """Bytes of text that the sample's tokenizer was trained on."""

    @property
    def whole(self) -> bool:
        """Whether every record was read."""
        return all(source.covered >= source.disk for source in self.sources)

    @property
    def documents(self) -> float:
        """Estimated documents of all sources."""
        return sum(source.documents for source in self.sources)

    @property
    def text_bytes(self) -> float:
        """Estimated UTF-8 bytes of text."""
        return sum(source.bytes * source.scale for source in self.sources)

    @property
    def tokens(self) -> float:
        """Estimated tokens."""
        return sum(source.tokens for source in self.sources)

    @property
    def work(self) -> float:
        """Estimated bytes that lie beside the shards until the run ends: the tokens."""
        return self.tokens * np.dtype(shards.dtype_of(self.vocab_size)).itemsize

    @property
    def disk(self) -> float:
        """Estimated bytes of the shards."""
        return self.work + self.documents * _DOCUMENT_BYTES

    @property
    def shard_count(self) -> int:
        """Estimated number of shards. Raises SettingsError as the run does."""
        wanted, documents = self.config.shards, max(round(self.documents), 1)
        return order.shard_count(round(self.tokens), documents, wanted.count, wanted.tokens)

    @property
    def run_seconds(self) -> float:
        """Estimated time of the run: what was measured, scaled, over the workers."""
        read = sum(source.read for source in self.sources)
        scale = sum(source.read * source.scale for source in self.sources) / max(read, 1)
        # The survey decompresses and hashes, which takes no longer than reading records.
        passes = 3 if DrawSample.name in self.seconds else 2
        shared = self.seconds["read"] * passes
        shared += self.seconds[DrawSample.name] + self.seconds[Tokenize.name]
        wanted = min(self.config.tokenizer.sample_bytes, self.text_bytes)
        training = self.seconds[TrainTokenizer.name] * wanted / max(self.trained, 1)
        return _START_SECONDS + training + shared * scale / pipeline.workers(self.config)


def estimate(config: Config) -> Estimate:
    """Plan the run. Raises what `pipeline.run` raises for the same mistakes; writes nothing."""
    work = pipeline.open_work(config)
    finished = pipeline.finished(config, work) is not None
    stages = [stage.label for stage in pipeline.stages(config)]
    plan = Estimate(config, stages, finished, config.tokenizer.vocab_size)
    if finished:
        return plan
    workspace.stale_stages(work, config)
    plan.sources = [_sampled(plan, source, work.files) for source in config.sources]
    _measure(plan, work)
    if plan.whole:
        if not plan.documents:
            left_out: Counter[str] = sum((source.left_out for source in plan.sources), Counter())
            read = sum(len(source.records) for source in plan.sources)
            raise workspace.nothing_left(work, read, left_out)
        _ = plan.shard_count
    return plan


@dataclass(frozen=True)
class _Sample(Work):
    """The sampled records; each source is a unit."""

    sources: list[SourceSample] = field(default_factory=list)

    @cached_property
    def units(self) -> list[Any]:
        return [[] for _ in self.sources]

    def unit_sizes(self) -> list[int]:
        return [source.read for source in self.sources]

    def text_bytes(self) -> float:
        records = (record for source in self.sources for _, record in source.records)
        texts = (record.text for record in records if isinstance(record, RawDocument))
        return sum(len(text.encode()) for text in texts)

    def records(self, unit: int) -> Iterator[tuple[int, Record]]:
        return iter(self.sources[unit].records)


class _CountBytes(Tokenize):
    """Without a tokenizer, by the assumed length of a token."""

    def write(self, texts: Iterable[str], written: Written) -> None:
        size = sum(len(text.encode()) for text in texts)
        written.bytes += size
        written.tokens += round(size / _ASSUMED)


def _measure(plan: Estimate, work: Work) -> None:
    """Run the stages over the sample, and count."""
    wanted = plan.config.tokenizer
    made = work.marker(TrainTokenizer.name, 0).exists()
    given = str(tokenizer.find(work.output)) if made else wanted.path
    least = min(wanted.sample_bytes, _TRAINED_BYTES)
    changed = dataclasses.replace(wanted, path=given, sample_bytes=least)
    config = dataclasses.replace(plan.config, tokenizer=changed, duplicates=DuplicatesConfig())
    tokenize = Tokenize
    with tempfile.TemporaryDirectory() as directory:
        sample = _Sample(Path(directory), work.files, work.evaluation, sources=plan.sources)
        sample.directory.mkdir()
        try:
            if not given:
                _timed(plan, DrawSample(config, sample))
            _timed(plan, TrainTokenizer(config, sample))
        except (TokenizerError, NothingLeftError) as error:
            # Of the temporary directory the user knows nothing.
            why = str(error).removeprefix(f"{sample.output}: ")
            plan.how = f"assumed: {_ASSUMED} bytes per token, since of the sample {why}"
            tokenize = _CountBytes
        _timed(plan, tokenize(config, sample))
        if given:
            plan.marks = marks.lines(sample.tokenizer)
            plan.vocab_size = sample.tokenizer.vocab_size
        for unit, source in enumerate(plan.sources):
            _count(source, sample, unit)
    plan.trained = min(least, sum(source.bytes for source in plan.sources))
    if given:
        plan.how = f"measured with {given}"
    elif not plan.how:
        more = min(wanted.sample_bytes, plan.text_bytes) > plan.trained
        plan.how = (
            f"measured with {wanted.vocab_size:,} pieces trained on {_mega(plan.trained)} of the "
            f"sample{'; the run trains on more' if more else ''}"
        )


def _timed(plan: Estimate, stage: Stage) -> None:
    started = time.process_time()
    stage.run_task(0, 1)
    plan.seconds[stage.name] = time.process_time() - started


def _count(source: SourceSample, sample: Work, unit: int) -> None:
    """Add the result of Tokenize for the source's records."""
    result, rows = sample.read(Tokenize.name, unit), table.read(sample.documents(unit))
    source.accepted += len(rows)
    source.bytes += int(rows["bytes"].sum())
    source.counted += int(rows["tokens"].sum())
    for *_, reason, detail in result["rejects"]:
        kept = f", which {NFC_REMEDY} would keep" * (NFC_REMEDY in detail)
        source.left_out[f"rejected: {reason}{kept}"] += 1
    for account in result["accounts"]["sources"].values():
        for reason, count in account["dropped"].items():
            source.left_out[f"dropped: {reason}"] += count


def _sampled(plan: Estimate, source: SourceConfig, files: list[InputFile]) -> SourceSample:
    """The sample of a source, not counted yet; adds the time to read it to the plan."""
    groups = [group for group in inputs.groups(files) if files[group.start].source == source.name]
    own = [files[index] for group in groups for index in group]
    sample = SourceSample(source.name, len(own), sum(file.listed.bytes for file in own))
    if all(file.format == "text" for file in own):
        sample.most = len(own)
    share = sample.disk / max(sum(file.listed.bytes for file in files), 1)
    budget = _READ_BYTES * max(share, 1 / _LEAST_SHARE)
    limit = int(budget / min(len(own), _FILES))
    seed, started, read = plan.config.seed, time.process_time(), 0
    for group in sorted(groups, key=lambda group: keyed(seed, "estimate", files[group.start].name)):
        if read >= budget:
            break
        found, covered = _records(seed, [files[index] for index in group], limit)
        read += sum(record.read for record in found)
        sample.records += [(group.start, record) for record in found]
        sample.covered += covered
    plan.seconds["read"] += time.process_time() - started
    return sample


def _records(seed: int, files: list[InputFile], limit: int) -> tuple[list[Record], float]:
    """Records of about `limit` bytes of a file or group, and the bytes on disk that they cover.

    They are the first ones, or in plain lines those from a place drawn by key on.
    """
    file, covered, start = files[0], float(sum(file.listed.bytes for file in files)), (0, 1)
    found = _survey(file, limit)
    if file.group:
        surveys = [found, *(_survey(member, limit) for member in files[1:])]
        records: Iterator[Record] = (record for _, record in readers.group(files, surveys))
    else:
        if file.format == "jsonl" and not file.compression and covered > 2 * limit:
            start = _line_from(seed, file, limit)
        records = readers.records(file, found, start, found.size)
    taken: list[Record] = []
    read = 0
    for record in records:
        if isinstance(record, LongDocument):
            taken.append(_beginning(record, limit))
            covered *= taken[-1].read / record.read
        else:
            taken.append(record)
        read += taken[-1].read
        if read >= limit and file.format != "text":
            return taken, read / _expansion(file, found, limit)
    return taken, covered if start == (0, 1) else read


def _line_from(seed: int, file: InputFile, limit: int) -> tuple[int, int]:
    """Offset of a line drawn by key, and 2: it is not the first; (0, 1) where none is near."""
    place = int.from_bytes(keyed(seed, "estimate from", file.name)[:8])
    place %= file.listed.bytes - limit
    with storage.open_binary(file.path) as raw:
        raw.seek(place)
        last = place + file.held_bytes
        while place < last and (block := raw.read(compression.BLOCK_BYTES)):
            if end := block.find(b"\n") + 1:
                return (place + end, 2) if place + end < file.listed.bytes else (0, 1)
            place += len(block)
    return 0, 1


def _beginning(document: LongDocument, limit: int) -> RawDocument | Reject:
    """About the first `limit` bytes of a long document."""
    texts, read = [], 0
    place = (document.line, document.offset)
    try:
        for text in document.passages():
            texts.append(text)
            read += len(text.encode())
            if read >= limit:
                break
    except BadRecordError as bad:
        return bad.at(*place, document.read)
    return RawDocument(document.id, *place, read, "".join(texts))


def _survey(file: InputFile, limit: int) -> Survey:
    """What reading needs to know of a file; one of many records is not read to its end for that."""
    if file.format == "text" or file.listed.bytes <= limit:
        return readers.survey(file, _END)
    status, size, damage, detail = storage.status(file.path), _END, "", ""
    if file.format == "parquet":
        size, _, _, damage, detail = parquet.survey(file, _END)
    with storage.open_binary(file.path) as raw:
        try:
            compression.check_head(raw, file.compression)
        except UnsupportedError as error:
            damage, detail = UNSUPPORTED, str(error)
    return Survey(status.bytes, status.version, "", size, [(0, 1)], damage, 1, detail)


def _expansion(file: InputFile, found: Survey, limit: int) -> float:
    """Bytes after decompression for each on disk."""
    if file.format == "parquet":
        return max(found.size, 1) / max(found.bytes, 1)
    with storage.open_binary(file.path) as raw:
        return compression.expansion(raw, file.compression, limit) or 1.0


def lines(plan: Estimate) -> list[str]:
    """The plan as text, each figure with how it was obtained."""
    output, wanted = Path(plan.config.output).expanduser(), plan.config.tokenizer
    if plan.finished:
        return [f"{output} is finished already, from the same configuration: nothing to do"]
    made = f"trained: {wanted.vocab_size:,} pieces, on up to {_mega(wanted.sample_bytes)} of text"
    width = max(len("source"), *(len(source.name) for source in plan.sources))
    return [
        f"the plan for {output}; nothing is written",
        "",
        f"{'source':<{width}}  {'files':>9}  {'on disk':>12}  {'sampled':>12}  {'~tokens':>14}",
        *(
            f"{source.name:<{width}}  {source.files:>9,}  {_mega(source.disk):>12}  "
            f"{_mega(min(source.covered, source.disk)):>12}  {round(source.tokens):>14,}"
            for source in plan.sources
        ),
        "",
        f"stages     {'; '.join(plan.stages)}",
        f"tokenizer  {f'taken from {wanted.path}' if wanted.path else made}",
        *(f"{'':9}  {line}" for line in plan.marks),
        "",
        *_figure_lines(plan),
        *_left_out_lines(plan),
    ]


def _figure_lines(plan: Estimate) -> list[str]:
    """The estimated figures, aligned: name, value, how it was obtained."""
    read = sum(source.read for source in plan.sources)
    covered = sum(min(source.covered, source.disk) for source in plan.sources)
    share = covered / max(sum(source.disk for source in plan.sources), 1)
    scaled = "counted: all was read" if plan.whole else f"scaled from {share:.1%} of the bytes"
    about = "" if plan.whole else "~"
    rate = plan.text_bytes / plan.tokens if plan.tokens else _ASSUMED
    output = Path(plan.config.output).expanduser().absolute()
    # Of the nearest directory that exists.
    room = shutil.disk_usage(next(at for at in (output, *output.parents) if at.exists())).free
    workers, near = pipeline.workers(plan.config), plan.config.duplicates.near
    rows = [
        ("documents", f"{about}{round(plan.documents):,}", scaled),
        (
            *("text", f"{about}{_mega(plan.text_bytes)}"),
            f"{scaled}; {_mega(read)} after decompression read",
        ),
        ("tokens", f"~{round(plan.tokens):,}", f"{rate:.2f} bytes per token, {plan.how}"),
        ("shards", *_shards(plan)),
        (
            *("disk", f"~{_mega(plan.disk)}"),
            f"tokens and {_DOCUMENT_BYTES:,} bytes per document; {_mega(plan.work)} more until the "
            f"end; {_mega(room)} are free",
        ),
        (
            *("time", f"~{plan.run_seconds:,.0f} s"),
            f"computing time of the sample, over {counted(workers, 'worker')} here"
            f"{', without near duplicates' * near}",
        ),
    ]
    width = max(len(value) for _, value, _ in rows)
    return [f"{name:<9}  {value:<{width}}  {how}" for name, value, how in rows]


def _shards(plan: Estimate) -> tuple[str, str]:
    wanted = plan.config.shards
    if not wanted.count:
        return f"~{plan.shard_count:,}", f"shards.tokens={wanted.tokens:,}"
    refused = "; more than documents: the run may refuse it" * (wanted.count > plan.documents)
    return f"{wanted.count:,}", f"shards.count{refused}"


def _left_out_lines(plan: Estimate) -> list[str]:
    found = [
        f"{source.name}: {count:,} of {counted(len(source.records), 'sampled record')} {reason}"
        for source in plan.sources
        for reason, count in source.left_out.most_common()
    ]
    found += [
        f"{source.name}: no record was found in {counted(source.files, 'file')}"
        for source in plan.sources
        if not source.records and source.covered >= source.disk
    ]
    if plan.config.limit:
        found.append(f"limit={plan.config.limit} is not applied: this is of all records")
    if plan.config.duplicates.wanted:
        found.append("duplicates are not estimated: documents, text and tokens include them")
    return ["", *found] if found else []


def _mega(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
