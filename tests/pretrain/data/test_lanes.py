import itertools
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards import DataError, Manifest
from pretrain.data.lanes import IGNORE, Dataset, Lane, LanePlace, Mix, SourcePlace
from pretrain.model import loss

Window = tuple[np.ndarray, np.ndarray, np.ndarray]


def at(epoch: int, shard: int, document: int, *, token: int = 0, read: int = 0) -> LanePlace:
    """A place of a lane that has one source."""
    return LanePlace(0, token, (SourcePlace(epoch, shard, document, read),))


def random_documents(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Documents of 0 to `longest` tokens, short ones often."""
    random = np.random.default_rng(seed)
    sizes = (longest * random.random(count) ** 3).astype(int)
    return [random.integers(3, 1000, size).tolist() for size in sizes]


def naive_stream(
    directory: Path, manifest: Manifest, index: int, lanes: int, seed: int
) -> Iterator[tuple[int, int, bool]]:
    """(token, target, starts) of a lane forever, in plain Python, with stock webdataset."""
    import webdataset

    head, tail = manifest.tokenizer.bos_id, manifest.tokenizer.eos_id
    for epoch in itertools.count():
        for shard in Dataset(directory).order(seed, epoch)[index::lanes]:
            path = str(directory / manifest.shards[shard].name)
            for sample in webdataset.WebDataset(
                path, shardshuffle=False, empty_check=False
            ).decode():
                tokens = [int(token) for token in sample["tokens.npy"]]
                tokens = [i for i in (head, *tokens, tail) if i is not None]
                for place, token in enumerate(tokens):
                    last = place == len(tokens) - 1
                    yield token, IGNORE if last else tokens[place + 1], place == 0


def naive_window(stream: Iterator[tuple[int, int, bool]], length: int) -> Window:
    tokens, targets, starts = zip(*itertools.islice(stream, length), strict=True)
    return np.array(tokens), np.array(targets), np.array(starts)


def assert_equal(found: Window, expected: Window) -> None:
    for name, left, right in zip(("tokens", "targets", "starts"), found, expected, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)


def test_windows_by_hand(tmp_path: Path, write_data_set: Any) -> None:
    documents = [[10, 11, 12], [20], [], [40, 41, 42], [50, 51]]
    write_data_set(tmp_path, documents, 1, 100, bos_id=None, eos_id=None)
    lane, x = Lane(Mix([Dataset(tmp_path)]), 0, 1, seed=1), IGNORE
    # The second document is one token; the third is empty and leaves no trace. The fourth starts
    # at the first window's last token, whose target lies beyond that window.
    tokens, targets, starts = lane.window(5)
    assert tokens.tolist() == [10, 11, 12, 20, 40]
    assert targets.tolist() == [11, 12, x, x, 41]
    assert starts.tolist() == [True, False, False, True, True]
    assert lane.place == at(0, 0, 3, token=1, read=3)
    # The second window ends with the fourth document's end.
    tokens, targets, starts = lane.window(2)
    assert tokens.tolist() == [41, 42]
    assert targets.tolist() == [42, x]
    assert starts.tolist() == [False, False]
    assert lane.place == at(0, 0, 4, read=4)
    # The third starts with a document and goes on into the next epoch.
    tokens, targets, starts = lane.window(4)
    assert tokens.tolist() == [50, 51, 10, 11]
    assert targets.tolist() == [51, x, 11, 12]
    assert starts.tolist() == [True, False, True, False]
    assert lane.place == at(1, 0, 0, token=2, read=5)
    assert (tokens.dtype, targets.dtype, starts.dtype) == (np.int64, np.int64, np.bool_)


@pytest.mark.parametrize(
    ("bos", "eos", "laid"),
    [
        (1, 2, [1, 7, 8, 2]),
        (1, None, [1, 7, 8]),
        (None, 2, [7, 8, 2]),
        (0, 0, [0, 7, 8, 0]),
        (None, None, [7, 8]),
    ],
)
def test_a_document_is_laid_out_with_the_special_ids_that_its_tokenizer_has(
    tmp_path: Path, write_data_set: Any, bos: int | None, eos: int | None, laid: list[int]
) -> None:
    write_data_set(tmp_path, [[7, 8]], 1, 100_000, bos_id=bos, eos_id=eos)
    dataset = Dataset(tmp_path)
    (document,) = dataset.documents()
    found = dataset.lay_out(document)
    assert (found.tolist(), found.dtype) == (laid, np.int64)
    assert Lane(Mix([dataset]), 0, 1, seed=0).window(len(laid))[0].tolist() == laid


@pytest.mark.parametrize("special", [(1, 2), (None, 2), (None, None)])
@pytest.mark.parametrize(("shards", "lanes"), [(7, 3), (4, 4), (5, 1), (60, 4)])
def test_lanes_equal_a_plain_concatenation_over_epochs(
    tmp_path: Path,
    write_data_set: Any,
    special: tuple[int | None, int | None],
    shards: int,
    lanes: int,
) -> None:
    # 60 shards of 40 documents: some shards are empty.
    manifest = write_data_set(
        tmp_path, random_documents(40, 90), shards, 1000, bos_id=special[0], eos_id=special[1]
    )
    dataset = Dataset(tmp_path)
    for index in range(lanes):
        lane = Lane(Mix([dataset]), index, lanes, seed=5)
        stream = naive_stream(tmp_path, manifest, index, lanes, seed=5)
        for length in itertools.cycle((17, 64, 1, 200)):
            assert_equal(lane.window(length), naive_window(stream, length))
            if lane.place.sources[0].epoch == 4:
                break


def test_lanes_roll_into_their_next_epoch_at_different_times(
    tmp_path: Path, write_data_set: Any
) -> None:
    write_data_set(tmp_path, random_documents(40, 90), 7, 1000)
    lanes = [Lane(Mix([Dataset(tmp_path)]), index, 3, seed=5) for index in range(3)]
    epochs = []
    for _ in range(40):
        for lane in lanes:
            lane.window(32)
        epochs.append(tuple(lane.place.sources[0].epoch for lane in lanes))
    assert any(len(set(each)) > 1 for each in epochs)


@pytest.mark.parametrize("special", [(1, 2), (None, None)])
def test_a_lane_goes_on_from_any_place_as_if_it_had_not_stopped(
    tmp_path: Path, write_data_set: Any, special: tuple[int | None, int | None]
) -> None:
    write_data_set(
        tmp_path, random_documents(60, 100), 25, 1000, bos_id=special[0], eos_id=special[1]
    )
    dataset = Dataset(tmp_path)
    lane = Lane(Mix([dataset]), 1, 3, seed=2)
    places, windows = [lane.place], []
    while lane.place.sources[0].epoch < 3:
        windows.append(lane.window(13))
        places.append(lane.place)
    assert len(windows) > 60
    for step, place in enumerate(places[:-1]):
        resumed = Lane(Mix([dataset]), 1, 3, seed=2, place=place)
        for later in range(step, min(step + 4, len(windows))):
            assert_equal(resumed.window(13), windows[later])
            assert resumed.place == places[later + 1]


def test_every_epoch_reads_every_shard_once_in_an_order_of_its_own(
    tmp_path: Path, write_data_set: Any
) -> None:
    write_data_set(tmp_path, [[n] for n in range(8)], 8, 100)
    dataset = Dataset(tmp_path)
    orders = [dataset.order(seed, epoch).tolist() for seed in (1, 2) for epoch in range(20)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 40
    # Runs are resumed with other versions of numpy: the order may not change with them.
    assert orders[:2] == [[3, 5, 2, 7, 0, 6, 1, 4], [0, 6, 5, 3, 4, 7, 2, 1]]


def test_a_shard_is_checked_before_its_first_use_and_not_again(
    tmp_path: Path, write_data_set: Any
) -> None:
    write_data_set(tmp_path, [[5, 6, 7]], 1, 100, bos_id=None, eos_id=None)
    dataset = Dataset(tmp_path)
    assert dataset.checked == [False]
    lane = Lane(Mix([dataset]), 0, 1, seed=0)
    lane.window(3)
    assert dataset.checked == [True]
    with (tmp_path / "shard-00000.tar").open("r+b") as file:
        with tarfile.open(fileobj=file) as tar:
            member = tar.getmember("00000000.tokens.npy")
        file.seek(member.offset_data + member.size - 2)
        file.write(b"\x09")
    assert lane.window(3)[0].tolist() == [5, 6, 9]
    with pytest.raises(DataError, match=r"shard-00000\.tar: sha256 differs"):
        list(Dataset(tmp_path).documents())


def test_documents_come_in_the_order_of_the_manifest(tmp_path: Path, write_data_set: Any) -> None:
    documents = random_documents(20, 30)
    write_data_set(tmp_path, documents, 6, 1000)
    found = list(Dataset(tmp_path).documents())
    assert [document.tokens.tolist() for document in found] == documents
    assert [document.id for document in found] == [f"document-{n}" for n in range(20)]


def test_a_lane_holds_a_document_and_not_a_shard(tmp_path: Path, write_data_set: Any) -> None:
    each = 1 << 14
    manifest = write_data_set(tmp_path, [np.full(each, n) for n in range(400)], 1, 1000)
    lane = Lane(Mix([Dataset(tmp_path)]), 0, 1, seed=0)
    lane.window(each)  # imports
    tracemalloc.start()
    while lane.place.sources[0].epoch == 0:
        lane.window(each)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 8 * each < manifest.shards[0].bytes / 10


def test_fewer_shards_than_lanes_is_an_error_that_names_the_settings(
    tmp_path: Path, write_data_set: Any
) -> None:
    write_data_set(tmp_path, [[1]] * 3, 3, 100)
    with pytest.raises(DataError) as raised:
        Lane(Mix([Dataset(tmp_path)]), 0, 4, seed=0)
    message = str(raised.value)
    assert str(tmp_path) in message and "3 shards cannot feed 4 lanes" in message
    assert "data.lanes to 3 or less" in message and "shards.count" in message


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_a_data_set_without_a_token_is_refused_and_not_searched_forever(
    tmp_path: Path, write_data_set: Any, documents: list[list[int]]
) -> None:
    write_data_set(tmp_path, documents, 2, 100, bos_id=None, eos_id=None)
    with pytest.raises(DataError, match="holds no tokens"):
        Dataset(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        at(-1, 0, 0),
        at(0, 2, 0),
        at(0, 0, 3),
        at(0, 0, 2, token=1),
        at(0, 0, 0, token=5),
        at(0, 0, 0, token=-1),
        LanePlace(1, 0, (SourcePlace(),)),
        LanePlace(0, 0, (SourcePlace(), SourcePlace())),
    ],
)
def test_a_place_of_another_data_set_is_refused(
    tmp_path: Path, write_data_set: Any, place: LanePlace
) -> None:
    write_data_set(tmp_path, [[1, 2, 3]] * 4, 2, 100)  # 2 documents a shard, 5 tokens each
    with pytest.raises(DataError, match=r"lane 0 of 1 has no LanePlace.*other data sets"):
        Lane(Mix([Dataset(tmp_path)]), 0, 1, seed=0, place=place).window(1)


def test_a_lane_names_the_shard_that_it_opens_next(tmp_path: Path, write_data_set: Any) -> None:
    # Three shards a lane and epoch, each of one token.
    write_data_set(tmp_path, [[n] for n in range(6)], 6, 100, bos_id=None, eos_id=None)
    dataset = Dataset(tmp_path)
    lane = Lane(Mix([dataset]), 1, 2, seed=3)
    assert lane.place == at(0, 0, 0)
    lane.window(1)
    for _ in range(20):
        ((_, expected),) = lane.next_shards
        lane.window(1)
        assert (
            int(dataset.order(3, lane.place.sources[0].epoch)[1::2][lane.place.sources[0].shard])
            == expected
        )
    assert lane.place.sources[0].epoch == 6


def test_lanes_and_loss_mean_the_same_by_an_ignored_target() -> None:
    # Neither may import the other: they stand on one floor.
    assert IGNORE == loss.IGNORE
