"""Command lines from dataclasses: the fields of a command are its arguments and options.

Parser, help and checks come from the fields, so that an option is described in one place. All
mistakes of a command line are found before it runs and reported in one message.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import math
import operator
import os
import select
import shutil
import sys
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from data_prep.dataset import durable, shards
from data_prep.dataset.settings import MistakeError, SettingsError, at_home
from data_prep.dataset.wording import any_of, meant

_DISTRIBUTION = "infini-pretrain"
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell gives it


class CommandError(MistakeError):
    """A command line that cannot run; `problems` holds every mistake, one sentence each."""

    def __init__(self, command: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(cannot_run(command, self.problems))


def cannot_run(command: str, problems: Iterable[str]) -> str:
    """The message that lists every mistake of a command."""
    return "\n".join([f"{command}: this command cannot run:", *(f"  - {one}" for one in problems)])


class Kind(NamedTuple):
    """How text becomes a value: `read` raises ValueError or KeyError for what is not expected.

    `refusal` says why a value cannot be used; empty: it can.
    """

    expected: str
    read: Callable[[str], Any]
    show: Callable[[Any], str] = str
    refusal: Callable[[Any], str] = lambda value: ""


def one_of(names: Iterable[str]) -> Kind:
    """The kind of text that is one of `names`."""
    known = {name: name for name in names}
    return Kind(f"one of {', '.join(known)}", known.__getitem__)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


_SIZES = {"m": 2**20, "k": 2**10}


def _tokens(text: str) -> int:
    size = _SIZES.get(text[-1:].lower())
    return int(text) if size is None else int(text[:-1]) * size


def _short(tokens: int) -> str:
    fitting = (f"{tokens // size}{unit}" for unit, size in _SIZES.items() if tokens % size == 0)
    return next(fitting, str(tokens))


def _path(text: str) -> Path:
    return Path(at_home(text))  # a shell leaves the ~ in --output=~/x as it is


def path_kind(refusal: Callable[[Path], str]) -> Kind:
    """The kind of a path that `refusal` has no reason to refuse."""
    return Kind("a path", _path, refusal=refusal)


DIRECTORY = path_kind(shards.no_directory)
DATA_SET = path_kind(shards.no_data_set)


def file_to_write(*ends: str) -> Kind:
    """The kind of a file that can be written, with a name that says what is written there."""

    def refusal(path: Path) -> str:
        reason = durable.obstacle(path, directory=False)
        if reason or path.name.endswith(ends):
            return reason
        return f"{path}: expected a name that ends in {any_of(ends)}, which is what is written"

    return path_kind(refusal)


TOKENS = Kind("tokens as 4096, 32k or 1m", _tokens, _short)
_KINDS = {
    int: Kind("a whole number", int),
    float: Kind("a number", _finite, "{:g}".format),
    str: Kind("text", str),
    Path: Kind("a path", _path),
}


@dataclass(frozen=True)
class Option:
    """An option of a command, or an argument if it is `positional`, with the field that it sets.

    The bounds `low` and `high` are closed, `above` is open. A list is given separated by commas,
    or as several `words` behind one option, or by the option given `again`; `unique` refuses equal
    items; `check` says what is wrong with all of them together, a sentence each that begins with
    what it is about. `otherwise` is shown in the help in place of the default. Of this option and
    the one that it is `instead_of`, only one may be given.
    """

    doc: str
    default: Any
    positional: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    kind: Kind | None = None
    many: Literal["commas", "words", "again"] = "commas"
    unique: bool = False
    check: Callable[[Any], list[str]] | None = None
    metavar: str = ""
    otherwise: str = ""
    instead_of: str = ""
    # Of the field; the type is that of one item.
    name: str = ""
    type: Any = str
    is_list: bool = False

    @property
    def label(self) -> str:
        """As messages name it."""
        return self.metavar or self.name if self.positional else _dashed(self.name)

    @property
    def reader(self) -> Kind:
        """How its text is read."""
        if get_origin(self.type) is Literal:
            return one_of(get_args(self.type))
        return self.kind or _KINDS[self.type]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add it to a parser, which passes its text on unread."""
        more: dict[str, Any] = {} if self.positional else {"required": self.default is MISSING}
        if self.type is bool:
            more["action"] = "store_true"
        else:
            more["metavar"] = self._metavar()
        if self.is_list and self.many == "again":
            more["action"] = "append"
        elif self.is_list and (self.positional or self.many == "words"):
            more["nargs"] = "+" if self.default is MISSING else "*"
        name = self.name if self.positional else _dashed(self.name)
        parser.add_argument(name, help=self._help(), default=argparse.SUPPRESS, **more)

    def _metavar(self) -> str:
        if self.metavar or self.positional:
            return self.metavar or self.name
        if get_origin(self.type) is Literal:
            return f"{{{','.join(get_args(self.type))}}}"
        letter = {int: "N", float: "X", Path: "PATH"}.get(self.type, self.name.upper())
        return f"{letter},..." if self.is_list and self.many == "commas" else letter

    def _help(self) -> str:
        end = ""
        if self.otherwise:
            end = f" (default: {self.otherwise})"
        elif self.default not in (MISSING, None, "", []) and self.default is not False:
            items = self.default if self.is_list else [self.default]
            end = f" (default {','.join(map(self.reader.show, items))})"
        return f"{self.doc}{end}".replace("%", "%%")

    def value(self, given: Any, problems: list[str]) -> Any:
        """The value of the text given, None where it is wrong; mistakes are added to `problems`."""
        if self.type is bool:
            return given
        if self.is_list and isinstance(given, str):
            given = given.split(",")
        texts, items, wrong = given if self.is_list else [given], [], []
        for text in texts:
            try:
                item = self.reader.read(text)
            except (ValueError, KeyError):
                wrong.append(f"expected {self.reader.expected}, found {text!r}")
                continue
            if refusal := self.reader.refusal(item):
                wrong.append(refusal)
                continue
            items.append(item)
            wrong += self._out_of_bounds(item, text)
        twice = [one for one in dict.fromkeys(items) if self.unique and items.count(one) > 1]
        wrong += [f"{self.reader.show(one)} is given twice" for one in twice]
        problems += [f"{self.label}: {text}" for text in wrong]
        problems += self.check(items) if self.check and not wrong else []
        if len(items) < len(texts):
            return None
        return items if self.is_list else items[0]

    def _out_of_bounds(self, value: Any, text: str) -> list[str]:
        limits = (
            ("at least", self.low, operator.ge),
            ("more than", self.above, operator.gt),
            ("at most", self.high, operator.le),
        )
        if all(bound is None or holds(value, bound) for _, bound, holds in limits):
            return []
        wanted = [f"{words} {bound:g}" for words, bound, _ in limits if bound is not None]
        return [f"expected {' and '.join(wanted)}, found {text}"]


def option(default: Any, doc: str, **about: Any) -> Any:
    """A field that is given as --its-name; `MISSING` as default: it must be given. See Option."""
    metadata = {"option": Option(doc, default, **about)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def word(doc: str, default: Any = MISSING, **about: Any) -> Any:
    """A field that is given by its place. A list takes all arguments that are left; see Option."""
    return option(default, doc, positional=True, **about)


class Command(ABC):
    """A command. A subclass becomes a frozen dataclass of its `word` and `option` fields.

    The first paragraph of its docstring is its line in the list of commands; its own help shows
    all of it.
    """

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def epilog(cls) -> str:
        """The end of its help."""
        return ""

    def problems(self) -> list[str]:
        """Every mistake that no field has by itself, one sentence each."""
        return []

    @abstractmethod
    def run(self) -> int:
        """Run the command; the exit code."""


class Configured(Command):
    """A command on a configuration, which is checked together with the command line."""

    config: Path = word("YAML file with what differs from the defaults", metavar="CONFIG")
    overrides: list[str] = word("overrides of the file's values", [], metavar="key=value")

    @property
    @abstractmethod
    def wanted(self) -> Any:
        """The configuration. Raises SettingsError."""

    def problems(self) -> list[str]:
        """Every mistake in the configuration."""
        try:
            _ = self.wanted
        except SettingsError as error:
            return error.problems
        return []


class Program(NamedTuple):
    """Commands by name: `train`, or after the name of their group, `eval passkey`."""

    name: str
    about: str
    commands: Mapping[str, type[Command]]
    groups: Mapping[str, str]
    epilog: str = ""


def parse(program: Program, arguments: Sequence[str] | None = None) -> tuple[str, Command]:
    """The full name of a command line's command, and the command; None: the process's arguments.

    From here on stdout escapes what it cannot encode, as stderr does: where it is Latin-1, say, or
    of a file's name that is not UTF-8.
    Raises CommandError with every mistake. Ends the process where help was asked for.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        given, rest = _parser(program).parse_known_args(arguments)
    except SystemExit:
        flush()
        raise
    if "_command" not in given:
        raise CommandError(given._prog, [given._missing])
    schema = program.commands[given._command]
    options = _options(schema)
    problems = _left_over(rest, given, schema, options)
    values = _values(vars(given), options, problems)
    if all(one.name in values for one in options if one.default is MISSING):
        made = schema(**values)
        # What is said of a wrong value, or of the default in its place, would mislead.
        wrong = [text.partition(":")[0] for text in problems]
        problems += [text for text in made.problems() if not any(label in text for label in wrong)]
        if not problems:
            return given._prog, made
    raise CommandError(given._prog, problems)


def _options(schema: type[Command]) -> list[Option]:
    """The option of each field; those that must be given are first."""
    hints, found = get_type_hints(schema), []
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        kind = hints[field.name]
        is_list = get_origin(kind) is list
        if is_list or NoneType in get_args(kind):
            kind = next(one for one in get_args(kind) if one is not NoneType)
        about = field.metadata["option"]
        found.append(dataclasses.replace(about, name=field.name, type=kind, is_list=is_list))
    return sorted(found, key=lambda one: one.default is not MISSING)


def _left_over(
    rest: Sequence[str],
    given: argparse.Namespace,
    schema: type[Command],
    options: list[Option],
) -> list[str]:
    """Give arguments that follow an option to the list they belong to; what is unknown."""
    known = [one.label for one in options if not one.positional]
    unknown = []
    for text in (text for text in rest if text.startswith("-")):
        hints = [meant(text.partition("=")[0], known)] if known else []
        if issubclass(schema, Configured) and not any(hint.endswith("?") for hint in hints):
            hints.insert(0, "settings are given without dashes, as key=value")
        unknown.append("; ".join([f"{text}: unknown option", *hints]))
    if unknown or not rest:
        return unknown
    last = next((one.name for one in options if one.positional and one.is_list), None)
    if last is None:
        return [f"{text!r}: unexpected argument; this command takes no more" for text in rest]
    # argparse takes no further items of a list once an option has come between.
    setattr(given, last, [*getattr(given, last, []), *rest])
    return []


def _values(given: Mapping[str, Any], options: list[Option], problems: list[str]) -> dict[str, Any]:
    """The values given that are right, by field; what is wrong goes into `problems`."""
    values = {}
    for one in options:
        if one.instead_of in given and one.name in given:
            both = f"{one.label}, {_dashed(one.instead_of)}"
            problems.append(f"{both}: both are given; give one of the two")
        elif one.name in given:
            values[one.name] = one.value(given[one.name], problems)
        elif one.default is MISSING:
            problems.append(f"{one.label}: not given; expected the {one.doc}")
    return {name: value for name, value in values.items() if value is not None}


class _Parser(argparse.ArgumentParser):
    """A parser that raises CommandError."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(self.prog, [message.removeprefix("argument ")])

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            self.error(f"{action.metavar}: there is no {value!r}; {meant(value, action.choices)}")


class _Version(argparse.Action):
    """Prints the version. What is not installed has none: a checkout on PYTHONPATH."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            found = metadata.version(_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            found = "of a checkout that is not installed"
        print(f"{parser.prog} {found}")
        parser.exit()


def _parser(program: Program) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = _Parser(program.name, description=_filled(program.about), formatter_class=raw)
    top.epilog = program.epilog
    top.add_argument("--version", action=_Version, help="show the version and end")
    groups: dict[str, argparse.ArgumentParser] = {"": top}
    places: dict[str, Any] = {"": top.add_subparsers(metavar="COMMAND")}

    def added(group: str, verb: str, doc: str, epilog: str = "") -> argparse.ArgumentParser:
        line = " ".join(doc.partition("\n\n")[0].split()).rstrip(".").replace("%", "%%")
        about = {"help": line[:1].lower() + line[1:], "description": _filled(doc)}
        made: argparse.ArgumentParser = places[group].add_parser(
            verb, epilog=epilog, formatter_class=raw, **about
        )
        return made

    for name, schema in program.commands.items():
        group, _, verb = name.rpartition(" ")
        if group not in places:
            groups[group] = added("", group, program.groups[group])
            places[group] = groups[group].add_subparsers(metavar="KIND")
        parser = added(group, verb, inspect.cleandoc(schema.__doc__ or ""), schema.epilog())
        parser.set_defaults(_command=name, _prog=parser.prog)
        for one in _options(schema):
            one.add_to(parser)
        # Shown as required, and reported by `parse` where missing, with all other mistakes.
        parser.usage = parser.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%")
        for action in parser._actions:
            action.required = False
    for group, place in places.items():
        missing = f"{place.metavar}: not given; expected one of {', '.join(place.choices)}"
        groups[group].set_defaults(_prog=groups[group].prog, _missing=missing)
    return top


def _filled(text: str) -> str:
    """Text filled to the terminal's width, paragraph by paragraph."""
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(textwrap.fill(one, width) for one in text.split("\n\n"))


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flush() -> None:
    """Flush stdout and stderr; where that fails, redirect the stream to /dev/null.

    Otherwise the interpreter would flush again as it exits, and exit with 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(message: object) -> None:
    """Print on stderr, if there still is one: the terminal may be gone, or its disk full."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        flush()


def is_closed_pipe(error: Exception) -> bool:
    """Whether an error means that stdout has no reader any more; what is left of it is dropped."""
    if not isinstance(error, OSError):
        return False
    poll = select.poll()
    poll.register(1, 0)  # of events, those that cannot be masked: errors
    has_no_reader = bool(poll.poll(0))
    flush()
    return isinstance(error, BrokenPipeError) and has_no_reader


def explained(error: OSError) -> str:
    """An OSError as text: the file, where there is one, and what is wrong."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
