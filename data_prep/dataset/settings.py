"""Configuration in three layers: dataclass defaults, a YAML with what differs, and overrides.

Every mistake of a user is found before anything runs and all are reported at once. OmegaConf
parses, merges and interpolates; the check against the dataclasses is ours, since OmegaConf stops at
the first mistake. Only `${other.key}` may be interpolated: resolvers such as `${oc.env:KEY}` would
carry secrets into every file that stores the configuration, so they are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from data_prep.dataset.wording import meant

T = TypeVar("T")

# As messages name keys: train.steps, sources[0].paths.
_KEY = re.compile(r"\w+(\[\d+\])?(\.\w+(\[\d+\])?)*")
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")


class MistakeError(ValueError):
    """A mistake of the user, who can correct it; a command that ends with it has exit code 2."""


class SettingsError(MistakeError):
    """A configuration that cannot work; `problems` holds every mistake, one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[type[SettingsError], tuple[list[str]]]:
        """Pickled by its problems, so that it leaves a worker process whole."""
        return type(self), (self.problems,)


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field: its default (a list or dict is copied), unit, meaning, closed bounds."""
    metadata = {"doc": doc, "low": low, "high": high}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(schema: type[T]) -> T:
    """A dataclass field that holds a group of settings, all at their defaults."""
    return dataclasses.field(default_factory=schema)


def load(
    schema: type[T],
    path: Path | None,
    overrides: Sequence[str] = (),
    inherited: Callable[[T], Mapping[str, Any]] | None = None,
) -> T:
    """The configuration of the YAML at `path` with `key=value` overrides on top.

    What `inherited` gives of the configuration without it takes the place of defaults.
    Raises SettingsError with every unknown key, wrong type, value out of bounds, and with each
    sentence that a dataclass's own `problems()` returns. Those sentences start with the key.
    """
    raw, problems = _read(path, overrides)
    if inherited is not None:
        raw = _over(inherited(_build(schema, raw, "", [])), raw)
    built = _build(schema, raw, "", problems)
    # The default replaces a wrong value: what follows from that default would mislead.
    wrong = [problem.partition(":")[0] for problem in problems]
    problems += [
        problem
        for problem in _own_problems(built, "")
        if not any(key and key in problem for key in wrong)
    ]
    if problems:
        raise SettingsError(problems)
    return built


def from_plain(schema: type[T], value: Any) -> T:
    """The dataclass that `to_plain` wrote, checked again. Raises SettingsError."""
    problems: list[str] = []
    with contextlib.suppress(_WrongValueError):
        built = _build(schema, value, "", problems)
        if not problems:
            return built
    raise SettingsError(problems)


def to_plain(config: Any) -> dict[str, Any]:
    """The resolved configuration, or another dataclass, as JSON-able dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal configuration."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def describe(schema: type[Any], prefix: str = "") -> list[str]:
    """A line for each key: name, default, meaning; for `--help`."""
    lines, defaults = [], schema()
    for field in dataclasses.fields(schema):
        name, default = f"{prefix}{field.name}", getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            lines += describe(type(default), f"{name}.")
        else:
            lines.append(f"{name} = {default!r}  {field.metadata.get('doc', '')}")
    return lines


def _over(inherited: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and of what is inherited the rest, key by key."""
    both = {key: given[key] for key in given.keys() & inherited.keys()}
    groups = {
        key: _over(inherited[key], value)
        for key, value in both.items()
        if isinstance(value, Mapping) and isinstance(inherited[key], Mapping)
    }
    return {**inherited, **given, **groups}


def _read(path: Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[str] = []
    merged: Any = OmegaConf.create({})
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
            merged = OmegaConf.create(text)
            if isinstance(yaml.safe_load(text), str):  # OmegaConf takes it for a key
                raise SettingsError([f"{path}: expected keys with values, found one value"])
            if not isinstance(merged, DictConfig):
                raise SettingsError([f"{path}: expected keys with values, found a list"])
        except OSError as error:
            raise SettingsError([f"{path}: cannot be read ({error.strerror})"]) from None
        except UnicodeDecodeError:
            raise SettingsError([f"{path}: is not UTF-8 text"]) from None
        except AssertionError:  # OmegaConf's, for a file that holds a number
            raise SettingsError([f"{path}: expected keys with values, found one value"]) from None
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise SettingsError([f"{path}: is not valid YAML: {error}"]) from None
    for word in overrides:
        key, equals, given = word.partition("=")
        if not equals or not _KEY.fullmatch(key):
            problems.append(f"{word!r}: expected key=value, for example train.steps=100")
            continue
        try:
            # Interpolations are resolved once all keys are known.
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"_={given}"]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            problems.append(f"{word!r}: the value is not valid YAML: {error}")
            continue
        try:
            OmegaConf.update(merged, key, parsed["_"], merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError):
            problems.append(f"{word!r}: there is no {key} whose value could be set")
    return _resolved(merged, problems), problems


def _resolved(merged: Any, problems: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(merged, resolve=False)
        allowed = OmegaConf.create(_without_resolvers(plain, "", problems))
        resolved = OmegaConf.to_container(allowed, resolve=True)
    except OmegaConfBaseException as error:
        raise SettingsError([*problems, str(error).splitlines()[0]]) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _without_resolvers(value: Any, key: str, problems: list[str]) -> Any:
    """`value` with each text that uses a resolver emptied, and added to `problems`."""
    if isinstance(value, dict):
        return {
            name: _without_resolvers(item, f"{key}.{name}" if key else str(name), problems)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [
            _without_resolvers(item, f"{key}[{index}]", problems)
            for index, item in enumerate(value)
        ]
    if isinstance(value, str) and _RESOLVER.search(value):
        problems.append(
            f"{key}: {value!r} uses a resolver, which would store what it reads; only "
            f'${{other.key}} is resolved. Pass the value on the command line: {key}="$NAME"'
        )
        return ""
    return value


def _build(schema: type[T], raw: Any, prefix: str, problems: list[str]) -> T:
    """The dataclass made of `raw`; a wrong value is added to `problems`, its default is used.

    Raises _WrongValueError where a value without a default is wrong or missing.
    """
    fields = _fields(schema)  # type: ignore[arg-type]
    needed = {name for name, (_, _, is_needed) in fields.items() if is_needed}
    if isinstance(raw, Mapping):
        problems += [f"{prefix}{name}: missing" for name in fields if name in needed - raw.keys()]
    else:
        problems.append(f"{prefix.rstrip('.') or 'configuration'}: expected keys, found {raw!r}")
        raw = {}
    for key in raw:
        if key not in fields:
            problems.append(f"{prefix}{key}: unknown key; {meant(str(key), fields, prefix)}")
    values = {}
    for name, (kind, bounds, _) in fields.items():
        if name in raw:
            with contextlib.suppress(_WrongValueError):
                values[name] = _value(kind, raw[name], f"{prefix}{name}", bounds, problems)
    if not needed <= values.keys():
        raise _WrongValueError
    return schema(**values)


@functools.cache
def _fields(schema: type[Any]) -> dict[str, tuple[Any, Mapping[str, Any], bool]]:
    """Type, metadata and whether it has no default, of each field by its name."""
    # Cached: a manifest has very many records, and types are parsed from their source text.
    hints = get_type_hints(schema)
    return {
        field.name: (
            hints[field.name],
            field.metadata,
            field.default is field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(schema)
    }


class _WrongValueError(Exception):
    """A value of the wrong type; the reason is in `problems`."""


def _wrong(problem: str, problems: list[str]) -> NoReturn:
    problems.append(problem)
    raise _WrongValueError


def _value(kind: Any, raw: Any, key: str, bounds: Mapping[str, Any], problems: list[str]) -> Any:
    """`raw` as the type `kind`. Raises _WrongValueError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build(kind, raw, f"{key}.", problems)  # type: ignore[arg-type]
    if origin is Literal:
        if raw not in arguments or type(raw) not in {type(choice) for choice in arguments}:
            choices = ", ".join(str(choice) for choice in arguments)
            _wrong(f"{key}: expected one of {choices}; found {raw!r}", problems)
        return raw
    if origin is list:
        if not isinstance(raw, list):
            _wrong(f"{key}: expected a list, found {raw!r}", problems)
        items = []
        for index, item in enumerate(raw):
            with contextlib.suppress(_WrongValueError):
                items.append(_value(arguments[0], item, f"{key}[{index}]", bounds, problems))
        if len(items) < len(raw):
            raise _WrongValueError
        return items
    if origin is dict:
        if not isinstance(raw, dict):
            _wrong(f"{key}: expected keys, found {raw!r}", problems)
        return raw
    if origin is types.UnionType:
        # Of one type and None.
        return None if raw is None else _value(arguments[0], raw, key, bounds, problems)
    return _scalar(kind, raw, key, bounds, problems)


def _scalar(
    kind: type[Any], raw: Any, key: str, bounds: Mapping[str, Any], problems: list[str]
) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as text; users mean the number.
    if kind is float and isinstance(raw, str):
        with contextlib.suppress(ValueError):
            raw = float(raw)
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw)
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        _wrong(f"{key}: expected {names[kind]}, found {raw!r}", problems)
    if kind is float and not math.isfinite(raw):
        _wrong(f"{key}: expected a finite number, found {raw!r}", problems)
    low, high = bounds.get("low"), bounds.get("high")
    if (low is not None and raw < low) or (high is not None and raw > high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        _wrong(f"{key}: expected {wanted}, found {raw!r}", problems)
    return raw


def _own_problems(config: Any, prefix: str) -> list[str]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if dataclasses.is_dataclass(item):
                place = f"[{index}]" if isinstance(value, list) else ""
                found += _own_problems(item, f"{prefix}{field.name}{place}.")
    own = getattr(config, "problems", None)
    return found + ([f"{prefix}{problem}" for problem in own()] if own is not None else [])
