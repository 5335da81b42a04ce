"""Files and directories that are whole or absent: written under a temporary name, synced, renamed.

A rename alone survives a killed process; it survives a power loss only if the file's bytes and the
directory's entry were synced first, so both are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

_URL = re.compile(r"[A-Za-z][\w+.-]+:/")
_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_listed: dict[tuple[int, Path], dict[str, list[str]]] = {}


def sha256_of(path: Path) -> str:
    """Hex sha256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make the directory's entries (names just created, renamed or removed) durable.

    Some file systems (shared folders of virtual machines, CIFS) sync files alone: there it does
    nothing.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def url_of(path: Path) -> str:
    """The URL that the path was made of, of which Path has left one slash; empty: of none."""
    return str(path).replace(":/", "://", 1) if _URL.match(str(path)) else ""


def obstacle(path: Path, *, directory: bool) -> str:
    """Why no file (or no `directory`) can be written at `path`; empty: one can.

    Directories that are missing above it do not count: they are made.
    """
    if url := url_of(path):
        return f"{url} is a URL, and files are written to file systems alone; give a path"
    at = path
    while not os.path.lexists(at):
        at = at.parent
    if at.is_symlink() and not at.exists() and (directory or at != path):
        reason = f"{at} is a link to {at.readlink()}, which is not there"
        return f"{path} cannot be made, since {reason}; make that, or give another place"
    if at == path and path.is_dir() != directory:
        found, wanted = ("file", "directory") if directory else ("directory", "file")
        return f"{path} is a {found}; give a {wanted}"
    if at == path and not directory:
        at = path.parent
    if not at.is_dir():
        return f"{path} cannot be made, since {at} is not a directory; give another place"
    if not os.access(at, os.W_OK | os.X_OK):
        return f"{path} cannot be written, since {at} is not writable; give another place"
    return ""


def lock(file: IO[Any] | int, path: Path, how: int, instead: str) -> None:
    """Lock a file that is open from `path`, as fcntl.flock does; BlockingIOError too is as there.

    Where the file system has no such locks (NFS without its lock daemon, Lustre without `-o flock`)
    the OSError says so, and what to do `instead`.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        reason = f"its file system has no locks, flock ({error.strerror}); {instead}"
        raise OSError(error.errno, reason, str(path)) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes `path`'s place, durably, when the block ends without an exception.

    The temporary name is `path` with random digits and `.tmp` appended, so that a task and its
    duplicate on a node that lost contact never write into the same file: `path` is whole, whichever
    ends last. Temporaries of `path` that existed when this process first wrote to the directory are
    of killed writers, or of such a duplicate, which then fails; they are removed with the rename.
    """
    left = _leftovers(path.parent).pop(path.name, [])
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        # A message names the file that was asked for.
        if isinstance(error, OSError):
            is_full = (error.errno, error.filename) == (errno.ENOSPC, None)
            if is_full or error.filename == str(temporary):
                error.filename = str(path)
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)
        raise
    for name in left:
        path.with_name(name).unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def new_directory(out: Path, doing: str) -> Iterator[Path]:
    """A directory that becomes `out`, durably, when the block ends without an exception.

    It is beside `out`, with `.` and `doing` appended, and is removed with an exception, as is what
    a killed process has left of it. OSError where there is a file or a full directory at
    `out`.
    """
    writing = out.with_name(f"{out.name}.{doing}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        writing.rename(out)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    sync_directory(out.parent)


def _leftovers(directory: Path) -> dict[str, list[str]]:
    """Names of temporaries by the file that each was to replace. Listed once per process."""
    key = (os.getpid(), directory.absolute())
    if key not in _listed:
        found: dict[str, list[str]] = {}
        for name in (entry.name for entry in directory.iterdir()):
            if match := _TEMPORARY.fullmatch(name):
                found.setdefault(match[1], []).append(name)
        _listed[key] = found
    return _listed[key]


def write_bytes(path: Path, data: bytes) -> None:
    """Write the whole file durably."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON durably: sorted keys, so that equal values give equal bytes.

    Without indent it takes a fifth of the time: for files that only programs read.
    """
    write_bytes(path, json_bytes(value, indent))


def json_bytes(value: Any, indent: int | None = 1) -> bytes:
    """What `write_json` writes."""
    text = json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()
