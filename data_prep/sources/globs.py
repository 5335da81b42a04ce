"""The files that patterns match, except those that other patterns exclude.

A pattern is a row of names, as for `glob.glob` with `recursive=True`: a wildcard stays within a
name and does not match the dot of a hidden one, `**` crosses directories.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import itertools
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.sources import storage
from data_prep.sources.storage import Listed, Status

Names = tuple[str, ...]
_Place = tuple[int, int]

_STDLIB = "{stdlib}/"
# Servers that are asked about files at once.
_ASKED = 16
# What remains of a pattern that a directory's name matches: it may end in a slash.
_ENDS: set[Names] = {(), ("",)}


@dataclass(frozen=True)
class Found:
    """The files that a pattern matches, and the directories, in which it takes nothing.

    Of a pattern that ends in `*`, `**` or `*.*` directories are not meant, and not told; nor is an
    empty one.
    """

    files: list[Listed] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)


def anchored(root: str, pattern: str) -> tuple[str, str]:
    """The pattern's directory or URL up to its first wildcard, and the rest of it."""
    is_local = pattern.startswith(("/", "~", _STDLIB))
    if storage.is_url(root) and not is_local and not storage.is_url(pattern):
        pattern = f"{root.rstrip('/')}/{pattern}"
    if is_url := storage.is_url(pattern):
        server, _, pattern = pattern.partition("://")
        base = f"{server}://"
    elif pattern.startswith(_STDLIB):
        base, pattern = sysconfig.get_path("stdlib"), pattern.removeprefix(_STDLIB)
    elif is_local:
        base, pattern = "/", str(Path(pattern).expanduser()).lstrip("/")
    else:
        base = str(Path(root).expanduser().absolute())
    names = pattern.split("/")
    fixed = [*itertools.takewhile(lambda name: not glob.has_magic(name), names[:-1])]
    rest = "/".join(names[len(fixed) :])
    if is_url:
        return base + "".join(f"{name}/" for name in fixed), rest
    return os.path.normpath(Path(base, *fixed)), rest


class Excluded:
    """What a source excludes, decided by a path alone: local globs are not expanded.

    Of each glob, the names that remain to be matched below a directory are cached by directory.
    """

    def __init__(self, root: str, patterns: Sequence[str]) -> None:
        self._begin: dict[str, set[Names]] = {}
        urls = []
        for pattern in patterns:
            base, rest = anchored(root, pattern)
            if storage.is_url(base):
                urls.append(pattern)
            else:
                self._begin.setdefault(base.rstrip("/"), set()).add(_names(rest))
        # By directory; "" is the root.
        self._left = {"": frozenset(self._begin.get("", ()))}
        self._urls: set[str] = set()
        answers = matches(root, urls, self)
        self.problems = [answer for answer in answers if isinstance(answer, str)]
        self._urls = {
            one.path for found in answers if isinstance(found, Found) for one in found.files
        }

    def holds(self, path: str) -> bool:
        """Whether the file is left out."""
        if storage.is_url(path):
            return path in self._urls
        directory, _, name = path.rpartition("/")
        return any(() in _after(name, left) for left in self._at(directory))

    def holds_all_below(self, directory: str) -> bool:
        """Whether all that globs find in the directory is left out, except hidden names."""
        return ("**",) in self._at(directory)

    def _at(self, directory: str) -> frozenset[Names]:
        """What remains of the globs below a directory."""
        if directory not in self._left:
            parent, _, name = directory.rpartition("/")
            left = set(self._begin.get(directory, ()))
            left.update(*(_after(name, rest) for rest in self._at(parent)))
            self._left[directory] = frozenset(left)
        return self._left[directory]


def matches(
    root: str, patterns: Sequence[str], excluded: Excluded, output: str = ""
) -> list[Found | str]:
    """What each pattern matches and `excluded` does not hold, or why that is unknown.

    Directories that are left out as a whole are not read, and nothing is found in `output`,
    whatever a run has left there.
    """
    own = _place(os.path.realpath(Path(output).expanduser())) if output else None

    def ask(pattern: str) -> Found | str:
        base, rest = anchored(root, pattern)
        try:
            if not storage.is_url(base):
                return _local(base.rstrip("/"), _names(rest), excluded, own)
            if storage.is_web(base):
                found = Found([storage.page(base + rest)])
            else:
                found = _remote(base, rest)
            return Found(
                [one for one in found.files if not excluded.holds(one.path)], found.directories
            )
        except OSError as error:
            remedy = "" if storage.is_url(base) else "; repair it, make it readable, or exclude it"
            return f"{error.filename or base}: {error.strerror or error}{remedy}"
        except ValueError as error:
            return f"{base}{rest}: {error}"

    with ThreadPoolExecutor(_ASKED) as pool:
        return list(pool.map(ask, patterns))


def directory(root: str, pattern: str, excluded: Excluded) -> str:
    """A directory that the local pattern matches, where it matches no file; empty: there is none.

    Not one that is left out, or empty.
    """
    base, rest = anchored(root, pattern)
    names, found = _names(rest), ""
    if storage.is_url(base) or not _is_named(names):
        return ""
    if names == ("",):
        return base if _kind(base) and not excluded.holds_all_below(base) else ""
    for path, is_directory in _walk(base.rstrip("/"), {names}, excluded, (), None):
        if not is_directory:
            return ""
        if not found and not excluded.holds_all_below(path) and _holds_files(path):
            found = path
    return found


def spelled(root: str, pattern: str) -> str:
    """How to give the first name with a wildcard where a file or directory is called so, or ""."""
    base, rest = anchored(root, pattern)
    name = rest.split("/")[0]
    if storage.is_url(base) or fnmatch.fnmatchcase(name, name):
        return ""
    if not os.path.lexists(Path(base, name)):
        return ""
    return f"; give {glob.escape(name)!r} for the name {name!r}, which has the signs of a wildcard"


def _names(pattern: str) -> Names:
    """The names of a glob; an empty last one asks for a directory, and so for no file."""
    *names, last = pattern.split("/")
    return (*(name for name in names if name), last)


def _after(name: str, pattern: Names) -> set[Names]:
    """What remains of a glob after a file's or directory's name; () where it is matched."""
    if not pattern:
        return set()
    first, rest = pattern[0], pattern[1:]
    if first != "**":
        hidden = name.startswith(".") and not first.startswith(".")
        return {rest} if not hidden and fnmatch.fnmatchcase(name, first) else set()
    left = _after(name, rest)
    if name.startswith("."):
        return left
    return {*left, pattern} if rest else {(), pattern}


def _remote(base: str, pattern: str) -> Found:
    """What matches the pattern below a URL. Raises as `storage.entries` does."""
    if not pattern:
        return Found([], [base.rstrip("/")] if storage.entries(base) else [])
    found, directories, open_ = list[Listed](), list[str](), [(base, "", {_names(pattern)})]
    while open_:
        url, relative, left = open_.pop()
        crosses = any(names[0] == "**" for names in left)
        for path, name, status in storage.entries(url, below=crosses):
            after = left
            for step in name.split("/"):
                after = {rest for names in after for rest in _after(step, names)}
            if status is not None and () in after:
                found.append(Listed(path, relative + name, status))
            elif status is None:
                if after & _ENDS:
                    directories.append(path)
                if after - {()}:
                    open_.append((path, f"{relative}{name}/", after - {()}))
    found.sort(key=lambda one: one.path)
    return Found(found, sorted(directories) if _is_named(_names(pattern)) else [])


def _is_named(names: Names) -> bool:
    """Whether a directory that matches was meant: the last name is more than `*`, `**`, `*.*`."""
    return bool(next((name for name in reversed(names) if name), "/").strip("*."))


def _local(base: str, names: Names, excluded: Excluded, output: _Place | None) -> Found:
    # Patterns for hidden names may match some that no `**` leaves out.
    pruned = None if any(name.startswith(".") for name in names) else excluded
    found, directories, is_named = list[Listed](), list[str](), _is_named(names)
    if names == ("",) and _kind(base) and _holds_files(base):
        directories.append(base)
    for path, is_directory in sorted(_walk(base, {names}, pruned, (), output)):
        if excluded.holds(path):
            continue
        if is_directory:
            if is_named and not excluded.holds_all_below(path) and _holds_files(path):
                directories.append(path)
            continue
        try:
            # One call per file: there may be very many.
            state = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:
            # A dangling link is reported with its reason, not passed over.
            found.append(Listed(path, path[len(base) + 1 :], Status(0, "")))
            continue
        place = state.st_dev, state.st_ino
        found.append(Listed(path, path[len(base) + 1 :], storage.local_status(state), place))
    return Found(found, directories)


def _holds_files(directory: str) -> bool:
    return any(files for _, _, files in os.walk(directory))


def _walk(
    directory: str,
    left: set[Names],
    pruned: Excluded | None,
    above: tuple[_Place, ...],
    output: _Place | None,
) -> Iterator[tuple[str, bool]]:
    """What matches one of `left` and whether it is a directory, except in those left out.

    glob itself would walk through all that is left out, and look for files in each file. `above`
    are the directories on the way: `**` does not follow a link back to one of them. `output` is
    not entered.
    """
    if pruned and pruned.holds_all_below(directory):
        return
    way = (*above, here) if (here := _place(directory)) else above
    for name, is_directory in _entries(directory, left):
        path = f"{directory}/{name}"
        after = {rest for names in left for rest in _after(name, names)}
        if not is_directory and () in after:
            yield path, False
        elif is_directory and after:
            if (place := _place(path)) and place == output:
                continue
            if after & _ENDS:
                yield path, True
            if place in way:
                after = {
                    rest for names in left if names[:1] != ("**",) for rest in _after(name, names)
                }
            if after - {()}:
                yield from _walk(path, after - {()}, pruned, way, output)


def _place(directory: str) -> _Place | None:
    """What tells a directory from others, whatever its path; None where it is missing."""
    try:
        found = os.stat(directory or "/")  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _entries(directory: str, left: set[Names]) -> list[tuple[str, bool]]:
    """Names in a directory and whether each is one; none where there is no such directory.

    Raises OSError where it cannot be listed: what it holds would be missing in silence.
    """
    first = {names[0] for names in left}
    if not any(map(glob.has_magic, first)):
        names = [name for name in first if name]
        return [
            (name, kind) for name in names if (kind := _kind(f"{directory}/{name}")) is not None
        ]
    try:
        with os.scandir(directory or "/") as entries:
            return [(entry.name, _is_directory(entry)) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether it is one, also by way of a link; a link that leads nowhere or to itself is not."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _kind(path: str) -> bool | None:
    """Whether the path is a directory; None where there is nothing."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False
