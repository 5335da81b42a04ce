"""Disks that fail: without power, so that what was not synced may be gone, or at any call.

A killed process leaves the page cache, so a kill shows nothing of this. Here the calls that change
directories or sync are observed (and carried out), and before each of them the disk that a power
loss could leave can be built: of every file its synced bytes, of every directory its synced
entries, or, by the toss of a coin, the newer ones that happened to reach the disk.
"""

from __future__ import annotations

import builtins
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHANGES = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


class Disk:
    """What of the tree under `base` is durable, kept by observing fsync."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.files: dict[int, bytes] = {}
        self.directories: dict[int, dict[str, int]] = {base.stat().st_ino: {}}
        self._held: list[int] = []

    def synced(self, descriptor: int) -> None:
        """Note what an fsync of the descriptor has made durable."""
        self._held.append(os.dup(descriptor))  # so that its inode number is not given away again
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            names = os.listdir(descriptor)
            self.directories[status.st_ino] = {
                name: os.stat(name, dir_fd=descriptor).st_ino for name in names
            }
        else:
            self.files[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def after_power_loss(self, target: Path, reaches_disk: Callable[[], bool]) -> None:
        """Build the tree that is left; `reaches_disk` decides for each thing not yet synced."""
        files, directories = dict(self.files), dict(self.directories)
        for path in sorted([self.base, *self.base.rglob("*")]):
            inode = path.stat().st_ino
            if path.is_dir():
                directories.setdefault(inode, {})
                if reaches_disk():
                    directories[inode] = {e.name: e.stat().st_ino for e in path.iterdir()}
            else:
                files.setdefault(inode, b"")
                if reaches_disk():
                    files[inode] = path.read_bytes()

        def build(inode: int, place: Path) -> None:
            if inode in directories:
                place.mkdir()
                for name, child in directories[inode].items():
                    build(child, place / name)
            else:
                place.write_bytes(files.get(inode, b""))

        build(self.base.stat().st_ino, target)

    def close(self) -> None:
        """Let the files go whose inode numbers were held."""
        for descriptor in self._held:
            os.close(descriptor)


Before = Callable[[Disk, str, tuple[Any, ...]], None]


@contextmanager
def observed(base: Path, before: Before) -> Iterator[Disk]:
    """A block in which `before(disk, call, arguments)` precedes each change below `base`."""
    disk, quiet = Disk(base), False
    real = {name: getattr(os, name) for name in CHANGES}

    def observing(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal quiet
            if quiet:
                return real[name](*arguments, **named)
            quiet = True
            try:
                before(disk, name, arguments)
                result = real[name](*arguments, **named)
                if name == "fsync":
                    disk.synced(arguments[0])
            finally:
                quiet = False
            return result

        return call

    try:
        for name in CHANGES:
            setattr(os, name, observing(name))
        yield disk
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        disk.close()


FALLIBLE = (*CHANGES, "open", "scandir", "listdir", "stat")
"""Functions of `os` at which `failing` counts, beside those of open files."""


class _Failing:
    """A file open for writing, whose calls are counted."""

    def __init__(self, file: Any, count: Callable[[str, object], None], name: object) -> None:
        self._file, self._count, self._name = file, count, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """Write, unless it is this call's turn to fail."""
        self._count("write", self._name)
        return int(self._file.write(data))


@contextmanager
def failing(base: Path, index: int, number: int) -> Iterator[list[str]]:
    """A block in which call `index` to the file system below `base` fails with this errno.

    Gives the list of what failed: one call, or none where there are fewer calls.
    """
    failed: list[str] = []
    left = index
    real = {name: getattr(os, name) for name in FALLIBLE}
    real_open = io.open

    def count(call: str, where: object) -> None:
        nonlocal left
        text = str(where)
        inside = isinstance(where, int) or text.startswith(str(base))
        if inside:
            left -= 1
            if left == -1:
                failed.append(f"{call} {Path(text).name}")
                unnamed = call == "write" or isinstance(where, int)
                raise OSError(number, os.strerror(number), None if unnamed else text)

    def counted(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            count(name, arguments[0] if arguments else "")
            return real[name](*arguments, **named)

        return call

    def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        made = real_open(file, mode, *more, **named)
        return _Failing(made, count, file) if set(mode) & set("wxa+") else made

    try:
        for name in FALLIBLE:
            setattr(os, name, counted(name))
        io.open = builtins.open = opened
        yield failed
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        io.open = builtins.open = real_open
