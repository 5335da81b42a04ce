"""Pieces, special tokens and places to cut of a Hugging Face tokenizer.json.

The tokens that begin and end a text have no fixed place in it. BOS, EOS and padding are each taken
from the first of these that names it:

1. what `standalone` wrote into the file, as into every copy in a data set or a run;
2. `tokenizer_config.json`, then `special_tokens_map.json` beside the file (null: there is none);
3. the file: the one special token that its post-processor puts before (BOS) or after (EOS) a text,
   or the token of its `padding`;
4. for BOS and EOS, the only special added token with one of the well-known names.

Otherwise there is none.

The tokens of these roles are special whatever the file says of them, and so are those that its
companions call special, and those between bars (<|user|>) with which its chat template marks turns:
a text that holds one is encoded as text. Others that a template holds, such as <think>, are tokens
of texts where the file says so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tokenizers

from data_prep.dataset.parsing import json_value
from data_prep.tokenizer.spelling import SPACE

_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
# Further special tokens in these, by the names that transformers had for them.
_MORE = ("additional_special_tokens", "extra_special_tokens")
_TEMPLATE = "chat_template.jinja"
# How control tokens are spelled; DeepSeek's bars are those of full width.
_CONTROL = re.compile("<[|\uff5c].+[|\uff5c]>")
_WELL_KNOWN = {
    "bos_token": {
        "<|begin_of_text|>",
        "<|startoftext|>",
        "<s>",
        "<bos>",
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    },
    "eos_token": {
        "<|end_of_text|>",
        "<|endoftext|>",
        "</s>",
        "<eos>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    },
    "pad_token": set(),
}
# Decoders of what was converted from SentencePiece.
_SPACED = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
# A text alone, and a pair: a post-processor that changes nothing.
_ALONE = {"Sequence": {"id": "A", "type_id": 0}}
_SECOND = {"Sequence": {"id": "B", "type_id": 1}}

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
# The patterns match nothing that crosses from a line end to a character that is no white space, and
# their earlier matches do not depend on later text; GPT-2's only after a single line end.
_LINE_START = re.compile(r"(?<=\n)(?=\S)")
_NEXT_LINE = re.compile(r"(?<=\S\n)(?=\S)")
# Encoding prefixes the space that is cut off, but not to an empty text.
_BEFORE_SPACE = re.compile(rf"(?<=[^\s{SPACE}])(?= [\s\S])")


def special_tokens(
    path: Path, plain: dict[str, Any], model: tokenizers.Tokenizer
) -> dict[str, str | None]:
    """`bos_token`, `eos_token` and `pad_token` of the file, by the rule above.

    Raises ValueError where a companion cannot be read or names a token that the file lacks.
    """
    if (found := of_copy(plain)) is not None:
        return found
    found = _of_file(plain, model)
    for name in reversed(_COMPANIONS):
        companion = path.with_name(name)
        if companion.is_file():
            found |= _of_companion(companion)
    for role, token in found.items():
        if token is not None and model.token_to_id(token) is None:
            raise ValueError(
                f"{path}: lacks {token!r}, which a {' or '.join(_COMPANIONS)} beside it names as "
                f"{role}; put the files of one tokenizer together"
            )
    return found


def with_control_tokens(path: Path, plain: dict[str, Any]) -> dict[str, Any] | None:
    """The file, in which the control tokens that it does not call special are; None: there is none.

    Raises ValueError where a companion cannot be read.
    """
    added = plain.get("added_tokens") or []
    if of_copy(plain) is not None or all(token["special"] for token in added):
        return None
    beside = [one for name in _COMPANIONS if (one := path.with_name(name)).is_file()]
    found = {name for one in beside for name in _called_special(companion(one))}
    template = _chat_template(path, beside)
    tokens = [
        {**token, "special": True}
        if token["content"] in found
        or (_CONTROL.fullmatch(token["content"]) and token["content"] in template)
        else token
        for token in added
    ]
    return None if tokens == added else {**plain, "added_tokens": tokens}


def _called_special(plain: dict[str, Any]) -> list[str]:
    """The tokens that a companion names as special ones."""
    decoder = plain.get("added_tokens_decoder")
    listed = list(decoder.values()) if isinstance(decoder, dict) else []
    named: list[Any] = [
        token for token in listed if isinstance(token, dict) and token.get("special") is True
    ]
    named += [plain.get(role) for role in _WELL_KNOWN]
    for more in map(plain.get, _MORE):
        if isinstance(more, dict | list):
            named += more.values() if isinstance(more, dict) else more
    contents = [token.get("content") if isinstance(token, dict) else token for token in named]
    return [content for content in contents if isinstance(content, str)]


def _chat_template(path: Path, beside: list[Path]) -> str:
    """The chat templates beside the file, one after the other; "" where there is none."""
    found = [str(companion(one).get("chat_template") or "") for one in beside]
    if (alone := path.with_name(_TEMPLATE)).is_file():
        found.append(alone.read_bytes().decode(errors="replace"))
    return "\n".join(found)


def standalone(
    plain: dict[str, Any], found: dict[str, str | None], model: tokenizers.Tokenizer
) -> dict[str, Any] | None:
    """The file with `found` in it, so that it needs no companions; None where it has just them.

    They are written as the special tokens of a template that adds nothing, before the file's own
    post-processor: other programs read the file and encode as before.
    """
    template = _template(found, model, lays=False)
    if template in _steps(plain.get("post_processor"), "processors"):
        return None
    return _with_processors(plain, [template, *_own_processors(plain)])


def laying(
    plain: dict[str, Any], found: dict[str, str | None], model: tokenizers.Tokenizer
) -> dict[str, Any] | None:
    """The file with `found` in it, and with a post-processor that lays BOS, if there is one, before
    a text and nothing else; None where the file's own does. `standalone` of it is that of the file,
    unless the file's own post-processor lays something else."""
    bos = found["bos_token"]
    if laid(model) == ([bos] * (bos is not None), []):
        return None
    own = [step for step in _own_processors(plain) if step["type"] == "ByteLevel"]
    return _with_processors(plain, [_template(found, model, lays=True), *own])


def laid(model: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
    """The special tokens that the file's post-processor puts before a text, and after it."""
    encoded = model.encode("a")
    places = [place for place, mark in enumerate(encoded.special_tokens_mask) if not mark]
    if not places:
        return [], []
    return encoded.tokens[: places[0]], encoded.tokens[places[-1] + 1 :]


def pieces(plain: dict[str, Any], model: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes of text that each id means; none for special tokens and ids without a piece.

    Raises ValueError where tokens have no fixed bytes, or are drawn at random.
    """
    if dropout := plain["model"].get("dropout"):
        raise ValueError(
            f"has the dropout {dropout}, so a text gets different tokens each time; set it to null"
        )
    kinds = {step["type"] for step in _steps(plain.get("decoder"), "decoders")}
    byte_level = "ByteLevel" in kinds
    if not byte_level and not (kinds and kinds <= _SPACED):
        raise ValueError(
            f"has the decoder {', '.join(sorted(kinds)) or 'none'}; byte-level BPE (as Llama 3's) "
            "and converted SentencePiece models (as Llama 2's) are read"
        )
    alphabet = _byte_alphabet()
    vocabulary: dict[str, int] = model.get_vocab(with_added_tokens=True)
    found = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, id in vocabulary.items():
        if byte_level and alphabet.keys() >= set(piece):
            found[id] = bytes(alphabet[character] for character in piece)
        elif "ByteFallback" in kinds and (byte := re.fullmatch("<0x([0-9A-F]{2})>", piece)):
            found[id] = bytes([int(byte[1], 16)])
        else:
            found[id] = (piece if byte_level else piece.replace(SPACE, " ")).encode()
    for id, token in model.get_added_tokens_decoder().items():
        if token.special:
            found[id] = b""
        elif byte_level:
            found[id] = token.content.encode()
    return found


def of_texts(plain: dict[str, Any]) -> dict[str, Any] | None:
    """The file for encoding, in which no text holds a special token's piece; None: as it is.

    Of Unigram models the library finds such a piece, unlike SentencePiece, wherever a text spells
    it, and prefers it: its score is 0. Here it has no spelling; all ids are the same.
    """
    added, model = plain.get("added_tokens") or [], plain["model"]
    if model.get("type") != "Unigram":
        return None
    names = [name for name, _ in model["vocab"]]
    unknown = [] if model.get("unk_id") is None else [names[model["unk_id"]]]
    held = {*unknown, *(token["content"] for token in added if token["special"])} & {*names}
    if not held:
        return None
    spelled = [["" if name in held else name, score] for name, score in model["vocab"]]
    # The ids of other added tokens are counted from the end of the vocabulary.
    others = [token for token in added if token["content"] not in held]
    return {**plain, "model": {**model, "vocab": spelled}, "added_tokens": others}


def unknown(plain: dict[str, Any], model: tokenizers.Tokenizer) -> int | None:
    """The id of what has no piece; None where there is none, as in byte-level BPE."""
    own = plain["model"]
    id: int | None = own.get("unk_id")
    return id if own.get("unk_token") is None else model.token_to_id(own["unk_token"])


def cut(plain: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a text may be cut so that its parts have its tokens; None where none is known.

    Known are the splits of GPT-2, Llama 3 and Qwen, at the start of a line; and BPE over spaces
    written U+2581 where no piece has one behind another character, before a space: no piece grows
    across that place.
    """
    taken = [token for token in plain.get("added_tokens", []) if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] for token in taken):
        return None
    held = "".join(token["content"] for token in taken)
    normalizers = [step["type"] for step in _steps(plain.get("normalizer"), "normalizers")]
    if normalizers in ([], ["NFC"]) and "\n" not in held and (lines := _line_cut(plain)):
        return lines
    model, splitter = plain["model"], plain.get("pre_tokenizer") or {}
    if (
        model.get("type") == "BPE"
        and not model.get("ignore_merges")
        and SPACE in model["vocab"]
        and not any(SPACE in piece.lstrip(SPACE) for piece in model["vocab"])
        and normalizers in ([], ["Replace"], ["Prepend", "Replace"])
        and splitter.get("type") in (None, "Metaspace")
        and not {" ", SPACE} & set(held)
    ):
        return _BEFORE_SPACE
    return None


def _line_cut(plain: dict[str, Any]) -> re.Pattern[str] | None:
    """Where a byte-level BPE's text may be cut, by the split that precedes it."""
    steps = _steps(plain.get("pre_tokenizer"), "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    own_split = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return _NEXT_LINE if own_split else None
    first = steps[0]
    if (
        len(steps) > 2
        or own_split
        or first["type"] != "Split"
        or first["behavior"] != "Isolated"
        or first["invert"]
    ):
        return None
    pattern = first["pattern"].get("Regex")
    return _LINE_START if pattern in (LLAMA3, QWEN) else None


def of_copy(plain: dict[str, Any]) -> dict[str, str | None] | None:
    """What `standalone` wrote into the file; None where it is no copy of ours."""
    for step in _steps(plain.get("post_processor"), "processors"):
        tokens = step.get("special_tokens", {})
        if _WELL_KNOWN.keys() <= tokens.keys():
            return {role: next(iter(tokens[role]["tokens"]), None) for role in _WELL_KNOWN}
    return None


def _of_file(plain: dict[str, Any], model: tokenizers.Tokenizer) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    names = {token["content"] for token in plain.get("added_tokens", []) if token["special"]}
    for role, known in _WELL_KNOWN.items():
        there = names & known
        found[role] = there.pop() if len(there) == 1 else None
    if plain.get("padding"):
        found["pad_token"] = plain["padding"]["pad_token"]
    before, after = laid(model)
    if len(before) == 1:
        found["bos_token"] = before[0]
    if len(after) == 1:
        found["eos_token"] = after[0]
    return found


def companion(path: Path) -> dict[str, Any]:
    """The object in a file beside a tokenizer. Raises ValueError."""
    try:
        plain = json_value(path.read_bytes())
    except (OSError, ValueError):
        plain = None
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: is not a JSON object; repair or remove it")
    return plain


def _of_companion(path: Path) -> dict[str, str | None]:
    """The roles that the file names: a token as a string, in an object's `content`, or null."""
    plain = companion(path)
    named = {role: plain[role] for role in _WELL_KNOWN if role in plain}
    found = {}
    for role, value in named.items():
        found[role] = value.get("content") if isinstance(value, dict) else value
        if not (value is None or isinstance(found[role], str)):
            raise ValueError(f"{path}: {role}: expected a token or null, found {value!r}")
    return found


def _template(
    found: dict[str, str | None], model: tokenizers.Tokenizer, lays: bool
) -> dict[str, Any]:
    """A step that holds `found`; `lays`: and lays BOS, if there is one."""
    tokens = {
        role: {
            "id": role,
            "ids": [] if token is None else [model.token_to_id(token)],
            "tokens": [] if token is None else [token],
        }
        for role, token in found.items()
    }
    begins = lays and found["bos_token"] is not None
    first, second = (
        [{"SpecialToken": {"id": "bos_token", "type_id": type_id}}] * begins for type_id in (0, 1)
    )
    return {
        "type": "TemplateProcessing",
        "single": [*first, _ALONE],
        "pair": [*first, _ALONE, *second, _SECOND],
        "special_tokens": tokens,
    }


def _with_processors(plain: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {**plain, "post_processor": {"type": "Sequence", "processors": steps}}


def _own_processors(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of the post-processor that `standalone` did not write."""
    steps = _steps(plain.get("post_processor"), "processors")
    return [
        step for step in steps if not _WELL_KNOWN.keys() <= step.get("special_tokens", {}).keys()
    ]


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a part of the file: those of a sequence, the part itself, or none."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes with (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
