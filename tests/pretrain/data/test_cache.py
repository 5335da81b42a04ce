"""The cache of remote files: whole or absent, bounded, shared between processes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import pytest

from data_prep.dataset.shards import DataError
from pretrain.data.cache import FileCache

ROOM = 3000


class Source:
    """Files of 1,000 bytes that differ, and how often each was fetched."""

    def __init__(self, cache: FileCache) -> None:
        self.cache = cache
        self.fetched: list[int] = []
        self.broken: list[bytes] = []

    def bytes_of(self, number: int) -> bytes:
        return bytes([number]) * 1000

    def blocks(self, number: int) -> Iterator[bytes]:
        self.fetched.append(number)
        data = self.broken.pop(0) if self.broken else self.bytes_of(number)
        yield data[:300]
        yield data[300:]

    def held(self, number: int) -> ExitStack:
        stack = ExitStack()
        data = self.bytes_of(number)
        sha256 = hashlib.sha256(data).hexdigest()
        path = stack.enter_context(
            self.cache.held(f"file {number}", sha256, 1000, lambda: self.blocks(number))
        )
        assert path.read_bytes() == data
        return stack

    def path(self, number: int) -> Path:
        return self.cache.directory / hashlib.sha256(self.bytes_of(number)).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(FileCache(tmp_path / "cache", ROOM))


def names(source: Source) -> set[str]:
    return {path.name for path in source.cache.directory.iterdir()} - {"lock"}


def test_a_file_is_fetched_once_and_then_held(source: Source) -> None:
    for _ in range(3):
        with source.held(1):
            pass
    assert source.fetched == [1] and names(source) == {source.path(1).name}


def test_the_file_used_longest_ago_is_evicted_when_room_is_needed(source: Source) -> None:
    for number in (1, 2, 3, 1, 4):
        with source.held(number):
            # Times of files are as coarse as the kernel's tick.
            time.sleep(0.02)
    assert names(source) == {source.path(n).name for n in (1, 3, 4)}
    assert source.fetched == [1, 2, 3, 4]
    with source.held(2):
        pass
    assert source.fetched == [1, 2, 3, 4, 2]


def test_files_that_are_read_are_not_evicted_and_what_finds_no_room_is_refused(
    source: Source,
) -> None:
    with source.held(1), source.held(2):
        with source.held(3), pytest.raises(DataError) as refused:
            source.held(4)
        with source.held(4):  # in the place of 3
            assert names(source) == {source.path(n).name for n in (1, 2, 4)}
    assert str(refused.value) == (
        f"file 4: has 0.00 GB, for which the cache of remote data in {source.cache.directory} has "
        "no room: of its 0.00 GB, 0.00 GB are being read; raise data.cache.gigabytes"
    )


def test_a_damaged_file_is_fetched_again_by_a_process_that_has_not_checked_it(
    source: Source,
) -> None:
    with source.held(1):
        pass
    source.path(1).write_bytes(b"\0" * 1000)
    other = Source(FileCache(source.cache.directory, ROOM))
    with other.held(1):
        pass
    source.path(1).write_bytes(b"cut")
    third = Source(FileCache(source.cache.directory, ROOM))
    with third.held(1):
        pass
    assert (source.fetched, other.fetched, third.fetched) == ([1], [1], [1])


def test_bytes_of_another_digest_are_fetched_once_more_and_then_refused(source: Source) -> None:
    source.broken = [b"x" * 1000]
    with source.held(1):
        pass
    assert source.fetched == [1, 1]
    for broken, what in (
        (b"x" * 1000, "its sha256 differs"),
        (b"x" * 400, "400 of 1000 bytes"),
        (b"x" * 1200, "more than 1000 bytes"),
        (b"", "0 of 1000 bytes"),
    ):
        source.broken = [broken, broken]
        with pytest.raises(DataError, match=what):
            source.held(2)
        assert names(source) == {source.path(1).name}


def test_bytes_that_were_too_many_at_first_leave_none_behind_the_file(source: Source) -> None:
    source.broken = [b"x" * 1200]
    with source.held(1):
        assert source.path(1).stat().st_size == 1000
    assert source.fetched == [1, 1]


def test_what_fails_in_the_middle_leaves_nothing(source: Source) -> None:
    def cut() -> Iterator[bytes]:
        yield b"some"
        raise DataError("the network is gone")

    held = source.cache.held("f", hashlib.sha256(b"f").hexdigest(), 1000, cut)
    with pytest.raises(DataError, match="the network is gone"), held:
        pass
    assert names(source) == set()


def test_threads_that_want_one_file_fetch_it_once(source: Source) -> None:
    def slow() -> Iterator[bytes]:
        source.fetched.append(7)
        time.sleep(0.2)
        yield source.bytes_of(7)

    def hold() -> bytes:
        sha256 = source.path(7).name
        with source.cache.held("f", sha256, 1000, slow) as path:
            return path.read_bytes()

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(hold) for _ in range(4)]]
    assert found == [source.bytes_of(7)] * 4 and source.fetched == [7]


FETCHES = """
import sys, time
from pathlib import Path
from pretrain.data.cache import FileCache
def blocks():
    yield b"a" * 500
    print("half", flush=True)
    time.sleep(float(sys.argv[3]))
    yield b"a" * 500
with FileCache(Path(sys.argv[1]), 3000).held("f", sys.argv[2], 1000, blocks) as path:
    print("whole", path.stat().st_size, flush=True)
"""


def started(source: Source, seconds: float) -> subprocess.Popen[str]:
    sha256 = hashlib.sha256(b"a" * 1000).hexdigest()
    command = [sys.executable, "-c", FETCHES, str(source.cache.directory), sha256, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_process_killed_while_fetching_leaves_nothing_that_is_taken_for_whole(
    source: Source,
) -> None:
    with started(source, 60) as first:
        assert first.stdout is not None and first.stdout.readline() == "half\n"
        # Another one waits for it, and fetches in its place when it dies.
        with started(source, 0) as second:
            assert second.stdout is not None
            time.sleep(0.5)
            (left,) = names(source)
            assert left.endswith(".part")
            os.kill(first.pid, signal.SIGKILL)
            assert second.stdout.read() == "half\nwhole 1000\n"
    (held,) = names(source)
    assert not held.endswith(".part")


def test_the_part_of_a_killed_process_makes_room(source: Source) -> None:
    with started(source, 60) as first:
        assert first.stdout is not None and first.stdout.readline() == "half\n"
        os.kill(first.pid, signal.SIGKILL)
    with source.held(1), source.held(2), source.held(3):
        assert names(source) == {source.path(n).name for n in (1, 2, 3)}


def test_the_part_of_a_killed_process_does_not_count_where_it_is_fetched_again(
    source: Source,
) -> None:
    with started(source, 60) as first:
        assert first.stdout is not None and first.stdout.readline() == "half\n"
        os.kill(first.pid, signal.SIGKILL)
    with source.held(1), source.held(2), started(source, 0) as second:
        assert second.stdout is not None
        assert second.stdout.read() == "half\nwhole 1000\n"


def test_a_fetch_that_has_begun_counts_with_its_whole_size(source: Source) -> None:
    with started(source, 60) as first, source.held(1):
        assert first.stdout is not None and first.stdout.readline() == "half\n"
        with source.held(2), pytest.raises(DataError, match="no room"):
            source.held(3)
        first.kill()


def test_many_threads_in_little_room_read_right_bytes(source: Source) -> None:
    failed: list[str] = []

    def read(seed: int) -> None:
        for n in range(60):
            try:
                source.held((seed * 7 + n * 5) % 9).close()
            except DataError as error:  # three of four threads hold what the fourth needs
                if "no room" not in str(error):
                    failed.append(str(error))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sizes = sum(path.stat().st_size for path in source.cache.directory.iterdir())
    assert not failed and sizes <= ROOM


def test_files_of_others_in_the_directory_are_neither_evicted_nor_counted(source: Source) -> None:
    directory = source.cache.directory
    others = [directory / "thesis.tex", directory / f"{'a' * 64}.bak", directory / ("b" * 63)]
    for other in others:
        other.write_bytes(b"x" * ROOM)
    (directory / "results").mkdir()
    with source.held(1), source.held(2), source.held(3):
        pass
    with source.held(4):  # in the place of 1
        assert not source.path(1).exists()
    assert all(other.read_bytes() == b"x" * ROOM for other in others)
    assert (directory / "results").is_dir()


class Late(FileCache):
    """Another process fetches the damaged file again while this one is still hashing it."""

    def _is_sound(self, file: BinaryIO, path: Path, size: int) -> bool:
        sound = super()._is_sound(file, path, size)
        if not sound:
            self.other = Source(FileCache(self.directory, ROOM)).held(1)
        return sound


def test_what_another_process_fetched_in_place_of_a_damaged_file_is_left_there(
    source: Source,
) -> None:
    with source.held(1):
        pass
    source.path(1).write_bytes(b"\0" * 1000)
    late = Late(source.cache.directory, ROOM)
    late_source = Source(late)
    with late_source.held(1), late.other:
        # The other one still reads this path.
        assert source.path(1).read_bytes() == source.bytes_of(1)
    assert late_source.fetched == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data\.cache\.directory to another place"):
        FileCache(tmp_path / "file", ROOM)
