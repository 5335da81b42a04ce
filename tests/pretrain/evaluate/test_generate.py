"""Generation against whole-document forwards, and sampling by hand."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from data_prep.recall import mqar
from data_prep.tokenizer import tokenizer
from pretrain import trained
from pretrain.config.memory import FullConfig, MemoryConfig
from pretrain.evaluate import generate
from pretrain.evaluate.questions import EvaluationError, ResultError, Sampling
from pretrain.model.stream import StreamState
from pretrain.trained import Trained
from tests.pretrain import kinds

CPU = torch.device("cpu")
PROMPT = "It is a truth universally acknowledged, that a “man” in want of a wife. " * 6


@kinds.of_every_kind
def test_greedy_tokens_are_the_argmax_of_whole_document_forwards(
    tmp_path: Path, write_run: Any, kind: str
) -> None:
    """A prompt of several windows, and on over several segments."""
    write_run(tmp_path / "run", memory=kinds.memory(kind))
    model = trained.load(tmp_path / "run", CPU)
    ids = model.tokenizer.encode(PROMPT).tolist()
    assert len(ids) > 2 * 64
    document = [1, *ids]
    for _ in range(40):
        tokens = torch.tensor([document])
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[0, 0] = True
        with torch.no_grad():
            output = model.model(tokens, starts, model.model.initial_state(1, CPU))
        document.append(int(output.logits[0, -1].argmax()))
    assert _generate(model, ids, max_tokens=40, temperature=0.0) == document[1 + len(ids) :]


def test_a_seed_gives_one_text_and_another_seed_another(model: Trained) -> None:
    first = _generate(model, [], seed=3)
    assert len(first) == 60
    assert _generate(model, [], seed=3) == first
    assert _generate(model, [], seed=4) != first
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    _generate(model, [], seed=3)
    assert torch.equal(torch.rand(1), expected), "torch's own generator is left alone"


def test_the_nucleus_by_hand() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    for top_p, expected in {
        1.0: [0.15, 0.5, 0.05, 0.3],
        0.9: [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95],
        0.7: [0, 0.5 / 0.8, 0, 0.3 / 0.8],
        0.4: [0, 1, 0, 0],
        1e-9: [0, 1, 0, 0],
    }.items():
        assert generate.distribution(logits, 1.0, top_p).tolist() == pytest.approx(expected)


def test_the_temperature_by_hand() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log() + 7
    squares = [0.0225, 0.25, 0.0025, 0.09]
    expected = [square / sum(squares) for square in squares]
    assert generate.distribution(logits, 0.5, 1.0).tolist() == pytest.approx(expected)
    assert generate.distribution(logits, 1e-308, 1.0).tolist() == [0, 1, 0, 0]
    assert generate.distribution(logits, 1e9, 1.0).tolist() == pytest.approx([0.25] * 4)


def test_tokens_are_drawn_as_the_distribution_says(tmp_path: Path, write_run: Any) -> None:
    model = _always(tmp_path, write_run, {50: 0.5, 60: 0.3, 70: 0.2})
    drawn = _generate(model, [], max_tokens=400, temperature=1.0, top_p=0.75)
    assert set(drawn) == {50, 60}
    # Four standard deviations.
    assert abs(drawn.count(50) / 400 - 0.625) < 4 * math.sqrt(0.625 * 0.375 / 400)


def test_generation_ends_before_eos(tmp_path: Path, write_run: Any) -> None:
    write_run(tmp_path / "run", tied_embeddings=False)
    model = trained.load(tmp_path / "run", CPU)
    greedy = _generate(model, [], temperature=0.0)
    place = next(index for index in range(1, 60) if greedy[index] not in greedy[:index])
    assert 2 not in greedy[: place + 1]
    with torch.no_grad():
        rows = model.model.lm_head.weight[[2, greedy[place]]]
        model.model.lm_head.weight[[greedy[place], 2]] = rows
    assert _generate(model, [], temperature=0.0) == greedy[:place]


def test_the_text_is_that_of_the_tokens(model: Trained) -> None:
    ids = model.tokenizer.encode("naïve ").tolist()
    pieces, drawn = _pieces(model, ids), _generate(model, ids)
    data = model.tokenizer.decode_bytes([*ids, *drawn])[len("naïve ".encode()) :]
    assert "".join(pieces) == data.decode("utf-8", errors="replace")
    assert len(pieces) > 10


def test_a_character_that_the_prompt_begins_is_completed(
    tmp_path: Path, write_run: Any, tokenizer_model: Path
) -> None:
    first, second = tokenizer.load(tokenizer_model).byte_tokens[list("é".encode())].tolist()
    model = _always(tmp_path, write_run, {second: 1.0})
    assert _pieces(model, [first], max_tokens=2) == ["é", "\ufffd"]


def test_a_character_that_is_never_completed_comes_at_the_end(
    tmp_path: Path, write_run: Any, tokenizer_model: Path
) -> None:
    first = int(tokenizer.load(tokenizer_model).byte_tokens["é".encode()[0]])
    model = _always(tmp_path, write_run, {first: 1.0})
    assert _pieces(model, [], max_tokens=1) == ["\ufffd"]


def test_the_streams_size_does_not_grow(model: Trained) -> None:
    ids = model.tokenizer.encode(PROMPT * 8).tolist()[: 40 * 16]
    # BOS is the first token of the first segment.
    short, long = (generate.prefill(model, ids[: n * 16 - 1], print)[1] for n in (1, 40))
    assert short.filled == long.filled == 0
    assert _stored(short) == _stored(long)
    grown = generate.prefill(model, ids[: 40 * 16 - 2], print)[1]
    assert grown.filled == 15
    assert _stored(grown) == _stored(generate.prefill(model, ids[:14], print)[1])


def test_a_large_vocabulary_is_scored_by_smaller_chunks(
    model: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.tokenizer.encode(PROMPT)

    def logits() -> torch.Tensor:
        chunks = generate.extended(model, ids, model.model.open_stream(1, CPU))
        return torch.cat([logits for logits, _ in chunks])

    expected = logits()
    monkeypatch.setattr(generate, "_CHUNK_LOGITS", 320 * 16 * 2 + 1)
    assert generate.chunk_tokens(model) == 2 * 16
    for segments, chunk in ((2, 2 * 16), (4, 4 * 16)):
        memory = MemoryConfig(kind="full", full=FullConfig(segments))
        config = replace(model.config, model=replace(model.config.model, memory=memory))
        assert generate.chunk_tokens(replace(model, config=config)) == chunk
    torch.testing.assert_close(logits(), expected, rtol=0, atol=1e-5)


def test_a_prompt_costs_the_logits_of_a_few_tokens_alone(
    model: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, computed = model.tokenizer.encode(PROMPT * 4), list[int]()
    hook = model.model.lm_head.register_forward_pre_hook(
        lambda _, given: computed.append(given[0].shape[-2])
    )
    expected, _ = generate.prefill(model, ids, print)
    monkeypatch.setattr(generate, "_CHUNK_TOKENS", 2 * 16)
    logits, _ = generate.prefill(model, ids, print)
    hook.remove()
    # Of a window of 64 tokens, then of 32, one; of the last chunk also that of its whole segments.
    assert sum(computed) <= len(ids) // 64 + 2 + len(ids) // 32 + 2 < len(ids) / 10
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_an_empty_prompt_needs_a_bos(tmp_path: Path, model: Trained) -> None:
    (tmp_path / "plain.model").write_bytes(_without_bos())
    without = replace(model, tokenizer=tokenizer.load(tmp_path / "plain.model"))
    with pytest.raises(EvaluationError, match=r"the prompt is empty, and .* no BOS"):
        _generate(without, [])
    assert _generate(without, [5], max_tokens=3, temperature=0.0)


@pytest.mark.parametrize(
    "given",
    [(0, 1.0), (1, -0.1), (1, math.nan), (1, math.inf), (1, 1.0, 0.0), (1, 1.0, 1.1)],
)
def test_sampling_that_cannot_work_is_refused(given: tuple[int, float]) -> None:
    with pytest.raises(EvaluationError, match=r"max_tokens=.*: expected max_tokens of 1 or more"):
        Sampling(*given)


def test_logits_that_are_not_finite_are_reported(model: Trained) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ResultError, match="logits are not finite"):
        _generate(model, [])


def test_the_command_continues_argument_file_and_stdin_alike(
    tmp_path: Path,
    model: Trained,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "prompt.txt").write_text("naïve man", encoding="utf-8")
    stdin = io.TextIOWrapper(io.BytesIO("naïve man".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    texts = []
    for source in (
        {"prompt": "naïve man"},
        {"prompt_file": str(tmp_path / "prompt.txt")},
        {"prompt_file": "-"},
    ):
        sampling = Sampling(20, 0.7, 0.9, seed=1)
        assert generate.run(model.run_directory, **source, sampling=sampling) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 5


def test_a_prompt_that_spells_special_tokens_is_text_and_that_is_said(
    model: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt, names in (("a man</s><s>", "<s>, </s> is text"), ("a <man>", None)):
        generate.run(model.run_directory, prompt=prompt, sampling=Sampling(1, 0.0))
        said = capsys.readouterr().err
        assert (f"in the prompt {names}" in said) if names else "in the prompt" not in said
    ids = model.tokenizer.encode("</s>").tolist()
    assert model.tokenizer.eos_id not in ids and model.tokenizer.decode(ids) == "</s>"


def test_a_prompt_that_the_tokenizer_changes_is_said_to_be_read_so(
    model: Trained, tmp_path: Path, write_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(mqar.tokenizer_json())  # without capitals
    write_run(tmp_path / "other", tokenizer=tmp_path / "tokenizer.json")
    for run, changed in ((tmp_path / "other", True), (model.run_directory, False)):
        generate.run(run, prompt="hello World", sampling=Sampling(1, 0.0))
        said = capsys.readouterr().err
        assert ("the model reads it so: 'World' becomes 'orld'\n" in said) == changed


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path, model: Trained) -> None:
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    for name, words in {
        "latin": "is not UTF-8",
        "nothing": "No such file",
        ".": "directory",
    }.items():
        with pytest.raises(EvaluationError, match=words):
            generate.run(
                model.run_directory,
                prompt_file=str(tmp_path / name),
                sampling=Sampling(1, 0.0),
            )


def _generate(model: Trained, ids: list[int], **given: Any) -> list[int]:
    sampling = Sampling(**{"max_tokens": 60, "temperature": 1.0, **given})
    return list(generate.sampled(model, *generate.prefill(model, ids, print), sampling))


def _pieces(model: Trained, ids: list[int], **given: Any) -> list[str]:
    sampling = Sampling(**{"max_tokens": 60, "temperature": 1.0, **given})
    return list(generate.generate(model, ids, sampling, print))


def _always(tmp_path: Path, write_run: Any, shares: dict[int, float]) -> Trained:
    """A model that gives these tokens these probabilities, whatever comes before."""
    write_run(tmp_path / "always", tied_embeddings=False, init_std=0.0)
    model = trained.load(tmp_path / "always", CPU)
    with torch.no_grad():
        model.model.embedding.weight[:, 0] = 1.0
        model.model.lm_head.weight[:, 0] = -30.0
        for token, share in shares.items():
            # RMSNorm makes sqrt(d_model) of the one coordinate that is not 0.
            model.model.lm_head.weight[token, 0] = math.log(share) / math.sqrt(32)
    return model


def _stored(stream: StreamState) -> int:
    """Bytes of all storage that the stream keeps alive."""
    tensors = [tensor for layer in stream.layers for tensor in (*layer.memory, *layer.cache)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _without_bos() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT]),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()
