"""The tokenizer of a Hugging Face model, with what transformers take from the files beside it.

Of a tokenizer.json that is `added_tokens_decoder` in tokenizer_config.json or, without it,
added_tokens.json: their tokens are added. Texts begin with what its post-processor lays. Of a
SentencePiece model, `add_bos_token` says whether they begin with BOS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data_prep.dataset.wording import counted
from data_prep.tokenizer import tokenizer, tokenizer_json
from data_prep.tokenizer.contract import FILES, Tokenizer, TokenizerError
from data_prep.tokenizer.hugging_face import HuggingFace
from data_prep.tokenizer.sentencepiece import SentencePiece
from pretrain.checkpoint.runs import HUGGING_FACE

_CONFIG = "tokenizer_config.json"
_ADDED = "added_tokens_decoder"
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_MORE = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Theirs:
    """A model's tokenizer."""

    tokenizer: Tokenizer
    file: tuple[str, bytes]
    """Name and bytes of a copy that needs no file beside it."""
    notes: list[str]
    """What is otherwise than in the file, or than the files beside it say."""


def of_file(path: Path) -> Theirs:
    """The tokenizer in a file. Raises TokenizerError."""
    data = tokenizer.read(path)
    try:
        beside = _beside(path)
        if data.startswith(b"{"):
            return _hugging_face(path, data, beside)
        return _sentencepiece(path, data, beside)
    except ValueError as error:
        raise TokenizerError(str(error)) from None


def without(trainer: Any, role: str) -> None:
    """Leave a SentencePiece model without a token of the `role`. It goes by the piece's name, and
    the unknown one is no control piece."""
    setattr(trainer, f"{role}_id", -1)
    setattr(trainer, f"{role}_piece", trainer.unk_piece)


@dataclass(frozen=True)
class _Beside:
    """What the files beside a tokenizer say, as transformers read them."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json."""
    named: Mapping[str, str] = field(default_factory=dict)
    """The tokens of roles, by the role."""
    more: list[str] = field(default_factory=list)
    """Other special tokens."""
    added: Mapping[int, tokenizers.AddedToken] = field(default_factory=dict)
    """The tokens whose ids they say."""


def _beside(path: Path) -> _Beside:
    """Raises ValueError."""
    names = (_CONFIG, "special_tokens_map.json", "added_tokens.json")
    config, special, added = (
        tokenizer_json.companion(path.with_name(name)) if path.with_name(name).is_file() else {}
        for name in names
    )
    # With `added_tokens_decoder` transformers read all from tokenizer_config.json.
    roles = config if _ADDED in config else {**special, **config}
    named = {role: text for role in _ROLES if (text := _content(roles.get(role))) is not None}
    more = [
        text
        for listed in map(roles.get, _MORE)
        for one in (listed.values() if isinstance(listed, dict) else listed or [])
        if (text := _content(one)) is not None
    ]
    try:
        if _ADDED in config:
            listed = {
                int(id): tokenizers.AddedToken(**{key: one[key] for key in one if key != "__type"})
                for id, one in config[_ADDED].items()
            }
        else:
            known = {*named.values(), *more}
            listed = {
                id: tokenizers.AddedToken(text, normalized=text not in known, special=text in known)
                for text, id in added.items()
            }
        return _Beside(config, named, more, dict(sorted(listed.items())))
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"{path.with_name(_CONFIG)}, or {names[2]}: its added tokens cannot be read; expected "
            "what transformers write (save_pretrained)"
        ) from None


def _content(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _hugging_face(path: Path, data: bytes, beside: _Beside) -> Theirs:
    """Raises TokenizerError, or ValueError."""
    data, new = _with_added(path, data, beside)
    whole = HuggingFace(path, data)
    copy = whole.as_laid
    own = HuggingFace(path, copy)
    notes = []
    if new:
        notes.append(f"added to {path.name}: {_listed(new)}, which files beside it give ids")
    named = whole.special_tokens["bos_token"]
    if named is not None and own.bos_id is None:
        notes.append(f"no BOS: the post-processor of {path.name} lays no {named} before texts")
    said = beside.config.get("add_bos_token")
    if isinstance(said, bool) and said is not (own.bos_id is not None):
        notes.append(
            f"not followed: add_bos_token of {_CONFIG}, which transformers 5 do not read beside a "
            f"{FILES[1]} either; their tokenizer.add_bos_token = {said} writes it into the file "
            "that save_pretrained makes"
        )
    return Theirs(own, (FILES[1], copy), notes)


def _with_added(path: Path, data: bytes, beside: _Beside) -> tuple[bytes, list[str]]:
    """The file with the tokens that are beside it, and which of them it lacked.

    Raises ValueError where a token would have another id than is said of it.
    """
    try:
        model = tokenizers.Tokenizer.from_buffer(data)
    except Exception:  # the library raises no narrower one; `HuggingFace` says what is wrong
        return data, []
    there = {token.content for token in model.get_added_tokens_decoder().values()}
    new = [token for token in beside.added.values() if token.content not in there]
    model.add_tokens(new)
    wrong = [
        f"{token.content} (id {id})"
        for id, token in beside.added.items()
        if model.token_to_id(token.content) != id
    ]
    wrong += [text for text in beside.more if model.token_to_id(text) is None]
    if wrong:
        raise ValueError(_unknown(path, wrong))
    if not new:
        return data, []
    plain = {**json.loads(data), "added_tokens": json.loads(model.to_str())["added_tokens"]}
    whole = json.dumps(plain, ensure_ascii=False, indent=2).encode()
    return whole, [token.content for token in new]


def _sentencepiece(path: Path, data: bytes, beside: _Beside) -> Theirs:
    """Raises TokenizerError, or ValueError."""
    own = SentencePiece(path, data)
    pieces = [own.name(id) for id in range(own.vocab_size)]
    wrong = [
        f"{token.content} (id {id})"
        for id, token in beside.added.items()
        if pieces[id : id + 1] != [token.content]
    ]
    said = {token.content for token in beside.added.values()}
    roles = [beside.named[role] for role in ("bos_token", "eos_token") if role in beside.named]
    wrong += [text for text in [*roles, *beside.more] if text not in {*pieces, *said}]
    if wrong:
        raise ValueError(_unknown(path, wrong))
    notes = []
    if beside.config.get("add_bos_token") is False and own.bos_id is not None:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        without(model.trainer_spec, "bos")
        data = model.SerializeToString()
        own = SentencePiece(path, data)
        notes.append(f"no BOS: {_CONFIG} says add_bos_token=false")
    if "add_bos_token" not in beside.config and own.bos_id is not None and _of_a_model(path):
        notes.append(
            f"BOS: texts begin with {own.name(own.bos_id)}, as with transformers 4; transformers 5 "
            f"lay none, since no {_CONFIG} says add_bos_token, true or false"
        )
    for role, id in (("bos_token", own.bos_id), ("eos_token", own.eos_id)):
        named = beside.named.get(role)
        if id is not None and named not in (None, own.name(id)):
            notes.append(f"{role}: is {own.name(id)} of {path.name}; files beside it name {named}")
    return Theirs(own, (FILES[0], data), notes)


def _of_a_model(path: Path) -> bool:
    """Whether a tokenizer lies beside a model, and not in a data set."""
    return path.with_name(HUGGING_FACE).is_file()


def _unknown(path: Path, tokens: list[str]) -> str:
    return (
        f"{path}: lacks {_listed(list(dict.fromkeys(tokens)))}, which files beside it name; save "
        "them into one file with transformers, AutoTokenizer.from_pretrained("
        f"{str(path.parent)!r}).save_pretrained(NEW), and give it: --tokenizer NEW/{FILES[1]}"
    )


def _listed(tokens: list[str]) -> str:
    more = [f"and {counted(len(tokens) - 8, 'more token')}"] if len(tokens) > 8 else []
    return ", ".join([*tokens[:8], *more])
