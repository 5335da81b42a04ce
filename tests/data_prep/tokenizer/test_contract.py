"""Tokens that come one by one are decoded to the same text."""

from __future__ import annotations

from data_prep.tokenizer.contract import StreamDecoder, Tokenizer
from tests.data_prep.tokenizer.texts import nasty_texts


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
