"""The input files of a configuration, and the format of each."""

from __future__ import annotations

import bisect
import itertools
import os
import re
import stat
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_prep.config import Config, SourceConfig
from data_prep.dataset.settings import MistakeError
from data_prep.dataset.wording import counted
from data_prep.sources import compression, contents, globs, storage
from data_prep.sources.compression import Compression, DamageError, Gap
from data_prep.sources.globs import Found
from data_prep.sources.storage import Listed, Status

Format = Literal["text", "jsonl", "parquet", "warc"]

_COMPRESSIONS: dict[str, Compression] = {
    **dict.fromkeys((".gz", ".gzip", ".bgz"), "gzip"),
    **dict.fromkeys((".zst", ".zstd"), "zstd"),
}
_FORMATS: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "jsonl"),
    # JSON lines, as those of C4 and Dolma: `_contradictions` refuses others.
    ".json": "jsonl",
    **dict.fromkeys((".warc", ".wet", ".wat"), "warc"),
    ".parquet": "parquet",
}
# Files of each suffix that are looked into before the run, locally and from a server.
_LOOKED_INTO, _ASKED_FOR = 16, 3
# Suffixes of plain text, or of anything.
_PLAIN = (".txt", ".text", "")
# How a parquet file begins.
_PARQUET = b"PAR1"
# Keys of a record that a message names.
_NAMED = 8


@dataclass(frozen=True)
class InputFile:
    """One input file: a local path or a URL, and the settings of its source.

    `relative` is its path below the fixed part of the glob that found it, `listed` its status at
    that time. Consecutive files of one source and `group`, if that is not empty, make one document.
    """

    config: SourceConfig
    path: str
    relative: str
    format: Format
    compression: Compression
    listed: Status = Status(0, "")
    group: str = ""
    place: tuple[int, int] | None = None
    """As of Listed."""

    @property
    def source(self) -> str:
        """The name of its source."""
        return self.config.name

    @property
    def name(self) -> str:
        """How the manifest and the rejects name the file, wherever it is stored."""
        return f"{self.source}/{self.relative}"

    @property
    def held_bytes(self) -> int:
        """Bytes of the largest record that is held in memory."""
        return min(self.config.max_record_bytes, self.config.max_held_bytes)


class InputChangedError(MistakeError):
    """An input file, its argument, has changed since the preparation of the data set began."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]}: changed since the preparation of this data set began; restore it, or "
            "start again in another output directory"
        )


def find(config: Config, problems: list[str]) -> list[InputFile]:
    """The input files in order of source, group and path; adds to `problems` what is wrong.

    Paths are in order of their characters; within a group in natural order: name by name, where
    runs of the digits 0-9 count as numbers.
    """
    if wrong := _no_root(config):
        problems.append(f"root: {wrong}; give the directory below which the sources lie")
        return []
    files: list[InputFile] = []
    for index, source in enumerate(config.sources):
        files += _of_source(config, source, f"sources[{index}]", problems)
    files.sort(key=_place)
    if not config.duplicates.wanted:
        _tell_repeats(files)
    return files


def _tell_repeats(files: list[InputFile]) -> None:
    """Tell that files are read more than once, in two sources or by several names."""
    seen: dict[object, InputFile] = {}
    again = [
        (other, file)
        for file in files
        if (other := seen.setdefault(file.place or file.path, file)) is not file
    ]
    if again:
        other, file = again[0]
        names = f"{other.path} in source {other.source} and {file.path} in source {file.source}"
        print(
            f"{counted(len(again), 'input file is', 'input files are')} read more than once, such "
            f"as {names}; if that is not meant, use `exclude`, or set duplicates.exact: true",
            file=sys.stderr,
        )


def _no_root(config: Config) -> str:
    """Why no file can be below `root`, or "", also where no path is."""
    root = Path(config.root).expanduser()
    paths = [path for source in config.sources for path in source.paths]
    base = str(root.absolute())
    is_below = any(globs.anchored(base, path)[0].startswith(base) for path in paths)
    if storage.is_url(config.root) or root.is_dir() or not is_below:
        return ""
    return f"{root} is not a directory" if root.exists() else f"{root} does not exist"


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
    names = file.relative.split("/") if file.group else []
    natural: list[list[str | int]] = [
        # Every second part is a run of digits.
        [int(part) if index % 2 else part for index, part in enumerate(re.split("([0-9]+)", name))]
        for name in names
    ]
    return file.source, file.group, natural, file.relative


def _of_source(
    config: Config, source: SourceConfig, key: str, problems: list[str]
) -> list[InputFile]:
    excluded = globs.Excluded(config.root, source.exclude)
    problems += [f"{key}.exclude: {problem}" for problem in excluded.problems]
    problems += _wrong_exclude(config, source, key, excluded)
    found = _matched(config, source, key, excluded, problems)
    unreadable = {path: wrong for path in found if (wrong := _unreadable(path))}
    problems += [f"{key}.paths: {wrong}" for wrong in unreadable.values()]
    problems += _repeated(key, found) + _linked(key, source, found)
    files = _tables([_input(source, listed) for listed in found.values()], unreadable)
    problems += _joined(key, files) + _misfits(key, source, files)
    # To open a pipe would be to wait.
    sound = [file for file in files if file.path not in unreadable]
    problems += [f"{key}.paths: {wrong}" for wrong in _contradictions(source, sound)]
    return files


def _matched(
    config: Config, source: SourceConfig, key: str, excluded: globs.Excluded, problems: list[str]
) -> dict[str, Listed]:
    """The files that the source's globs match, by path; adds to `problems` what is wrong."""
    answers = globs.matches(config.root, source.paths, excluded, config.output)
    matched = {
        one.path: one for found in answers if isinstance(found, Found) for one in found.files
    }
    paths = sorted(matched)
    for index, (pattern, found) in enumerate(zip(source.paths, answers, strict=True)):
        place = f"{key}.paths[{index}]"
        if inside := _in_output(config, pattern):
            problems.append(f"{place}: {inside}")
        elif isinstance(found, str):
            problems.append(f"{place}: {found}")
        else:
            # What is in a directory may be found by another pattern.
            missed = [
                path for path in found.directories if not found.files or _is_empty(path, paths)
            ]
            if missed:
                problems.append(f"{place}: {_is_directory(pattern, missed)}")
            elif not found.files:
                problems.append(f"{place}: {_nothing(config, source, pattern)}")
    return matched


def _nothing(config: Config, source: SourceConfig, pattern: str) -> str:
    """Why the pattern finds no file."""
    base, rest = globs.anchored(config.root, pattern)
    if source.exclude:
        (found,) = globs.matches(
            config.root, [pattern], globs.Excluded(config.root, []), config.output
        )
        if isinstance(found, Found) and found.files:
            return (
                f"`exclude` leaves out every file that matches {rest!r} below {base}, such as "
                f"{found.files[0].path}"
            )
    return f"no file matches {rest!r} below {base}{globs.spelled(config.root, pattern)}"


def _wrong_exclude(
    config: Config, source: SourceConfig, key: str, excluded: globs.Excluded
) -> list[str]:
    """Problems of globs that leave out nothing, though there is something of that name.

    Others may find nothing: what they leave out need not be on every machine.
    """
    found = []
    for index, pattern in enumerate(source.exclude):
        place = f"{key}.exclude[{index}]"
        try:
            directory = globs.directory(config.root, pattern, excluded)
        except OSError:
            continue  # it may be left out because it cannot be read
        if directory:
            found.append(f"{place}: {_is_directory(pattern, [directory])}")
        elif hint := globs.spelled(config.root, pattern):
            found.append(f"{place}: {pattern!r} leaves out nothing{hint}")
    return found


def _in_output(config: Config, pattern: str) -> str:
    """Why a glob cannot lie where the data set is written, or ""."""
    base, _ = globs.anchored(config.root, pattern)
    output = os.path.realpath(Path(config.output).expanduser())
    if storage.is_url(base) or not Path(os.path.realpath(base)).is_relative_to(output):
        return ""
    return f"{base} is in the output directory; give files outside of it, or another output"


def _is_empty(directory: str, paths: list[str]) -> bool:
    """Whether none of the sorted paths lies in the directory."""
    first = bisect.bisect_left(paths, f"{directory}/")
    return not (first < len(paths) and paths[first].startswith(f"{directory}/"))


def _is_directory(pattern: str, directories: list[str]) -> str:
    """What to give instead of a pattern that matches directories."""
    others = f" and {counted(len(directories) - 1, 'other')} are directories"
    told = others if directories[1:] else " is a directory"
    return f"{directories[0]}{told}; give {pattern.rstrip('/') + '/**'!r} for the files inside"


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
        return f"{path} is a dangling link; repair or exclude it"
    if not stat.S_ISREG(mode):
        return f"{path} is not a regular file; exclude it"
    return (
        "" if os.access(path, os.R_OK) else f"{path} cannot be read; make it readable or exclude it"
    )


def _tables(files: list[InputFile], unreadable: Collection[str]) -> list[InputFile]:
    """The files, of which df.parquet.gzip and the like may be parquet with compressed pages.

    Of each suffix the first file is looked into.
    """
    is_parquet: dict[str, bool] = {}
    found = []
    for file in files:
        stem, suffix = os.path.splitext(file.relative.lower())  # noqa: PTH122
        is_packed = suffix in _COMPRESSIONS or suffix in contents.REFUSED
        named = file.config.format == "auto" and stem.endswith(".parquet")
        if is_packed and (named or file.config.format == "parquet") and file.path not in unreadable:
            if suffix not in is_parquet:
                is_parquet[suffix] = _is_parquet(file.path)
            if is_parquet[suffix]:
                found.append(replace(file, format="parquet", compression=None))
                continue
        found.append(file)
    return found


def _is_parquet(path: str) -> bool:
    try:
        with storage.open_binary(path, len(_PARQUET)) as raw:
            return raw.read(len(_PARQUET)) == _PARQUET
    except OSError:
        return False  # reported where it is read


def _misfits(key: str, source: SourceConfig, files: list[InputFile]) -> list[str]:
    """Problems of the files' formats."""
    found = [
        f"{key}.paths: {file.path} is compressed, and parquet is not read so; decompress it"
        for file in files
        if file.format == "parquet" and file.compression
    ]
    others = [file for file in files if file.format != "text"]
    if source.group_by != "file" and others:
        found.append(
            f"{key}.group_by: joins text files, and {others[0].path} is {others[0].format}; "
            "exclude such files, or leave group_by out"
        )
    formats = sorted({file.format for file in files})
    # Where the format is set, the configuration is refused by itself.
    if source.format == "auto" and formats and not {"jsonl", "parquet"} & set(formats):
        unused = source.unused_field(" and ".join(formats))
        found += [f"{key}.{name}: {unused}" for name in source.changed_fields()]
    return found


def _contradictions(source: SourceConfig, files: list[InputFile]) -> list[str]:
    """What names or contents say against reading the files in their format, once for a suffix."""
    by_suffix: dict[str, list[InputFile]] = {}
    for file in files:
        by_suffix.setdefault(_suffix(file), []).append(file)
    found = []
    for suffix, those in sorted(by_suffix.items()):
        if wrong := _refused(source, suffix):
            more = f" and {counted(len(those) - 1, 'other')}" if len(those) > 1 else ""
            found.append(f"{those[0].path}{more}: {wrong}")
        elif wrong := _contradicted(those):
            found.append(wrong)
    return found


def _suffix(file: InputFile) -> str:
    """The suffix that tells the format; that of a compression counts where it is not read."""
    if file.format == "parquet" and file.compression is None:
        return ".parquet"
    stem, suffix = os.path.splitext(file.relative.lower())  # noqa: PTH122
    return os.path.splitext(stem)[1] if suffix in _COMPRESSIONS else suffix  # noqa: PTH122


def _refused(source: SourceConfig, suffix: str) -> str:
    """Why files of this suffix are not read, or ""."""
    if source.group_by != "file":
        return ""  # they are members of a directory of text, where each is rejected by its name
    if remedy := contents.REFUSED.get(suffix):
        return f"*{suffix} files are not read; {remedy}, or exclude ['**/*{suffix}']"
    if source.format == "auto" and (remedy := contents.TABLES.get(suffix)):
        return (
            f"*{suffix} files are no plain text; {remedy}, exclude ['**/*{suffix}'], or set "
            "format: text to take each as a text"
        )
    return ""


def _contradicted(files: list[InputFile]) -> str:
    """Which of some of these files holds what does not fit its format, and why, or ""."""
    for file in looked_into(files):
        if wrong := _misread(file):
            return f"{file.path}: {wrong}"
    return ""


def _misread(file: InputFile) -> str:
    """Why the beginning of the file does not fit its format, or ""."""
    if file.config.group_by != "file":
        return ""  # each member that is no text is rejected by its name
    try:
        if wrong := _not_packed(file):
            return wrong
        head = first_bytes(file)
    except (OSError, DamageError):
        return ""  # reported where it is read
    expected = {"parquet": "a parquet table", "warc": "a WARC archive"}.get(file.format, "")
    other = contents.binary(head)
    if other.startswith("text in "):
        return f"it is {other}; convert it to UTF-8 (iconv), or exclude it"
    if other and other != expected:
        remedy = contents.remedy(other, "rename it, set `format`, or exclude it")
        return f"it is {other}, not {file.format}; {remedy}"
    # Of the one its name is refused, of the other the beginning may be damaged.
    is_known = bool(file.compression) if file.format == "parquet" else b"WARC/" in head
    if expected and not other and not is_known and contents.is_text(head):
        return f"it is plain text, not {file.format}; rename it, set `format`, or exclude it"
    if file.config.format != "auto" or not head.strip():
        return ""
    is_lines = contents.is_json_lines(head)
    if file.format == "text" and is_lines:
        return "it is JSON lines; set format: jsonl, or format: text to take it as text"
    if is_hidden_page(file, head):
        return f"{contents.PAGE}; exclude it, or set format: text to take its tags as text"
    return _misread_json(file, head, is_lines) if _suffix(file) == ".json" else ""


def is_hidden_page(file: InputFile, head: bytes) -> bool:
    """Whether a file that begins so is an HTML page, where its name promises plain text.

    Other names may be those of source code, as `.php`; `.html` is refused by itself.
    """
    return file.format == "text" and _suffix(file) in _PLAIN and contents.is_page(head)


def _misread_json(file: InputFile, head: bytes, is_lines: bool) -> str:
    """Why the beginning of a .json file is no records with a text, or ""."""
    others = "set format: text to take it as text, or exclude it"
    if not is_lines:
        return f"it is no JSON lines (an object a line); convert it (jq -c '.[]'), {others}"
    keys, wanted = contents.keys(head), file.config.text_field
    if keys and wanted not in keys:
        found = f"have no key {wanted!r}, but {listed(keys)}"
        return f"its first records {found}; set text_field, {others}"
    return ""


def listed(names: Sequence[str]) -> str:
    """The first few names of keys or columns, for a message."""
    return ", ".join([*map(repr, names[:_NAMED]), *(["..."] if names[_NAMED:] else [])])


def _not_packed(file: InputFile) -> str:
    """Why a file is not compressed as its name says, or "": the run reports damaged data."""
    if file.compression is None:
        return ""
    with storage.open_binary(file.path, contents.HEAD_BYTES) as raw:
        head = raw.read(contents.HEAD_BYTES)
    found = contents.binary(head) or ("plain text" if contents.is_text(head) else "")
    if not found or found.startswith(file.compression):
        return ""
    remedy = contents.remedy(found, "rename or exclude it")
    return f"it is {found}, not {file.compression} data as its name says; {remedy}"


def first_bytes(
    file: InputFile, gaps: Sequence[Gap] = (), least: int = contents.HEAD_BYTES
) -> bytes:
    """The first `least` bytes of a file, if it has as many, after decompression, without its gaps.

    Some more of compressed data. Raises OSError, DamageError.
    """
    found, size = [], 0
    with storage.open_binary(file.path, least) as raw:
        if file.compression is None:
            return raw.read(least)
        for block in compression.blocks(raw, file.compression, gaps):
            found.append(block)
            size += len(block)
            if size >= least:
                break
    return b"".join(found)


def looked_into(files: Sequence[InputFile]) -> Sequence[InputFile]:
    """Some of the files, from the first on, that are looked into before a run."""
    most = _ASKED_FOR if files and storage.is_url(files[0].path) else _LOOKED_INTO
    return files[:: max(len(files) // most, 1)][:most]


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


def _joined(key: str, files: list[InputFile]) -> list[str]:
    """A problem for each group of files that globs of different directories found.

    Directories of one name in different places are different documents.
    """
    seen: dict[str, InputFile] = {}
    problems: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(file.group, file)
        if file.group and _base(other) != _base(file):
            problems[file.group] = problems.get(file.group) or (
                f"{key}.paths: {other.path} and {file.path} would be joined in one document, "
                f"called {file.group!r}, though they lie below different globs; give one glob from "
                "their common directory, or two sources"
            )
    return list(problems.values())


def _base(file: InputFile) -> str:
    """The fixed part of the glob that found the file; on the web its server."""
    if storage.is_web(file.path):
        return "/".join(file.path.split("/")[:3])
    return file.path.removesuffix(file.relative)


def _linked(key: str, source: SourceConfig, found: dict[str, Listed]) -> list[str]:
    """A problem where a directory is read twice, by way of a link; those of groups may be."""
    seen: dict[tuple[int, int], str] = {}
    pairs = [
        (other, path)
        for path, listed in found.items()
        if listed.place and (other := seen.setdefault(listed.place, path)) != path
    ]
    # A single file may have several names in a collection, such as a hard link or a link beside it.
    twice = [pair for pair in pairs if _is_directory_twice(*map(os.path.dirname, pair))]
    if not twice or source.group_by != "file":
        return []
    (other, path), more = twice[0], f", as would {counted(len(twice) - 1, 'other')}"
    return [
        f"{key}.paths: {other} and {path} are one file, which would be read twice by way of a link "
        f"to a directory{more * bool(twice[1:])}; exclude the link"
    ]


def _is_directory_twice(one: str, other: str) -> bool:
    return one != other and os.path.realpath(one) == os.path.realpath(other)


def _input(source: SourceConfig, listed: Listed) -> InputFile:
    # Not by pathlib: there may be very many files.
    stem, suffix = os.path.splitext(listed.relative.lower())  # noqa: PTH122
    packed = _COMPRESSIONS.get(suffix)
    if packed:
        _, suffix = os.path.splitext(stem)  # noqa: PTH122
    kind = _FORMATS.get(suffix, "text") if source.format == "auto" else source.format
    group = _group(source, listed.relative)
    if source.group_by != "file" and suffix == ".json":
        kind = "text"  # a member of a directory of texts, as in a repository
    return InputFile(
        source, listed.path, listed.relative, kind, packed, listed.status, group, listed.place
    )


def _group(source: SourceConfig, relative: str) -> str:
    """The directory whose files make one document; empty where the file is one alone."""
    directory, _, _ = relative.rpartition("/")
    if source.group_by == "directory":
        return directory or "."
    return directory.partition("/")[0] if source.group_by == "top" else ""


def missing_evaluation(config: Config, wrong: Collection[str]) -> list[str]:
    """What is wrong with the patterns of evaluation files, beside the mistakes in `wrong`.

    These are reported first, and files below a root that may be another one are not looked for.
    """
    if any(name in ("", "root") or name.startswith("'root=") for name in wrong):
        return []
    found = []
    for index, source in enumerate(config.sources):
        key, problems = f"sources[{index}].cleaning.decontaminate", list[str]()
        if not any(name.startswith(key) for name in wrong):
            evaluation_files(config, source, problems)
        found += [f"{key}: {problem}" for problem in problems]
    return found


def evaluation_files(config: Config, source: SourceConfig, problems: list[str]) -> dict[str, Path]:
    """The files that `source` must share no text with, by the name that the manifest gives them.

    Adds to `problems` what is wrong with the patterns.
    """
    is_remote = storage.is_url(config.root)
    root = "/" if is_remote else str(Path(config.root).expanduser().absolute())
    found: dict[str, Path] = {}
    patterns = []
    for pattern in source.cleaning.decontaminate:
        base, rest = globs.anchored(config.root if is_remote else root, pattern)
        if storage.is_url(base):
            to_do = "copy it, and give its absolute path"
            problems.append(f"{base}{rest}: evaluation files are read from local paths; {to_do}")
        else:
            patterns.append(pattern)
    answers = globs.matches(root, patterns, globs.Excluded(root, []), config.output)
    for pattern, matched in zip(patterns, answers, strict=True):
        if isinstance(matched, str):
            problems.append(matched)
        elif matched.directories:
            problems.append(_is_directory(pattern, matched.directories))
        elif not matched.files:
            problems.append(f"no file matches {pattern!r} below {root}")
        else:
            for one in matched.files:
                found[f"evaluation/{os.path.relpath(one.path, root)}"] = Path(one.path)
    return found
