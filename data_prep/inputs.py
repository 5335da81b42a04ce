"""Which files a configuration means, and what each of them is."""

from __future__ import annotations

import glob
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.config import Config, SourceConfig

_COMPRESSIONS: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".zst": "zstd"}
_JSONL = (".jsonl", ".ndjson")
_STDLIB = "{stdlib}/"


@dataclass(frozen=True)
class InputFile:
    """One input file. `relative` is its path below the fixed part of the glob that found it."""

    source: str
    path: Path
    relative: str
    format: Literal["text", "jsonl"]
    compression: Literal["gzip", "zstd"] | None
    text_field: str
    id_field: str

    @property
    def name(self) -> str:
        """How the manifest and the rejects call the file, wherever it lies."""
        return f"{self.source}/{self.relative}"


class InputChangedError(ValueError):
    """An input file is no longer what it was when the data set was begun."""


def changed(path: Path) -> InputChangedError:
    """The error that says so, and what to do."""
    return InputChangedError(
        f"{path}: changed since this data set was begun; restore it, or begin anew in another "
        "output directory"
    )


def find(config: Config, problems: list[str]) -> list[InputFile]:
    """The input files in order of source and relative path; adds to `problems` what is wrong."""
    files: list[InputFile] = []
    for index, source in enumerate(config.sources):
        files += _of_source(config, source, f"sources[{index}]", problems)
    return sorted(files, key=lambda file: (file.source, file.relative))


def _of_source(
    config: Config, source: SourceConfig, key: str, problems: list[str]
) -> list[InputFile]:
    left_out = {path for pattern in source.exclude for path, _ in _matches(config, pattern)}
    found: dict[Path, str] = {}
    for index, pattern in enumerate(source.paths):
        matches = [match for match in _matches(config, pattern) if match[0] not in left_out]
        if not matches:
            base, rest = _anchored(config, pattern)
            problems.append(f"{key}.paths[{index}]: no file matches {rest!r} below {base}")
        for path, relative in matches:
            found.setdefault(path, relative)
    output = Path(os.path.realpath(config.output))
    inside = [path for path in found if output in path.parents]
    if inside:
        problems.append(f"{key}.paths: matches {inside[0]}, which lies in the output directory")
    problems += [
        f"{key}.paths: {path} cannot be read" for path in found if not os.access(path, os.R_OK)
    ]
    problems += _repeated(key, found)
    return [_input(source, path, relative) for path, relative in found.items()]


def _repeated(key: str, found: dict[Path, str]) -> list[str]:
    seen: dict[str, Path] = {}
    problems = []
    for path, relative in found.items():
        other = seen.setdefault(relative, path)
        if other != path:
            problems.append(
                f"{key}.paths: {other} and {path} are both called {relative!r}; give one glob "
                "from their common directory, or two sources"
            )
    return problems


def _matches(config: Config, pattern: str) -> list[tuple[Path, str]]:
    """(absolute path, path below the glob's fixed directory) of each file."""
    base, rest = _anchored(config, pattern)
    # Path.glob would take hidden files too.
    names = glob.glob(rest, root_dir=base, recursive=True)  # noqa: PTH207
    return [(base / name, name) for name in sorted(names) if (base / name).is_file()]


def _anchored(config: Config, pattern: str) -> tuple[Path, str]:
    """The pattern's directory up to its first wildcard, and what follows."""
    base = Path(config.root).expanduser().absolute()
    if pattern.startswith(_STDLIB):
        base, pattern = Path(sysconfig.get_path("stdlib")), pattern.removeprefix(_STDLIB)
    elif pattern.startswith(("/", "~")):
        base, pattern = Path("/"), str(Path(pattern).expanduser()).lstrip("/")
    parts = pattern.split("/")
    while len(parts) > 1 and not glob.has_magic(parts[0]):
        base /= parts.pop(0)
    return Path(os.path.normpath(base)), "/".join(parts)


def _input(source: SourceConfig, path: Path, relative: str) -> InputFile:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    inner = path.with_suffix("") if compression else path
    kind = source.format
    if kind == "auto":
        kind = "jsonl" if inner.suffix.lower() in _JSONL else "text"
    return InputFile(
        source.name, path, relative, kind, compression, source.text_field, source.id_field
    )


def evaluation_files(config: Config, source: SourceConfig) -> dict[str, Path]:
    """The files that `source` must share no text with, by the name that the manifest gives them."""
    root = Path(config.root).expanduser().absolute()
    found = {}
    for pattern in source.cleaning.decontaminate:
        whole = str(root / Path(pattern).expanduser())
        for name in sorted(glob.glob(whole, recursive=True)):  # noqa: PTH207
            found[f"evaluation/{os.path.relpath(name, root)}"] = Path(name)
    return found
