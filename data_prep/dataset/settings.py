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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from data_prep.dataset import credentials
from data_prep.dataset.wording import any_of, meant

T = TypeVar("T")

# As messages name keys: train.steps, sources[0].paths.
_KEY = re.compile(r"\w+(\[\d+\])?(\.\w+(\[\d+\])?)*")
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ITEM = re.compile(r"\[\d+\]\Z")
_MEANT = re.compile(r"; did you mean (\S+)\?\Z")
# Whole numbers and fractions that YAML 1.1 reads to the base 8 and 60: 010 as 8, 1:30 as 90.
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_ZEROS_FIRST = re.compile(r"[-+]?0[0-9]+")
_UNKNOWN = "unknown key"
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")


EXIT_MISTAKE = 2


class MistakeError(ValueError):
    """A mistake of the user, who can correct it; a command ends with EXIT_MISTAKE."""


class SettingsError(MistakeError):
    """A configuration that cannot work; `problems` holds every mistake, one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(f"  - {problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[type[SettingsError], tuple[list[str]]]:
        """Pickled by its problems, so that it leaves a worker process whole."""
        return type(self), (self.problems,)


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field: its default (a list or dict is copied), unit, meaning, closed bounds.

    In a `path` a leading `~` stands for a home directory.
    """
    metadata = {"doc": doc, "low": low, "high": high, "path": path}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(schema: type[T]) -> T:
    """A dataclass field that holds a group of settings, all at their defaults."""
    return dataclasses.field(default_factory=schema)


def at_home(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by the home directory, as a shell does it.

    Raises ValueError where there is no such home.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        home = path.partition("/")[0]
        raise ValueError(
            f"there is no home directory {home}; give the whole path, or ./{path} where that is "
            "its name"
        ) from None


def load(
    schema: type[T],
    path: Path | None,
    overrides: Sequence[str] = (),
    inherited: Callable[[T], Mapping[str, Any]] | None = None,
    also: Callable[[T, Collection[str]], list[str]] | None = None,
) -> T:
    """The configuration of the YAML at `path` with `key=value` overrides on top.

    The value of an override is the text behind `=`, whatever is in it; where the setting is no
    text it is read as one YAML value, lists and groups in brackets. Quotes around it are taken off.
    What `inherited` gives of the configuration without it takes the place of defaults. Where there
    are mistakes, `also` tells others, such as missing files, of the configuration that has defaults
    in their place, and of the settings with the mistakes ("": which one is not known).
    Raises SettingsError with every unknown key, wrong type, value out of bounds, and with each
    sentence that a dataclass's own `problems()` returns. Those sentences start with the key.
    """
    unread, merged = _from_file(path)
    raw, problems = _read(schema, merged, overrides, whole=not unread)
    if unread:
        # What the file may say is not missing: only the overrides are checked.
        with contextlib.suppress(_WrongValueError):
            _build(schema, raw, "", problems)
        raise SettingsError([*unread, *(one for one in problems if not one.endswith(": missing"))])
    if inherited is not None:
        raw = _over(inherited(_build(schema, raw, "", [])), raw)
    built = _build(schema, raw, "", problems)
    # The default replaces a wrong value: what follows from that default would mislead.
    wrong = list(filter(None, map(_wrong_key, problems)))
    problems += [
        problem
        for problem in _own_problems(built, "")
        if not any(_follows(problem, key) for key in wrong)
    ]
    if problems:
        more = [] if also is None else also(built, {_wrong_key(one) for one in problems})
        raise SettingsError([*problems, *more])
    return built


def _wrong_key(problem: str) -> str:
    """The setting whose default replaces a wrong value, or one that was misspelled; empty: none."""
    if match := _MEANT.search(problem):
        return match[1]
    return "" if _UNKNOWN in problem else problem.partition(":")[0]


def _follows(problem: str, wrong: str) -> bool:
    """Whether a sentence of `problems()` may be true of the default of the setting `wrong` alone.

    It names that setting, also by its last part where it is about a setting beside it (`kind=...`),
    or it is about the list that the value is an item of.
    """
    about, _, told = problem.partition(":")
    place, _, name = wrong.rpartition(".")
    if wrong in problem or _ITEM.sub("", wrong) == about:
        return True
    is_above = f"{place}.".startswith((f"{about}.", f"{about}["))
    is_beside = f"{about}.".startswith(f"{place}.") if place else "." not in about
    word = rf"\b{re.escape(_ITEM.sub('', name))}\b"
    return (is_above or is_beside) and bool(re.search(word, told))


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


def _example(schema: type[Any]) -> str:
    """The first number of the settings with its default, as an override gives it."""
    numbers = (line.partition("  ")[0].replace(" = ", "=") for line in describe(schema))
    return next((one for one in numbers if one.rpartition("=")[2].isdecimal()), "name=value")


def _over(inherited: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, and of what is inherited the rest, key by key."""
    both = {key: given[key] for key in given.keys() & inherited.keys()}
    groups = {
        key: _over(inherited[key], value)
        for key, value in both.items()
        if isinstance(value, Mapping) and isinstance(inherited[key], Mapping)
    }
    return {**inherited, **given, **groups}


def _read(
    schema: type[Any], merged: Any, overrides: Sequence[str], *, whole: bool
) -> tuple[dict[str, Any], list[str]]:
    """The values of the configuration `merged` with overrides on top, and what is wrong with these.

    Where it is not the `whole` file, overrides that need what is in it are left out.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[str] = []
    for word in overrides:
        key, equals, given = word.partition("=")
        if not equals or not _KEY.fullmatch(key):
            problems.append(f"{word!r}: expected key=value, for example {_example(schema)}")
            continue
        if not whole and ("[" in key or "${" in given):
            continue
        try:
            value = _given(_kind_of(schema, key), given)
            if "${" in given:
                OmegaConf.create({"_": value})  # it may have no end
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            problems.append(f"{word!r}: the value cannot be read: {str(error).splitlines()[0]}")
            continue
        except RecursionError:
            problems.append(f"{key}: the value is nested too deeply")
            continue
        try:
            # Interpolations are resolved once all keys are known.
            OmegaConf.update(merged, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError):
            problems.append(f"{word!r}: there is no {key} whose value could be set")
    return _resolved(schema, merged, problems), problems


def _from_file(path: Path | None) -> tuple[list[str], Any]:
    """Why a file cannot be read, and its keys and values, none where it cannot or is not given."""
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    nothing = OmegaConf.create({})
    if path is None:
        return [], nothing
    try:
        text = _with_texts(path.read_text(encoding="utf-8"))
        found = OmegaConf.create(text)
        if isinstance(yaml.safe_load(text), str):  # OmegaConf takes it for a key
            return [f"{path}: expected keys with values, found one value"], nothing
        if not isinstance(found, DictConfig):
            return [f"{path}: expected keys with values, found a list"], nothing
    except OSError as error:
        if isinstance(error, FileNotFoundError) and "=" in str(path):
            return [f"{path}: is an override; give the configuration's file before it"], nothing
        if isinstance(error, IsADirectoryError):
            within = [f", e.g. {one}" for one in sorted(path.glob("*.yaml"))[:1]]
            return [f"{path}: is a directory; give a YAML file{''.join(within)}"], nothing
        return [f"{path}: cannot be read ({error.strerror})"], nothing
    except UnicodeDecodeError:
        return [f"{path}: is not UTF-8 text"], nothing
    except AssertionError:  # OmegaConf's, for a file that holds a number
        return [f"{path}: expected keys with values, found one value"], nothing
    except RecursionError:
        return [f"{path}: is nested too deeply"], nothing
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        return [f"{path}: is not valid YAML: {error}"], nothing
    return [], found


def _with_texts(text: str) -> str:
    """YAML in which numbers to the base 8 or 60 are texts. Raises yaml's errors."""
    import yaml

    done, parts = 0, []
    for token in yaml.scan(text):
        if not isinstance(token, yaml.ScalarToken) or not token.plain:
            continue
        if _OTHER_BASE.fullmatch(token.value):
            parts += [text[done : token.start_mark.index], f"'{token.value}'"]
            done = token.end_mark.index
    return "".join([*parts, text[done:]])


def _kind_of(schema: Any, key: str) -> Any:
    """The type of the setting `key`; None where there is none."""
    kind = schema
    for name in re.findall(r"\w+", key):
        if dataclasses.is_dataclass(kind):
            fields = _fields(kind)  # type: ignore[arg-type]
            kind = fields[name][0] if name in fields else None
        else:
            kind = get_args(kind)[0] if get_origin(kind) is list and name.isdecimal() else None
    return kind


def _given(kind: Any, text: str) -> Any:
    """What the text of an override means for a setting of type `kind`. Raises yaml's errors.

    Never a document of YAML: in one, ` #` begins a comment, and `a: b` is a key with a value.
    """
    import yaml

    if _QUOTED.fullmatch(text.strip()):
        return yaml.safe_load(text)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if kind is str or (choices and all(isinstance(choice, str) for choice in choices)):
        return text
    bare = text.strip()
    if not bare:
        return ""  # YAML's null, but mostly a variable of the shell that is not set
    if bare.startswith(("[", "{")):
        return _in_brackets(bare)
    if re.fullmatch(r"[+-]?\d+", bare):
        return int(bare)  # YAML reads 010 as 8
    loader: Any = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, bare, (True, False))
    value = loader.construct_object(yaml.ScalarNode(tag, bare))
    return value if isinstance(value, int | float | None) and ":" not in bare else bare


def _in_brackets(text: str) -> Any:
    """A list or group in YAML's flow style. Raises yaml's errors, and ValueError."""
    import yaml
    from omegaconf import OmegaConf

    text = _with_texts(text)
    node: Any = yaml.compose(text)
    if rest := text[node.end_mark.index :]:
        raise ValueError(f"found {rest.strip()!r} behind its last bracket")
    plain: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"_={text}"]))
    return plain["_"]


def _resolved(schema: type[Any], merged: Any, problems: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(merged, resolve=False)
        resolved = given = _without_resolvers(plain, "", problems)
        if "${" in repr(given):  # else to resolve nothing would take longer than all the rest
            # An interpolation may name a key that nobody has set.
            whole = OmegaConf.create(_with_defaults(schema, given))
            resolved = _only(given, OmegaConf.to_container(whole, resolve=True))
    except OmegaConfBaseException as error:
        raise SettingsError([*problems, str(error).splitlines()[0]]) from None
    assert isinstance(resolved, dict)
    return _without_empty(schema, {str(key): value for key, value in resolved.items()})


def _without_empty(schema: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, without groups and lists that have no value, such as those whose lines are
    all commented out."""
    kept, fields = {}, _fields(schema)  # type: ignore[arg-type]
    for name, value in given.items():
        kind = fields[name][0] if name in fields else None
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            kept[name] = _without_empty(kind, value)  # type: ignore[arg-type]
        elif value is not None or not (dataclasses.is_dataclass(kind) or get_origin(kind) is list):
            kept[name] = value
    return kept


def _with_defaults(kind: Any, given: Any) -> Any:
    """What was given for a setting of type `kind`, with the defaults of all that was not."""
    if get_origin(kind) is list and isinstance(given, list):
        return [_with_defaults(get_args(kind)[0], item) for item in given]
    if not dataclasses.is_dataclass(kind) or not isinstance(given, dict):
        return given
    whole = dict(given)
    for name, (of, _, is_needed) in _fields(kind).items():  # type: ignore[arg-type]
        if name in given:
            whole[name] = _with_defaults(of, given[name])
        elif not is_needed:
            whole[name] = _default(kind, name)
    return whole


def _default(schema: Any, name: str) -> Any:
    """The default of a field, as plain values."""
    (field,) = (one for one in dataclasses.fields(schema) if one.name == name)
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    value = field.default_factory()
    return to_plain(value) if dataclasses.is_dataclass(value) else value


def _only(given: Any, whole: Any) -> Any:
    """Of `whole` the keys that were given."""
    if isinstance(given, dict) and isinstance(whole, dict):
        return {key: _only(value, whole[key]) for key, value in given.items()}
    if isinstance(given, list) and isinstance(whole, list):
        return [_only(item, one) for item, one in zip(given, whole, strict=True)]
    return whole


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
            problems.append(f"{prefix}{key}: {_UNKNOWN}; {_may_mean(str(key), schema, prefix)}")
    values = {}
    for name, (kind, bounds, _) in fields.items():
        if name in raw:
            with contextlib.suppress(_WrongValueError):
                values[name] = _value(kind, raw[name], f"{prefix}{name}", bounds, problems)
    if not needed <= values.keys():
        raise _WrongValueError
    return schema(**values)


def _may_mean(key: str, schema: type[Any], prefix: str) -> str:
    """What may have been meant by an unknown key: a setting further down that has its name, as
    `steps` for `train.steps`, or else a name that is near."""
    if inside := [f"{prefix}{path}" for path in _paths(schema) if path.endswith(f".{key}")]:
        return f"did you mean {any_of(inside)}?"
    return meant(key, _fields(schema), prefix)  # type: ignore[arg-type]


def _paths(schema: type[Any]) -> Iterator[str]:
    """The keys of a schema, with dots, and of those inside it."""
    for name, (kind, _, _) in _fields(schema).items():  # type: ignore[arg-type]
        yield name
        if dataclasses.is_dataclass(kind):
            yield from (f"{name}.{path}" for path in _paths(kind))  # type: ignore[arg-type]


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
        if isinstance(raw, dict) and raw and all(str(name).isdecimal() for name in raw):
            # Overrides reach into the items of a list that the file has.
            _wrong(f"{key}: the file gives no list to change; give it whole, {key}=[...]", problems)
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
        if raw == "" and arguments[0] is not str:
            _wrong(f"{key}: expected a value, or null for none, found {raw!r}", problems)
        return None if raw is None else _value(arguments[0], raw, key, bounds, problems)
    return _scalar(kind, raw, key, bounds, problems)


def _scalar(
    kind: type[Any], raw: Any, key: str, bounds: Mapping[str, Any], problems: list[str]
) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as text; users mean the number.
    if kind is float and isinstance(raw, str):
        with contextlib.suppress(ValueError):
            raw = float(raw)
    if kind is int and isinstance(raw, str) and _ZEROS_FIRST.fullmatch(raw):
        raw = int(raw)  # an unquoted 010, which YAML 1.1 would read as 8
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw)
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        _wrong(f"{key}: expected {names[kind]}, found {raw!r}", problems)
    if kind is float and not math.isfinite(raw):
        _wrong(f"{key}: expected a finite number, found {raw!r}", problems)
    if bounds.get("path"):
        try:
            raw = at_home(raw)
        except ValueError as error:
            _wrong(f"{key}: {error}", problems)
        if "://" in raw and (wrong := credentials.refusal(raw)):
            _wrong(f"{key}: {wrong}", problems)
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
