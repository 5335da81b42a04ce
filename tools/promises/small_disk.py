"""A real file system of a few MiB that only one forked process sees: Linux's tmpfs, in a mount
namespace of its own, where the machine allows one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.promises.campaign import BrokenError, UnavailableError

BYTES, INODES = 4 << 20, 256

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
_PRIVATE = (1 << 18) | (1 << 14)  # MS_PRIVATE | MS_REC
_UNAVAILABLE, _BROKEN = 2, 1


def on_a_small_disk(here: Path, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `work(directory)` returns in a forked process, with the file system at `directory`.

    Raises UnavailableError where no file system may be mounted, and BrokenError with what the
    process raised.
    """
    disk, said = here / "small", here / "said"
    disk.mkdir()
    child = os.fork()
    if child == 0:
        _child(disk, said, work)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = said.read_text() if said.exists() else f"the process ended with {code}"
    if code == _UNAVAILABLE:
        raise UnavailableError(text)
    if code:
        raise BrokenError(text)
    found: dict[str, Any] = json.loads(text)
    return found


def filled(disk: Path, free_bytes: int) -> Path:
    """A file that leaves so many bytes, in whole pages; remove it to make room."""
    ballast = disk / "ballast"
    status = os.statvfs(disk)
    left = status.f_bavail * status.f_frsize
    with ballast.open("wb") as file:
        file.write(bytes(max(0, left - free_bytes)))
    return ballast


def without_inodes(disk: Path, free: int) -> list[Path]:
    """Empty files that leave room for so many new files and directories."""
    files = [disk / f"empty-{number}" for number in range(os.statvfs(disk).f_favail - free)]
    for path in files:
        path.touch()
    return files


def _child(disk: Path, said: Path, work: Callable[[Path], dict[str, Any]]) -> None:
    code = _BROKEN
    try:
        try:
            _mount(disk)
        except OSError as error:
            code = _UNAVAILABLE
            said.write_text(f"no file system can be mounted here: {error}")
        else:
            said.write_text(json.dumps(work(disk)))
            code = 0
    except BaseException:
        said.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _mount(disk: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    _called(libc.unshare, _NEW_MOUNTS | (_NEW_USER if user else 0))
    if user:
        # Root in a namespace of users, which most systems allow, may mount a tmpfs there.
        with contextlib.suppress(FileNotFoundError):
            Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _called(libc.mount, b"none", b"/", None, ctypes.c_ulong(_PRIVATE), None)
    size = f"size={BYTES},nr_inodes={INODES}".encode()
    _called(libc.mount, b"none", os.fsencode(disk), b"tmpfs", ctypes.c_ulong(0), size)


def _called(function: Any, *arguments: Any) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno() or errno.EPERM
        raise OSError(number, os.strerror(number))
