"""Promise 9: whatever the input files hold, every record is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from data_prep import accounts, config
from data_prep.dataset import shards
from data_prep.pipeline import pipeline
from data_prep.sources import inputs, readers
from data_prep.sources.documents import Reject
from data_prep.tokenizer import training
from tools.promises import fuzz_targets
from tools.promises.campaign import Promise, Room, check
from tools.promises.fuzzing import mutated

FILES = 50  # malformed ones of a case
_INTACT = 5
_TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"


def _lines(choose: random.Random) -> bytes:
    rows = ({"text": f"line {n} {choose.random()}", "id": n} for n in range(choose.randint(1, 9)))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _table(choose: random.Random) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    rows = [f"row {n} {choose.random()}" for n in range(20)]
    pq.write_table(pa.table({"text": rows}), out, row_group_size=5, write_page_checksum=True)
    return out.getvalue()


def _warc(choose: random.Random) -> bytes:
    return b"".join(choose.choices(fuzz_targets.seeds("warc"), k=3))


SOURCES: dict[str, Callable[[random.Random], bytes]] = {
    "txt": lambda choose: f"text {choose.random()} ".encode() * choose.randint(1, 30),
    "jsonl": _lines,
    "jsonl.gz": lambda choose: gzip.compress(_lines(choose), mtime=0),
    "jsonl.zst": lambda choose: zstandard.ZstdCompressor(write_checksum=True).compress(
        _lines(choose)
    ),
    "parquet": _table,
    "warc": _warc,
    "warc.gz": lambda choose: gzip.compress(_warc(choose), mtime=0),
}


def accounts_for_all(seed: int, room: Room) -> dict[str, Any]:
    """A corpus of malformed files and some intact ones goes through the whole pipeline."""
    choose = random.Random(seed)
    corpus = room.here / "in"
    corpus.mkdir()
    kinds = [choose.choice([*SOURCES]) for _ in range(FILES)]
    for number, kind in enumerate(kinds):
        data = mutated(SOURCES[kind](choose), choose)
        (corpus / f"{number:03d}.{kind}").write_bytes(data)
    for number in range(_INTACT):
        (corpus / f"intact-{number}.txt").write_text(f"intact text {number} of {seed}")
    model = room.made("tokenizer", _train) / "tokenizer.model"
    wanted = config.load(None, [
        f"root={corpus}", f"output={room.here / 'set'}", "workers=1", f"tokenizer.path={model}",
        "sources=[{name: s, paths: ['*']}]", "shards.count=2",
    ])  # fmt: skip
    # What no format fits is refused before the start, by its name: it is left out.
    wanted = _without_refused(wanted)
    manifest = pipeline.run(wanted).manifest
    check(accounts.verify(room.here / "set") == [], "the data set is not whole")
    found = accounts.load(room.here / "set")
    read, rejected = _read_again(wanted)
    counts = {name: found.total(name) for name in ("read", "accepted", "rejected", "dropped",
                                                   "duplicates")}  # fmt: skip
    check(counts["read"] == read, f"{counts} of {read} records")
    check(counts["rejected"] == rejected == manifest.rejected, f"{counts}, {rejected} rejects")
    ids = {document.id for document in shards.read_documents(room.here / "set", manifest)}
    intact = {f"intact-{number}.txt" for number in range(_INTACT)}
    check(intact <= ids, f"missing: {sorted(intact - ids)}")
    check(len(ids) <= counts["accepted"] == manifest.documents, f"{counts}, {len(ids)} ids")
    return counts


def _without_refused(wanted: config.Config) -> config.Config:
    problems: list[str] = []
    files = inputs.find(wanted, problems)
    refused = {file.relative for file in files if any(file.path in one for one in problems)}
    check(not problems or refused, f"refused without a name: {problems}")
    if not refused:
        return wanted
    left = [f"'{name}'" for name in sorted(refused)]
    words = [
        f"root={wanted.root}", f"output={wanted.output}", "workers=1",
        f"tokenizer.path={wanted.tokenizer.path}", "shards.count=2",
        f"sources=[{{name: s, paths: ['*'], exclude: [{', '.join(left)}]}}]",
    ]  # fmt: skip
    return _without_refused(config.load(None, words)) if len(left) < FILES else wanted


def _read_again(wanted: config.Config) -> tuple[int, int]:
    """Records and rejects, as the readers give them file by file."""
    read = rejected = 0
    for file in inputs.find(wanted, []):
        found = readers.survey(file, 1 << 20)
        for record in readers.records(file, found, (0, 1), found.size):
            read += 1
            rejected += isinstance(record, Reject)
    return read, rejected


def _train(directory: Path) -> None:
    directory.mkdir()
    training.train([_TEXT], directory / "tokenizer.model", 320)


PROMISES = (
    Promise(
        9, "malformed",
        "preprocessing conserves and refuses: read = accepted + rejected + dropped + duplicates",
        20, "malformed inputs", accounts_for_all, each=FILES, limit=300.0,
        how=f"{FILES} files of {', '.join(SOURCES)} with random changes, beside {_INTACT} intact "
        "ones, go through the whole pipeline; its accounts are compared with what the readers give "
        "file by file.",
    ),
)  # fmt: skip
