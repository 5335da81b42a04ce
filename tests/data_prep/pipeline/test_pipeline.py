"""The bytes of a data set depend on corpus, configuration and seed; nothing is lost on the way."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers
import trafilatura
import zstandard
from lxml.html import HtmlElement
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_prep import cli, config
from data_prep.config import Config, SourceConfig
from data_prep.dataset import shards
from data_prep.dataset.keyed import keyed
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import Document
from data_prep.pipeline import pipeline, reshard, stages, workspace, writing
from data_prep.pipeline.stages import DrawSample, SurveyFiles, TrainTokenizer, _why_lossy
from data_prep.pipeline.table import Rows
from data_prep.pipeline.workers import Workers
from data_prep.pipeline.workspace import WorkspaceError
from data_prep.sources import extractor, inputs, storage
from data_prep.sources.documents import Survey
from data_prep.sources.inputs import InputChangedError, InputFile
from data_prep.sources.storage import Status
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import TokenizerError

WORDS = [
    *("the", "memory", "of", "a", "segment", "reads", "before", "it", "writes", "12", "-", "\n"),
    *("\u00fcber", "\u65e5\u672c", "\u2581", "\0", "\r\n", "\t", "  ", "\ufeff", "\U0001f600"),
]
BAD_LINES = [
    b'{"text": "a\xff"}',
    b'{"text": ',
    b"[1]",
    b'{"txt": "a"}',
    b'{"text": 4}',
    b'{"text": ""}',
    b"",
    b'{"text": "\\udc00"}',
]


@dataclass(frozen=True)
class Corpus:
    """A directory of input files and what is in them, by hand."""

    root: Path
    texts: Counter[str]
    rejected: Counter[str]


def story(source: random.Random, words: int) -> str:
    return "".join(
        source.choice(WORDS) + source.choice(("", " ")) for _ in range(source.randrange(1, words))
    ) + str(source.random())


def lines_of(texts: list[str], source: random.Random) -> bytes:
    lines = [
        json.dumps({"text": text, "id": f"id {n % 50}"} if n % 3 else {"text": text}).encode()
        for n, text in enumerate(texts)
    ]
    lines += BAD_LINES
    source.shuffle(lines)
    return b"\n".join(lines) + b"\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    source = random.Random(5)
    groups = [[story(source, 200) for _ in range(120)] for _ in range(3)]
    (root / "a.jsonl").write_bytes(lines_of(groups[0], source))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(groups[1], source), mtime=0))
    (root / "c.jsonl.zst").write_bytes(
        zstandard.ZstdCompressor().compress(lines_of(groups[2], source))
    )
    files = [story(source, 300) for _ in range(20)]
    for number, text in enumerate(files):
        (root / f"{number}.txt").write_bytes(text.encode())
    (root / "empty.txt").touch()
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "lost"}\n')[:-4])
    reasons = Counter(
        {
            "invalid UTF-8": 4,
            "broken JSON": 3,
            "not an object": 3,
            "text missing": 3,
            "text not a string": 3,
            "empty text": 4,
            "blank line": 3,
            "lone surrogate": 3,
            "truncated file": 1,
        }
    )
    return Corpus(root, Counter([*itertools.chain(*groups), *files, "lost"]), reasons)


def configured(corpus: Corpus, output: Path, *words: str) -> Config:
    sources = "sources=[{name: lines, paths: ['*.jsonl*']}, {name: files, paths: ['*.txt']}]"
    # The sample is a part of the corpus, so that what is drawn matters.
    model = ["tokenizer.vocab_size=400", "tokenizer.sample_bytes=30000"]
    # Each bucket is a file to sync for each unit; four find what is alike here.
    near = ["duplicates.near=true", "duplicates.buckets=4"]
    defaults = [*model, *near, "shards.count=7", "workers=2"]
    places = [f"root={corpus.root}", f"output={output}"]
    return config.load(None, [*places, sources, *defaults, *words])


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


def documents_of(directory: Path) -> list[Document]:
    manifest = shards.read_manifest(directory)
    return [
        document
        for info in manifest.shards
        for document in shards.read_shard(directory / info.name, info)
    ]


@pytest.fixture(scope="module")
def made(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the corpus, made by one worker."""
    output = tmp_path_factory.mktemp("made") / "set"
    outcome = pipeline.run(configured(corpus, output, "workers=1"))
    assert not outcome.already
    return output


def test_the_data_set_is_whole_and_alone_in_its_directory(made: Path) -> None:
    assert shards.verify(made) == []
    names = {shards.shard_name(number) for number in range(7)}
    assert {path.name for path in made.iterdir()} == names | {
        *("manifest.json", "inputs.json", "rejects.jsonl", "cleaning.json", "tokenizer.model")
    }


def test_every_record_is_a_document_or_a_reject(corpus: Corpus, made: Path) -> None:
    manifest = shards.read_manifest(made)
    rejects = [json.loads(line) for line in (made / "rejects.jsonl").read_text().splitlines()]
    assert Counter(reject["reason"] for reject in rejects) == corpus.rejected
    places = [(reject["file"], reject["line"]) for reject in rejects]
    assert places == sorted(places)
    assert manifest.rejected == corpus.rejected.total()
    assert manifest.documents == corpus.texts.total()


def test_every_text_comes_back_from_the_shards(corpus: Corpus, made: Path) -> None:
    model = tokenizer.load(made / "tokenizer.model")
    documents = documents_of(made)
    texts = [model.decode(document.tokens) for document in documents]
    assert Counter(texts) == corpus.texts
    assert [document.bytes for document in documents] == [len(text.encode()) for text in texts]
    assert {document.source for document in documents} == {"lines", "files"}


def test_ids_are_unique(made: Path) -> None:
    ids = [document.id for document in documents_of(made)]
    assert len(set(ids)) == len(ids)
    assert {"id 1", "id 1#2", "0.txt"} <= set(ids)


def test_a_reject_names_the_place(corpus: Corpus, made: Path) -> None:
    for line in (made / "rejects.jsonl").read_text().splitlines():
        reject = json.loads(line)
        if reject["file"] == "lines/a.jsonl":
            data = (corpus.root / "a.jsonl").read_bytes()
            assert data[: reject["offset"]].count(b"\n") == reject["line"] - 1
            assert data[reject["offset"] :].split(b"\n")[0] in BAD_LINES


def byte_level(path: Path) -> Path:
    """A tokenizer.json of which each byte is a token: the same with any version of its library."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))
    model.save(str(path))
    return path


def test_data_sets_of_unique_ids_are_to_the_byte_what_they_always_were(tmp_path: Path) -> None:
    for name in "ab":
        rows = [
            {"id": f"{name} {n}", "text": f"text {n} of {name} " * (n % 7 + 1)} for n in range(150)
        ]
        lines = [json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "[]", ""]))
    sources = "sources=[{name: b, paths: [b.jsonl]}, {name: a, paths: ['a.*']}]"
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", sources, "shards.count=3"]
    words += [f"tokenizer.path={byte_level(tmp_path / 'bytes.json')}", "workers=1"]
    manifest = pipeline.run(config.load(None, words)).manifest
    # Of commit 8f64b49, in which the order was a list of Python objects.
    assert [info.sha256[:16] for info in manifest.shards] == [
        *("aa223573b6997dd9", "7422aee39a03b27f", "5a3888b1d7e05b93")
    ]


def test_documents_whose_ids_repeat_are_shuffled_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        rows = [{"id": row, "text": f"file {number} row {row}"} for row in range(50)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{number:02}.jsonl").write_text("".join(lines))
    model = byte_level(tmp_path / "bytes.json")
    words = [f"root={tmp_path}", "sources=[{name: s, paths: ['*.jsonl']}]", "shards.count=2"]
    words += [f"tokenizer.path={model}"]
    found = []
    for name, workers, cut_bytes, part in (("a", 1, 1 << 20, 1 << 15), ("b", 2, 500, 90)):
        monkeypatch.setattr(workspace, "CUT_BYTES", cut_bytes)
        monkeypatch.setattr(writing, "_PART", part)
        pipeline.run(config.load(None, [*words, f"output={tmp_path / name}", f"workers={workers}"]))
        found.append(hashes(tmp_path / name))
    assert found[0] == found[1]
    documents = documents_of(tmp_path / "a")
    assert len({document.id for document in documents}) == len(documents) == 1000
    rows_of = [document.id.partition("#")[0] for document in documents]
    # 20 by chance, where it was 950.
    assert sum(a == b for a, b in itertools.pairwise(rows_of)) < 45
    # A row's documents are numbered in the order of the corpus.
    tokens = {document.id: document.tokens for document in documents}
    given = tokenizer.load(model)
    for number in range(20):
        id = f"7#{number + 1}" if number else "7"
        assert given.decode(tokens[id]) == f"file {number} row 7"


@pytest.mark.parametrize("different", [100_000, 3])
def test_ordering_holds_less_than_100_bytes_a_document(different: int, tmp_path: Path) -> None:
    peaks = []
    for units in (4, 24):
        work = workspace.Work(tmp_path / str(units), [])
        work.documents(0).parent.mkdir(parents=True)
        vars(work)["units"] = [[]] * units
        for unit in range(units):
            rows = Rows()
            for line in range(1000):
                id = f"document {(line * units + unit) % different}"
                rows.add(id, keyed(1, id), b"", (0, line), (67, 20))
            rows.write(work.documents(unit))
        tracemalloc.start()
        pipeline._write_recipe(Config(), work, np.arange(1000 * units))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 20_000 < 100


@pytest.mark.parametrize(("workers", "cut_bytes"), [(2, 1 << 20), (4, 4000)])
def test_workers_and_units_change_no_byte(
    workers: int,
    cut_bytes: int,
    corpus: Corpus,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workspace, "CUT_BYTES", cut_bytes)
    monkeypatch.setattr(writing, "_PART", cut_bytes // 200)  # 20: each shard is of several parts
    pipeline.run(configured(corpus, tmp_path / "set", f"workers={workers}"))
    assert hashes(tmp_path / "set") == hashes(made)


def test_the_seed_changes_order_and_nothing_else(
    corpus: Corpus, made: Path, tmp_path: Path
) -> None:
    # The seed draws the sample too, so both are made with one tokenizer.
    model = f"tokenizer.path={made / 'tokenizer.model'}"
    pipeline.run(configured(corpus, tmp_path / "set", "seed=2", model))
    ours = [(doc.id, doc.tokens.tolist()) for doc in documents_of(tmp_path / "set")]
    theirs = [(doc.id, doc.tokens.tolist()) for doc in documents_of(made)]
    assert ours != theirs
    assert sorted(ours) == sorted(theirs)


def test_a_finished_data_set_is_left_alone(corpus: Corpus, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [made, *made.iterdir()]}
    assert pipeline.run(configured(corpus, made, "workers=5")).already
    assert {path: path.stat().st_mtime_ns for path in [made, *made.iterdir()]} == before


def test_another_configuration_is_refused_by_name(corpus: Corpus, made: Path) -> None:
    before = hashes(made)
    with pytest.raises(WorkspaceError, match=r"seed: 1 there, 3 now; shards.count: 7 there, 5"):
        pipeline.run(configured(corpus, made, "seed=3", "shards.count=5"))
    assert hashes(made) == before


def test_other_inputs_are_refused(corpus: Corpus, made: Path, tmp_path: Path) -> None:
    for path in corpus.root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "one more"}\n')
    changed = Corpus(tmp_path, corpus.texts, corpus.rejected)
    with pytest.raises(WorkspaceError, match=r"other input files: lines/a\.jsonl"):
        pipeline.run(configured(changed, made))


@pytest.mark.parametrize("kills", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bytes(
    kills: int, corpus: Corpus, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, source = tmp_path / "set", random.Random()
    killed_at: set[str] = set()
    struck = 0
    while struck < kills:
        if (output / "manifest.json").exists():
            assert hashes(output).items() >= hashes(made).items()
            shutil.rmtree(output)
        process = start(configured(corpus, output, f"workers={source.randrange(1, 5)}"), 2000)
        # Small units: some hundred marks in all, and a kill after a few more of them.
        goal = len(marks(output)) + source.randrange(max(10, 240 // kills))
        while process.is_alive() and len(marks(output)) < goal:
            time.sleep(0.005)
        struck_now = process.is_alive()
        if struck_now:
            killed_at |= {path.parent.name for path in marks(output)}
            kill(process, source.choice(["parent", "worker", "both"]), source)
            struck += 1
        process.join()
        # 1: it lost a worker and said so.
        assert process.exitcode in ((0, 1, -signal.SIGKILL) if struck_now else (0,))
    monkeypatch.setattr(workspace, "CUT_BYTES", 2000)
    pipeline.run(configured(corpus, output, "workers=2"))
    assert hashes(output) == hashes(made)
    assert not (output / "work").exists()
    assert killed_at >= {"survey", "sample"}


def start(wanted: Config, cut_bytes: int) -> ForkProcess:
    """A run in a process of its own, which need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(wanted, cut_bytes))
    process.start()
    return process


def run(wanted: Config, cut_bytes: int) -> None:
    pytest.MonkeyPatch().setattr(workspace, "CUT_BYTES", cut_bytes)
    pytest.MonkeyPatch().setattr(writing, "_PART", 20)
    pipeline.run(wanted)


def kill(process: ForkProcess, victim: str, source: random.Random) -> None:
    """SIGKILL the command, one of its workers, or a worker and then the command."""
    assert process.pid is not None
    children = children_of(process.pid)
    if children and victim != "parent":
        with contextlib.suppress(ProcessLookupError):
            os.kill(source.choice(children), signal.SIGKILL)
    if victim != "worker" or not children:
        process.kill()


def marks(output: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError):  # a run that ends removes them meanwhile
        return list((output / "work").glob("*/*.json"))
    return []


def test_workers_end_with_their_parent(corpus: Corpus, tmp_path: Path) -> None:
    big = Corpus(tmp_path / "in", corpus.texts, corpus.rejected)
    big.root.mkdir()
    (big.root / "a.jsonl").write_bytes((corpus.root / "a.jsonl").read_bytes() * 200)
    (big.root / "b.txt").write_text("b")
    words = [
        *(f"root={big.root}", f"output={tmp_path / 'set'}", "workers=3"),
        *("sources=[{name: s, paths: ['*']}]", "tokenizer.vocab_size=400"),
    ]
    process = start(config.load(None, words), 1 << 20)
    assert process.pid is not None
    children = wait_for_children(process.pid, 3)
    process.kill()
    process.join()
    deadline = time.monotonic() + 5
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)


def wait_for_children(pid: int, count: int) -> list[int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(children := children_of(pid)) >= count:
            return children
        time.sleep(0.02)
    raise AssertionError("the workers never came")


def children_of(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in text.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_number_of_shards_may_change_before_the_manifest_is_written(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=r"shards\.count: 1,000 shards cannot be made of 381"):
        pipeline.run(configured(corpus, tmp_path / "set", "shards.count=1000"))
    assert list((tmp_path / "set/work/tokenize").glob("*.json"))
    # Shards that a run left, which ended before its manifest, are dropped too.
    with monkeypatch.context() as failing:
        failing.setattr(shards, "write_manifest", full_disk)
        with pytest.raises(OSError, match="No space"):
            pipeline.run(configured(corpus, tmp_path / "set", "shards.count=9"))
    assert len(list((tmp_path / "set").glob("*.tar"))) == 9
    outcome = pipeline.run(configured(corpus, tmp_path / "set", "shards.count=3"))
    assert len(outcome.manifest.shards) == 3
    assert shards.verify(tmp_path / "set") == []


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_vocabulary_that_does_not_fit_may_be_changed(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.vocab_size: 100000 does not fit"):
        pipeline.run(configured(corpus, tmp_path / "set", "tokenizer.vocab_size=100000"))
    path = pipeline.run_tokenizer(configured(corpus, tmp_path / "set"))
    assert tokenizer.load(path).vocab_size == 400


def test_in_two_steps_it_is_the_same_data_set(corpus: Corpus, made: Path, tmp_path: Path) -> None:
    wanted = configured(corpus, tmp_path / "set")
    with pytest.raises(WorkspaceError, match="has no tokenizer yet"):
        pipeline.run(wanted, "shards")
    pipeline.run_tokenizer(wanted)
    with pytest.raises(WorkspaceError, match="seed: 1 there, 2 now"):
        pipeline.run(configured(corpus, tmp_path / "set", "seed=2"), "shards")
    pipeline.run(wanted, "shards")
    assert hashes(tmp_path / "set") == hashes(made)


def test_a_data_set_below_the_root_is_continued_and_then_left_alone(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"some text {name}")
    (tmp_path / "model").mkdir()
    model = small_model(tmp_path / "model")
    sources = "sources=[{name: s, paths: ['**/*'], exclude: ['model/**']}]"
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", sources, "shards.count=1"]
    wanted = config.load(None, [*words, f"tokenizer.path={model}", "workers=1"])
    pipeline.run_tokenizer(wanted)
    assert [file.path for file in pipeline.run(wanted, "shards").manifest.inputs] == [
        *("s/a.txt", "s/b.txt", "s/c.txt")
    ]
    assert pipeline.run(wanted).already


def test_files_are_surveyed_a_few_megabytes_or_many_files_at_a_time(tmp_path: Path) -> None:
    def units(*sizes: int) -> list[int]:
        files = [
            InputFile(SourceConfig("s"), f"/{n}", f"{n}", "text", None, Status(size, ""))
            for n, size in enumerate(sizes)
        ]
        return [len(unit) for unit in workspace.Work(tmp_path, files).survey_units]

    assert units() == []
    assert units(5 << 20, 1 << 20, 3 << 20, 1, 1) == [1, 2, 2]
    assert units(*[1] * 300) == [128, 128, 44]
    # Of a corpus of 64 GiB in files of 1 MiB there are no more than some thousand.
    assert units(*[1 << 20] * (1 << 16)) == [16] * 4096


def test_the_last_units_are_smaller(tmp_path: Path) -> None:
    names = [f"{number:03d}" for number in range(100)]
    files = [InputFile(SourceConfig("s"), f"/{name}", name, "text", None) for name in names]
    work = workspace.Work(tmp_path, files)
    size = 1 << 16
    vars(work)["surveys"] = [Survey(size, "", "", size, [(0, 1)], "", 1)] * len(files)
    assert [part.file for unit in work.units for part in unit] == list(range(100))
    # 16 make a unit of 1 MiB; then a quarter of what is left; never less than 128 KiB.
    assert [len(unit) for unit in work.units] == [16, 16, 16, 13, 10, 8, 6, 4, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("size", [1, 30_000, 70_001, 10**9])
def test_the_sample_has_the_stated_size(corpus: Corpus, tmp_path: Path, size: int) -> None:
    wanted = configured(corpus, tmp_path / "set", f"tokenizer.sample_bytes={size}")
    work = workspace.Work(tmp_path / "set", inputs.find(wanted, []))
    with workspace.locked(work):
        workspace.begin(work, wanted)
        with Workers(wanted, work, 1) as workers:
            workers.run(SurveyFiles)
            workers.run(DrawSample)
    drawn = sum(len(text.encode()) for text in TrainTokenizer(wanted, work)._sample())
    everything = sum(len(text.encode()) for text in corpus.texts.elements())
    # The last passage ends with a whole character.
    assert min(size, everything) - 3 <= drawn <= min(size, everything)


def test_a_tokenizer_json_is_copied_in_place_of_another(corpus: Corpus, tmp_path: Path) -> None:
    model = tokenizers.Tokenizer.from_file(str(byte_level(tmp_path / "bytes.json")))
    # What a run that was killed had copied, before its configuration was corrected.
    (tmp_path / "set/work").mkdir(parents=True)
    (tmp_path / "set/tokenizer.model").write_bytes(b"stale")
    wanted = configured(corpus, tmp_path / "set", f"tokenizer.path={tmp_path}/bytes.json")
    manifest = pipeline.run(wanted).manifest
    assert tokenizer.find(tmp_path / "set").name == manifest.tokenizer.file == "tokenizer.json"
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id) == (256, None)
    # One token a byte.
    assert manifest.tokens == manifest.text_bytes
    assert shards.verify(tmp_path / "set") == []
    assert pipeline.run(wanted).already
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "bytes.json"))
    with pytest.raises(WorkspaceError, match=r"another tokenizer\.path file"):
        pipeline.run(wanted)


def test_a_given_tokenizer_is_copied(corpus: Corpus, made: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.model"
    given.write_bytes((made / "tokenizer.model").read_bytes())
    wanted = configured(corpus, tmp_path / "set", f"tokenizer.path={given}")
    manifest = pipeline.run(wanted).manifest
    assert manifest.tokenizer == shards.read_manifest(made).tokenizer
    assert {doc.id for doc in documents_of(tmp_path / "set")} == {
        doc.id for doc in documents_of(made)
    }
    given.write_bytes(given.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="tokenizer"):
        pipeline.run(wanted)


def test_a_tokenizer_that_changes_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a text"] * 20),
        model_prefix=str(tmp_path / "nfkc"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(TokenizerError, match=r"nfkc\.model changes white space"):
        pipeline.run(configured(corpus, tmp_path / "s", f"tokenizer.path={tmp_path}/nfkc.model"))


def test_what_a_tokenizer_cannot_give_back_is_rejected(corpus: Corpus, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc def\tx\r", "cab fed"] * 20),
        model_prefix=str(tmp_path / "m"),
        model_type="char",
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\r", "\t"],
        minloglevel=2,
    )
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jsonl").write_text('{"text": "abc"}\n{"text": "xyz"}\n{"text": "fed"}\n')
    words = [
        *(f"root={root}", f"output={tmp_path / 'set'}", f"tokenizer.path={tmp_path}/m.model"),
        "sources=[{name: s, paths: ['*']}]",
    ]
    manifest = pipeline.run(config.load(None, words)).manifest
    assert (manifest.documents, manifest.rejected) == (2, 1)
    (reject,) = (tmp_path / "set/rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["reason"] == "not lossless"
    assert (json.loads(reject)["line"], json.loads(reject)["offset"]) == (2, 16)


def test_an_input_that_changes_meanwhile_stops_the_run(corpus: Corpus, tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for path in corpus.root.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    wanted = configured(Corpus(root, corpus.texts, corpus.rejected), tmp_path / "set")
    pipeline.run_tokenizer(wanted)
    (root / "a.jsonl").write_bytes(b'{"text": "other"}\n')
    with pytest.raises(InputChangedError, match=r"a\.jsonl: changed since"):
        pipeline.run(wanted)
    assert not (tmp_path / "set/manifest.json").exists()


def test_a_tokenizer_that_is_a_directory_is_told(corpus: Corpus, tmp_path: Path) -> None:
    def problem() -> str:
        with pytest.raises(SettingsError) as raised:
            pipeline.open_work(configured(corpus, tmp_path / "set", f"tokenizer.path={tmp_path}"))
        return raised.value.problems[0]

    assert problem() == f"tokenizer.path: {tmp_path} is a directory; give the file in it"
    (tmp_path / "tokenizer.json").touch()
    assert problem().endswith(f"; give the file in it, {tmp_path}/tokenizer.json")


def touched(path: Path) -> None:
    """Give the file another modification time, an hour later."""
    at = path.stat().st_mtime_ns + 3600 * 10**9
    os.utime(path, ns=(at, at))


def test_an_input_that_was_restored_is_continued_with(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(Path(__file__).read_text())
    (tmp_path / "b.txt").write_text("more")
    for number, path in enumerate((small_model(tmp_path), None)):
        words = [f"root={tmp_path}", f"output={tmp_path / str(number)}", "workers=1"]
        words += ["sources=[{name: s, paths: ['*.txt']}]", "shards.count=1"]
        words += [f"tokenizer.path={path}" if path else "tokenizer.vocab_size=400"]
        wanted = config.load(None, words)
        work = pipeline.open_work(wanted)
        with workspace.locked(work):
            pipeline._run(wanted, work, pipeline.stages(wanted)[: 1 if number else 2])
        (tmp_path / "b.txt").write_text("less")
        touched(tmp_path / "b.txt")
        with pytest.raises(InputChangedError, match=r"b\.txt: changed since"):
            pipeline.run(wanted)
        (tmp_path / "b.txt").write_text("more")
        touched(tmp_path / "b.txt")
        assert pipeline.run(wanted).manifest.documents == 2


def test_an_input_may_be_touched_between_its_listing_and_its_reading(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(Path(__file__).read_text())
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "workers=1", "shards.count=1"]
    words += ["sources=[{name: s, paths: ['*.txt']}]", "tokenizer.vocab_size=400"]
    wanted = config.load(None, words)
    work = pipeline.open_work(wanted)
    touched(tmp_path / "a.txt")
    with workspace.locked(work):
        pipeline._run(wanted, work, pipeline.stages(wanted))
    assert shards.verify(tmp_path / "set") == []


def test_a_finished_data_set_is_of_other_input_where_its_bytes_changed_and_not_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, text = tmp_path / "exam.txt", tmp_path / "a.txt"
    evaluation.write_text("one two three")
    text.write_text("some text")
    (tmp_path / "b.txt").write_text("more text")
    source = "{name: s, paths: [a.txt, b.txt], cleaning: {decontaminate: [exam.txt], ngram: 3}}"
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", f"sources=[{source}]", "workers=1"]
    words += ["shards.count=1", f"tokenizer.path={small_model(tmp_path)}"]
    wanted = config.load(None, words)
    manifest = pipeline.run(wanted).manifest
    hashed: list[str] = []
    digest = storage.sha256_of

    def counting(path: str) -> str:
        hashed.append(path)
        return digest(path)

    monkeypatch.setattr(storage, "sha256_of", counting)
    assert pipeline.run(wanted).already and hashed == []
    for path, other, name in (
        (text, "same size", r"s/a\.txt"),
        (evaluation, "one two eight", r"evaluation/exam\.txt"),
    ):
        before = path.read_text()
        path.write_text(other)
        touched(path)
        with pytest.raises(
            WorkspaceError, match=f"was made from other input files: {name} differs"
        ):
            pipeline.run(wanted)
        path.write_text(before)
        touched(path)
        hashed.clear()
        # Of the file restored all bytes are read, once.
        for _ in range(2):
            assert pipeline.run(wanted).manifest == manifest
            assert hashed == [str(path)]
    # Data sets of earlier versions have the sizes alone.
    (tmp_path / "set/inputs.json").unlink()
    text.write_text("same size")
    assert pipeline.run(wanted).already
    assert not (tmp_path / "set/inputs.json").exists()


ENGLISH = "The harbour lay calm in the morning light, and the ships came home from the sea."


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("source", "reasons"),
    [
        ("cleaning: {languages: [de]}", "3 dropped: language: en, 1 rejected: not an object"),
        ("max_held_bytes: 9", "3 rejected: record too large, 1 rejected: not an object"),
    ],
)
def test_where_no_document_is_left_to_train_on_the_reasons_are_told(
    source: str, reasons: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last document has passages that are drawn one by one, and is counted once.
    texts = [ENGLISH, ENGLISH + " It rained.", (ENGLISH + " ") * 600]
    lines = [json.dumps({"text": text, "url": "u"}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "[]", ""]))
    (tmp_path / "c.yaml").write_text(
        f"root: {tmp_path}\noutput: {tmp_path / 'set'}\n"
        f"sources: [{{name: s, paths: [a.jsonl], {source}}}]\n"
    )
    assert cli.main(["run", str(tmp_path / "c.yaml"), *more]) == 2
    told = (
        f"{tmp_path / 'set'}: no document is left of 4 records: {reasons.format(root=tmp_path)}\n"
    )
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_field_that_no_file_has_is_refused_before_anything_is_read(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"body": ENGLISH, "n": n, "turns": [ENGLISH], "x": n / 2} for n in range(9)]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(data)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")

    def told(source: str) -> str:
        (tmp_path / "c.yaml").write_text(
            f"root: {tmp_path}\noutput: {tmp_path / 'set'}\nsources: [{{name: s, {source}}}]\n"
        )
        assert cli.main(["run", str(tmp_path / "c.yaml"), "tokenizer.path=none", *more]) == 2
        assert not (tmp_path / "set").exists()
        *_, problem = capsys.readouterr().err.splitlines()
        return problem.removeprefix("  - sources[0]: ")

    remedy = "; correct it, or exclude such files"
    where = f"{tmp_path}/a.jsonl has 'body', 'n', 'turns', 'x'"
    assert told("paths: ['*.jsonl']") == f"text_field is 'text', but {where}{remedy}"
    pairs = "paths: ['*.jsonl'], format: jsonl, prompt_field: question, answer_field: body"
    assert told(pairs) == f"prompt_field is 'question', but {where}{remedy}"
    ids = "paths: ['*.jsonl'], text_field: body, id_field: uid"
    assert told(ids) == f"id_field is 'uid', but {where}{remedy}"
    found = told("paths: ['*.parquet'], text_field: content")
    assert found == f"text_field is 'content', but {where.replace('a.jsonl', 'c.parquet')}{remedy}"
    (tmp_path / "d.jsonl").write_text('["one", "text"]\n"text"\n' * 9)
    (tmp_path / "empty.jsonl").touch()
    found = told("paths: [d.jsonl, empty.jsonl]")
    assert found.startswith(f"{tmp_path}/d.jsonl has no JSON object in its first lines")
    for name, field, kind in (
        ("a.jsonl", "turns", "a list"),
        ("a.jsonl", "n", "a number"),
        ("c.parquet", "n", "int64"),
    ):
        path = tmp_path / name
        found = told(f"paths: [{name}], text_field: {field}")
        assert found == f"text_field is {field!r}, which in {path} is no text, but {kind}{remedy}"
    for name, text, kind in (
        ("a.jsonl", "body", "a number"),
        ("c.parquet", "body", "double"),
        ("c.parquet", "n", "double"),
    ):
        path = tmp_path / name
        found = told(f"paths: [{name}], text_field: {text}, id_field: x")
        wrong = f"text_field is 'n', which in {path} is no text, but int64; " * (text == "n")
        what = f"id_field is 'x', which in {path} is no id (a text or a whole number), but {kind}"
        assert found == f"{wrong}{what}{remedy}"


def test_a_field_that_no_file_has_is_told_where_other_files_are_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": ENGLISH}) + "\n")
    (tmp_path / "b.txt").write_text(ENGLISH)
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "sources=[{name: s, paths: ['*']}]"]
    pipeline.open_work(config.load(None, words))
    told = f"sources[0]: text_field is 'text', but {tmp_path}/a.jsonl has 'body'; correct it, or"
    assert capsys.readouterr().err.startswith(told)


def test_files_of_which_one_may_hold_texts_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "no text"}) + "\n"] * 9
    text = json.dumps({"text": ENGLISH}) + "\n"
    book = json.dumps({"text": ENGLISH * 2000}) + "\n"
    long = json.dumps({"body": "no text" * 2000}) + "\n"
    for name, data in (
        ("another", ["".join(lines), text]),
        ("later", ["".join([*lines, text])]),
        ("a head before one long record", [lines[0] + book]),
        ("after long ones", [long * 9 + text]),
    ):
        root = tmp_path / name
        root.mkdir()
        for number, one in enumerate(data):
            (root / f"{number}.jsonl").write_text(one)
        words = [
            f"root={root}",
            f"output={root / 'set'}",
            "sources=[{name: s, paths: ['*.jsonl']}]",
        ]
        assert len(pipeline.open_work(config.load(None, words)).files) == len(data)


def test_a_tokenizer_of_few_records_of_a_large_file_is_trained_on_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One unit has the whole file, of which one passage in thirty would be drawn.
    monkeypatch.setattr(workspace, "CUT_BYTES", 1 << 30)
    texts = [f"record {n}: {ENGLISH}\n" * 20 for n in range(5000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [f"root={tmp_path}", "sources=[{name: s, paths: [a.jsonl]}]", "workers=1"]
    words += ["tokenizer.sample_bytes=3000", "tokenizer.vocab_size=300", "shards.count=1"]
    limited = config.load(None, [*words, f"output={tmp_path / 'set'}", "limit=2"])
    assert pipeline.run(limited).manifest.documents == 2
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:2]))
    words[0] = f"root={few}"
    pipeline.run(config.load(None, [*words, f"output={tmp_path / 'of few'}"]))
    models = [tmp_path / name / "tokenizer.model" for name in ("set", "of few")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_records_of_which_no_passage_was_drawn_are_not_called_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_MARGIN", 0.0)
    monkeypatch.setattr(stages, "_SPARE", 0)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ENGLISH}) + "\n[]\n[]\n")
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "workers=1"]
    with pytest.raises(
        TokenizerError, match=r"of 3 records 1 were not drawn, 2 rejected: not an object; raise tok"
    ):
        pipeline.run(config.load(None, [*words, "sources=[{name: s, paths: ['*.jsonl']}]"]))


def test_what_an_earlier_version_started_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    wanted = configured(corpus, tmp_path / "set")
    work = pipeline.open_work(wanted)
    with workspace.locked(work):
        workspace.begin(work, wanted)
    begun = json.loads(work.begun.read_text())
    begun["version"][0] -= 1
    work.begun.write_text(json.dumps(begun))
    with pytest.raises(WorkspaceError, match="was started by another version of data-prep"):
        pipeline.run(wanted)


def test_two_runs_on_one_directory_are_kept_apart(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_LOCK_SECONDS", 0.2)
    wanted = configured(corpus, tmp_path / "set")
    with (
        workspace.locked(workspace.Work(tmp_path / "set", [])),
        pytest.raises(WorkspaceError, match="another data-prep process is using this directory"),
    ):
        pipeline.run(wanted)


# Cleaning and duplicates, through the whole pipeline.


def cleaned_corpus(root: Path) -> None:
    """Two sources with documents for each fate: kept, dropped, changed, duplicate, rejected."""
    source = random.Random(9)
    words = [source.choice(STEMS) + source.choice(("", "s", "ing")) for _ in range(4000)]
    texts = [" ".join(words[n * 50 : n * 50 + 50]) + "." for n in range(60)]
    web = [
        *texts[:30],
        texts[3],
        texts[4] + " more",
        "mail a@b.org " + texts[31],
        "d\u00e9ja\u0300 vu",
    ]
    web.append("Das Meer (m@eer.de) war ruhig und der Wind kam leise \u00fcber den alten Hafen.")
    web.append(texts[32] + " the secret question of the exam is what stands here")
    books = [*texts[40:], texts[5], texts[41] + " again"]
    for name, documents in (("web", web), ("books", books)):
        lines = [json.dumps({"text": text}) for text in documents] + ["broken"]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (root / "exam.jsonl").write_text(
        '{"q": "The secret question of the exam is: what stands here?"}\n'
    )


STEMS = ("harbour", "light", "wind", "sea", "calm", "ship", "morning", "road", "stone", "river")
CLEANING = """
sources:
  - {name: books, paths: [books.jsonl]}
  - name: web
    paths: [web.jsonl]
    cleaning:
      nfc: true
      languages: [en, fr]
      language_score: 0.0
      mask: [email]
      decontaminate: [exam.jsonl]
      ngram: 8
duplicates: {near: true, buckets: 8}
tokenizer: {vocab_size: 320}
shards: {count: 3}
"""


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The corpus's directory and a data set that one worker made of it."""
    root = tmp_path_factory.mktemp("cleaned")
    cleaned_corpus(root)
    (root / "c.yaml").write_text(CLEANING)
    pipeline.run(cleaning_of(root, root / "set", "workers=1"))
    return root, root / "set"


def cleaning_of(root: Path, output: Path, *words: str) -> Config:
    return config.load(root / "c.yaml", [f"root={root}", f"output={output}", *words])


def test_every_record_read_is_accepted_rejected_dropped_or_a_duplicate(
    cleaned: tuple[Path, Path],
) -> None:
    _, directory = cleaned
    manifest = shards.read_manifest(directory)
    sources = json.loads((directory / "cleaning.json").read_text())["sources"]
    # books come first in the corpus: of what both hold, theirs stays.
    assert sources["books"] == {
        "read": 23, "accepted": 21, "rejected": 1, "dropped": {}, "duplicates": {"near": 1},
        "changed": {},
    }  # fmt: skip
    assert sources["web"]["read"] == 37 and sources["web"]["rejected"] == 1
    assert sources["web"]["dropped"] == {"language: de": 1, "contaminated": 1}
    assert sources["web"]["duplicates"] == {"exact": 2, "near": 1}
    assert sources["web"]["changed"] == {"nfc": 1, "mask email": 1}
    assert sources["web"]["accepted"] == 31
    counts = (manifest.documents, manifest.rejected, manifest.dropped, manifest.duplicates)
    assert counts == (52, 2, 2, 4) and sum(counts) == 23 + 37


def test_what_is_kept_comes_back_as_it_was_cleaned(cleaned: tuple[Path, Path]) -> None:
    root, directory = cleaned
    model = tokenizer.load(directory / "tokenizer.model")
    texts = [model.decode(document.tokens) for document in documents_of(directory)]
    assert "d\u00e9j\u00e0 vu" in texts
    assert sum(text.startswith("mail email@example.com ") for text in texts) == 1
    raw = [json.loads(line)["text"] for line in (root / "web.jsonl").read_text().split("\n")[:30]]
    assert set(raw) <= set(texts)
    assert len(texts) == len(set(texts)) == 52


def test_samples_show_what_was_left_out_and_why(cleaned: tuple[Path, Path]) -> None:
    _, directory = cleaned
    samples = json.loads((directory / "cleaning.json").read_text())["samples"]
    shown = {(sample["source"], sample["reason"]): sample for sample in samples}
    assert shown.keys() == {
        ("books", "near duplicate"), ("web", "exact duplicate"), ("web", "near duplicate"),
        ("web", "language: de"), ("web", "contaminated"),
    }  # fmt: skip
    german = shown["web", "language: de"]
    assert german["text"].startswith("Das Meer (email@example.com) war") and german["line"] == 35
    assert (german["file"], german["id"]) == ("web/web.jsonl", "web.jsonl:35")
    assert shown["web", "near duplicate"]["text"]


def test_cleaning_gives_the_same_bytes_for_any_workers_and_units(
    cleaned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, directory = cleaned
    monkeypatch.setattr(workspace, "CUT_BYTES", 2000)  # many units
    pipeline.run(cleaning_of(root, tmp_path / "set", "workers=3"))
    ours, theirs = hashes(tmp_path / "set"), hashes(directory)
    assert ours == theirs


LONG = """
sources:
  - name: books
    paths: ["**/*.txt"]
    group_by: directory
    cleaning: {repair: true, nfc: true, languages: [en], mask: [email], decontaminate: [exam.jsonl]}
duplicates: {near: true, buckets: 8}
shards: {count: 2}
"""


def test_documents_in_passages_give_the_same_shards(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random.Random(8)
    prose = [" ".join(source.choices(STEMS, k=60)) + ".\n" for _ in range(200)]
    books = {
        "a/1": "".join(prose[:40]),
        "a/2": "Mail cafe\u0301@b.org or a@b.org.\n" + "".join(prose[40:60]),
        "b/1": "".join(prose[60:120]),
        "c/1": "".join(prose[60:119]) + "Another end.\n",  # a near duplicate
        "d/1": "".join(prose[60:120]),  # an exact one
        "e/1": "".join(prose[120:150]) + "The secret question of the exam is: what\nstands here?",
        "f/1": "Es ist ein ruhiger Morgen am Hafen, und das Licht liegt auf dem Meer.\n" * 99,
        "g/1": "".join(prose[150:]).replace("\n", " "),
    }
    for name, text in books.items():
        (tmp_path / f"{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "g/2.txt").write_bytes(b"caf\xe9 " * 2000)
    (tmp_path / "exam.jsonl").write_text(
        '{"q": "The secret question of the exam is: what stands here?", "n": "a b c d e f g h i j"}'
    )
    (tmp_path / "c.yaml").write_text(LONG.replace("[exam.jsonl]}", "[exam.jsonl], ngram: 9}"))
    monkeypatch.setattr("data_prep.sources.documents._PASSAGE", 300)
    monkeypatch.setattr("data_prep.tokenizer.sentencepiece.SentencePiece.least_part", 90)
    monkeypatch.setattr("data_prep.pipeline.writing._BLOCK", 700)
    accounts, found = [], []
    for held in ("100000000", "1000"):
        words = [f"sources[0].max_held_bytes={held}", f"tokenizer.path={made / 'tokenizer.model'}"]
        places = [f"root={tmp_path}", f"output={tmp_path / held}"]
        pipeline.run(config.load(tmp_path / "c.yaml", [*places, *words]))
        assert shards.verify(tmp_path / held) == []
        accounts.append(json.loads((tmp_path / held / "cleaning.json").read_text()))
        found.append(hashes(tmp_path / held))
    assert accounts[0]["sources"] == accounts[1]["sources"]
    (account,) = accounts[0]["sources"].values()
    assert account["dropped"] == {"contaminated": 1, "language: de": 1}
    assert account["duplicates"] == {"exact": 1, "near": 1}
    assert (account["read"], account["accepted"], account["rejected"]) == (8, 3, 1)
    for name in ("shard-00000.tar", "shard-00001.tar", "rejects.jsonl"):
        assert found[0][name] == found[1][name]


def peaks(parent: int) -> dict[int, int]:
    """Peak resident bytes of the processes below, by number."""
    found: dict[int, int] = {}
    waiting = [parent]
    while waiting:
        number = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended
            below = Path(f"/proc/{number}/task/{number}/children").read_text().split()
            status = Path(f"/proc/{number}/status").read_text()
            found |= {number: int(match[1]) << 10} if (match := PEAK.search(status)) else {}
            waiting += map(int, below)
    return found


PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


@pytest.mark.parametrize(
    ("size", "held", "most"),
    [
        (20 << 20, 4 << 20, 512 << 20),
        pytest.param(2 << 30, 64 << 20, 1 << 30, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_worker_does_not_grow_with_a_document(
    size: int, held: int, most: int, made: Path, tmp_path: Path
) -> None:
    source = random.Random(10)
    lines = [" ".join(source.choices(STEMS, k=12)) + "\n" for _ in range(1 << 14)]
    block = "".join(lines).encode()
    (tmp_path / "in").mkdir()
    with (tmp_path / "in/long.txt").open("wb") as file:
        for number in range(size // len(block)):
            file.write(b"Part %d\n" % number + block)
    (tmp_path / "in/short.txt").write_text("a short one")
    given = f"sources: [{{name: s, paths: ['*.txt'], max_held_bytes: {held}}}]\n"
    (tmp_path / "c.yaml").write_text(given)
    words = [f"root={tmp_path / 'in'}", f"tokenizer.path={made / 'tokenizer.model'}", "workers=1"]
    # Near duplicates would take half of the time.
    words += ["duplicates.near=true", "duplicates.buckets=2"] if size < 1 << 30 else []
    words += [f"output={tmp_path / 'set'}"]
    command = [sys.executable, "-m", "data_prep.cli", "run", str(tmp_path / "c.yaml"), *words]
    found: dict[int, int] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            found |= peaks(process.pid)
            time.sleep(0.05)
    assert process.returncode == 0
    assert len(found) >= 2 and max(found.values()) < most
    manifest = shards.read_manifest(tmp_path / "set")
    assert manifest.documents == 2 and manifest.rejected == 0
    assert manifest.text_bytes == (tmp_path / "in/long.txt").stat().st_size + 11


def test_it_is_told_how_many_evaluation_texts_are_too_short_to_be_found(
    cleaned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = cleaned
    # The others have eight words: in one text, and in a question with its answer.
    rows: list[dict[str, object]] = [{"q": "Who, " * 7}, {"q": "Who, " * 8}, {"n": 1}]
    rows += [{"q": "Who, " * 7, "a": "me"}, {"q": "Who?"}]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decontaminate = f"sources.1.cleaning.decontaminate=[{tmp_path}/quiz.jsonl]"
    pipeline.open_work(cleaning_of(root, tmp_path / "set", decontaminate))
    assert capsys.readouterr().err == (
        "sources[1].cleaning.decontaminate: 2 of 4 evaluation texts have fewer than 8 words, the "
        "n-gram that is looked for, and cannot be found; a lower cleaning.ngram finds more\n"
    )


def test_an_evaluation_set_that_changed_is_another_data_set(
    cleaned: tuple[Path, Path], tmp_path: Path
) -> None:
    root, directory = cleaned
    wanted = cleaning_of(root, directory)
    assert pipeline.run(wanted).already
    exam = (root / "exam.jsonl").read_text()
    try:
        (root / "exam.jsonl").write_text(exam + '{"q": "another"}\n')
        with pytest.raises(WorkspaceError, match=r"evaluation/exam\.jsonl"):
            pipeline.run(wanted)
        (root / "exam.jsonl").write_text("{")
        with pytest.raises(
            SettingsError, match=r"decontaminate: .*exam\.jsonl: is not UTF-8 jsonl"
        ):
            pipeline.run(wanted)
        # Seven words where eight in a row are looked for.
        (root / "exam.jsonl").write_text(json.dumps({"q": "Who, " * 7}))
        with pytest.raises(SettingsError, match="decontaminate: no evaluation text has 8 words"):
            pipeline.run(wanted)
    finally:
        (root / "exam.jsonl").write_text(exam)


def test_documents_are_cleaned_by_the_evaluation_files_with_which_the_run_began(
    tmp_path: Path,
) -> None:
    cleaned_corpus(tmp_path)
    (tmp_path / "c.yaml").write_text(CLEANING)
    wanted = cleaning_of(tmp_path, tmp_path / "set", "sources.1.cleaning.decontaminate=['exam*']")
    work = pipeline.open_work(wanted)
    with workspace.locked(work):
        pipeline._run(wanted, work, pipeline.stages(wanted)[:3])
    tokenize, exam = stages.Tokenize(wanted, work), tmp_path / "exam.jsonl"
    data = exam.read_bytes()
    # A later one, which holds documents of the corpus.
    (tmp_path / "exam_2.json").write_bytes((tmp_path / "web.jsonl").read_bytes()[:-7])
    exam.write_bytes(data + b"\n")
    with pytest.raises(InputChangedError, match=r"exam\.jsonl: changed since"):
        tokenize.run_task(0, 1)
    exam.unlink()
    with pytest.raises(FileNotFoundError, match=r"exam\.jsonl"):
        tokenize.run_task(0, 1)
    exam.write_bytes(data)
    tokenize.run_task(0, 1)
    found = [work.read("tokenize", unit)["accounts"]["sources"] for unit in range(len(work.units))]
    assert sum(one["web"]["dropped"].get("contaminated", 0) for one in found if "web" in one) == 1
    for stage in pipeline.stages(wanted)[4:-1]:
        stage(wanted, work).run_task(0, 1)
    exam.write_bytes(data + b"\n")
    with pytest.raises(InputChangedError, match=r"exam\.jsonl: changed since"):
        pipeline.WriteManifest(wanted, work).run_task(0, 1)


def test_a_limit_takes_the_first_records_of_each_source(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "CUT_BYTES", 2000)
    model = ["tokenizer.vocab_size=300", "shards.count=2"]
    for limit in (5, 130):
        output = tmp_path / str(limit)
        pipeline.run(configured(corpus, output, *model, f"limit={limit}"))
        sources = json.loads((output / "cleaning.json").read_text())["sources"]
        files = len(list(corpus.root.glob("*.txt")))
        assert sources["lines"]["read"] == limit
        assert sources["files"]["read"] == min(limit, files)
        rejects = (output / "rejects.jsonl").read_text().splitlines()
        taken = [line for line in map(json.loads, rejects) if line["file"].startswith("lines/")]
        # a.jsonl has 128 lines; what is beyond it comes from b.jsonl.gz.
        assert {line["file"] for line in taken} <= {"lines/a.jsonl", "lines/b.jsonl.gz"}
        assert all(line["line"] <= min(limit, 128) for line in taken)


def test_a_limit_reads_no_file_of_which_it_takes_no_record(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{ENGLISH} {number}"}).encode() + b"\n" for number in range(3000)]
    (tmp_path / "a.jsonl").write_bytes(lines[0] + lines[1])
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    words = [f"root={tmp_path}", "sources=[{name: s, paths: ['*.jsonl*']}]", "workers=1"]
    words += [f"tokenizer.path={small_model(tmp_path)}"]
    for limit, last in ((1, "a"), (2, "a"), (5, "b"), (3010, "c")):
        output = tmp_path / str(limit)
        wanted = config.load(None, [*words, f"output={output}", f"limit={limit}"])
        work = pipeline.open_work(wanted)
        with workspace.locked(work):
            pipeline._run(wanted, work, [stages.SurveyFiles])
        assert [found.is_unread for found in work.surveys] == [
            name > last for name in ("a", "b", "c")
        ]
        manifest = pipeline.run(wanted).manifest
        assert manifest.documents == limit
        hashes = [file.sha256 != "" for file in manifest.inputs]
        # Of the last file no more than its first records was read.
        assert hashes == [name < last for name in ("a", "b", "c")]
        assert pipeline.run(wanted).already
        touched(tmp_path / f"{last}.jsonl{'.gz' * (last == 'c')}")
        with pytest.raises(WorkspaceError, match="was made from other input files"):
            pipeline.run(wanted)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "rejects.jsonl", "cleaning.json", "shard-0.tar"]
)
def test_files_of_something_else_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "model").mkdir()
    model = small_model(tmp_path)
    words = [f"root={tmp_path}", f"output={tmp_path / 'model'}", f"tokenizer.path={model}"]
    wanted = config.load(None, [*words, "sources=[{name: s, paths: ['a.txt']}]"])
    kept = tmp_path / "model" / name
    kept.write_text("mine")
    with pytest.raises(SettingsError, match=rf"output: .*model holds {name}, which a data set th"):
        pipeline.run(wanted)
    assert [path.name for path in (tmp_path / "model").iterdir()] == [name]
    kept.rename(tmp_path / "model" / "notes.txt")
    pipeline.run(wanted)
    assert pipeline.run(wanted).already
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_a_limit_counts_the_records_of_all_archives_of_a_source(tmp_path: Path) -> None:
    for number in range(3):
        record = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 5\r\n\r\ntext{}\r\n\r\n"
        (tmp_path / f"{number}.wet").write_text("".join(map(record.format, range(4))), newline="")
    (tmp_path / "b.txt").write_text("another source")
    sources = "sources=[{name: a, paths: ['*.wet']}, {name: b, paths: ['*.txt']}]"
    words = [f"root={tmp_path}", sources, f"tokenizer.path={small_model(tmp_path)}"]
    for limit, read in ((3, 3), (4, 4), (6, 6), (9, 9), (99, 12)):
        output = tmp_path / f"set {limit}"
        pipeline.run(config.load(None, [*words, f"output={output}", f"limit={limit}"]))
        accounts = json.loads((output / "cleaning.json").read_text())["sources"]
        assert {name: account["read"] for name, account in accounts.items()} == {"a": read, "b": 1}
        ids = {document.id.partition(":")[0] for document in documents_of(output)}
        assert ids == {*(f"{n}.wet" for n in range((read + 3) // 4)), "b.txt"}


def test_a_prompt_and_its_answer_share_no_token(tmp_path: Path) -> None:
    source = random.Random(3)
    pairs = {f"pair {n}": (story(source, 80), story(source, 9)) for n in range(60)}
    # Where one text would be cut otherwise than two.
    pairs["joint"] = ("the memor", "y of the segment")
    lines = [json.dumps({"id": i, "q": q, "a": a}) for i, (q, a) in pairs.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, '{"q": "no answer"}']))
    entry = "{name: pairs, paths: [pairs.jsonl], format: jsonl, prompt_field: q, answer_field: a}"
    words = [f"root={tmp_path}", f"sources=[{entry}]", "tokenizer.vocab_size=400", "shards.count=2"]
    output = tmp_path / "out"
    manifest = pipeline.run(config.load(None, [*words, f"output={output}", "workers=1"])).manifest
    assert (manifest.documents, manifest.rejected) == (61, 1)
    assert manifest.configuration["sources"][0]["prompt_field"] == "q"
    assert shards.verify(output) == []
    model = tokenizer.load(tokenizer.find(output))
    found = {}
    for document in documents_of(output):
        prompt, answer = np.split(document.tokens, document.turns)
        assert prompt.tolist() == model.encode(pairs[document.id][0]).tolist()
        found[document.id] = (
            model.decode(prompt),
            model.decode_bytes(answer, inside=True).decode(),
        )
        assert document.bytes == sum(len(part.encode()) for part in found[document.id])
    assert found == pairs
    assert manifest.prompt_tokens == sum(document.turns[0] for document in documents_of(output))
    joint = "".join(pairs["joint"])
    (stored,) = (document for document in documents_of(output) if document.id == "joint")
    assert stored.tokens.tolist() != model.encode(joint).tolist(), "the case should be met"
    # Cut anew, the prompts stay.
    assert reshard.run(output, tmp_path / "again", 3)
    again = {document.id: document.turns for document in documents_of(tmp_path / "again")}
    assert again == {document.id: document.turns for document in documents_of(output)}
    assert shards.verify(tmp_path / "again") == []


def test_every_turn_has_tokens_of_its_own(tmp_path: Path) -> None:
    source = random.Random(5)
    turns = {f"{n}": [story(source, 5) for _ in range(2 * (n % 3) + 2)] for n in range(60)}
    # Where one text would be cut otherwise than two.
    turns["joint"] = ["the memor", "y of the seg", "ment and its mem", "ory"]
    lines = [json.dumps({"id": i, "q": all[::2], "a": all[1::2]}) for i, all in turns.items()]
    (tmp_path / "turns.jsonl").write_text("\n".join(lines))
    question = "\nSo: "
    entry = (
        "{name: turns, paths: [turns.jsonl], format: jsonl, prompt_field: q, answer_field: a, "
        f"question: {json.dumps(question)}}}"
    )
    words = [f"root={tmp_path}", f"sources=[{entry}]", "tokenizer.vocab_size=400", "shards.count=2"]
    output = tmp_path / "out"
    manifest = pipeline.run(config.load(None, [*words, f"output={output}"])).manifest
    assert shards.verify(output) == []
    model = tokenizer.load(tokenizer.find(output))
    prompts = 0
    for document in documents_of(output):
        found = np.split(document.tokens, document.turns)
        texts = [model.decode_bytes(ids, inside=n > 0).decode() for n, ids in enumerate(found)]
        assert texts[1::2] == turns[document.id][1::2]
        assert texts[::2] == [f"{prompt}{question}" for prompt in turns[document.id][::2]]
        prompts += sum(map(len, found[::2]))
    assert manifest.prompt_tokens == prompts
    # Cut anew, the turns stay.
    assert reshard.run(output, tmp_path / "again", 3)
    again = {document.id: document.turns for document in documents_of(tmp_path / "again")}
    assert again == {document.id: document.turns for document in documents_of(output)}
    assert len(again["joint"]) == 3


def test_a_question_ends_every_prompt_in_tokens_of_its_own(tmp_path: Path) -> None:
    source = random.Random(4)
    pairs = {f"pair {n}": (story(source, 80), story(source, 9)) for n in range(60)}
    pairs["joint"] = ("the memor", "of the segment")
    lines = [json.dumps({"id": i, "q": q, "a": a}) for i, (q, a) in pairs.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    question = "y\n\nSummary:\n"
    entry = (
        "{name: pairs, paths: [pairs.jsonl], format: jsonl, prompt_field: q, answer_field: a, "
        f"question: {json.dumps(question)}}}"
    )
    words = [f"root={tmp_path}", f"sources=[{entry}]", "tokenizer.vocab_size=400"]
    output = tmp_path / "out"
    manifest = pipeline.run(config.load(None, [*words, f"output={output}", "workers=1"])).manifest
    assert manifest.configuration["sources"][0]["question"] == question
    model = tokenizer.load(tokenizer.find(output))
    (asked,) = (ids.tolist() for _, ids in model.encode_parts([question], inside=True))
    for document in documents_of(output):
        text, answer = pairs[document.id]
        prompt = document.tokens[: document.turns[0]].tolist()
        assert prompt == [*model.encode(text).tolist(), *asked]
        rest = model.decode_bytes(document.tokens[document.turns[0] :], inside=True)
        assert rest.decode() == answer
        assert document.bytes == len((text + question + answer).encode())


def test_answers_without_an_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"q": "a", "a": "b"}')
    model = tmp_path / "endless.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc def\tx", "cab fed"] * 20),
        model_prefix=str(model.with_suffix("")),
        model_type="char",
        vocab_size=20,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\r", "\t"],
        eos_id=-1,
        minloglevel=2,
    )
    entry = "{name: pairs, paths: [pairs.jsonl], format: jsonl, prompt_field: q, answer_field: a}"
    words = [f"root={tmp_path}", f"sources=[{entry}]", f"tokenizer.path={model}"]
    with pytest.raises(
        TokenizerError, match="no end-of-text token, which has to end the answers of pairs"
    ):
        pipeline.run(config.load(None, [*words, f"output={tmp_path / 'out'}"]))


DECOMPOSED = [
    "Tie\u0302\u0301ng Vie\u0323\u0302t",
    "\u1f00\u0301\u03bd\u03b8\u03c1\u03c9\u03c0\u03bf\u03c2",
    "plain text",
]


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Path:
    """A byte-level tokenizer.json as Qwen's: it composes characters, its EOS ends a turn."""
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["text"], trainer)
    model.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    (tmp_path / "hub").mkdir()
    model.save(str(tmp_path / "hub/tokenizer.json"))
    (tmp_path / "hub/tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return tmp_path / "hub/tokenizer.json"


def test_a_tokenizer_that_composes_characters_names_the_remedy(
    chat_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": text}) for text in [*DECOMPOSED, "nothing of it"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.yaml").write_text("{}\n")
    sources = "sources=[{{name: s, paths: ['a.jsonl'], cleaning: {{nfc: {}}}}}]"
    words = [
        "run",
        str(tmp_path / "c.yaml"),
        f"root={tmp_path}",
        f"tokenizer.path={chat_tokenizer}",
    ]
    words += ["shards.count=1", "workers=1", f"output={tmp_path / 'set'}"]
    turn = "this EOS is a chat model's end of turn; tokenizer.eos_token='<|endoftext|>' ends"
    assert cli.main([*words, sources.format("false"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert (
        "2 of 4 sampled records rejected: not lossless, which cleaning.nfc: true would keep" in told
    )
    assert "no BOS, EOS is 257 <|im_end|>" in told and turn in told
    assert cli.main([*words, sources.format("false")]) == 0
    told = capsys.readouterr().out
    assert "2 of these would be kept with cleaning.nfc: true" in told
    assert "tokenizer.json, no BOS, EOS is 257 <|im_end|>" in told and turn in told
    rejects = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").open()]
    assert [reject["line"] for reject in rejects] == [1, 2]
    assert all("cleaning.nfc: true does so before" in reject["detail"] for reject in rejects)
    words[-1] = f"output={tmp_path / 'composed'}"
    assert cli.main([*words, sources.format("true"), "tokenizer.eos_token='<|endoftext|>'"]) == 0
    told = capsys.readouterr().out
    assert "EOS is 256 <|endoftext|>" in told and "chat model" not in told
    manifest = shards.read_manifest(tmp_path / "composed")
    assert (manifest.documents, manifest.tokenizer.eos_id) == (4, 256)
    assert cli.main([*words, sources.format("true"), "tokenizer.eos_token='<x>'"]) == 2


def test_what_else_a_tokenizer_changes_is_shown(tmp_path: Path) -> None:
    assert (
        _why_lossy("abc", b"abx")
        == "the tokenizer does not give this text back exactly: 'c' becomes 'x'"
    )


def test_a_run_that_finds_nothing_says_so_and_a_dry_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = b"WARC/1.0\r\nWARC-Type: request\r\nContent-Length: 1\r\n\r\nx\r\n\r\n"
    for name, data, problem in (
        ("a.warc", request * 3, "no record was found in 1 input file of format warc, such as "),
        ("b.jsonl", b"", "no record was found in 1 input file of format jsonl, such as "),
        (
            "c.jsonl",
            b'[]\n[]\n{"text": ""}\n',
            "no document is left of 3 records: 2 rejected: not an object, 1 ",
        ),
        ("e.jsonl", b"[]\n[]\n{\n", "e.jsonl has no JSON object in its first lines, of which"),
        ("d.jsonl.zst", b"\x27\xb5\x2f\xfdxxxx", "left of 1 record: 1 rejected: unsupported file"),
    ):
        (tmp_path / name).write_bytes(data)
        (tmp_path / "c.yaml").write_text("{}\n")
        words = ["run", str(tmp_path / "c.yaml"), f"root={tmp_path}", "workers=1"]
        words += [f"sources=[{{name: s, paths: [{name}]}}]", f"output={tmp_path / name}.set"]
        given = f"tokenizer.path={small_model(tmp_path)}"
        for more in (["--dry-run"], ["--dry-run", given], [given], [f"output={tmp_path / name}.2"]):
            assert cli.main([*words, *more]) == 2
            told = capsys.readouterr().err
            assert problem in told
            # It is written after the tokenizer is made.
            assert ("rejects.jsonl" in told) == (more == [given] and name[0] in "cd")


def test_a_source_without_records_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.yaml").write_text("{}\n")
    words = ["run", str(tmp_path / "c.yaml"), f"root={tmp_path}", "workers=1", "shards.count=1"]
    words += ["sources=[{name: s, paths: [a.txt]}, {name: other, paths: [b.jsonl]}]"]
    words += [f"output={tmp_path / 'set'}", f"tokenizer.path={small_model(tmp_path)}"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "other: no record was found in 1 file" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert "no record was found in the files of source other" in capsys.readouterr().out


def small_model(directory: Path) -> Path:
    """A SentencePiece model of single characters and bytes."""
    if not (directory / "m.model").exists():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some text", "abc"]),
            model_prefix=str(directory / "m"),
            vocab_size=275,
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return directory / "m.model"


def slow(page: HtmlElement, **options: object) -> str:
    """In place of the extractor: does not end on some pages."""
    while "slow" in (text := page.text_content()):
        time.sleep(60)
    return str(text)


def write_pages(path: Path, pages: Sequence[str]) -> None:
    """An archive of web pages."""
    bodies = [f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n{page}" for page in pages]
    head = "WARC/1.0\r\nWARC-Type: response\r\nContent-Length: {}\r\n\r\n{}\r\n\r\n"
    archive = "".join(head.format(len(body), body) for body in bodies)
    path.write_text(archive, newline="")


def said(seed: int) -> str:
    """Some 1,700 bytes of words, by the seed."""
    drawn = np.random.default_rng(seed).integers(0, 400, 300)
    return " ".join(f"word{number}" for number in drawn)


def test_a_tokenizer_of_web_pages_is_trained_on_as_much_text_as_asked_for(tmp_path: Path) -> None:
    markup = "<script>" + "x = 1; " * 8000 + "</script>"
    pages = [f"<html><body>{markup}<p>{said(seed)}</p></body></html>" for seed in range(600)]
    write_pages(tmp_path / "a.warc", pages)
    # Names of fields are of any case.
    archive = tmp_path / "a.warc"
    archive.write_bytes(archive.read_bytes().replace(b"WARC-Type:", b"warc-type:"))
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "workers=1"]
    words += ["sources=[{name: s, paths: ['*.warc']}]", "tokenizer.sample_bytes=200000"]
    wanted = config.load(None, words)
    work = pipeline.open_work(wanted)
    with workspace.locked(work):
        workspace.begin(work, wanted)
    for stage in (SurveyFiles, DrawSample):
        made = stage(wanted, work)
        made.run(range(len(made.sizes)))
    drawn = [work.read("sample", unit)["passages"] for unit in range(len(work.units))]
    sizes = [len(text.encode()) for passages in drawn for _, text in passages]
    assert 200_000 <= sum(sizes) < 1_000_000


@pytest.mark.parametrize("workers", [1, 2])
def test_a_page_on_which_the_extractor_hangs_is_rejected_by_the_workers(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trafilatura, "extract", slow)
    monkeypatch.setattr(extractor, "SECONDS", 2.0)
    for number in range(2):
        texts = [f"page {number}.{n}{' slow' * (n == 1)}" for n in range(3)]
        pages = [f"<html><body><p>{text}</p></body></html>" for text in texts]
        write_pages(tmp_path / f"{number}.warc", pages)
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", f"workers={workers}"]
    words += ["sources=[{name: s, paths: ['*.warc']}]", f"tokenizer.path={small_model(tmp_path)}"]
    manifest = pipeline.run(config.load(None, [*words, "shards.count=1"])).manifest
    assert (manifest.documents, manifest.rejected) == (4, 2)
    rejects = [json.loads(line) for line in (tmp_path / "set/rejects.jsonl").open()]
    assert [reject["line"] for reject in rejects] == [2, 2]
    assert {reject["detail"] for reject in rejects} == {"the extractor did not end within 2 s"}
    assert multiprocessing.active_children() == []
