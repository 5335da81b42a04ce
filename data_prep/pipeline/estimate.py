"""What a run would do and about what it would give, from a sample; nothing is written.

The sample is drawn by key: of each source some files and of these some records, which are read and
cleaned as the run would; of their texts some passages, which are tokenized. Everything is scaled by
the bytes on disk that were sampled.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.config import Config, SourceConfig
from data_prep.dataset import shards
from data_prep.dataset.keyed import keyed
from data_prep.pipeline import order, pipeline, workspace
from data_prep.pipeline.cleaning import Cleaner
from data_prep.pipeline.stages import TrainTokenizer
from data_prep.pipeline.workspace import Work
from data_prep.sources import compression, inputs, parquet, readers, storage
from data_prep.sources.documents import BadRecordError, LongDocument, RawDocument, Reject, Survey
from data_prep.sources.inputs import InputFile
from data_prep.tokenizer import tokenizer, training
from data_prep.tokenizer.contract import Tokenizer, TokenizerError

# What is read of the corpus after decompression, and characters that are tokenized: seconds.
_READ_BYTES = 4_000_000
_TOKENIZED = 4_000_000
# A source's share of the sample is at least one part of so many, from so many files if it has them.
_LEAST_SHARE, _FILES = 32, 8
_PASSAGE = 16_384
# English under a vocabulary of some ten thousand pieces; used where nothing could be measured.
_ASSUMED = 4.0
# Two tar headers, the metadata and the array's header with their padding to blocks of 512 bytes.
_DOCUMENT_BYTES = 1920
_START_SECONDS = 3.0
_END = 1 << 62


@dataclass
class SourceSample:
    """What was sampled of a source. `covered` of its `disk` bytes were read, giving `read`."""

    name: str
    files: int
    disk: int
    covered: float = 0
    read: int = 0
    records: int = 0
    most: float = math.inf
    """Documents at most: a text file is one, however little of it was read."""
    bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    texts: list[str] = field(default_factory=list)
    bytes_per_token: float = _ASSUMED

    @property
    def scale(self) -> float:
        """The whole source is so many times its sample."""
        return self.disk / self.covered if self.covered else 0.0

    @property
    def documents(self) -> float:
        """Of the whole source, as the three that follow."""
        return min((self.records - self.left_out.total()) * self.scale, self.most)

    @property
    def text_bytes(self) -> float:
        """UTF-8 bytes of its documents."""
        return self.bytes * self.scale

    @property
    def tokens(self) -> float:
        """Tokens of its documents."""
        return self.text_bytes / self.bytes_per_token

    @property
    def read_bytes(self) -> float:
        """Bytes after decompression."""
        return self.read * self.scale


@dataclass
class Estimate:
    """The plan of a run. `seconds` of computing went into the sample; `how` tells whose tokens."""

    config: Config
    stages: list[str]
    finished: bool
    sources: list[SourceSample] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    how: str = ""
    tokenized: int = 0
    trained: int = 0

    @property
    def whole(self) -> bool:
        """Whether every record was read."""
        return all(source.covered >= source.disk for source in self.sources)

    @property
    def documents(self) -> float:
        """Documents of all sources, as the two that follow."""
        return sum(source.documents for source in self.sources)

    @property
    def text_bytes(self) -> float:
        """UTF-8 bytes of text."""
        return sum(source.text_bytes for source in self.sources)

    @property
    def tokens(self) -> float:
        """Tokens."""
        return sum(source.tokens for source in self.sources)

    @property
    def disk(self) -> float:
        """Bytes of the shards."""
        return self.tokens * self._token_bytes + self.documents * _DOCUMENT_BYTES

    @property
    def work(self) -> float:
        """Bytes that lie beside the shards until the run ends."""
        return self.tokens * self._token_bytes

    @property
    def _token_bytes(self) -> int:
        return 2 if shards.dtype_of(self.config.tokenizer.vocab_size) == "uint16" else 4

    @property
    def run_seconds(self) -> float:
        """Time of the run: what was measured, scaled, over the workers."""
        scale = sum(source.read_bytes for source in self.sources) / max(self._read, 1)
        drawn = 0 if self.config.tokenizer.path else 1
        # The survey decompresses and hashes, which takes no longer than reading records.
        shared = self.seconds["read"] * scale * (2 + drawn)
        shared += self.seconds["clean"] * scale * (1 + drawn)
        shared += self.seconds["tokenize"] * self.text_bytes / max(self.tokenized, 1)
        wanted = min(self.config.tokenizer.sample_bytes, self.text_bytes)
        training = self.seconds["train"] * wanted / max(self.trained, 1)
        return _START_SECONDS + training + shared / pipeline.workers(self.config)

    @property
    def _read(self) -> int:
        return sum(source.read for source in self.sources)


def estimate(config: Config) -> Estimate:
    """Plan the run. Raises what `pipeline.run` raises for the same mistakes; writes nothing."""
    work = pipeline.open_work(config)
    finished = pipeline.finished(config, work) is not None
    if not finished:
        _refuse_other(config, work)
    plan = Estimate(config, _stages(config), finished)
    if finished:
        return plan
    disk = sum(file.listed.bytes for file in work.files)
    for source in config.sources:
        files = [file for file in work.files if file.source == source.name]
        plan.sources.append(_sample(config, source, files, max(disk, 1), plan.seconds))
    _tokenize(plan, work)
    if plan.whole:
        _shard_count(plan)
    return plan


def _refuse_other(config: Config, work: Work) -> None:
    """Refuse the output directory of another run, with the exceptions that the run makes."""
    path = work.directory / "begun.json"
    if not path.exists():
        return
    ours, theirs = config.identity(), json.loads(path.read_bytes())["configuration"]
    theirs["shards"] = ours["shards"]
    if not work.marker(TrainTokenizer.stage, 0).exists():
        theirs["tokenizer"] = ours["tokenizer"]
    workspace.refuse_other(work.output, config, theirs)


def _stages(config: Config) -> list[str]:
    return [stage.label for stage in pipeline.stages(config)]


def _sample(
    config: Config,
    source: SourceConfig,
    files: list[InputFile],
    disk: int,
    seconds: defaultdict[str, float],
) -> SourceSample:
    sample = SourceSample(source.name, len(files), sum(file.listed.bytes for file in files))
    if all(file.format == "text" for file in files):
        sample.most = len(files)
    cleaner = Cleaner(source.cleaning, tuple(inputs.evaluation_files(config, source).values()))
    budget = _READ_BYTES * max(sample.disk / disk, 1 / _LEAST_SHARE)
    limit = int(budget / min(len(files), _FILES))
    groups = [[files[index] for index in members] for members in inputs.groups(files)]
    for group in sorted(groups, key=lambda group: keyed(config.seed, "estimate", group[0].name)):
        if sample.read >= budget:
            break
        begun = time.process_time()
        found, covered = _group(group) if group[0].group else _records(config, group[0], limit)
        sample.records += len(found)
        sample.read += sum(record.read for record in found)
        sample.covered += covered
        cleaned = time.process_time()
        _clean(sample, cleaner, found, source.question)
        seconds["read"] += cleaned - begun
        seconds["clean"] += time.process_time() - cleaned
    return sample


def _group(files: list[InputFile]) -> tuple[list[RawDocument | Reject], float]:
    """The group as a document, or the beginning of a long one, and its bytes on disk."""
    surveys = [readers.survey(file, _END) for file in files]
    disk = sum(file.listed.bytes for file in files)
    found: list[RawDocument | Reject] = []
    share = 1.0
    for _, record in readers.group(files, surveys):
        if isinstance(record, LongDocument):
            found.append(_beginning(record, _READ_BYTES))
            share = found[-1].read / record.read
        else:
            found.append(record)
    return found, disk * share


def _records(
    config: Config, file: InputFile, limit: int
) -> tuple[list[RawDocument | Reject], float]:
    """Records of about `limit` bytes of a file, and the bytes on disk that they stand for.

    From the beginning, but of plain lines, in which one can seek, from a place drawn by key.
    """
    disk, found, start = file.listed.bytes, _survey(file), (0, 1)
    if file.format == "jsonl" and not file.compression and disk > 2 * limit:
        place = int.from_bytes(keyed(config.seed, "estimate from", file.name)[:8])
        with storage.open_binary(file.path) as raw:
            raw.seek(place % (disk - limit))
            raw.readline()
            start = (raw.tell(), 2)
    taken: list[RawDocument | Reject] = []
    read = 0
    for record in readers.records(file, found, start, found.size):
        is_long = isinstance(record, LongDocument)
        taken.append(_beginning(record, limit) if isinstance(record, LongDocument) else record)
        read += taken[-1].read
        if read >= limit and (is_long or file.format != "text"):
            return taken, read / _expansion(file, found, limit)
    return taken, disk if start == (0, 1) else read


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


def _survey(file: InputFile) -> Survey:
    """What reading wants to know of a file, without reading all of one that has many records."""
    if file.format == "text":
        return readers.survey(file, _END)
    status, size, damage = storage.status(file.path), _END, ""
    if file.format == "parquet":
        size, _, _, damage = parquet.survey(file, _END)
    return Survey(status.bytes, status.version, "", size, [(0, 1)], damage, 1)


def _expansion(file: InputFile, found: Survey, limit: int) -> float:
    """Bytes after decompression for each on disk."""
    if file.format == "parquet":
        return max(found.size, 1) / max(found.bytes, 1)
    with storage.open_binary(file.path) as raw:
        return compression.expansion(raw, file.compression, limit) or 1.0


def _clean(
    sample: SourceSample, cleaner: Cleaner, records: list[RawDocument | Reject], question: str
) -> None:
    for record in records:
        if isinstance(record, Reject):
            sample.left_out[f"rejected: {record.reason}"] += 1
            continue
        done = cleaner(record.text)
        if done.dropped:
            sample.left_out[f"dropped: {done.dropped}"] += 1
        else:
            text = done.text + question + record.answer
            sample.bytes += len(text.encode())
            sample.texts.append(text)


def _tokenize(plan: Estimate, work: Work) -> None:
    """Measure bytes a token of each source and how long tokenizing takes."""
    passages = _passages(plan)
    given = Path(plan.config.tokenizer.path).expanduser() if plan.config.tokenizer.path else None
    if work.marker(TrainTokenizer.stage, 0).exists():
        given = tokenizer.find(work.output)
    with tempfile.TemporaryDirectory() as directory:
        if given:
            model, plan.how = tokenizer.load(given), f"measured with {given}"
        else:
            trained = _train(plan, passages[::2], Path(directory) / "sample.model")
            if trained is None:
                return
            model, passages = trained, passages[1::2] or passages
        tokens, size = Counter[int](), Counter[int]()
        begun = time.process_time()
        for index, text in passages:
            ids = model.encode(text)
            model.decode(ids)
            tokens[index] += len(ids)
            size[index] += len(text.encode())
        plan.seconds["tokenize"] = time.process_time() - begun
    plan.tokenized = size.total()
    overall = size.total() / tokens.total() if tokens.total() else _ASSUMED
    for index, source in enumerate(plan.sources):
        source.bytes_per_token = size[index] / tokens[index] if tokens[index] else overall
        source.texts.clear()


def _passages(plan: Estimate) -> list[tuple[int, str]]:
    """(number of the source, text) of passages of all sampled texts, drawn by key."""
    places = [
        (keyed(plan.config.seed, "passage", *map(str, place)), *place)
        for source, sample in enumerate(plan.sources)
        for number, text in enumerate(sample.texts)
        for start in range(0, len(text), _PASSAGE)
        for place in [(source, number, start)]
    ]
    drawn, left = [], _TOKENIZED
    for _, source, number, start in sorted(places):
        text = plan.sources[source].texts[number][start : start + _PASSAGE]
        drawn.append((source, text))
        left -= len(text)
        if left <= 0:
            break
    return drawn


def _train(plan: Estimate, passages: list[tuple[int, str]], path: Path) -> Tokenizer | None:
    wanted, begun = plan.config.tokenizer, time.process_time()
    plan.trained = sum(len(text.encode()) for _, text in passages)
    texts = (text for _, text in passages)
    try:
        training.train(texts, path, wanted.vocab_size, wanted.character_coverage)
    except TokenizerError as error:
        plan.how = f"assumed: {_ASSUMED} bytes a token, since of the sample {error}"
        return None
    plan.seconds["train"] = time.process_time() - begun
    plan.how = (
        f"measured with {wanted.vocab_size:,} pieces trained on {_mega(plan.trained)} of the "
        "sample, on other passages; the run trains on more"
    )
    return tokenizer.load(path)


def _shard_count(plan: Estimate) -> int:
    wanted = plan.config.shards
    documents = max(round(plan.documents), 1)
    return order.shard_count(round(plan.tokens), documents, wanted.count, wanted.tokens)


def lines(plan: Estimate) -> list[str]:
    """The plan, each figure with how it was got."""
    output = Path(plan.config.output).expanduser()
    if plan.finished:
        return [f"{output} is finished already, from the same configuration: nothing to do"]
    return [
        f"the plan for {output}; nothing is written",
        "",
        *_source_lines(plan),
        "",
        f"stages     {'; '.join(plan.stages)}",
        f"tokenizer  {_tokenizer_line(plan)}",
        "",
        *_figure_lines(plan),
        *_left_out_lines(plan),
    ]


def _source_lines(plan: Estimate) -> list[str]:
    width = max(len("source"), *(len(source.name) for source in plan.sources))
    told = [f"{'source':<{width}}  {'files':>9}  {'on disk':>12}  {'sampled':>12}  {'~tokens':>14}"]
    for source in plan.sources:
        told.append(
            f"{source.name:<{width}}  {source.files:>9,}  {_mega(source.disk):>12}  "
            f"{_mega(min(source.covered, source.disk)):>12}  {round(source.tokens):>14,}"
        )
    return told


def _tokenizer_line(plan: Estimate) -> str:
    wanted = plan.config.tokenizer
    if wanted.path:
        return f"taken from {wanted.path}"
    return f"trained: {wanted.vocab_size:,} pieces, on {_mega(wanted.sample_bytes)} of text at most"


def _figure_lines(plan: Estimate) -> list[str]:
    read = sum(source.read for source in plan.sources)
    share = sum(min(s.covered, s.disk) for s in plan.sources) / max(
        1, sum(s.disk for s in plan.sources)
    )
    scaled = "counted: all was read" if plan.whole else f"scaled from {share:.1%} of the bytes"
    about = "" if plan.whole else "~"
    rate = plan.text_bytes / plan.tokens if plan.tokens else _ASSUMED
    room = shutil.disk_usage(_existing(Path(plan.config.output).expanduser())).free
    workers = pipeline.workers(plan.config)
    rows = [
        ("documents", f"{about}{round(plan.documents):,}", scaled),
        (
            "text",
            f"{about}{_mega(plan.text_bytes)}",
            f"{scaled}; {_mega(read)} after decompression read",
        ),
        ("tokens", f"~{round(plan.tokens):,}", f"{rate:.2f} bytes a token, {plan.how}"),
        ("shards", *_shards_told(plan)),
        (
            *("disk", f"~{_mega(plan.disk)}"),
            f"tokens and {_DOCUMENT_BYTES:,} bytes a document; {_mega(plan.work)} more until the "
            f"end; {_mega(room)} are free",
        ),
        (
            *("time", f"~{plan.run_seconds:,.0f} s"),
            f"computing time of the sample, over {workers} worker{'s' * (workers != 1)} here"
            + (", without near duplicates" if plan.config.duplicates.near else ""),
        ),
    ]
    width = max(len(value) for _, value, _ in rows)
    return [f"{name:<9}  {value:<{width}}  {how}" for name, value, how in rows]


def _shards_told(plan: Estimate) -> tuple[str, str]:
    wanted = plan.config.shards
    if not wanted.count:
        return f"~{_shard_count(plan):,}", f"shards.tokens={wanted.tokens:,}"
    if wanted.count > plan.documents:
        return f"{wanted.count:,}", "shards.count; more than documents: the run may refuse that"
    return f"{wanted.count:,}", "shards.count"


def _left_out_lines(plan: Estimate) -> list[str]:
    told = []
    for source in plan.sources:
        for reason, count in source.left_out.most_common():
            told.append(f"{source.name}: {count:,} of {source.records:,} sampled records {reason}")
    if plan.config.duplicates.wanted:
        told.append("duplicates are not estimated: documents, text and tokens are before them")
    return ["", *told] if told else []


def _existing(path: Path) -> Path:
    """The nearest directory above that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _mega(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
