"""What a tokenizer's BOS and EOS are called, and which EOS a user may have meant instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.tokenizer import marks, tokenizer
from data_prep.tokenizer.contract import Tokenizer, TokenizerError

Make = Callable[[Path, tuple[str, ...]], Path]


def test_ids_are_told_with_their_text(trained: Tokenizer, files: dict[str, Path]) -> None:
    assert marks.lines(trained) == [f"BOS is {trained.bos_id} <s>, EOS is {trained.eos_id} </s>"]
    assert marks.lines(tokenizer.load(files["llama2"])) == ["BOS is 1 <s>, EOS is 2 </s>"]


@pytest.fixture
def chat(gpt2_like: Make, tmp_path: Path) -> Path:
    """A chat model's tokenizer, whose EOS ends a turn."""
    path = gpt2_like(tmp_path / "tokenizer.json", ("<|im_end|>", "<|endoftext|>"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return path


def test_a_chat_models_end_of_turn_is_told_with_the_setting_that_chooses_another(
    chat: Path,
) -> None:
    ids, hint = marks.lines(tokenizer.load(chat))
    assert ids == "no BOS, EOS is 400 <|im_end|>"
    assert hint == (
        "this EOS is a chat model's end of turn; tokenizer.eos_token='<|endoftext|>' ends "
        "documents with another token"
    )
    chosen = marks.lines(tokenizer.load(chat, "<|endoftext|>"))
    assert chosen == ["no BOS, EOS is 401 <|endoftext|>"]


def test_the_chosen_eos_is_in_the_copy_and_in_copies_of_it(chat: Path, tmp_path: Path) -> None:
    name, data = tokenizer.standalone(chat, "<|endoftext|>")
    (tmp_path / "copy").mkdir()
    tokenizer.write(tmp_path / "copy", name, data)
    copy = tokenizer.find(tmp_path / "copy")
    assert tokenizer.load(copy).eos_id == 401
    assert tokenizer.standalone(copy, "<|endoftext|>") == tokenizer.standalone(copy) == (name, data)
    # And back: nothing of the first choice is left.
    assert tokenizer.standalone(copy, "<|im_end|>") == tokenizer.standalone(chat)
    steps = json.loads(tokenizer.standalone(copy, "<|im_end|>")[1])["post_processor"]["processors"]
    assert sum("eos_token" in step.get("special_tokens", {}) for step in steps) == 1


def test_a_token_that_cannot_end_documents_is_refused(
    chat: Path, trained: Tokenizer, files: dict[str, Path]
) -> None:
    for token in ("</s>", "<tool>", "the"):
        with pytest.raises(
            TokenizerError, match=r"has no special token .*; it has <\|im_end\|>, <"
        ):
            tokenizer.load(chat, token)
    assert tokenizer.load(trained.path, "</s>").eos_id == trained.eos_id
    with pytest.raises(TokenizerError, match=r"whose end of text is </s> and cannot be chosen"):
        tokenizer.load(trained.path, "<s>")
