"""A bounded cache of files on a node's disk, shared by its processes without a server.

A file's name is the sha256 of its bytes, so equal shards are held once and a changed object is a
file of another name. It gets that name when its bytes have been checked, and not before: what a
killed process leaves is a `.part`, which nobody reads.

Locks (flock, which the kernel releases when a process dies): readers hold a shared one on the file
they read, and who fetches holds an exclusive one on its `.part`; only files without a lock are
evicted, those used longest ago first. The directory's own lock is held while room is made, so that
two fetches do not count on the same bytes. What else lies in the directory is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from data_prep.dataset import durable
from data_prep.dataset.shards import DataError

Fetch = Callable[[], Iterator[bytes]]
"""Returns the file's bytes from its source, in blocks; called again if their sha256 is wrong."""

_LOCK = "lock"
_PART = ".part"
_OWN = re.compile(rf"[0-9a-f]{{64}}({re.escape(_PART)})?")
_ATTEMPTS = 2


class FileCache:
    """The cache in `directory`, of at most `capacity` bytes. Safe to share between threads."""

    def __init__(self, directory: Path, capacity: int) -> None:
        self.directory = directory
        self.capacity = capacity
        self._checked: dict[str, int] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / _LOCK).open("ab") as file, contextlib.suppress(BlockingIOError):
                how, instead = fcntl.LOCK_SH | fcntl.LOCK_NB, "it belongs on a disk of the node"
                durable.lock(file, directory / _LOCK, how, instead)
        except OSError as error:
            raise DataError(
                f"{directory}: the cache of remote data cannot be written here ({error.strerror}); "
                "set data.cache.directory to another place"
            ) from None

    @contextlib.contextmanager
    def held(self, name: str, sha256: str, size: int, fetch: Fetch) -> Iterator[Path]:
        """The path of a file of `size` bytes with this digest, which is not evicted in this block.

        `name` is for messages. A file is checked when it is fetched, and by each process again
        before its first use; a damaged one is fetched anew. Raises DataError where it cannot be
        had, and what `fetch` raises.
        """
        path = self.directory / sha256
        while True:
            file = _opened(path) or self._fetched(name, path, size, fetch)
            if file is None:
                continue  # another process was fetching it
            with file:
                if self._is_sound(file, path, size):
                    os.utime(file.fileno())  # when it was used last
                    yield path
                    return
                self._discard(file, path)

    def _is_sound(self, file: BinaryIO, path: Path, size: int) -> bool:
        inode = os.fstat(file.fileno())
        if self._checked.get(path.name) != inode.st_ino:
            if inode.st_size != size or durable.sha256_of(path) != path.name:
                return False
            self._checked[path.name] = inode.st_ino
        return True

    def _discard(self, damaged: BinaryIO, path: Path) -> None:
        """Remove a damaged file, unless another process has put a good one in its place."""
        with self._locked():
            if _is_at(damaged, path):
                path.unlink()

    def _fetched(self, name: str, path: Path, size: int, fetch: Fetch) -> BinaryIO | None:
        """Fetch the file and open it; None: look again, another process has been fetching it."""
        part = path.with_name(path.name + _PART)
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_SH)  # until it is there, or its process has died
                return None
            if not _is_at(file, part):
                return None
            if path.exists():
                part.unlink()
                return None
            try:
                self._reserve(name, file, part, size)
                self._fill(name, file, path.name, size, fetch)
                with self._locked():
                    part.replace(path)
            except BaseException as error:
                part.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.filename is None:
                    raise DataError(
                        f"{name}: cannot be written to the cache of remote data in "
                        f"{self.directory} ({error.strerror}); lower data.cache.gigabytes, or set "
                        "data.cache.directory to another place"
                    ) from None
                raise
            fcntl.flock(file, fcntl.LOCK_UN)  # a lock on the file at `path`, too: it is the same
            opened = _opened(path)
            if opened is not None:
                self._checked[path.name] = os.fstat(opened.fileno()).st_ino
            return opened

    def _fill(self, name: str, file: BinaryIO, sha256: str, size: int, fetch: Fetch) -> None:
        """Write the fetched bytes, which must be those of the manifest, in place of any before."""
        for _ in range(_ATTEMPTS):
            file.seek(0)
            digest = hashlib.sha256()
            for block in fetch():
                digest.update(block)
                file.write(block)
                if file.tell() > size:
                    break
            if file.tell() == size and digest.hexdigest() == sha256:
                file.truncate()  # an attempt before may have written more
                file.flush()
                os.fsync(file.fileno())
                return
        raise DataError(
            f"{name}: is not the file that the manifest lists ({_difference(file.tell(), size)}): "
            "it was changed or damaged after the data set was written; copy the data set there "
            "again"
        )

    def _reserve(self, name: str, file: BinaryIO, part: Path, size: int) -> None:
        """Make room for `size` bytes, and let `file`, which is `part`, occupy them."""
        with self._locked():
            self._make_room(name, part, size)
            os.posix_fallocate(file.fileno(), 0, size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """In this block no other process gives a file its name, or takes it away; parts may come
        and go."""
        with (self.directory / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, name: str, part: Path, size: int) -> None:
        """Evict until `part`, whatever a killed process left of it, can have `size` bytes.

        Files that are not the cache's, by their names, neither count nor go.
        """
        entries = []
        for path in self.directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _OWN.fullmatch(path.name) and path.name != part.name:
                    entries.append((path.stat(), path))
        used = sum(found.st_size for found, _ in entries)
        for found, path in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            if used + size <= self.capacity:
                return
            if _evicted(path):
                used -= found.st_size
        if used + size > self.capacity:
            raise DataError(
                f"{name}: has {size / 1e9:.2f} GB, for which the cache of remote data in "
                f"{self.directory} has no room: of its {self.capacity / 1e9:.2f} GB, "
                f"{used / 1e9:.2f} GB are being read; raise data.cache.gigabytes"
            )


def _difference(found: int, listed: int) -> str:
    if found == listed:
        return "its sha256 differs"
    return f"{'more than' if found > listed else f'{found} of'} {listed} bytes"


def _opened(path: Path) -> BinaryIO | None:
    """The file with a shared lock, so that it is not evicted; None: there is none."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path):
            return file
        file.close()  # evicted between the two


def _evicted(path: Path) -> bool:
    """Remove a file unless somebody reads or writes it; returns whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
