import itertools
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.dataset import shards
from data_prep.dataset.shards import DataError
from pretrain.config.data import Weight
from pretrain.data.lanes import Dataset, Lane, LanePlace, Mix, SourcePlace
from pretrain.data.loader import Batch, Loader

LANES = 4
LENGTH = 48
SEED = 11
STEPS = 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, write_data_set: Any) -> Path:
    """9 shards for 4 lanes: lanes have 2 or 3 shards an epoch, of unequal lengths."""
    random = np.random.default_rng(0)
    documents = [random.integers(3, 1000, size) for size in random.integers(0, 90, 50)]
    path = tmp_path_factory.mktemp("data") / "set"
    write_data_set(path, documents, 9, 1000)
    return path


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[Batch]:
    """The batches of all lanes, made by the lanes themselves, one window at a time."""
    lanes = [Lane(Mix([Dataset(directory)]), index, LANES, SEED) for index in range(LANES)]
    batches = []
    for _ in range(STEPS):
        tokens, targets, starts, _ = zip(*(lane.window(LENGTH) for lane in lanes), strict=True)
        stacked = [torch.from_numpy(np.stack(part)) for part in (tokens, targets, starts)]
        batches.append(Batch(*stacked, weights=None, places=[lane.place for lane in lanes]))
    epochs = [[place.sources[0].epoch for place in batch.places] for batch in batches]
    assert min(epochs[-1]) >= 2, "three epochs and more"
    assert any(len(set(each)) > 1 for each in epochs), "that lanes end at different times"
    return batches


def load(
    directory: Path,
    lanes: range = range(LANES),
    places: list[LanePlace] | None = None,
    prefetch: int = 2,
    workers: int = 1,
) -> Loader:
    return Loader(Mix([Dataset(directory)]), lanes, LANES, LENGTH, SEED, places, prefetch, workers)


def assert_equal(batch: Batch, expected: Batch, lanes: range = range(LANES)) -> None:
    rows = slice(lanes.start, lanes.stop)
    assert torch.equal(batch.tokens, expected.tokens[rows])
    assert torch.equal(batch.targets, expected.targets[rows])
    assert torch.equal(batch.starts, expected.starts[rows])
    assert batch.places == expected.places[rows]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert wait_for(lambda: not threads())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 7), (2, 1), (3, 2), (9, 4)])
def test_batches_are_equal_for_any_number_of_ranks_workers_and_batches_ahead(
    directory: Path, expected: list[Batch], ranks: int, workers: int, prefetch: int
) -> None:
    for rank in range(ranks):
        share = LANES // ranks
        own = range(rank * share, (rank + 1) * share)
        with load(directory, own, None, prefetch, workers) as loader:
            for batch, whole in zip(loader, expected, strict=False):
                assert_equal(batch, whole, own)


def test_a_batch_is_int64_and_bool_on_the_cpu(directory: Path) -> None:
    with load(directory) as loader:
        batch = next(loader)
    for tensor, dtype in zip(
        (batch.tokens, batch.targets, batch.starts),
        (torch.int64, torch.int64, torch.bool),
        strict=True,
    ):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((LANES, LENGTH), dtype, "cpu")


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (4, 1)])
def test_an_interruption_after_any_step_loses_and_repeats_nothing(
    directory: Path, expected: list[Batch], ranks: int, workers: int
) -> None:
    share = LANES // ranks
    for step, interrupted in enumerate(expected[:-3]):
        rank = step % ranks
        own = range(rank * share, (rank + 1) * share)
        places = interrupted.places[own.start : own.stop]
        with load(directory, own, places, 3, workers) as loader:
            for later in range(step + 1, step + 4):
                assert_equal(next(loader), expected[later], own)


# A damaged shard: what is done to it, by a name, as a function of its whole bytes.
Damage = Callable[[bytes], bytes | None]


def cut_at(size: int) -> Damage:
    return lambda whole: whole[:size]


def flip(offset: int, bit: int) -> Damage:
    def flipped(whole: bytes) -> bytes:
        data = bytearray(whole)
        data[offset] ^= 1 << bit
        return bytes(data)

    return flipped


def damages(path: Path) -> Iterator[tuple[str, Damage]]:
    """Every kind of damage to this shard, some at many places."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    last = members[-1]
    ends = [member.offset for member in members[1:]]
    ends.append(last.offset_data + 512 * -(-last.size // 512))
    for end in ends:
        yield f"cut at the member boundary {end}", cut_at(end)
    for member in members:
        middle = member.offset_data + member.size // 2
        yield f"cut in the data of {member.name}", cut_at(middle)
        yield f"cut in the header of {member.name}", cut_at(member.offset + 300)
        yield f"flipped name of {member.name}", flip(member.offset + 7, 0)
        yield f"flipped size of {member.name}", flip(member.offset + 134, 1)
        yield f"flipped checksum of {member.name}", flip(member.offset + 150, 2)
        yield f"flipped data bit of {member.name}", flip(middle, 3)
    yield "empty", cut_at(0)
    yield "missing", lambda whole: None
    yield "a byte too long", lambda whole: whole + b"\0"


def assert_refused(directory: Path, names: set[str], expected: list[Batch]) -> None:
    """`verify` names every shard; the loader stops at one, after whole and right batches only."""
    problems = shards.verify(directory)
    assert {Path(problem.partition(":")[0]).name for problem in problems} == names
    with load(directory, prefetch=1) as loader, pytest.raises(DataError) as raised:
        for whole in expected:
            assert_equal(next(loader), whole)
    message = str(raised.value)
    assert any(message.startswith(f"{directory / name}: ") for name in names)
    assert "\n" not in message and "data-prep verify" in message


@pytest.mark.parametrize("index", [0, 4, 8])
def test_a_damaged_shard_stops_the_loader_by_name_and_is_never_shorter(
    tmp_path: Path, directory: Path, expected: list[Batch], index: int
) -> None:
    for source in directory.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    path = tmp_path / f"shard-{index:05d}.tar"
    whole = path.read_bytes()
    cases = list(damages(path))
    assert len(cases) >= 60
    for _, damage in cases:
        data = damage(whole)
        path.unlink() if data is None else path.write_bytes(data)
        assert_refused(tmp_path, {path.name}, expected)
    path.write_bytes(whole)
    assert shards.verify(tmp_path) == []


def test_two_swapped_shards_stop_the_loader(
    tmp_path: Path, directory: Path, expected: list[Batch]
) -> None:
    names = sorted(path.name for path in directory.glob("*.tar"))
    for first, second in itertools.combinations(names, 2):
        for source in directory.iterdir():
            (tmp_path / source.name).write_bytes(source.read_bytes())
        (tmp_path / first).write_bytes((directory / second).read_bytes())
        (tmp_path / second).write_bytes((directory / first).read_bytes())
        assert_refused(tmp_path, {first, second}, expected)


def shard_opened_at(expected: list[Batch], directory: Path, step: int) -> str:
    """The name of the shard in which lane 0 is after this step."""
    dataset, place = Dataset(directory), expected[step].places[0].sources[0]
    shard = dataset.order(SEED, place.epoch)[::LANES][place.shard]
    return dataset.manifest.shards[shard].name


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 3), (4, 30)])
def test_what_fails_in_a_thread_is_raised_once_after_the_batches_before_it(
    tmp_path: Path, directory: Path, expected: list[Batch], workers: int, prefetch: int
) -> None:
    for source in directory.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    step = next(n for n, batch in enumerate(expected) if batch.places[0].sources[0].shard > 0)
    name = shard_opened_at(expected, directory, step)
    (tmp_path / name).unlink()
    loader = load(tmp_path, range(1), None, prefetch, workers)
    for before in range(step):
        assert_equal(next(loader), expected[before], range(1))
    with pytest.raises(DataError, match=name):
        next(loader)
    assert wait_for(lambda: not threads())
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_lane_that_cannot_start_is_an_error_at_once(directory: Path) -> None:
    with pytest.raises(DataError, match=r"9 shards cannot feed 10 lanes.*data\.lanes"):
        Loader(Mix([Dataset(directory)]), range(10), 10, LENGTH, SEED, None, 1, 1)
    with pytest.raises(DataError, match="lane 2 of 4 has no"):
        load(directory, range(2, 3), [LanePlace(0, 0, (SourcePlace(0, 99),))])


def test_closing_ends_the_threads_while_they_wait_and_may_be_done_twice(directory: Path) -> None:
    loader = load(directory, workers=3, prefetch=1)
    next(loader)
    time.sleep(0.2)  # until every queue is full
    assert len(threads()) == 4
    loader.close()
    assert wait_for(lambda: not threads(), 2.0)
    loader.close()


def test_a_loader_that_nobody_closes_ends_with_its_last_reference(directory: Path) -> None:
    loader = load(directory)
    next(loader)
    assert threads()
    del loader
    assert wait_for(lambda: not threads(), 2.0)


def test_the_interpreter_ends_with_a_loader_open(directory: Path) -> None:
    program = f"""
from pathlib import Path
from pretrain.data.lanes import Dataset, Mix
from pretrain.data.loader import Loader
loader = Loader(Mix([Dataset(Path({str(directory)!r}))]), range(4), 4, 48, 1, None, 2, 2)
next(loader)
"""
    endings = ["", "raise SystemExit(0)", "loader.close()"]
    started = [
        subprocess.Popen([sys.executable, "-c", program + ending], stderr=subprocess.PIPE)
        for ending in endings
    ]
    ended = [process.communicate(timeout=300)[1] for process in started]
    assert [
        (process.returncode, stderr) for process, stderr in zip(started, ended, strict=True)
    ] == [(0, b"")] * 3


def test_threads_read_no_further_ahead_than_prefetch(tmp_path: Path, write_data_set: Any) -> None:
    write_data_set(tmp_path, [[n] * LENGTH for n in range(60)], 60, 100, bos_id=None, eos_id=None)
    dataset = Dataset(tmp_path)
    with Loader(Mix([dataset]), range(1), 1, LENGTH, SEED, None, 3, 1) as loader:
        next(loader)
        # One consumed, three ready, one in hand, and the one after it, which was checked ahead.
        assert wait_for(lambda: sum(dataset.checked) == 6)
        time.sleep(0.2)
        assert sum(dataset.checked) == 6


def test_the_next_shard_is_checked_before_its_lane_opens_it(
    tmp_path: Path, write_data_set: Any
) -> None:
    write_data_set(tmp_path, [[n] * 10 * LENGTH for n in range(12)], 12, 100)
    dataset = Dataset(tmp_path)
    with Loader(Mix([dataset]), range(2), 2, LENGTH, SEED, None, 1, 1) as loader:
        batch = next(loader)
        assert [place.sources[0].shard for place in batch.places] == [0, 0]
        order = dataset.order(SEED, 0)
        assert wait_for(lambda: sum(dataset.checked) == 4)
        assert [dataset.checked[shard] for shard in order[:4]] == [True] * 4


@pytest.fixture
def two(directory: Path, tmp_path: Path, write_data_set: Any) -> list[Path]:
    """Two data sets of documents of different lengths."""
    write_data_set(tmp_path / "long", [[n + 3] * (9 * n) for n in range(30)], 5, 1000)
    return [directory, tmp_path / "long"]


WEIGHTS: dict[str, list[Weight]] = {
    "constant": [2.0, 1.0],
    "scheduled": [[[0, 2.0], [6, 0.0], [15, 1.0]], 1.0],
}


def mixed(
    two: list[Path],
    weights: str,
    lanes: range,
    places: Any,
    prefetch: int,
    workers: int,
    step: int = 0,
) -> Loader:
    mix = Mix([Dataset(path) for path in two], WEIGHTS[weights])
    return Loader(mix, lanes, LANES, LENGTH, SEED, places, prefetch, workers, step)


@pytest.mark.parametrize("weights", list(WEIGHTS))
@pytest.mark.parametrize(("ranks", "workers", "prefetch"), [(1, 3, 2), (2, 1, 1), (4, 1, 5)])
def test_a_mix_is_the_same_for_any_ranks_workers_and_interruptions(
    two: list[Path], ranks: int, workers: int, prefetch: int, weights: str
) -> None:
    with mixed(two, weights, range(LANES), None, 1, 1) as loader:
        expected = list(itertools.islice(loader, STEPS))
    reads = [[place.read for place in lane.sources] for lane in expected[-1].places]
    assert min(map(min, reads)) > 0
    share = LANES // ranks
    for rank, step in itertools.product(range(ranks), range(0, STEPS - 3, 7)):
        own = range(rank * share, (rank + 1) * share)
        places = expected[step].places[own.start : own.stop]
        with mixed(two, weights, own, places, prefetch, workers, step + 1) as loader:
            for later in range(step + 1, step + 4):
                assert_equal(next(loader), expected[later], own)


def test_the_next_shards_of_every_source_are_checked_ahead(two: list[Path]) -> None:
    mix = Mix([Dataset(path) for path in (*two, two[1])], (1.0, 1e-9, 0.0))
    with Loader(mix, range(1), 1, LENGTH, SEED, None, 1, 1) as loader:
        next(loader)
        assert wait_for(lambda: sum(mix.datasets[1].checked) == 1)
        assert mix.datasets[1].checked[int(mix.datasets[1].order(SEED, 0, 1)[0])]
        next(loader)
    # What has no weight is not read.
    assert not any(mix.datasets[2].checked)
