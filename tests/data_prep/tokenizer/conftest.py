"""Small tokenizers of every kind, each made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from data_prep.tokenizer import tokenizer, training
from data_prep.tokenizer.contract import Tokenizer
from tests.data_prep.tokenizer.texts import SIZE, SPECIAL, TEXT

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Our own."""
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    training.train([TEXT], path, SIZE)
    return tokenizer.load(path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A model as Llama 2's: identity, byte fallback, and a space put before every text."""
    directory = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_prefix=str(directory / "llama"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    return tokenizer.load(directory / "llama.model")


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A model as Gemma's: no space put before, runs of white space and marks as own pieces."""
    directory = tmp_path_factory.mktemp("gemma")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_prefix=str(directory / "gemma"),
        model_type="bpe",
        vocab_size=350,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\n\n", "\n\n\n", "\t", "  ", "    ", "<start_of_turn>"],
        control_symbols=["<mask>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return tokenizer.load(directory / "gemma.model")


def byte_level(path: Path, split: str | None = LLAMA3, special: tuple[str, ...] = SPECIAL) -> Path:
    """A tokenizer.json as Llama 3's; without `split` as GPT-2's, with no BOS before texts."""
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=split is not None))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        first = pre_tokenizers.Split(Regex(split), "isolated")
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = pre_tokenizers.Sequence([first, last])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    # GPT-2's split ends runs of line ends one before a word: it learns pieces of two.
    model.train_from_iterator([TEXT, TEXT.replace("\n\n", "\n\n\n")], trainer)
    model.add_special_tokens([AddedToken(name, special=True) for name in special])
    model.add_tokens([AddedToken("<tool>", special=False)])
    if split:
        bos = processors.TemplateProcessing(
            single=f"{special[0]} $A",
            pair=f"{special[0]} $A {special[0]} $B",
            special_tokens=[(special[0], model.token_to_id(special[0]))],
        )
        model.post_processor = processors.Sequence([processors.ByteLevel(), bos])
    model.enable_truncation(8)
    model.enable_padding(length=16, pad_token=special[-1], pad_id=model.token_to_id(special[-1]))
    model.save(str(path))
    return path


def spaced(path: Path, prefix: str) -> Path:
    """A tokenizer.json as Llama 2's; `prefix`: by its normalizer ("Prepend"), "Metaspace", none."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    model.train_from_iterator([TEXT], trainer)
    plain = json.loads(model.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]
    written = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    read = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    steps: list[Any] = [read, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    plain["decoder"] = {"type": "Sequence", "decoders": steps}
    if prefix == "Metaspace":
        plain["pre_tokenizer"]["split"] = False
    else:
        before = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
        plain["normalizer"] = {"type": "Sequence", "normalizers": [*before, written]}
        plain["pre_tokenizer"] = None
    path.write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    return path


def unigram(path: Path) -> Path:
    """A tokenizer.json of a Unigram model, whose special tokens are pieces of it, too."""
    model = tokenizers.Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    model.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        unk_token="<unk>",
        initial_alphabet=list("<>/psdunk"),
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    model.add_tokens([AddedToken("<tool>", special=False)])
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer.json of each kind."""
    directory = tmp_path_factory.mktemp("json")
    return {
        "llama3": byte_level(directory / "llama3.json"),
        "qwen": byte_level(directory / "qwen.json", QWEN),
        "gpt2": byte_level(directory / "gpt2.json", None),
        "llama2": spaced(directory / "llama2.json", "Prepend"),
        "metaspace": spaced(directory / "metaspace.json", "Metaspace"),
        "gemma": spaced(directory / "gemma.json", ""),
        "unigram": unigram(directory / "unigram.json"),
    }


@pytest.fixture(scope="session")
def gpt2_like() -> Callable[[Path, tuple[str, ...]], Path]:
    """Writes a tokenizer.json as GPT-2's with these special tokens."""
    return lambda path, special: byte_level(path, None, special)
