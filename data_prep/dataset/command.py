"""Command lines from dataclasses: the fields of a command are its words and its options.

Parser, help and checks come from the fields, so that an option is described in one place. All
mistakes of a command line are found before it runs and reported in one message.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import select
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

EXIT_MISTAKE = 2
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE, as a shell gives it


class CommandError(ValueError):
    """A command line that cannot run; `problems` holds every mistake, one sentence each."""

    def __init__(self, command: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(cannot_run(command, self.problems))


def cannot_run(command: str, problems: Iterable[str]) -> str:
    """The message that lists every mistake of a command."""
    return "\n".join([f"{command}: this command cannot run:", *(f"  - {one}" for one in problems)])


class Kind(NamedTuple):
    """How a word becomes a value: `read` raises ValueError for what is not as `expected`."""

    expected: str
    read: Callable[[str], Any]
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class About:
    """What a field of a command says of its word or option.

    The bounds `low` and `high` are closed, `above` is open. A list is given separated by commas,
    or as several `words` behind one option, or by the option given `again`; `unique` refuses equal
    items. `otherwise` is shown in the help in place of the default. Of this option and the
    one that it is `instead_of`, one alone may be given.
    """

    doc: str
    positional: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    kind: Kind | None = None
    many: Literal["commas", "words", "again"] = "commas"
    unique: bool = False
    metavar: str | None = None
    otherwise: str = ""
    instead_of: str = ""


def option(default: Any, doc: str, **about: Any) -> Any:
    """A field that is given as --its-name; `MISSING` as default: it must be given. See About."""
    return _field(default, About(doc, **about))


def word(doc: str, default: Any = MISSING, **about: Any) -> Any:
    """A field that is given by its place. A list takes all words that are left; see About."""
    return _field(default, About(doc, positional=True, **about))


def _field(default: Any, about: About) -> Any:
    metadata = {"about": about}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Command:
    """A command: a frozen dataclass of `word` and `option` fields.

    The first paragraph of its docstring is its line in the list of commands; its own help shows
    all of it.
    """

    @classmethod
    def epilog(cls) -> str:
        """What stands at the end of its help."""
        return ""

    def problems(self) -> list[str]:
        """Every mistake that no field has by itself, one sentence each."""
        return []

    def run(self) -> int:
        """Do it; the exit code."""
        raise NotImplementedError


@dataclass(frozen=True)
class Program:
    """A program of several commands, by name: `train`, or with a group before it `eval passkey`."""

    name: str
    about: str
    commands: Mapping[str, type[Command]]
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    epilog: str = ""


def one_of(names: Iterable[str]) -> Kind:
    """The kind of a word that is one of `names`."""
    known = list(names)

    def read(text: str) -> str:
        if text not in known:
            raise ValueError
        return text

    return Kind(f"one of {', '.join(known)}", read)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise ValueError
    return Path(text)


_SIZES = {"m": 2**20, "k": 2**10}


def _tokens(text: str) -> int:
    size = _SIZES.get(text[-1:].lower())
    return int(text) if size is None else int(text[:-1]) * size


def _short(tokens: int) -> str:
    """The shortest that `_tokens` reads as this number."""
    fitting = (f"{tokens // size}{unit}" for unit, size in _SIZES.items() if tokens % size == 0)
    return next(fitting, str(tokens))


DIRECTORY = Kind("a directory", _directory)
TOKENS = Kind("tokens as 4096, 32k or 1m", _tokens, _short)

_KINDS = {
    int: Kind("a whole number", int),
    float: Kind("a number", _finite, "{:g}".format),
    str: Kind("text", str),
    Path: Kind("a path", Path),
}


@dataclass(frozen=True)
class _Field:
    """A field as the command line has it."""

    name: str
    about: About
    type: Any  # of the value, or of one item
    is_list: bool
    default: Any

    @property
    def label(self) -> str:
        """As messages name it."""
        return self.about.metavar or self.name if self.about.positional else self.option

    @property
    def option(self) -> str:
        """`--its-name`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def kind(self) -> Kind:
        """How its words are read."""
        if get_origin(self.type) is Literal:
            return one_of(get_args(self.type))
        return self.about.kind or _KINDS[self.type]

    def help(self) -> str:
        """Its meaning and its default."""
        about, default = self.about, self.default
        if about.otherwise:
            return f"{about.doc} (default: {about.otherwise})"
        if default in (MISSING, None, "") or default is False or default == []:
            return about.doc
        items = default if self.is_list else [default]
        return f"{about.doc} (default {','.join(self.kind.show(item) for item in items)})"

    def value(self, given: Any, problems: list[str]) -> Any:
        """The value of the words given, None where one cannot be read; mistakes to `problems`."""
        if self.type is bool:
            return given
        texts = [given] if isinstance(given, str) else given
        if self.is_list and self.about.many == "commas" and not self.about.positional:
            texts = given.split(",")
        items = [self._item(text, problems) for text in texts]
        if self.about.unique:
            twice = [
                one for one in dict.fromkeys(items) if one is not None and items.count(one) > 1
            ]
            problems += [f"{self.label}: {self.kind.show(one)} is given twice" for one in twice]
        if None in items:
            return None
        return items if self.is_list else items[0]

    def _item(self, text: str, problems: list[str]) -> Any:
        kind, about = self.kind, self.about
        try:
            value = kind.read(text)
        except ValueError:
            problems.append(f"{self.label}: expected {kind.expected}, found {text!r}")
            return None
        over = about.low is not None and value < about.low
        over = over or (about.above is not None and value <= about.above)
        if over or (about.high is not None and value > about.high):
            problems.append(f"{self.label}: expected {_bounds(about)}, found {text}")
        return value


def _bounds(about: About) -> str:
    """`at least 1`, `more than 0 and at most 1`."""
    bounds = {"at least": about.low, "more than": about.above, "at most": about.high}
    return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)


def _fields(schema: type[Command]) -> list[_Field]:
    hints, found = get_type_hints(schema), []
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        kind, default = hints[field.name], field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        is_list = get_origin(kind) is list
        if is_list:
            (kind,) = get_args(kind)
        elif NoneType in get_args(kind):
            (kind,) = (one for one in get_args(kind) if one is not NoneType)
        found.append(_Field(field.name, field.metadata["about"], kind, is_list, default))
    return sorted(found, key=lambda one: one.default is not MISSING)  # what must be given is first


class _Parser(argparse.ArgumentParser):
    """A parser that raises CommandError."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(self.prog, [message.removeprefix("argument ")])


def _paragraphs(text: str) -> str:
    """Text filled to the terminal's width, paragraph by paragraph; lines set in are left alone."""
    width = shutil.get_terminal_size().columns - 2
    return "\n\n".join(textwrap.fill(one, width) for one in text.split("\n\n"))


def _parser(program: Program) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = _Parser(
        prog=program.name, description=_paragraphs(program.about), epilog=program.epilog,
        formatter_class=raw,
    )  # fmt: skip
    places = {"": top.add_subparsers(required=True, metavar="COMMAND")}
    for name, schema in program.commands.items():
        group, _, verb = name.rpartition(" ")
        if group not in places:
            about = program.groups[group]
            inner = places[""].add_parser(
                group, help=_line(about), description=_paragraphs(about), formatter_class=raw
            )
            places[group] = inner.add_subparsers(required=True, metavar="KIND")
        about = inspect.cleandoc(schema.__doc__ or "")
        parser = places[group].add_parser(
            verb, help=_line(about), description=_paragraphs(about), epilog=schema.epilog(),
            formatter_class=raw,
        )  # fmt: skip
        parser.set_defaults(_command=name, _prog=parser.prog)
        _add_fields(parser, _fields(schema))
    return top


def _line(about: str) -> str:
    """A command's line in the list of commands: its first paragraph, as a phrase."""
    first = " ".join(about.partition("\n\n")[0].split()).rstrip(".").replace("%", "%%")
    return first[:1].lower() + first[1:]


def _add_fields(parser: argparse.ArgumentParser, fields: Sequence[_Field]) -> None:
    required = []
    for field in fields:
        about = field.about
        more: dict[str, Any] = {"help": field.help().replace("%", "%%")}
        if field.type is bool:
            more["action"] = "store_true"
        else:
            more["metavar"] = _metavar(field)
        if field.is_list and about.many == "again":
            more["action"] = "append"
        elif field.is_list and (about.positional or about.many == "words"):
            more["nargs"] = "+" if field.default is MISSING else "*"
        names = [field.name] if about.positional else [field.option]
        if not about.positional:
            more["required"] = field.default is MISSING
        action = parser.add_argument(*names, default=argparse.SUPPRESS, **more)
        if action.required:
            required.append(action)
    # What is missing is reported here, together with all other mistakes.
    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip().replace("%", "%%")
    for action in required:
        action.required = False


def _metavar(field: _Field) -> str:
    if field.about.metavar or field.about.positional:
        return field.about.metavar or field.name
    if get_origin(field.type) is Literal:
        return f"{{{','.join(get_args(field.type))}}}"
    letter = {int: "N", float: "X", Path: "PATH"}.get(field.type, field.name.upper())
    return f"{letter},..." if field.is_list and field.about.many == "commas" else letter


def parse(program: Program, words: Sequence[str] | None = None) -> tuple[str, Command]:
    """The full name of a command line's command, and the command; None: the process's own words.

    Raises CommandError with every mistake. Ends the process where help was asked for.
    """
    try:
        given, rest = _parser(program).parse_known_args(words)
    except SystemExit:
        flush()
        raise
    schema, fields = program.commands[given._command], _fields(program.commands[given._command])
    problems = _left_over(rest, given, fields)
    values, wrong = _values(vars(given), fields, problems)
    if all(field.name in values for field in fields if field.default is MISSING):
        made = schema(**values)
        # What is said of a wrong value, or of the default in its place, would mislead.
        problems += [
            one for one in made.problems() if not any(field.label in one for field in wrong)
        ]
        if not problems:
            return given._prog, made
    raise CommandError(given._prog, problems)


def _left_over(
    rest: Sequence[str], given: argparse.Namespace, fields: Sequence[_Field]
) -> list[str]:
    """Give words that follow an option to the list they belong to; what is unknown."""
    # argparse takes no further words of a list once an option has come between.
    last = next((field for field in fields if field.about.positional and field.is_list), None)
    known = [field.option for field in fields if not field.about.positional]
    unknown = []
    for text in (text for text in rest if text.startswith("-")):
        near = difflib.get_close_matches(text.partition("=")[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
        unknown.append(f"{text}: unknown option; {hint}")
    if unknown or not rest:
        return unknown
    if last is None:
        return [f"{text!r}: unexpected, all words of this command are given" for text in rest]
    setattr(given, last.name, [*getattr(given, last.name, []), *rest])
    return []


def _values(
    given: Mapping[str, Any], fields: Sequence[_Field], problems: list[str]
) -> tuple[dict[str, Any], list[_Field]]:
    """The values given, by field, and the fields that are wrong; why goes into `problems`."""
    values: dict[str, Any] = {}
    wrong = []
    for field in fields:
        before = len(problems)
        if field.about.instead_of in given and field.name in given:
            other = field.about.instead_of.replace("_", "-")
            problems.append(f"{field.option}, --{other}: both are given; give one of the two")
        elif field.name in given:
            values[field.name] = field.value(given[field.name], problems)
        elif field.default is MISSING:
            problems.append(f"{field.label}: not given; expected the {field.about.doc}")
        if len(problems) > before:
            wrong.append(field)
    return {name: value for name, value in values.items() if value is not None}, wrong


def flush() -> None:
    """Write out what was printed. Where that fails, stdout leads nowhere from here on.

    Otherwise the interpreter would try again as it ends, and end with an error of its own.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_closed_pipe(error: Exception) -> bool:
    """Whether an error means that nobody reads stdout any more; what is left of it is dropped."""
    if not isinstance(error, OSError):
        return False
    poll = select.poll()
    poll.register(1, 0)  # of events, those that cannot be masked: errors
    has_no_reader = bool(poll.poll(0))
    flush()
    return isinstance(error, BrokenPipeError) and has_no_reader


def explained(error: OSError) -> str:
    """An error of the system as a sentence: the file, where there is one, and what is wrong."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
