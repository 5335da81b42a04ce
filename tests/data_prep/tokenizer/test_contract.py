"""Tokens that come one by one are decoded to the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import StreamDecoder, Tokenizer
from tests.data_prep.tokenizer.texts import TEXT, nasty_texts


@pytest.fixture(scope="session")
def line_ends(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2's, but two line ends are a piece."""
    path = tmp_path_factory.mktemp("line_ends") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_prefix=str(path),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        user_defined_symbols=["\n", "\n\n"],
        minloglevel=2,
    )
    return tokenizer.load(path.with_suffix(".model"))


def test_a_text_that_follows_another_is_restored_however_it_begins(
    trained: Tokenizer,
    llama: Tokenizer,
    gemma: Tokenizer,
    line_ends: Tokenizer,
    files: dict[str, Path],
) -> None:
    kinds = ("llama3", "qwen", "gpt2", "llama2", "metaspace", "gemma")
    for model in (
        trained,
        llama,
        gemma,
        line_ends,
        *(tokenizer.load(files[kind]) for kind in kinds),
    ):
        for text in (
            "Hello",
            "  so",
            "\nSo",
            "\n\nSo\n",
            " ",
            "\n",
            "\t",
            ".",
            "x",
            *nasty_texts(100),
        ):
            if "\u2581" in text:
                continue
            ids = [
                id for _, part in model.encode_parts([text], inside=True) for id in part.tolist()
            ]
            assert model.decode_bytes(ids, inside=True).decode() == text
            # The tokens that it has behind a sign with which none of its own forms a token.
            both = model.encode("\U0001f600" + text).tolist()
            assert both == [*model.encode("\U0001f600").tolist(), *ids]


def test_streamed_tokens_give_the_same_text(trained: Tokenizer) -> None:
    for text in nasty_texts(300):
        decoder = StreamDecoder(trained)
        streamed = "".join(decoder.push(int(id)) for id in trained.encode(text))
        assert streamed + decoder.finish() == text


def test_a_stream_holds_back_half_a_character(trained: Tokenizer) -> None:
    decoder = StreamDecoder(trained)
    first, *middle, last = trained.encode("\U0001f600").tolist()
    assert [decoder.push(id) for id in (first, *middle)] == ["", "", ""]
    assert decoder.push(last) == "\U0001f600"
    decoder.push(first)
    assert decoder.finish() == "\ufffd"
