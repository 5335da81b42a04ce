"""Which files a configuration means, and what each of them is."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import itertools
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.config import Config, SourceConfig
from data_prep.sources import storage
from data_prep.sources.compression import Compression
from data_prep.sources.storage import Listed, Status

Format = Literal["text", "jsonl", "parquet", "warc"]

_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_FORMATS: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".warc", ".wet", ".wat"), "warc"),
    ".parquet": "parquet",
}
_STDLIB = "{stdlib}/"
# Servers that are asked about files at once.
_ASKED = 16


@dataclass(frozen=True)
class InputFile:
    """One input file: a local path or a URL.

    `relative` is its path below the fixed part of the glob that found it, `listed` what it was
    then. Consecutive files of one source and `group`, if that is not empty, make one document.
    """

    source: str
    path: str
    relative: str
    format: Format
    compression: Compression
    text_field: str
    id_field: str
    listed: Status = Status(0, "")
    group: str = ""
    separator: str = ""
    max_record_bytes: int = 1 << 32
    max_held_bytes: int = 1 << 26
    prompt_field: str = ""
    answer_field: str = ""
    question: str = ""

    @property
    def name(self) -> str:
        """How the manifest and the rejects call the file, wherever it lies."""
        return f"{self.source}/{self.relative}"

    @property
    def held_bytes(self) -> int:
        """Bytes of the largest record that is held in memory."""
        return min(self.max_record_bytes, self.max_held_bytes)


class InputChangedError(ValueError):
    """An input file is no longer what it was when the data set was begun."""


def changed(path: str) -> InputChangedError:
    """The error that says so, and what to do."""
    return InputChangedError(
        f"{path}: changed since this data set was begun; restore it, or begin anew in another "
        "output directory"
    )


def find(config: Config, problems: list[str]) -> list[InputFile]:
    """The input files in order of source, group and path; adds to `problems` what is wrong.

    Paths are in order of their characters; within a group in natural order: name by name, where
    runs of the digits 0-9 count as numbers.
    """
    files: list[InputFile] = []
    for index, source in enumerate(config.sources):
        files += _of_source(config, source, f"sources[{index}]", problems)
    return sorted(files, key=_place)


def groups(files: Sequence[InputFile]) -> list[range]:
    """The runs of `files` that belong together: each alone, or those of a group."""
    runs, first = [], 0
    for _, members in itertools.groupby(
        enumerate(files), lambda item: (item[1].source, item[1].group or item[0])
    ):
        stop = first + sum(1 for _ in members)
        runs.append(range(first, stop))
        first = stop
    return runs


def _place(file: InputFile) -> tuple[str, str, list[list[str | int]], str]:
    natural = [_natural(name) for name in file.relative.split("/")] if file.group else []
    return file.source, file.group, natural, file.relative


def _natural(name: str) -> list[str | int]:
    """Text and numbers in turn."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _of_source(
    config: Config, source: SourceConfig, key: str, problems: list[str]
) -> list[InputFile]:
    excluded = _Excluded(config, source.exclude, f"{key}.exclude", problems)
    found: dict[str, Listed] = {}
    matched = _matches(config, source.paths, f"{key}.paths", problems, excluded)
    for index, matches in enumerate(matched):
        kept = [listed for listed in matches if not excluded.holds(listed.path)]
        place = f"{key}.paths[{index}]"
        if not kept and not any(problem.startswith(place) for problem in problems):
            base, rest = _anchored(config, source.paths[index])
            problems.append(f"{place}: no file matches {rest!r} below {base}")
        for listed in kept:
            found.setdefault(listed.path, listed)
    output = os.path.realpath(config.output).rstrip("/") + "/"
    inside = [path for path in found if path.startswith(output)]
    if inside:
        problems.append(f"{key}.paths: matches {inside[0]}, which lies in the output directory")
    problems += [f"{key}.paths: {wrong}" for path in found if (wrong := _unreadable(path))]
    problems += _repeated(key, found)
    files = [_input(source, listed) for listed in found.values()]
    problems += _misfits(key, source, files)
    return files


def _unreadable(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"{path!r} is not a name in UTF-8; rename or exclude it"
    if storage.is_url(path):
        return ""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except FileNotFoundError:
        return f"{path} is a link to nothing; mend or exclude it"
    if not stat.S_ISREG(mode):
        return f"{path} is no regular file; exclude it"
    return "" if os.access(path, os.R_OK) else f"{path} cannot be read"


def _misfits(key: str, source: SourceConfig, files: list[InputFile]) -> list[str]:
    """What the files' formats do not allow."""
    found = [
        f"{key}.paths: {file.path} is a compressed parquet file; decompress it"
        for file in files
        if file.format == "parquet" and file.compression
    ]
    others = [file for file in files if file.format != "text"]
    if source.group_by != "file" and others:
        found.append(
            f"{key}.group_by: joins text files, and {others[0].path} is {others[0].format}"
        )
    return found


def _repeated(key: str, found: dict[str, Listed]) -> list[str]:
    seen: dict[str, str] = {}
    problems = []
    for path, listed in found.items():
        other = seen.setdefault(listed.relative, path)
        if other != path:
            problems.append(
                f"{key}.paths: {other} and {path} are both called {listed.relative!r}; give one "
                "glob from their common directory, or two sources"
            )
    return problems


class _Excluded:
    """What a source's `exclude` leaves out, known from a path alone: local globs are not expanded.

    A glob is a row of names to match. What is left of each below a directory is kept for its files.
    """

    def __init__(self, config: Config, patterns: list[str], key: str, problems: list[str]) -> None:
        self._begin: dict[str, set[tuple[str, ...]]] = {}
        urls = []
        for pattern in patterns:
            base, rest = _anchored(config, pattern)
            if storage.is_url(base):
                urls.append(pattern)
            else:
                self._begin.setdefault(base.rstrip("/"), set()).add(_names(rest))
        # By directory; "" is the root.
        self._left = {"": frozenset(self._begin.get("", ()))}
        listed = itertools.chain(*_matches(config, urls, key, problems, self))
        self._urls = {found.path for found in listed}

    def holds(self, path: str) -> bool:
        """Whether the file is left out."""
        if storage.is_url(path):
            return path in self._urls
        directory, _, name = path.rpartition("/")
        return any(_is_last(name, rest) for rest in self._at(directory))

    def holds_all_below(self, directory: str) -> bool:
        """Whether all that globs find in the directory is left out, but for hidden names."""
        return ("**",) in self._at(directory)

    def _at(self, directory: str) -> frozenset[tuple[str, ...]]:
        """What the globs still ask for below a directory."""
        if directory not in self._left:
            parent, _, name = directory.rpartition("/")
            left = set(self._begin.get(directory, ()))
            left.update(*(_after(name, rest) for rest in self._at(parent)))
            self._left[directory] = frozenset(left)
        return self._left[directory]


def _after(name: str, pattern: tuple[str, ...]) -> set[tuple[str, ...]]:
    """What a glob still asks for below a directory; nothing where its name does not match."""
    if not pattern:
        return set()
    first, *rest = pattern
    if first == "**":
        left = _after(name, tuple(rest))
        return left if name.startswith(".") else {*left, pattern}
    return {tuple(rest)} if _is_match(name, first) else set()


def _is_last(name: str, pattern: tuple[str, ...]) -> bool:
    """Whether a file of this name is what a glob still asks for."""
    if len(pattern) > 1:
        return pattern[0] == "**" and _is_last(name, pattern[1:])
    return bool(pattern) and _is_match(name, pattern[0])


def _is_match(name: str, pattern: str) -> bool:
    """As `glob` sees a name: a wildcard does not match the dot of a hidden one."""
    if not glob.has_magic(pattern):
        return name == pattern
    hidden = name.startswith(".") and not pattern.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name, pattern)


def _names(pattern: str) -> tuple[str, ...]:
    """The names of a glob; a last, empty one asks for a directory, and so for no file."""
    *names, last = pattern.split("/")
    return (*(name for name in names if name), last)


def _matches(
    config: Config, patterns: list[str], key: str, problems: list[str], excluded: _Excluded
) -> list[list[Listed]]:
    """The files that each pattern matches, without those in directories that are left out."""

    def ask(index: int) -> list[Listed] | str:
        base, rest = _anchored(config, patterns[index])
        try:
            if storage.is_url(base):
                return storage.listing(base + rest)
            return _local(base.rstrip("/"), _names(rest), excluded)
        except OSError as error:
            return f"{key}[{index}]: {error.filename or base}: {error.strerror or error}"
        except ValueError as error:
            return f"{key}[{index}]: {base}{rest}: {error}"

    with ThreadPoolExecutor(_ASKED) as pool:
        answers = list(pool.map(ask, range(len(patterns))))
    problems += [answer for answer in answers if isinstance(answer, str)]
    return [[] if isinstance(answer, str) else answer for answer in answers]


def _local(base: str, names: tuple[str, ...], excluded: _Excluded) -> list[Listed]:
    # Who asks for hidden names may get some that no `**` leaves out.
    pruned = None if any(name.startswith(".") for name in names) else excluded
    found = []
    for path in sorted(set(_walk(base, names, pruned))):
        relative = path[len(base) + 1 :]
        try:
            # One call a file: there may be very many.
            status = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:
            # A link to nothing is told of with its reason, not passed over.
            found.append(Listed(path, relative, Status(0, "")))
            continue
        if not stat.S_ISDIR(status.st_mode):
            found.append(Listed(path, relative, storage.local_status(status)))
    return found


def _walk(directory: str, names: tuple[str, ...], pruned: _Excluded | None) -> Iterator[str]:
    """What `glob.glob` finds, some of it several times, but for directories that are left out.

    glob itself would walk through all that is left out, and look for files in each file.
    """
    first, *rest = names
    if not glob.has_magic(first):
        path = f"{directory}/{first}"
        if rest:
            yield from _walk(path, tuple(rest), pruned)
        elif first and os.path.lexists(path):
            yield path
        return
    if pruned and pruned.holds_all_below(directory):
        return
    if first == "**" and rest:
        yield from _walk(directory, tuple(rest), pruned)
    for name, is_directory in _entries(directory):
        path = f"{directory}/{name}"
        if not _is_match(name, first):
            continue
        if not rest and not (first == "**" and is_directory):
            yield path
        elif is_directory:
            yield from _walk(path, names if first == "**" else tuple(rest), pruned)


def _entries(directory: str) -> list[tuple[str, bool]]:
    """Names in a directory and whether each is one; none of what cannot be listed, as in glob."""
    found = []
    with contextlib.suppress(OSError), os.scandir(directory or "/") as entries:
        for entry in entries:
            is_directory = False
            with contextlib.suppress(OSError):
                is_directory = entry.is_dir()
            found.append((entry.name, is_directory))
    return found


def _anchored(config: Config, pattern: str) -> tuple[str, str]:
    """The pattern's directory or URL up to its first wildcard, and what follows."""
    if storage.is_url(config.root) and not pattern.startswith(("/", "~", _STDLIB)):
        pattern = pattern if storage.is_url(pattern) else f"{config.root.rstrip('/')}/{pattern}"
    if storage.is_url(pattern):
        server, _, path = pattern.partition("://")
        names = path.split("/")
        fixed = len(list(itertools.takewhile(lambda name: not glob.has_magic(name), names[:-1])))
        return f"{server}://{''.join(f'{name}/' for name in names[:fixed])}", "/".join(
            names[fixed:]
        )
    base = Path(config.root).expanduser().absolute()
    if pattern.startswith(_STDLIB):
        base, pattern = Path(sysconfig.get_path("stdlib")), pattern.removeprefix(_STDLIB)
    elif pattern.startswith(("/", "~")):
        base, pattern = Path("/"), str(Path(pattern).expanduser()).lstrip("/")
    parts = pattern.split("/")
    while len(parts) > 1 and not glob.has_magic(parts[0]):
        base /= parts.pop(0)
    return os.path.normpath(base), "/".join(parts)


def _input(source: SourceConfig, listed: Listed) -> InputFile:
    name = listed.relative.rpartition("/")[2]
    compression = _COMPRESSIONS.get(_suffix(name))
    kind = source.format
    if kind == "auto":
        inner = name.rpartition(".")[0] if compression else name
        kind = _FORMATS.get(_suffix(inner), "text")
    return InputFile(
        source=source.name,
        path=listed.path,
        relative=listed.relative,
        format=kind,
        compression=compression,
        text_field=source.text_field,
        id_field=source.id_field,
        prompt_field=source.prompt_field,
        answer_field=source.answer_field,
        question=source.question,
        listed=listed.status,
        group=_group(source, listed.relative),
        separator=source.group_separator,
        max_record_bytes=source.max_record_bytes,
        max_held_bytes=source.max_held_bytes,
    )


def _suffix(name: str) -> str:
    """As pathlib's, in lower case: a hidden name is not all suffix."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem and suffix else ""


def _group(source: SourceConfig, relative: str) -> str:
    """The directory whose files make one document; empty where the file is one alone."""
    directory, _, _ = relative.rpartition("/")
    if source.group_by == "directory":
        return directory or "."
    return directory.partition("/")[0] if source.group_by == "top" else ""


def evaluation_files(config: Config, source: SourceConfig) -> dict[str, Path]:
    """The files that `source` must share no text with, by the name that the manifest gives them."""
    root = Path(config.root).expanduser().absolute()
    found = {}
    for pattern in source.cleaning.decontaminate:
        whole = str(root / Path(pattern).expanduser())
        for name in sorted(glob.glob(whole, recursive=True)):  # noqa: PTH207
            found[f"evaluation/{os.path.relpath(name, root)}"] = Path(name)
    return found
