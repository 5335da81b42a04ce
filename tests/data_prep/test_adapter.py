"""A datatrove pipeline of a user's own that ends in our shards."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import ParquetReader

from data_prep import cli
from data_prep.adapter import InfiniShardFinaliser, InfiniShardWriter
from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.pipeline.workspace import WorkspaceError
from data_prep.tokenizer import tokenizer, training
from pretrain.data.lanes import Dataset

WORDS = ("memory", "of", "a", "segment", "\u00fcber", "\u2581", "\n", "  ", "\U0001f600")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    source = random.Random(2)
    return {
        f"id/{number}": " ".join(source.choices(WORDS, k=50)) + str(number)
        for number in range(60)
    }  # fmt: skip


@pytest.fixture(scope="module")
def raw(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files: twelve of sixty documents are dropped by the filter."""
    root = tmp_path_factory.mktemp("raw")
    records = [{"id": id, "text": text} for id, text in texts.items()]
    for file in range(6):
        pq.write_table(pa.Table.from_pylist(records[file::6]), root / f"{file}.parquet")
    return root


@pytest.fixture(scope="module")
def model(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.model"
    training.train(texts.values(), path, 300)
    return path


def kept(document: Document) -> bool:
    return not document.id.endswith("5") and not document.id.endswith("0")


def spoil(data: Any, rank: int, world_size: int) -> Any:
    """A step of the user's that leaves what no tokenizer can take."""
    for document in data:
        if document.id in ("id/7", "id/8"):
            document.text = {"id/7": "", "id/8": "a\ud800"}[document.id]
        yield document


class Stops:
    """Ends the task of rank 1 after some documents."""

    def __call__(self, data: Any, rank: int, world_size: int) -> Any:
        for number, document in enumerate(data):
            if rank == 1 and number == 3:
                raise RuntimeError("stopped")
            yield document


def run(
    raw: Path,
    model: Path,
    place: Path,
    tasks: int,
    *steps: Any,
    workers: int = 1,
    **settings: Any,
) -> Path:
    """In this process, the tasks in turn; with more workers, in some of datatrove's own."""
    writer = InfiniShardWriter(place / "set", tokenizer=model, **{"shards": 4, **settings})
    write = LocalPipelineExecutor(
        [ParquetReader(str(raw)), LambdaFilter(kept), spoil, *steps, writer],
        tasks=tasks,
        workers=workers,
        logging_dir=str(place / "write"),
        skip_completed=False,
    )
    finish = LocalPipelineExecutor(
        [InfiniShardFinaliser(writer)],
        depends=write,
        logging_dir=str(place / "finish"),
        skip_completed=False,
    )
    finish.run()
    return place / "set"


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*")
    }


@pytest.fixture(scope="module")
def made(raw: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(raw, model, tmp_path_factory.mktemp("made"), 3, workers=3)


def test_every_document_that_arrives_is_in_the_shards_or_among_the_rejects(
    made: Path, model: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(made)]) == 0
    assert "46 documents" in capsys.readouterr().out
    manifest = shards.read_manifest(made)
    assert (manifest.documents, manifest.rejected, len(manifest.shards)) == (46, 2, 4)
    rejects = [json.loads(line) for line in (made / "rejects.jsonl").open()]
    assert {reject["reason"] for reject in rejects} == {"empty text", "lone surrogate"}
    assert all(reject["file"].startswith("datatrove/task-") for reject in rejects)
    decode = tokenizer.load(model).decode
    found = {document.id: decode(document.tokens) for document in Dataset(made).documents()}
    left = {id: text for id, text in texts.items() if id[-1] not in "05"}
    assert found == {id: left[id] for id in left.keys() - {"id/7", "id/8"}}


def test_tasks_and_kills_change_no_shard(
    made: Path, raw: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        run(raw, model, tmp_path, 3, Stops())
    done = tmp_path / "set/work/tokenize/000000.json"
    before = done.stat().st_mtime_ns
    with pytest.raises(WorkspaceError, match="started with tasks=3, now it is 2"):
        run(raw, model, tmp_path, 2)
    with pytest.raises(WorkspaceError, match="started with source=datatrove, now it is web"):
        run(raw, model, tmp_path, 3, source="web")
    assert done.stat().st_mtime_ns == before
    again = run(raw, model, tmp_path, 3)
    ours = {name: digest for name, digest in hashes(made).items() if name != "manifest.json"}
    assert ours.items() <= hashes(again).items() and len(ours) == 8
    other = run(raw, model, tmp_path / "other", 7)
    assert {n: h for n, h in hashes(other).items() if n.endswith(".tar")} == {
        n: h for n, h in ours.items() if n.endswith(".tar")
    }


def test_the_number_of_shards_may_change_before_the_manifest_is_written(
    raw: Path, model: Path, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "set/shard-00003.tar"
    in_the_way.mkdir(parents=True)
    (tmp_path / "set/work").mkdir()
    with pytest.raises(OSError, match="directory"):
        run(raw, model, tmp_path, 3)
    in_the_way.rmdir()
    made = run(raw, model, tmp_path, 3, shards=2)
    manifest = shards.read_manifest(made)
    assert (manifest.configuration["shards"]["count"], len(manifest.shards)) == (2, 2)
    assert shards.verify(made) == []


def test_a_finished_data_set_is_left_alone_and_another_is_refused(
    made: Path, raw: Path, model: Path
) -> None:
    before = hashes(made)
    assert run(raw, model, made.parent, 3) == run(raw, model, made.parent, 2) == made
    with pytest.raises(WorkspaceError, match="seed: 1 there, 2 now"):
        run(raw, model, made.parent, 3, seed=2)
    assert hashes(made) == before


def test_files_of_something_else_are_not_replaced(raw: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "tokenizer.json").write_text("mine")
    writer = InfiniShardWriter(tmp_path / "set", tokenizer=model)
    with pytest.raises(WorkspaceError, match=r"set holds tokenizer\.json, which a data set there"):
        writer.run(iter([]))
    assert (tmp_path / "set" / "tokenizer.json").read_text() == "mine"


def test_what_is_wrong_with_a_writer_is_told_before_anything_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as raised:
        InfiniShardWriter("s3://bucket/set", model, seed=-1, shards=-2, shard_tokens=0, source="")
    starts = [problem.split(",")[0] for problem in raised.value.problems]
    assert starts == [
        "output_dir: s3://bucket/set is a URL",
        "source: not set; documents carry it",
        "seed: expected at least 0",
        "shards: expected at least 0",
        "shard_tokens: expected at least 1",
    ]
    with pytest.raises(SettingsError, match="output_dir: not set"):
        InfiniShardWriter("", model)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_is_missing_is_named(raw: Path, model: Path, tmp_path: Path) -> None:
    writer = InfiniShardWriter(tmp_path / "set", tokenizer=model)
    with pytest.raises(WorkspaceError, match="of 0 tasks"):
        InfiniShardFinaliser(writer).run()
    writer.run([Document(text="a text", id="one")], 1, 3)
    with pytest.raises(WorkspaceError, match=r"of 3 tasks .* 2 have not ended here.*\[0, 2\]"):
        InfiniShardFinaliser(writer).run()
