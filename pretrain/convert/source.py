"""A model that is to be imported: its configuration, tensors, tokenizer, and what is beside them.

Read here from a directory as `save_pretrained` writes it; from a GGUF file in gguf_file.py, under
the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.dataset.parsing import json_value, pointer
from data_prep.dataset.settings import SettingsError
from data_prep.tokenizer import tokenizer
from data_prep.tokenizer.contract import FILES, Tokenizer, TokenizerError
from pretrain.checkpoint.manifest import TensorInfo
from pretrain.convert import beside, their_tokenizer

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor of the model: the file where it lies, what it is, and how it is read."""

    file: Path
    info: TensorInfo
    read: Callable[[], Tensor]


@dataclass
class Source:
    """What could be read of a model; the rest is empty, and in `problems`."""

    path: Path
    config_file: Path
    """Where the configuration is."""
    plain: dict[str, Any] = field(default_factory=dict)
    """config.json, or the same of another format."""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """By Hugging Face's names."""
    tokenizer: Tokenizer | None = None
    tokenizer_file: tuple[str, bytes] = ("", b"")
    """Name and bytes of a copy of the tokenizer that needs no file beside it."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Files that are kept as they are, by name."""
    notes: list[str] = field(default_factory=list)
    """What the user is to know of the tokenizer."""
    problems: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[[], Any], otherwise: Any) -> Any:
        """What `action` gives; `otherwise` where it raised what belongs to the problems."""
        try:
            return action()
        except SettingsError as error:
            self.problems += error.problems
        except TokenizerError as error:
            self.problems.append(str(error))
        return otherwise

    def take_tokenizer(self, path: Path) -> None:
        """Use the tokenizer in a file. Raises TokenizerError."""
        theirs = their_tokenizer.of_file(path)
        self.tokenizer, self.tokenizer_file = theirs.tokenizer, theirs.file
        self.notes += theirs.notes


def of_directory(path: Path, tokenizer_path: Path | None) -> Source:
    """The model in a directory. Raises SettingsError where there is no model in it at all."""
    if not (path / _CONFIG).is_file():
        raise SettingsError(
            [
                f"{path}: has no {_CONFIG}; expected a model as save_pretrained writes it, or a "
                "GGUF file"
            ]
        )
    source = Source(path, path / _CONFIG)
    source.attempt(lambda: source.take_tokenizer(tokenizer_path or _tokenizer_in(path)), None)
    source.stored = source.attempt(lambda: _stored(path), {})
    source.plain = source.attempt(lambda: _json(path / _CONFIG), {})
    source.beside = source.attempt(lambda: beside.of_directory(path, source.plain), {})
    return source


def _tokenizer_in(path: Path) -> Path:
    """Raises TokenizerError."""
    try:
        return tokenizer.find(path)
    except TokenizerError as error:
        if any((path / name).is_file() for name in FILES):
            what = f"{error}; or name the one that data sets are prepared with: --tokenizer FILE"
        else:
            what = (
                f"{path}: holds none of {' and '.join(FILES)}; give one with --tokenizer FILE, "
                "where there are other files of a tokenizer what transformers make of them: "
                f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(NEW)"
            )
        raise TokenizerError(what) from None


def _stored(path: Path) -> dict[str, Stored]:
    """Every tensor of the directory by its name. Raises SettingsError."""
    if (path / _WEIGHTS).is_file():
        index, names = None, [_WEIGHTS]
    elif (path / _INDEX).is_file():
        index = _json(path / _INDEX).get("weight_map")
        given = list(index.values()) if isinstance(index, dict) else []
        names = sorted({name for name in given if isinstance(name, str)})
        if not names or len(given) != sum(isinstance(name, str) for name in given):
            raise SettingsError([f"{_INDEX}: expected weight_map to name a file a tensor"])
    else:
        pickled = sorted(one.name for one in path.glob("pytorch_model*.bin"))
        of = f", and {pickled[0]} is not read, since pickles can run code" if pickled else ""
        raise SettingsError(
            [
                f"{path}: holds neither {_WEIGHTS} nor {_INDEX}{of}; expected weights as "
                f"safetensors, which AutoModelForCausalLM.from_pretrained({str(path)!r})"
                ".save_pretrained(NEW) writes"
            ],
        )
    problems: list[str] = []
    found: dict[str, Stored] = {}
    for name in names:
        if Path(name).name != name:
            problems.append(f"{_INDEX}: {name} is not a file of the directory")
            continue
        try:
            found |= _listed(path / name)
        except SettingsError as error:
            problems += error.problems
    if index is not None and not problems:
        listed = {key: one.file.name for key, one in found.items()}
        wrong = sorted(key for key in {*index, *listed} if index.get(key) != listed.get(key))
        problems += [f"{key}: is not in the file that {_INDEX} says" for key in wrong[:8]]
    if problems:
        raise SettingsError(problems)
    return found


def _listed(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises SettingsError."""
    try:
        with path.open("rb") as file:
            if said := pointer(file.read(99)):
                raise SettingsError([f"{path.name}: {said}"])
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                info = TensorInfo(part.get_dtype(), tuple(part.get_shape()))
                found[name] = Stored(path, info, partial(_read, path, name))
            return found
    except (OSError, SafetensorError) as error:
        raise SettingsError([f"{path.name}: cannot be read ({error})"]) from None


def _read(path: Path, name: str) -> Tensor:
    """A tensor, mapped while it is used and no longer."""
    with safe_open(path, framework="pt", device="cpu") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises SettingsError."""
    reason = "expected a JSON object"
    with suppress(ValueError):
        try:
            plain = json_value(path.read_bytes())
            if isinstance(plain, dict):
                return plain
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
    raise SettingsError([f"{path.name}: {reason}"])
