"""Files beside a model's weights: chat templates, and what `generate` does by default.

An import keeps these files, a run that starts from it takes them over (`train.start_from`), and
`export` writes them: `pretrain/checkpoint/runs.py` names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.dataset.parsing import json_value
from data_prep.dataset.settings import SettingsError
from data_prep.tokenizer.contract import Tokenizer
from pretrain.checkpoint.runs import CHAT_TEMPLATE, GENERATION, MORE_TEMPLATES, ends_of

_ADAPTER = "adapter_config.json"
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of ids, of lists of them, and of lists of phrases.
_TOKENS = (
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("force_words_ids", "sequence_bias"),
)
_OF_A_VERSION = ("transformers_version", "_from_model_config")


def of_directory(source: Path, plain: Mapping[str, Any]) -> dict[str, bytes]:
    """The files to keep of a Hugging Face directory, whose config.json is `plain`, by name.

    As transformers read them: templates in files go before those in tokenizer_config.json. Raises
    SettingsError with all that is wrong.
    """
    problems: list[str] = []
    if (source / _ADAPTER).is_file():
        problems.append(
            f"{_ADAPTER}: transformers add an adapter to the weights that it is beside; merge it "
            "into them (peft's merge_and_unload), or take the file away"
        )
    settings = _json(source / "tokenizer_config.json", problems)
    texts = _templates(settings.get("chat_template"), problems)
    for path in [source / CHAT_TEMPLATE, *sorted((source / MORE_TEMPLATES).glob("*.jinja"))]:
        if path.is_file():
            name = "default" if path.name == CHAT_TEMPLATE else path.stem
            texts[name] = _text(path, problems)
    generation = _json(source / GENERATION, problems)
    if problems:
        raise SettingsError(problems)
    if not generation:
        generation = {role: plain[role] for role in _ROLES if plain.get(role) is not None}
    return files(texts, generation)


def files(templates: Mapping[str, str], generation: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of chat templates by name, of which one may be `default`, and of what `generate`
    does."""
    found = {
        CHAT_TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja": text.encode()
        for name, text in templates.items()
    }
    kept = {key: value for key, value in generation.items() if key not in _OF_A_VERSION}
    if kept:
        found[GENERATION] = (json.dumps(kept, indent=2) + "\n").encode()
    return found


def unknown_ends(files: Mapping[str, bytes], own: Tokenizer) -> list[str]:
    """What is wrong with the ids that end a text, in files to keep beside the tokenizer `own`.

    Neither a value that is no id would end a text, nor an id beyond the tokenizer's, whose row of
    the embedding is left out.
    """
    kept = json_value(files[GENERATION]) if GENERATION in files else {}
    given = kept.get("eos_token_id")
    listed = given if isinstance(given, list) else [given] * (given is not None)
    if listed != ends_of(kept):
        return [f"eos_token_id: expected an id, or a list of ids, found {given!r}"]
    return [
        f"eos_token_id: {id} is no token of {own.path}, which has {own.vocab_size}; name the "
        "tokenizer that has it: --tokenizer FILE"
        for id in ends_of(kept)
        if id >= own.vocab_size
    ]


def generation(
    directory: Path, special: Mapping[str, int | None], vocab_size: int
) -> dict[str, Any]:
    """The generation_config.json of an export: what was kept in a run directory, with the `special`
    ids of its tokenizer, whose EOS ends a text beside those that did so before.

    Ids that are no token are left out, since an import leaves out their rows: transformers load no
    model that pads with one, and such a token is never generated.
    """
    path = directory / GENERATION
    kept: dict[str, Any] = json_value(path.read_bytes()) if path.is_file() else {}
    for key in [key for key in _TOKENS if key in kept]:
        value = kept.pop(key)
        alone = not isinstance(value, list)
        left = [one for one in ([value] if alone else value) if _is_known(one, vocab_size)]
        if left:
            kept[key] = value if alone else left
    ends = [id for id in ends_of(kept) if _is_known(id, vocab_size)]
    own = special["eos_token_id"]
    if own is not None and own not in ends:
        ends.append(own)
    eos = ends if len(ends) > 1 else ends[0] if ends else None
    return {**special, **kept, "eos_token_id": eos}


def _is_known(given: Any, vocab_size: int) -> bool:
    """Whether all ids in it, one or a phrase, which may have a bias, are tokens."""
    if isinstance(given, list):
        return all(_is_known(one, vocab_size) for one in given)
    return not isinstance(given, int) or 0 <= given < vocab_size


def _templates(given: Any, problems: list[str]) -> dict[str, str]:
    """The templates of tokenizer_config.json by name: a text, or a list of named ones."""
    if isinstance(given, str):
        return {"default": given}
    found: dict[str, str] = {}
    for one in given if isinstance(given, list) else [given] * (given is not None):
        named = one if isinstance(one, dict) else {}
        name, text = named.get("name"), named.get("template")
        if not isinstance(text, str) or not isinstance(name, str) or Path(name).name != name:
            problems.append("tokenizer_config.json: chat_template: expected a text, or named texts")
            break
        found[name] = text
    return found


def _text(path: Path, problems: list[str]) -> str:
    """The text of a file; empty where it cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
    return ""


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    """The object in a file; {} without one."""
    try:
        plain = json_value(path.read_bytes())
        if isinstance(plain, dict):
            return plain
        problems.append(f"{path.name}: expected a JSON object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: cannot be read ({error})")
    return {}
