"""The tokenizer in a GGUF file's metadata, as a tokenizer.json or a SentencePiece model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from data_prep.tokenizer import tokenizer_json
from data_prep.tokenizer.contract import FILES, TokenizerError
from pretrain.convert.their_tokenizer import without

# Kinds of a piece: llama.cpp's are SentencePiece's.
_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN = ("qwen2", "deepseek-r1-qwen")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def of_metadata(path: Path, metadata: Mapping[str, Any]) -> tuple[str, bytes]:
    """Name and bytes of the tokenizer of the GGUF file `path`. Raises TokenizerError.

    BOS is one of its special tokens only where texts begin with it (`add_bos_token`).
    """
    own = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind, pre = own.get("model"), own.get("pre")
    begins = own.get("add_bos_token", kind == "llama" or pre in _LLAMA3)
    roles = {"bos": own.get("bos_token_id") if begins else None, "eos": own.get("eos_token_id"),
             "pad": own.get("padding_token_id")}  # fmt: skip
    if kind == "llama" and own.keys() >= {"tokens", "scores", "token_type"}:
        return FILES[0], _sentencepiece(path, own, roles)
    splitter = _splitter(pre)
    if kind == "gpt2" and splitter and own.keys() >= {"tokens", "merges", "token_type"}:
        return FILES[1], _byte_level(path, own, roles, splitter)
    raise TokenizerError(
        f"{path}: its tokenizer ({kind!r}, splitting as {pre!r}) is not known here; name the "
        "model's own: --tokenizer FILE"
    )


def _sentencepiece(path: Path, own: Mapping[str, Any], roles: Mapping[str, int | None]) -> bytes:
    """A SentencePiece model. Raises TokenizerError."""
    try:
        data: bytes = _pieces(own, roles).SerializeToString()
    except (IndexError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: its tokenizer cannot be read ({error})") from None
    return data


def _pieces(own: Mapping[str, Any], roles: Mapping[str, int | None]) -> Any:
    """The model. Raises IndexError, TypeError or ValueError where its fields do not fit."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    parts = zip(own["tokens"], own["scores"], own["token_type"], strict=True)
    for piece, score, kind in parts:
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(own["tokens"])
    trainer.byte_fallback = _BYTE in own["token_type"]
    trainer.unk_id = own.get("unknown_token_id", 0)
    trainer.unk_piece = own["tokens"][trainer.unk_id]
    for role, id in roles.items():
        if id is not None:
            setattr(trainer, f"{role}_id", id)
            setattr(trainer, f"{role}_piece", own["tokens"][id])
        elif getattr(trainer, f"{role}_piece") in own["tokens"]:
            without(trainer, role)
        else:
            setattr(trainer, f"{role}_id", -1)
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = own.get("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    return model


def _splitter(pre: Any) -> dict[str, Any] | None:
    """How a text is split before the merges, and what else goes with it; None: not known."""
    if pre == "gpt-2":
        return {"pre_tokenizer": {**_BYTES, "use_regex": True}}
    if pre == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}]
    elif pre in (*_LLAMA3, *_QWEN):
        pattern = tokenizer_json.LLAMA3 if pre in _LLAMA3 else tokenizer_json.QWEN
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        steps = [{**split, "invert": False}, {**_BYTES, "use_regex": False}]
    else:
        return None
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "normalizer": {"type": "NFC"} if pre in _QWEN else None,
        "ignore_merges": pre in _LLAMA3,
    }


def _byte_level(
    path: Path,
    own: Mapping[str, Any],
    roles: Mapping[str, int | None],
    splitter: Mapping[str, Any],
) -> bytes:
    """A tokenizer.json of byte-level BPE. Raises TokenizerError."""
    try:
        tokens, plain = _tokenizer_json(own, splitter)
        model = tokenizers.Tokenizer.from_str(json.dumps(plain))
        special = {
            f"{role}_token": None if id is None else tokens[id] for role, id in roles.items()
        }
        whole = tokenizer_json.standalone(plain, special, model)
    except Exception as error:  # the library raises no narrower one
        raise TokenizerError(f"{path}: its tokenizer cannot be read ({error})") from None
    return json.dumps(whole, ensure_ascii=False).encode()


def _tokenizer_json(
    own: Mapping[str, Any], splitter: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """The tokens, and their tokenizer.json, which does not yet say which of them is BOS or EOS.

    Fields that do not fit each other raise errors of several kinds.
    """
    tokens, kinds = list(own["tokens"]), list(own["token_type"])
    while kinds and kinds[-1] == _UNUSED:  # rows of the embedding for no token
        kinds.pop()
        tokens.pop()
    return tokens, {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, kinds),
        "normalizer": splitter.get("normalizer"),
        "pre_tokenizer": splitter["pre_tokenizer"],
        "post_processor": None,
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitter.get("ignore_merges", False),
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in own["merges"]],
        },
    }


def _added(tokens: Sequence[str], kinds: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are matched whole: special ones, and those that users defined."""
    return [
        {
            "id": id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
