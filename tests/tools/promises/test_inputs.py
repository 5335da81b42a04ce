"""Promises 8, 9, 13, 14 and 15 in small, and faults that turn them red."""

from __future__ import annotations

import importlib.util
import io
import random
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset import shards
from data_prep.dataset.shards import DataError
from data_prep.pipeline import pipeline
from tests.tools.promises.failures import failures
from tools.promises import campaign, canaries, fuzz_targets, fuzzing, planted_secrets
from tools.promises.campaign import Room, UnavailableError
from tools.promises.canaries import PLACES


def test_damaged_shards_are_refused_from_disk_and_from_a_server(tmp_path: Path) -> None:
    assert failures(tmp_path, "shards", range(8)) == {}


def test_an_unchecked_shard_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "check_shard", lambda path, info: None)
    assert failures(tmp_path, "shards", range(0, 16, 2))


# tests/data_prep/test_malformed.py is the quick one.
@pytest.mark.slow
def test_malformed_inputs_are_all_accounted_for(tmp_path: Path) -> None:
    assert failures(tmp_path, "malformed", [0]) == {}


@pytest.mark.slow
def test_a_record_that_goes_in_silence_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pipeline._write_rejects

    def silent(work: Any) -> Any:
        accounts, reasons = write(work)
        accounts.of("s").read -= 1
        accounts.of("s").rejected -= 1
        return accounts, reasons

    monkeypatch.setattr(pipeline, "_write_rejects", silent)
    (failure,) = failures(tmp_path, "malformed", [0]).values()
    assert "not whole" in failure  # rejects.jsonl has more of them than the accounts


QUICK = [place.__name__ not in ("_in_the_working_directory", "_in_a_job") for place in PLACES]


def test_canaries_are_not_run(tmp_path: Path) -> None:
    assert failures(tmp_path, "canaries", [n for n, quick in enumerate(QUICK) if quick]) == {}


@pytest.mark.slow
def test_canaries_in_modules_and_jobs_are_not_run(tmp_path: Path) -> None:
    seeds = [n for n in range(2 * len(PLACES)) if not QUICK[n % len(PLACES)]]
    assert failures(tmp_path, "canaries", seeds) == {}


def test_a_pickle_that_is_loaded_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(data: bytes) -> np.ndarray:
        return np.load(io.BytesIO(data), allow_pickle=True)

    monkeypatch.setattr(shards, "_array", trusting)
    seed = PLACES.index(canaries._in_an_array)
    assert "was run" in failures(tmp_path, "canaries", [seed])[seed]


def test_a_secret_in_a_file_is_found(tmp_path: Path) -> None:
    shared = tmp_path / "secrets" / "shared"
    (shared / "work" / "home").mkdir(parents=True)
    (shared / "work.made").touch()
    secret = planted_secrets.SECRETS["HF_TOKEN"]
    (shared / "work" / "home" / ".netrc").write_text(secret)  # where it was planted
    seed = [*planted_secrets.SECRETS].index("HF_TOKEN")
    assert failures(tmp_path, "secrets", [seed]) == {}
    (shared / "work" / "wandb.log").write_bytes(b"\0token=" + secret.encode() + b"\0")
    found = campaign.run(tmp_path, _secrets(), [seed], "test", again=True)
    assert "wandb.log" in next(found).failure


def _secrets() -> campaign.Promise:
    return planted_secrets.PROMISES[0]


@pytest.mark.slow
def test_secrets_stay_where_they_are(tmp_path: Path) -> None:
    assert failures(tmp_path, "secrets", range(20)) == {}


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_parsers_survive_random_changes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_targets, "_SCRATCH", tmp_path)
    choose, seeds = random.Random(1), fuzz_targets.seeds(name)
    inputs = [*seeds, *(fuzzing.mutated(choose.choice(seeds), choose) for _ in range(60))]
    if "settings" in name:  # YAML that is nested deeply takes seconds
        inputs = [data for data in inputs if len(data) < 1000][:20]
    for data in inputs:
        fuzz_targets.TARGETS[name](data)


def array(head: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(8)


@pytest.mark.parametrize(
    "head",
    [
        b"{'descr': '<u2', 'shape': (2",  # numpy raises tokenize.TokenError
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (" + b"9" * 30 + b",), }",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (4000000000000000,), }",
        b"  {'descr':\n  'x'}\n x",
        b"(" * 900,
    ],
)
def test_a_damaged_head_of_an_array_is_a_refusal(head: bytes) -> None:
    members = {"json": b'{"id": "a", "source": "s", "bytes": 1, "tokens": 2}',
               "tokens.npy": array(head)}  # fmt: skip
    with pytest.raises(DataError, match="document 0 is incomplete"):
        shards._document(Path("s.tar"), "0", members)


def test_a_parser_that_lets_an_error_through_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_UNREADABLE", (KeyError,))
    with pytest.raises(ValueError):
        test_parsers_survive_random_changes("shard", tmp_path, monkeypatch)


def test_an_input_is_given_cpu_time_and_not_that_of_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz_targets, "CPU_SECONDS", 0.05)
    fuzz_targets.bounded(lambda data: time.sleep(0.2))(b"waits")
    with pytest.raises(TimeoutError, match="s of CPU for 5 bytes"):
        fuzz_targets.bounded(lambda data: deque(range(10_000_000), maxlen=0))(b"works")


def test_without_a_fuzzer_nothing_counts_as_fuzzed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="atheris is not installed"):
        fuzzing.parses(0, Room(tmp_path, tmp_path))


def test_an_array_with_objects_is_a_refusal() -> None:
    out = io.BytesIO()
    np.save(out, np.array([{}], dtype=object), allow_pickle=True)
    members = {"json": b'{"id": "a"}', "tokens.npy": out.getvalue()}
    with pytest.raises(DataError):
        shards._document(Path("s.tar"), "0", members)
