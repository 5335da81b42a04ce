"""Perplexity against one forward over each document alone, and against numbers by hand."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from data_prep.dataset.shards import Document
from data_prep.tokenizer.contract import Tokenizer
from pretrain import trained
from pretrain.config.memory import FullConfig, MemoryConfig
from pretrain.evaluate import perplexity
from pretrain.evaluate.questions import EvaluationError, ResultError
from pretrain.trained import Trained
from tests.pretrain import kinds

CPU = torch.device("cpu")
SENTENCE = "However little known the feelings or views of such a man may be — “naïve” ▁ or not. "
# Segments are of 16 tokens, windows of 64: under a segment, at its edges, over several windows.
TEXTS = [SENTENCE * 9, "a", "", SENTENCE * 2, "It is a truth", SENTENCE * 14, "new\nlines\n", "☃"]


@pytest.mark.parametrize(
    "kind, bos_id, eos_id",
    [
        *((kind, 1, 2) for kind in kinds.KINDS),
        ("delta", None, 2),
        ("delta", 1, None),
        ("delta", None, None),
    ],
)
def test_losses_are_those_of_one_forward_over_each_document(
    tmp_path: Path,
    write_run: Any,
    write_data_set: Any,
    tokenizer_model: Path,
    kind: str,
    bos_id: int | None,
    eos_id: int | None,
) -> None:
    write_run(tmp_path / "run", memory=kinds.memory(kind))
    model = trained.load(tmp_path / "run", CPU)
    documents = _documents(model.tokenizer, TEXTS)
    write_data_set(
        tmp_path / "data",
        documents,
        3,
        320,
        bos_id=bos_id,
        eos_id=eos_id,
        tokenizer=tokenizer_model,
    )
    _compare(_evaluate(model, tmp_path / "data"), _naive(model, documents, bos_id, eos_id))


@pytest.mark.parametrize("batch, window_segments", [(1, 4), (2, 1), (5, 3), (8, 4), (20, 50)])
def test_neither_batch_nor_window_changes_the_result(
    small: tuple[Trained, Path], batch: int, window_segments: int
) -> None:
    expected = _evaluate(*small, batch=3, window_segments=2)
    found = _evaluate(*small, batch=batch, window_segments=window_segments)
    assert found.pop("window_segments") == window_segments and expected.pop("window_segments") == 2
    _assert_close(found, expected)


def test_windows_of_full_attention_are_whole_spans(
    tmp_path: Path, write_run: Any, small: tuple[Trained, Path]
) -> None:
    """Asked for 1 or 3 segments where attention spans 2, or 4 of a span of 4."""
    for segments, asked in ((2, (1, 3, 4)), (4, (1, 4))):
        directory = tmp_path / f"{segments}"
        write_run(directory, memory=MemoryConfig(kind="full", full=FullConfig(segments)))
        model = trained.load(directory, CPU)
        assert model.config.model.whole_spans(1) == segments * 16
        nats = [_evaluate(model, small[1], window_segments=each)["total"]["nats"] for each in asked]
        assert list(nats[0]) == ["none"]
        assert [each["none"] for each in nats] == pytest.approx([nats[0]["none"]] * len(asked))


def test_what_the_padding_holds_changes_nothing(
    tmp_path: Path, write_run: Any, small: tuple[Trained, Path]
) -> None:
    write_run(tmp_path / "untied", tied_embeddings=False)
    model = trained.load(tmp_path / "untied", CPU)
    expected = _evaluate(model, small[1])
    with torch.no_grad():
        model.model.embedding.weight[0] = 1e6
    assert _evaluate(model, small[1]) == expected


def test_the_masked_read_differs_from_the_second_segment_on(small: tuple[Trained, Path]) -> None:
    report = _evaluate(*small)
    for row in report["positions"]:
        memory, masked = row["nats"]["memory"], row["nats"]["masked"]
        if row["end"] <= 16:
            assert memory == pytest.approx(masked, rel=1e-6)
        else:
            assert abs(memory - masked) > 1e-4 * memory


def test_each_document_s_numbers_are_those_of_it_alone(
    tmp_path: Path, write_data_set: Any, tokenizer_model: Path, small: tuple[Trained, Path]
) -> None:
    model, whole = small[0], _evaluate(*small, batch=3, by_document=True)
    each = whole.pop("by_document")
    assert whole == _evaluate(*small, batch=3)
    documents = {one.id: one for one in _documents(model.tokenizer, TEXTS)}
    assert {one["id"] for one in each} <= documents.keys() and len(each) >= 6
    for one in each:
        directory = tmp_path / one["id"]
        write_data_set(directory, [documents[one["id"]]], 1, 320, tokenizer=tokenizer_model)
        if not one["text_bytes"]:
            continue
        alone = _evaluate(model, directory)
        assert one["text_bytes"] == alone["text_bytes"]
        assert one["total"]["nats"] == pytest.approx(alone["total"]["nats"], rel=1e-6)
        assert [row["tokens"] for row in one["positions"]] == [
            row["tokens"] for row in alone["positions"]
        ]


def test_without_masked_a_model_runs_once_and_its_numbers_stay(
    small: tuple[Trained, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    both, calls = _evaluate(*small), []
    forward = small[0].model.forward
    monkeypatch.setattr(
        small[0].model, "forward", lambda *a, **k: (calls.append(k), forward(*a, **k))[1]
    )
    alone = _evaluate(*small, masked=False)
    assert calls and not any(keywords for keywords in calls)
    assert alone["total"]["nats"] == {"memory": both["total"]["nats"]["memory"]}


def test_buckets_are_powers_of_two() -> None:
    edges = [0, 1, 2, 3, 4, 7, 8, 15, 16, 1023, 1024, 2**20 - 1, 2**20, 2**40 - 1, 2**40]
    expected = [0, 1, 2, 2, 3, 3, 4, 4, 5, 10, 11, 20, 21, 40, 41]
    assert perplexity.bucket_of(np.array(edges)).tolist() == expected


def test_bits_a_byte_by_hand(
    tmp_path: Path, write_run: Any, write_data_set: Any, tokenizer_model: Path
) -> None:
    """A model that knows nothing spends log2(320) bits on each target."""
    write_run(tmp_path / "run", init_std=0.0)
    model = trained.load(tmp_path / "run", CPU)
    # Three targets of a byte each at positions 0, 1, 2, and EOS at 3; twice.
    ids = model.tokenizer.byte_tokens[list("aé".encode())]
    documents = [Document(str(number), "test", 3, ids) for number in range(2)]
    write_data_set(tmp_path / "data", documents, 1, 320, tokenizer=tokenizer_model)
    report = _evaluate(model, tmp_path / "data")
    bits = math.log2(320)
    assert (report["documents"], report["text_bytes"], report["total"]["tokens"]) == (2, 6, 8)
    assert report["total"]["bits_per_byte"]["memory"] == pytest.approx(8 * bits / 6)
    assert report["total"]["perplexity"]["masked"] == pytest.approx(320)
    rows = [(row["first"], row["end"], row["tokens"], row["bytes"]) for row in report["positions"]]
    assert rows == [(0, 1, 2, 2), (1, 2, 2, 2), (2, 4, 4, 2)]
    found = [row["bits_per_byte"]["memory"] for row in report["positions"]]
    assert found == pytest.approx([bits, bits, 2 * bits])


def test_without_bos_bytes_that_no_target_makes_are_in_no_figure(
    tmp_path: Path, write_run: Any, write_data_set: Any, tokenizer_model: Path
) -> None:
    """A model that knows nothing spends log2(320) bits on each target."""
    write_run(tmp_path / "run", init_std=0.0)
    model = trained.load(tmp_path / "run", CPU)
    # After the first, two targets of a byte each, and EOS; twice.
    ids = model.tokenizer.byte_tokens[list("aé".encode())]
    documents = [Document(str(number), "test", 3, ids) for number in range(2)]
    write_data_set(tmp_path / "data", documents, 1, 320, bos_id=None, tokenizer=tokenizer_model)
    report = _evaluate(model, tmp_path / "data", by_document=True)
    assert (report["text_bytes"], report["total"]["bytes"], report["total"]["tokens"]) == (6, 4, 6)
    bits = 3 * math.log2(320) / 2
    assert report["total"]["bits_per_byte"]["memory"] == pytest.approx(bits)
    each = [one["total"]["bits_per_byte"]["memory"] for one in report["by_document"]]
    assert each == pytest.approx([bits, bits])
    write_data_set(tmp_path / "one", [ids[:1]], 1, 320, bos_id=None, tokenizer=tokenizer_model)
    with pytest.raises(EvaluationError, match="have no text to predict"):
        _evaluate(model, tmp_path / "one")


def test_a_bucket_of_ends_alone_has_no_bits_a_byte(
    tmp_path: Path, small: tuple[Trained, Path], write_data_set: Any, tokenizer_model: Path
) -> None:
    documents = _documents(small[0].tokenizer, ["a"])
    write_data_set(tmp_path / "a", documents, 1, 320, tokenizer=tokenizer_model)
    report = _evaluate(small[0], tmp_path / "a")
    assert report["positions"][1]["bits_per_byte"] == {"memory": None, "masked": None}
    assert report["total"]["tokens"] == 2
    assert perplexity.table(report).splitlines()[3].split() == ["1", "1", "-", "-", "-"]


def test_bytes_by_position_add_up_with_a_dummy_prefix(
    tmp_path: Path, write_run: Any, write_data_set: Any
) -> None:
    write_run(tmp_path / "run")
    model_file = tmp_path / "run" / "tokenizer.model"
    model_file.write_bytes(_with_dummy_prefix())
    model = trained.load(tmp_path / "run", CPU)
    assert model.tokenizer.strips_first_space
    documents = _documents(model.tokenizer, ["the man or the views", "views of the man"])
    write_data_set(tmp_path / "data", documents, 1, 320, tokenizer=model_file)
    report = _evaluate(model, tmp_path / "data")
    assert sum(row["bytes"] for row in report["positions"]) == report["text_bytes"] == 36


def test_the_first_documents_are_those_of_the_data_sets_order(
    tmp_path: Path, small: tuple[Trained, Path], write_data_set: Any, tokenizer_model: Path
) -> None:
    documents = _documents(small[0].tokenizer, TEXTS)[:4]
    write_data_set(tmp_path / "first", documents, 1, 320, tokenizer=tokenizer_model)
    expected = _evaluate(small[0], tmp_path / "first")
    found = _evaluate(*small, max_documents=4)
    for key, names in (("data", ["data", "first"]), ("data_sha256", None)):
        pair = [found.pop(key), expected.pop(key)]
        assert names is None or pair == names
    _assert_close(found, expected)


def test_the_command_writes_the_report_and_prints_the_table(
    small: tuple[Trained, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = small
    assert perplexity.run(model.run_directory, data, batch=3) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((model.run_directory / "eval-7-data.json").read_text())
    assert report.pop("code") and report.pop("written")
    _assert_close(report, _evaluate(model, data))
    assert lines[1].split() == ["position", "tokens", "with", "memory", "masked", "gain"]
    total, row = report["total"], report["positions"][2]
    bits = row["bits_per_byte"]
    assert lines[4].split() == [
        "2", "to", "3", str(row["tokens"]), f"{bits['memory']:.4f}", f"{bits['masked']:.4f}",
        f"{bits['masked'] - bits['memory']:+.4f}",
    ]  # fmt: skip
    assert lines[-3].split()[:2] == ["all", f"{total['tokens']:,}"]
    assert f"{total['perplexity']['memory']:.3f} with memory" in lines[-2]


def test_the_average_s_result_stands_beside_that_of_the_last_weights(
    tmp_path: Path, write_run: Any, small: tuple[Trained, Path]
) -> None:
    write_run(tmp_path / "averaged", averaged=True)
    for weights in ("last", "ema", "ema"):
        assert perplexity.run(tmp_path / "averaged", small[1], weights=weights) == 0  # type: ignore
    last, averaged = (
        json.loads((tmp_path / "averaged" / f"eval-7-data{name}.json").read_text())
        for name in ("", "-2")
    )
    assert "weights" not in last and averaged["weights"] == "ema"
    assert last["total"] != averaged["total"]
    assert perplexity.table(last).startswith("step 7 on ")
    assert perplexity.table(averaged).startswith("step 7 (weights ema) on ")
    assert not (tmp_path / "averaged" / "eval-7-data-3.json").exists()


def test_a_model_without_memory_has_one_column(
    tmp_path: Path, write_run: Any, small: tuple[Trained, Path]
) -> None:
    write_run(tmp_path / "plain", memory=MemoryConfig(kind="none"))
    report = _evaluate(trained.load(tmp_path / "plain", CPU), small[1])
    assert list(report["total"]["bits_per_byte"]) == ["none"]
    assert perplexity.table(report).splitlines()[1].split() == [
        "position",
        "tokens",
        "no",
        "memory",
    ]


def test_documents_without_text_are_refused(
    tmp_path: Path, small: tuple[Trained, Path], write_data_set: Any, tokenizer_model: Path
) -> None:
    write_data_set(tmp_path / "empty", [[], []], 1, 320, tokenizer=tokenizer_model)
    with pytest.raises(EvaluationError, match="have no text to predict"):
        _evaluate(small[0], tmp_path / "empty")


def test_another_tokenizer_is_refused(
    tmp_path: Path, small: tuple[Trained, Path], write_data_set: Any
) -> None:
    write_data_set(tmp_path / "other", [[5, 6]], 1, 320)
    with pytest.raises(EvaluationError, match="another tokenizer than the run's"):
        _evaluate(small[0], tmp_path / "other")


def test_a_loss_that_is_not_finite_names_the_document(small: tuple[Trained, Path]) -> None:
    model, data = small
    snowman = int(model.tokenizer.encode("☃")[0])
    with torch.no_grad():
        model.model.embedding.weight[snowman] = math.inf
    with pytest.raises(ResultError, match="not finite in"):
        _evaluate(model, data)


@pytest.fixture(scope="module")
def texts(
    tmp_path_factory: pytest.TempPathFactory,
    loaded: Trained,
    write_data_set: Any,
    tokenizer_model: Path,
) -> Path:
    """TEXTS in three shards."""
    directory = tmp_path_factory.mktemp("texts") / "data"
    documents = _documents(loaded.tokenizer, TEXTS)
    write_data_set(directory, documents, 3, 320, tokenizer=tokenizer_model)
    return directory


@pytest.fixture
def small(model: Trained, texts: Path) -> tuple[Trained, Path]:
    """A run with delta memory, and TEXTS."""
    return model, texts


def _documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Document]:
    return [
        Document(f"document-{number}", "test", len(text.encode()), tokenizer.encode(text))
        for number, text in enumerate(texts)
    ]


def _evaluate(model: Trained, data: Path, **given: Any) -> dict[str, Any]:
    settings = {"window_segments": None, "max_documents": None, "batch": 3, "report": print}
    return perplexity.evaluate(model, data, **{**settings, **given})


def _naive(
    model: Trained, documents: Sequence[Document], bos_id: int | None, eos_id: int | None
) -> dict[tuple[int, str], list[float]]:
    """(first position of the bucket, column): targets, bytes, nats; of a forward a document."""
    sums: dict[tuple[int, str], list[float]] = {}
    columns = _READS if model.config.model.memory.traits.remembers else {"none": True}
    for document in documents:
        text = document.tokens.tolist()
        head = [] if bos_id is None else [bos_id]
        laid_out = torch.tensor([head + text + ([] if eos_id is None else [eos_id])])
        if not laid_out.numel():
            continue
        ends = [len(model.tokenizer.decode_bytes(text[:end])) for end in range(len(text) + 1)]
        ends.append(ends[-1])
        starts = torch.zeros_like(laid_out, dtype=torch.bool)
        starts[0, 0] = True
        for column, read in columns.items():
            state = model.model.initial_state(1, CPU)
            with torch.no_grad():
                logits = model.model(laid_out, starts, state, read_memory=read).logits
            scores = torch.log_softmax(logits[0].double(), dim=1)
            for place in range(1, laid_out.shape[1]):
                position = place - len(head)
                first = 0 if position == 0 else 2 ** math.floor(math.log2(position))
                row = sums.setdefault((first, column), [0, 0, 0.0])
                row[0] += 1
                row[1] += ends[position + 1] - ends[position]
                row[2] -= float(scores[place - 1, laid_out[0, place]])
    return sums


_READS = {"memory": True, "masked": False}


def _compare(report: dict[str, Any], expected: dict[tuple[int, str], list[float]]) -> None:
    found = {
        (row["first"], column): [row["tokens"], row["bytes"], nats]
        for row in report["positions"]
        for column, nats in row["nats"].items()
    }
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key][:2] == expected[key][:2]
        assert found[key][2] == pytest.approx(expected[key][2], rel=1e-5)
    for column, nats in report["total"]["nats"].items():
        rows = [row for key, row in expected.items() if key[1] == column]
        tokens, size, total = (sum(row[part] for row in rows) for part in range(3))
        assert nats == pytest.approx(total, rel=1e-5)
        assert report["total"]["tokens"] == tokens
        assert report["total"]["perplexity"][column] == pytest.approx(
            math.exp(total / tokens), rel=1e-4
        )
        assert report["total"]["bits_per_byte"][column] == pytest.approx(
            total / math.log(2) / size, rel=1e-5
        )


def _assert_close(found: Any, expected: Any) -> None:
    """Equal, numbers within 1e-5."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            _assert_close(*pair)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5)
    else:
        assert found == expected


def _with_dummy_prefix() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE.replace("▁", ""), "the man or the views of the man"] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        minloglevel=2,
    )
    return model.getvalue()
