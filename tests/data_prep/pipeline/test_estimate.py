"""A plan is near to what the run gives, writes nothing, and refuses what the run refuses."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import cli, config
from data_prep.config import Config
from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.pipeline import estimate, pipeline
from data_prep.pipeline.workspace import WorkspaceError
from data_prep.recall import mqar
from data_prep.sources import compression

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text three times: lines, compressed lines, files; some lines are broken."""
    root = tmp_path_factory.mktemp("corpus")
    texts = [path.read_text(encoding="utf-8") for path in sorted(STDLIB.glob("[a-f]*.py"))]
    pieces = [text[at : at + 3000] for text in texts for at in range(0, len(text), 3000)]
    random.Random(3).shuffle(pieces)
    lines = [
        b"[]" if n % 50 in (7, 8) else json.dumps({"text": text}).encode()
        for n, text in enumerate(pieces)
    ]
    (root / "a.jsonl").write_bytes(b"\n".join(lines[::2]))
    (root / "few.lines").write_bytes(b"\n".join(lines[:180:2]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[1::4]), mtime=0))
    packed = zstandard.ZstdCompressor().compress(b"\n".join(lines[3::4]))
    (root / "c.jsonl.zst").write_bytes(packed)
    for number, text in enumerate(texts[::4]):
        (root / f"{number}.py").write_text(text, encoding="utf-8")
    return root


def configured(corpus: Path, output: Path, *words: str) -> Config:
    sources = "sources=[{name: lines, paths: ['*.jsonl*']}, {name: files, paths: ['*.py']}]"
    model = ["tokenizer.vocab_size=500", "shards.tokens=300000"]
    return config.load(None, [f"root={corpus}", f"output={output}", sources, *model, *words])


def near(value: float, factor: float) -> object:
    return pytest.approx(value, rel=factor - 1)


FEW = "sources=[{name: s, paths: ['few.lines'], format: jsonl}]"


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run makes of the corpus."""
    output = tmp_path_factory.mktemp("made") / "set"
    pipeline.run(configured(corpus, output))
    return output


@pytest.mark.parametrize("sample", [200_000, estimate._READ_BYTES])
def test_the_estimate_is_near_to_the_run(
    corpus: Path, made: Path, tmp_path: Path, sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_READ_BYTES", sample)
    plan = estimate.estimate(configured(corpus, tmp_path / "set"))
    assert not (tmp_path / "set").exists()
    manifest = shards.read_manifest(made)
    read_all = sample > 1_000_000
    assert plan.whole == read_all
    factor = 1.0 if read_all else 1.25
    assert plan.text_bytes == near(manifest.text_bytes, factor)
    assert plan.documents == near(manifest.documents, 1.5 if factor > 1 else 1)
    # Of all records it draws the run's sample, and so trains the run's tokenizer.
    assert plan.tokens == near(manifest.tokens, 1.3 if factor > 1 else 1)
    assert plan.disk == near(sum(info.bytes for info in manifest.shards), 1.3)
    assert plan.shard_count == near(len(manifest.shards), 1.3)
    given = f"tokenizer.path={made}/tokenizer.model"
    with_it = estimate.estimate(configured(corpus, tmp_path / "b", given))
    assert with_it.tokens == near(manifest.tokens, 1.3 if factor > 1 else 1)


def test_tokens_take_four_bytes_with_a_tokenizer_of_more_than_65536_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("many words " * 1000)
    plain = json.loads(mqar.tokenizer_json())
    vocabulary = plain["model"]["vocab"]
    vocabulary |= {chr(0x20000 + n): len(vocabulary) + n for n in range(1 << 16)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain), encoding="utf-8")
    words = [
        f"root={tmp_path}",
        f"output={tmp_path / 'set'}",
        "sources=[{name: s, paths: [a.txt]}]",
    ]
    wanted = config.load(None, [*words, f"tokenizer.path={tmp_path}/tokenizer.json"])
    plan, manifest = estimate.estimate(wanted), pipeline.run(wanted).manifest
    assert manifest.dtype == "uint32" and plan.tokens == manifest.tokens
    assert plan.work == 4 * manifest.tokens


def test_what_is_left_out_is_estimated_with_its_reasons(corpus: Path, tmp_path: Path) -> None:
    cleaning = "format: jsonl, cleaning: {rules: [gopher_repetition]}"
    words = f"sources=[{{name: s, paths: ['few.lines'], {cleaning}}}]"
    plan = estimate.estimate(configured(corpus, tmp_path / "set", words, "duplicates.exact=true"))
    (source,) = plan.sources
    manifest = pipeline.run(configured(corpus, tmp_path / "set", words)).manifest
    assert plan.documents == manifest.documents
    assert source.left_out["rejected: not an object"] == manifest.rejected
    shown = "\n".join(estimate.lines(plan))
    assert (
        f"s: {manifest.rejected:,} of {len(source.records):,} sampled records rejected: not"
        in shown
    )
    assert "sampled records dropped: " in shown
    assert "duplicates are not estimated" in shown
    assert "making the tokenizer; tokenizing; " in shown


def test_groups_and_parquet_are_estimated_as_they_are_read(tmp_path: Path) -> None:
    rows = [f"row {n} of a table " * 40 for n in range(400)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=50)
    for number in range(12):
        (tmp_path / "books" / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / f"{number % 3}" / f"{number}.txt").write_text("chapter " * 300)
    sources = (
        "[{name: t, paths: ['*.parquet']}, {name: b, paths: ['books/**'], group_by: directory}]"
    )
    places = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "tokenizer.vocab_size=300"]
    plan = estimate.estimate(config.load(None, [*places, f"sources={sources}"]))
    assert plan.whole and plan.documents == 400 + 3
    assert plan.text_bytes == sum(map(len, rows)) + 12 * 2400 + 9 * len("\n\n")


@pytest.mark.parametrize("end", ["\n", ""])
def test_files_of_a_single_long_line_are_estimated(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_READ_BYTES", 80_000)
    monkeypatch.setattr(compression, "BLOCK_BYTES", 1000)
    for number in range(12):
        line = json.dumps({"text": f"chapter {number:02} " * 3000})
        (tmp_path / f"{number}.jsonl").write_text(line + end)
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "sources=[{name: s, paths: ['*']}]"]
    # With the latter no line end is looked for so far.
    for held in ("1000000", "4000"):
        plan = estimate.estimate(config.load(None, [*words, f"sources.0.max_held_bytes={held}"]))
        assert len(plan.sources[0].records) == 3 and not plan.whole
        assert round(plan.documents) == (12 if held == "1000000" else 0)


def test_where_no_tokenizer_can_be_trained_the_assumption_is_stated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a short text")
    words = [f"root={tmp_path}", f"output={tmp_path / 'set'}", "sources=[{name: s, paths: ['*']}]"]
    plan = estimate.estimate(config.load(None, words))
    assert plan.tokens == 12 / 4
    assert "4.00 bytes per token, assumed: 4.0 bytes per token, since" in "\n".join(
        estimate.lines(plan)
    )


def test_mistakes_are_those_of_the_run(corpus: Path, tmp_path: Path) -> None:
    for words in (["tokenizer.path=nowhere"], ["shards.count=100000"]):
        messages = []
        for act in (estimate.estimate, pipeline.run):
            with pytest.raises(SettingsError) as error:
                act(configured(corpus, tmp_path / f"{words[0]}-{act.__name__}", FEW, *words))
            messages.append(str(error.value))
        assert messages[0] == messages[1]
    pipeline.run_tokenizer(configured(corpus, tmp_path / "begun", FEW))
    (tmp_path / "other").mkdir()
    shutil.copy(corpus / "few.lines", tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "begun").rglob("*")}
    with pytest.raises(WorkspaceError, match="seed: 1 there, 2 now"):
        estimate.estimate(configured(corpus, tmp_path / "begun", FEW, "seed=2"))
    with pytest.raises(WorkspaceError, match="started with other input or evaluation files"):
        estimate.estimate(configured(tmp_path / "other", tmp_path / "begun", FEW))
    plan = estimate.estimate(configured(corpus, tmp_path / "begun", FEW, "shards.tokens=1000"))
    assert str(tmp_path / "begun" / "tokenizer.model") in plan.how
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "begun").rglob("*")} == before


def test_the_command_takes_settings_after_the_option(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("sources: [{name: s, paths: [few.lines], format: jsonl}]\n")
    words = [f"root={corpus}", f"output={tmp_path / 'set'}", "tokenizer.vocab_size=400"]
    assert cli.main(["run", str(tmp_path / "c.yaml"), words[0], "--dry-run", *words[1:]]) == 0
    assert f"the plan for {tmp_path / 'set'}; nothing is written" in capsys.readouterr().out
    assert not (tmp_path / "set").exists()
    assert cli.main(["run", str(tmp_path / "c.yaml"), *words, "--dry-run", "--limit", "3"]) == 0
    assert "limit=3 is not applied: this is of all records" in capsys.readouterr().out
    assert cli.main(["run", str(tmp_path / "c.yaml"), "--dri-run", *words]) == 2
    assert cli.main(["run", str(tmp_path / "c.yaml"), *words]) == 0
    assert cli.main(["run", str(tmp_path / "c.yaml"), *words, "--dry-run"]) == 0
    assert "is finished already" in capsys.readouterr().out
