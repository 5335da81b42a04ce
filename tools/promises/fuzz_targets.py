"""The parsers that read what others wrote, each as a function of bytes.

What a parser may raise is its own refusal; anything else is a bug.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.config import load as load_data_prep
from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError, Document, ShardInfo
from data_prep.sources import html, readers
from data_prep.sources import warc as warc_reader
from data_prep.sources.compression import Compression
from data_prep.sources.documents import BadRecordError
from data_prep.sources.inputs import Format, InputFile

Target = Callable[[bytes], None]

CPU_SECONDS = 10  # of an input, while branches are recorded, which takes several times as long
_MOST_BYTES = 1 << 16  # of a record that a reader holds
_SCRATCH = Path(os.environ.get("FUZZ_SCRATCH", tempfile.gettempdir()))


def bounded(target: Target) -> Target:
    """The target, which raises TimeoutError after an input that took more CPU time."""

    def timed(data: bytes) -> None:
        began = time.process_time()
        target(data)
        if (spent := time.process_time() - began) > CPU_SECONDS:
            raise TimeoutError(f"{spent:.1f} s of CPU for {len(data)} bytes")

    return timed


def _file(data: bytes) -> Path:
    """A file of this process with these bytes."""
    path = _SCRATCH / f"fuzzed.{os.getpid()}"
    path.write_bytes(data)
    return path


def data_set_manifest(data: bytes) -> None:
    """The manifest of a data set."""
    with suppress(DataError):
        shards.parsed_manifest("m", data)


def checkpoint_manifest(data: bytes) -> None:
    """The manifest of a checkpoint, whose checksum holds."""
    from pretrain.checkpoint import manifest

    with suppress(manifest.CheckpointError):
        manifest._parse(data)


def shard(data: bytes) -> None:
    """A shard whose checksum holds: tar, JSON, arrays."""
    path = _file(data)
    with suppress(DataError):
        deque(shards.read_shard(path, ShardInfo("s", len(data), "", 3, 6)), maxlen=0)


def _records(data: bytes, form: Format, compression: Compression = None) -> None:
    config = SourceConfig("s", max_record_bytes=_MOST_BYTES, max_held_bytes=_MOST_BYTES)
    file = InputFile(config, str(_file(data)), "f", form, compression)
    found = readers.survey(file, 1 << 12)
    stops = [*(offset for offset, _ in found.cuts[1:]), found.size]
    warc_reader.Extractor = _Extractor  # type: ignore[attr-defined, assignment]
    for start, stop in zip(found.cuts, stops, strict=True):
        deque(readers.records(file, found, start, stop), maxlen=0)


def jsonl(data: bytes) -> None:
    """JSON lines."""
    _records(data, "jsonl")


def jsonl_gzip(data: bytes) -> None:
    """Compressed JSON lines."""
    _records(data, "jsonl", "gzip")


def jsonl_zstd(data: bytes) -> None:
    """Compressed JSON lines."""
    _records(data, "jsonl", "zstd")


def warc(data: bytes) -> None:
    """WARC and WET."""
    _records(data, "warc")


def warc_gzip(data: bytes) -> None:
    """WARC of compressed members."""
    _records(data, "warc", "gzip")


class _Extractor:
    """In the place of the extractor, which is a process of another's code."""

    def __enter__(self) -> _Extractor:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __call__(self, page: str | bytes) -> str:
        return str(page)[:100]


def http(data: bytes) -> None:
    """The HTTP response of a page; what extracts its text is another's."""
    with suppress(BadRecordError):
        html.text_of(data, _Extractor())


def settings(data: bytes) -> None:
    """A YAML file of settings of data-prep."""
    with suppress(SettingsError):
        load_data_prep(_file(data))


def run_settings(data: bytes) -> None:
    """A YAML file of settings of a run, and a word of a command line."""
    from pretrain.config.root import load

    text, _, word = data.partition(b"\0")
    with suppress(SettingsError):
        load(_file(text), [word.decode(errors="replace")] if word else [])


def safetensors(data: bytes) -> None:
    """A model's file of weights."""
    from pretrain.convert import source

    with suppress(SettingsError):
        for stored in source._listed(_file(data)).values():
            assert stored.info.shape is not None


def gguf(data: bytes) -> None:
    """A GGUF file."""
    from pretrain.convert import gguf_file

    with suppress(SettingsError):
        gguf_file.of_file(_file(data), None)


def ledger(data: bytes) -> None:
    """Records of steps: metrics and ledger."""
    from pretrain.training.metrics import read_records

    read_records(_file(data))


TARGETS: Mapping[str, Target] = {
    target.__name__.replace("_", "-"): target
    for target in (
        data_set_manifest, checkpoint_manifest, shard, jsonl, jsonl_gzip, jsonl_zstd, warc,
        warc_gzip, http, settings, run_settings, safetensors, ledger,
    )
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Sound inputs from which a fuzzer of the target starts."""
    record = (
        b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Record-ID: <urn:1>\r\n"
        b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n"
    )
    page = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n13\r\n<html><p>Text</p>\r\n\r\n0\r\n\r\n"
    )
    packed = b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n"
    packed += gzip.compress(b"<html><p>Text", mtime=0)
    response = (
        b"WARC/1.1\r\nWARC-Type: response\r\nContent-Type: application/http\r\n"
        b"Content-Length: %d\r\n\r\n%b\r\n\r\n" % (len(page), page)
    )
    lines = b'{"text": "a", "id": 1}\n{"text": "\\ud83d"}\n\n{"text": "b", "id": "x"}\n'
    given = {
        "warc": [record, record + response],
        "warc-gzip": [gzip.compress(record, mtime=0) + gzip.compress(response, mtime=0)],
        "http": [page, packed],
        "jsonl": [lines],
        "jsonl-gzip": [gzip.compress(lines, mtime=0)],
        "settings": [b"output: o\nsources:\n- {name: s, paths: ['*.txt']}\nseed: 1\n"],
        "run-settings": [
            b"data: {train: d}\noptim: {lr: 1e-3}\nmodel: {segment: 64}\0train.steps=9"
        ],
        "ledger": [b'{"kind": "train", "step": 1, "loss": 2.5}\n{"step": 2}\n'],
    }
    return given[name] if name in given else _written(name)


def _written(name: str) -> list[bytes]:
    """Sound inputs that our own writers make."""
    import numpy as np

    with tempfile.TemporaryDirectory() as place:
        path = Path(place)
        if name == "jsonl-zstd":
            import zstandard

            return [zstandard.ZstdCompressor().compress(b'{"text": "a"}\n')]
        if name == "shard":
            turns = [(), (1,), (0, 1, 2)]
            documents = [Document(f"d{n}", "s", 2, np.arange(2), turns[n]) for n in range(3)]
            shards.write_shard(path / "s.tar", documents, "uint16")
            return [(path / "s.tar").read_bytes()]
        if name == "data-set-manifest":
            from tools.promises import data_sets

            data_sets.small(path, seed=1, documents=2, count=1)
            data = (path / "manifest.json").read_bytes()
            plain = json.loads(data)
            del plain["checksum"]
            return [data, json.dumps(plain).encode()]
        import torch

        from pretrain.checkpoint.pieces import write_tensors
        from pretrain.checkpoint.ranks import SoloRanks
        from tools.promises import kills

        if name == "safetensors":
            write_tensors(path / "w", {"a": torch.ones(2, 3), "b": torch.zeros(1)})
            return [(path / "w").read_bytes()]
        kills.save_step(path / "checkpoints", 1, SoloRanks())
        return [(path / "checkpoints" / "step-00000001" / "manifest.json").read_bytes()]
