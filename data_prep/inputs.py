"""Which files a configuration means, and what each of them is."""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from data_prep import storage
from data_prep.compression import Compression
from data_prep.config import Config, SourceConfig
from data_prep.storage import Listed, Status

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
    excluded = _matches(config, source.exclude, f"{key}.exclude", problems)
    left_out = {listed.path for matches in excluded for listed in matches}
    found: dict[str, Listed] = {}
    matched = _matches(config, source.paths, f"{key}.paths", problems)
    for index, matches in enumerate(matched):
        kept = [listed for listed in matches if listed.path not in left_out]
        place = f"{key}.paths[{index}]"
        if not kept and not any(problem.startswith(place) for problem in problems):
            base, rest = _anchored(config, source.paths[index])
            problems.append(f"{place}: no file matches {rest!r} below {base}")
        for listed in kept:
            found.setdefault(listed.path, listed)
    output = Path(os.path.realpath(config.output))
    inside = [path for path in found if output in Path(path).parents]
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
    if not Path(path).exists():
        return f"{path} is a link to nothing; mend or exclude it"
    if not Path(path).is_file():
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


def _matches(
    config: Config, patterns: list[str], key: str, problems: list[str]
) -> list[list[Listed]]:
    """The files that each pattern matches."""

    def ask(index: int) -> list[Listed] | str:
        base, rest = _anchored(config, patterns[index])
        try:
            return storage.listing(base + rest) if storage.is_url(base) else _local(base, rest)
        except OSError as error:
            return f"{key}[{index}]: {error.filename or base}: {error.strerror or error}"
        except ValueError as error:
            return f"{key}[{index}]: {base}{rest}: {error}"

    with ThreadPoolExecutor(_ASKED) as pool:
        answers = list(pool.map(ask, range(len(patterns))))
    problems += [answer for answer in answers if isinstance(answer, str)]
    return [[] if isinstance(answer, str) else answer for answer in answers]


def _local(base: str, rest: str) -> list[Listed]:
    found = []
    # Path.glob would take hidden files too.
    for name in sorted(glob.glob(rest, root_dir=base, recursive=True)):  # noqa: PTH207
        path = f"{base.rstrip('/')}/{name}" if name else base
        try:
            # One call a file: there may be very many.
            status = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:
            # A link to nothing is told of with its reason, not passed over.
            found.append(Listed(path, name, Status(0, "")))
            continue
        if not stat.S_ISDIR(status.st_mode):
            found.append(Listed(path, name, storage.local_status(status)))
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
    name = PurePosixPath(listed.relative)
    compression = _COMPRESSIONS.get(name.suffix.lower())
    inner = PurePosixPath(name.stem).suffix if compression else name.suffix
    kind = source.format
    if kind == "auto":
        kind = _FORMATS.get(inner.lower(), "text")
    return InputFile(
        source=source.name,
        path=listed.path,
        relative=listed.relative,
        format=kind,
        compression=compression,
        text_field=source.text_field,
        id_field=source.id_field,
        listed=listed.status,
        group=_group(source, listed.relative),
        separator=source.group_separator,
        max_record_bytes=source.max_record_bytes,
        max_held_bytes=source.max_held_bytes,
    )


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
