"""Files are whole or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from data_prep.dataset import durable, shards


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with durable.replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep/d"
    (tmp_path / "deep/d.making/killed").mkdir(parents=True)
    with durable.new_directory(path, "making") as directory:
        durable.write_bytes(directory / "f", b"new")
        assert [entry.name for entry in path.parent.iterdir()] == ["d.making"]
    assert [entry.name for entry in path.parent.iterdir()] == ["d"]
    assert [entry.name for entry in path.iterdir()] == ["f"]


def test_a_failed_block_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyError), durable.new_directory(tmp_path / "d", "making") as directory:
        durable.write_bytes(directory / "f", b"half")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_failed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    durable.write_bytes(path, b"old")
    with pytest.raises(KeyError), durable.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


# Writes half of the file named by its argument, says so, and waits.
STALLED = (
    "import pathlib, sys, time\nfrom data_prep.dataset import durable\n"
    "with durable.replacing(pathlib.Path(sys.argv[1])) as file:\n"
    "    file.write(b'half of something long'); file.flush(); print('half', flush=True)\n"
    "    sys.stdin.readline()\n"
)


@pytest.fixture
def stalled() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """`stalled(path)`: a process that has written half of the file."""
    started: list[subprocess.Popen[str]] = []

    def start(path: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", STALLED, str(path)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_rewriting_a_file_removes_what_killed_writers_of_it_left(
    tmp_path: Path, stalled: Callable[[Path], subprocess.Popen[str]]
) -> None:
    path, other = tmp_path / "f", tmp_path / "f.tmp"
    for killed in (stalled(path), stalled(path), stalled(other)):
        killed.kill()
        killed.wait()
    assert len(list(tmp_path.iterdir())) == 3 and not path.exists()
    durable.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    (left,) = {entry.name for entry in tmp_path.iterdir()} - {"f"}
    assert left.startswith("f.tmp.")  # of another file: not ours to judge


def test_a_twin_that_comes_back_cannot_replace_what_was_written_since(
    tmp_path: Path, stalled: Callable[[Path], subprocess.Popen[str]]
) -> None:
    path = tmp_path / "f"
    twin = stalled(path)
    durable.write_bytes(path, b"whole")
    _, errors = twin.communicate("go on\n")
    assert twin.returncode == 1 and "FileNotFoundError" in errors
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_two_writers_of_a_path_never_mix_their_bytes(
    tmp_path: Path, stalled: Callable[[Path], subprocess.Popen[str]]
) -> None:
    path = tmp_path / "f"
    durable.write_bytes(path, b"first")  # from here on this process knows of no leftovers
    twin = stalled(path)
    durable.write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    twin.communicate("go on\n")
    assert (twin.returncode, path.read_bytes()) == (0, b"half of something long")
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_bytes_and_names_are_synced_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    seen = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    durable.write_bytes(path, b"data")
    (temporary, before), directory = seen
    assert re.fullmatch(r"f\.[0-9a-f]{8}\.tmp", temporary) and not before
    assert directory == (tmp_path.name, True)


def test_a_file_system_that_syncs_no_directories_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, number = os.fsync, errno.EINVAL

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    durable.write_bytes(tmp_path / "f", b"data")
    assert (tmp_path / "f").read_bytes() == b"data"
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        durable.write_bytes(tmp_path / "f", b"data")


def test_equal_values_give_equal_json(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "a", {"b": 1, "a": ["\u00e9"]})
    durable.write_json(tmp_path / "b", {"a": ["\u00e9"], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"a": ["\u00e9"], "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(tmp_path / "c", float("nan"))


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "f").write_bytes(data)
    assert durable.sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_what_stands_in_the_way_of_an_output_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "scratch"
    link.symlink_to("purged")
    gone = f"cannot be made, since {link} is a link to purged, which is not there; make that"
    for path, directory, said in (
        (link, True, gone),
        (link / "run", True, gone),
        (link / "run/page.html", False, gone),
        (file / "a/b", False, f"cannot be made, since {file} is not a directory; give another"),
        (file / "a", True, f"cannot be made, since {file} is not a directory; give another place"),
        (file, True, "is a file; give a directory"),
        (tmp_path, False, "is a directory; give a file"),
    ):
        assert durable.obstacle(path, directory=directory).startswith(f"{path} {said}")
    writable = ((file, False), (link, False), (tmp_path, True), (tmp_path / "a/b", False))
    for path, directory in writable:
        assert durable.obstacle(path, directory=directory) == ""
    assert durable.obstacle(Path("a"), directory=True) == ""


def test_a_lock_that_the_file_system_does_not_have_is_said_to_be_that(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w") as file, path.open() as other:
        durable.lock(file, path, fcntl.LOCK_EX, "give another")
        with pytest.raises(BlockingIOError) as blocked:
            durable.lock(other, path, fcntl.LOCK_EX | fcntl.LOCK_NB, "give another")
        assert blocked.value.filename is None  # the system's own error
    descriptor = os.open(path, os.O_PATH)  # which cannot be locked
    with pytest.raises(
        OSError, match=r"no locks, flock \(Bad file descriptor\); give an"
    ) as caught:
        durable.lock(descriptor, path, fcntl.LOCK_EX, "give another")
    os.close(descriptor)
    assert caught.value.filename == str(path)


def test_a_url_is_no_place_for_files_that_are_written(tmp_path: Path) -> None:
    for url in ("s3://bucket/run", "gs://bucket", "memory://a/b"):
        said = durable.obstacle(Path(url), directory=True)
        assert said.startswith(f"{url} is a URL, and files are written to file systems alone")
    for path in ("a:b/c", "x/s3:/y", "c:/d"):  # a name may have a colon
        assert durable.obstacle(tmp_path / path, directory=True) == ""
    assert durable.obstacle(Path("c:/d"), directory=True) == ""


def _without_rights() -> None:
    if os.geteuid() == 0:
        os.setuid(65534)


def test_a_directory_without_permission_stands_in_the_way(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context, initializer=_without_rights) as pool:
        said = pool.submit(durable.obstacle, tmp_path / "a", directory=True).result()
        tmp_path.chmod(0o000)
        unread = [pool.submit(shards.no_directory, tmp_path / one).result() for one in ("", "a")]
    tmp_path.chmod(0o755)
    assert all(one.endswith("not readable") for one in unread), unread
    assert said.startswith(f"{tmp_path / 'a'} cannot be written, since ")
    assert said.endswith(" is not writable; give another place")


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").touch()
    with pytest.raises(OSError, match=r"not empty|Is a directory") as caught:
        durable.write_bytes(tmp_path / "a", b"x")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="No space") as caught, durable.replacing(tmp_path / "c"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "c")
