import itertools
import json
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset.shards import DataError, Document, Manifest
from pretrain.config.data import Weight
from pretrain.data.lanes import Dataset, Lane, LanePlace, Mix, SourcePlace
from pretrain.data.packing import IGNORE
from pretrain.model import loss

Window = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


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
    """(token, target, starts) of a lane forever."""
    return laid_end_to_end(naive_documents(directory, manifest, index, lanes, seed, 0))


def laid_end_to_end(documents: Iterator[list[int]]) -> Iterator[tuple[int, int, bool]]:
    for tokens in documents:
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            yield token, IGNORE if last else tokens[place + 1], place == 0


def naive_documents(
    directory: Path, manifest: Manifest, index: int, lanes: int, seed: int, source: int
) -> Iterator[list[int]]:
    """A lane's laid-out documents of a source, in plain Python, with stock webdataset."""
    import webdataset

    head, tail = manifest.tokenizer.bos_id, manifest.tokenizer.eos_id
    for epoch in itertools.count():
        for shard in Dataset(directory).order(seed, epoch, source)[index::lanes]:
            path = str(directory / manifest.shards[shard].name)
            for sample in webdataset.WebDataset(
                path, shardshuffle=False, empty_check=False
            ).decode():
                tokens = [int(token) for token in sample["tokens.npy"]]
                yield [i for i in (head, *tokens, tail) if i is not None]


def naive_window(stream: Iterator[tuple[int, int, bool]], length: int) -> Window:
    tokens, targets, starts = zip(*itertools.islice(stream, length), strict=True)
    return np.array(tokens), np.array(targets), np.array(starts), None


def assert_equal(found: Window, expected: Window) -> None:
    names = ("tokens", "targets", "starts", "weights")
    for name, left, right in zip(names, found, expected, strict=True):
        np.testing.assert_array_equal(left, right, err_msg=name)


def test_windows_by_hand(tmp_path: Path, write_data_set: Any) -> None:
    documents = [[10, 11, 12], [20], [], [40, 41, 42], [50, 51]]
    write_data_set(tmp_path, documents, 1, 100, bos_id=None, eos_id=None)
    lane, x = Lane(Mix([Dataset(tmp_path)]), 0, 1, seed=1), IGNORE
    # The second document is one token; the third is empty and leaves no trace. The fourth starts
    # at the first window's last token, whose target lies beyond that window.
    tokens, targets, starts, _ = lane.window(5)
    assert tokens.tolist() == [10, 11, 12, 20, 40]
    assert targets.tolist() == [11, 12, x, x, 41]
    assert starts.tolist() == [True, False, False, True, True]
    assert lane.place == at(0, 0, 3, token=1, read=3)
    # The second window ends with the fourth document's end.
    tokens, targets, starts, _ = lane.window(2)
    assert tokens.tolist() == [41, 42]
    assert targets.tolist() == [42, x]
    assert starts.tolist() == [False, False]
    assert lane.place == at(0, 0, 4, read=4)
    # The third starts with a document and continues into the next epoch.
    tokens, targets, starts, _ = lane.window(4)
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
def test_a_lane_continues_from_any_place_as_if_it_had_not_stopped(
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
    # Neither may import the other.
    assert IGNORE == loss.IGNORE


# Several sources.

WEIGHTS = (1.0, 0.5, 2.5)


@pytest.fixture(params=[(1, 2), (None, None)], ids=["marked", "bare"])
def sources(request: Any, tmp_path: Path, write_data_set: Any) -> list[Path]:
    """Three data sets of documents of very different lengths, in 4, 7 and 7 shards."""
    bos, eos = request.param
    sets = [random_documents(40, 6, 1), random_documents(50, 300, 2), random_documents(60, 40, 3)]
    for number, (documents, shards) in enumerate(zip(sets, (4, 7, 7), strict=True)):
        write_data_set(tmp_path / f"{number}", documents, shards, 1000, bos_id=bos, eos_id=eos)
    return [tmp_path / f"{number}" for number in range(3)]


def mix_of(sources: list[Path], weights: tuple[float, ...] = WEIGHTS) -> Mix:
    return Mix([Dataset(path) for path in sources], weights)


def naive_draw(
    manifests: list[Manifest],
    seed: int,
    lane: int,
    number: int,
    weights: tuple[float, ...] = WEIGHTS,
) -> int:
    """The source of a lane's document, with the shares added up one by one."""
    info = manifests[0].tokenizer
    marks = (info.bos_id is not None) + (info.eos_id is not None)
    shares = [
        weight * manifest.documents / (manifest.tokens + marks * manifest.documents)
        for weight, manifest in zip(weights, manifests, strict=True)
    ]
    key = np.array([seed, lane], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=number + (1 << 192)).random_raw()
    left = int(raw) / 2**64 * sum(shares)
    return next(source for source in range(3) if (left := left - shares[source]) < 0)


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_mix_equals_a_plain_draw_of_whole_documents(sources: list[Path], lanes: int) -> None:
    manifests = [Dataset(path).manifest for path in sources]
    for index in range(lanes):
        each = [
            naive_documents(path, manifest, index, lanes, 9, source)
            for source, (path, manifest) in enumerate(zip(sources, manifests, strict=True))
        ]
        draws = (naive_draw(manifests, 9, index, number) for number in itertools.count())
        stream = laid_end_to_end(next(each[source]) for source in draws)
        lane = Lane(mix_of(sources), index, lanes, seed=9)
        for length in itertools.islice(itertools.cycle((17, 64, 1, 200)), 32):
            assert_equal(lane.window(length), naive_window(stream, length))
        assert min(place.read for place in lane.place.sources) > 0
        assert max(place.epoch for place in lane.place.sources) > 0


def test_shares_are_of_tokens_and_not_of_documents(tmp_path: Path, write_data_set: Any) -> None:
    random = np.random.default_rng(4)
    # A mark, which the short documents feel.
    short = [np.full(size, 10) for size in random.integers(0, 6, 400)]
    long = [np.full(size, 20) for size in random.integers(1, 60, 200)]
    write_data_set(tmp_path / "short", short, 8, 100, bos_id=None)
    write_data_set(tmp_path / "long", long, 8, 100, bos_id=None)
    lane = Lane(mix_of([tmp_path / "short", tmp_path / "long"], (3.0, 1.0)), 0, 2, seed=1)
    tokens, _, starts, _ = lane.window(40_000)
    first = np.flatnonzero(starts)
    lengths = np.diff(first)
    of_short = tokens[first[:-1]] != 20  # 10, or the mark of an empty one
    excess = lengths * (of_short - 0.75)
    error = np.sqrt((excess**2).sum()) / lengths.sum()
    assert error < 0.015
    assert abs(excess.sum() / lengths.sum()) < 3 * error
    assert of_short.mean() > 0.95


def test_shares_are_right_for_documents_a_thousand_times_as_long(
    tmp_path: Path, write_data_set: Any
) -> None:
    write_data_set(tmp_path / "short", [[10] * 8] * 4, 4, 100)
    write_data_set(tmp_path / "long", [[20] * 9998] * 4, 4, 100)
    mix = mix_of([tmp_path / "short", tmp_path / "long"], (1.0, 9.0))
    draws = [mix.draw(3, lane, number) for lane in range(4) for number in range(20_000)]
    # Of 10 and of 10,000 tokens: 9 times the tokens are 9 documents in a thousand and nine.
    chance, count = 9 / 1009, len(draws)
    assert abs(sum(draws) - chance * count) < 3 * np.sqrt(count * chance * (1 - chance))


def test_a_draw_depends_on_seed_lane_and_number_alone(sources: list[Path]) -> None:
    mix = mix_of(sources)
    keys = list(itertools.product((0, 1), (0, 1), range(200)))
    drawn = {key: mix.draw(*key) for key in keys}
    again = mix_of(sources)
    assert {key: again.draw(*key) for key in reversed(keys)} == drawn
    streams = [[drawn[seed, lane, n] for n in range(200)] for seed in (0, 1) for lane in (0, 1)]
    assert len({tuple(stream) for stream in streams}) == 4


def test_the_draws_of_a_run_are_the_same_with_other_versions_of_numpy(
    tmp_path: Path, write_data_set: Any
) -> None:
    for name in "ab":
        write_data_set(tmp_path / name, [[5]] * 4, 4, 100)
    mix = mix_of([tmp_path / "a", tmp_path / "b"], (1.0, 1.0))
    assert [mix.draw(1, 2, number) for number in range(16)] == [
        1,
        0,
        1,
        1,
        1,
        1,
        0,
        1,
        0,
        0,
        1,
        1,
        1,
        0,
        1,
        0,
    ]
    assert [Dataset(tmp_path / "a").order(1, 0, n).tolist() for n in (0, 1, 2)] == [
        [3, 2, 0, 1], [0, 2, 3, 1], [0, 3, 1, 2]
    ]  # fmt: skip


def test_weight_0_is_never_drawn_and_other_weights_have_no_unit(sources: list[Path]) -> None:
    for weights in [(0.0, 1.0, 3.0), (1.0, 0.0, 3.0), (3.0, 1.0, 0.0)]:
        mix = mix_of(sources, weights)
        drawn = [mix.draw(1, 0, n) for n in range(3000)]
        assert set(drawn) == {0, 1, 2} - {weights.index(0.0)}
        larger = mix_of(sources, (weights[0] * 64, weights[1] * 64, weights[2] * 64))
        assert [larger.draw(1, 0, n) for n in range(3000)] == drawn


def test_a_lane_of_a_mix_continues_from_any_place(sources: list[Path]) -> None:
    lane = Lane(mix_of(sources), 1, 3, seed=2)
    places, windows = [lane.place], []
    for _ in range(80):
        windows.append(lane.window(13))
        places.append(lane.place)
    assert any(place.token for place in places) and places[-1].drawn > 80
    for step, place in enumerate(places[:-1]):
        stored = LanePlace.of(json.loads(json.dumps(asdict(place))))
        assert stored == place
        resumed = Lane(mix_of(sources), 1, 3, seed=2, place=stored)
        for later in range(step, min(step + 4, len(windows))):
            assert_equal(resumed.window(13), windows[later])
            assert resumed.place == places[later + 1]


def test_other_weights_hold_from_the_next_document_on(sources: list[Path]) -> None:
    lane = Lane(mix_of(sources, (0.0, 1.0, 0.0)), 0, 1, seed=6)
    while not lane.place.token:
        lane.window(5)
    place = lane.place
    changed = Lane(mix_of(sources, (0.0, 0.0, 1.0)), 0, 1, seed=6, place=place)
    before, _, starts, _ = lane.window(300)
    after, _, _, _ = changed.window(300)
    end = int(np.flatnonzero(starts)[0])
    assert end > 0 and before[:end].tolist() == after[:end].tolist()
    assert before.tolist() != after.tolist()
    assert changed.place.sources[1].read == place.sources[1].read + 1
    assert changed.place.drawn == place.drawn + 1 + changed.place.sources[2].read


SCHEDULE: list[Weight] = [[[0, 1.0], [12, 0.0]], 0.5, [[0, 0.0], [5, 2.5], [25, 4.0]]]


def scheduled(sources: list[Path], schedule: list[Weight] = SCHEDULE) -> Mix:
    return Mix([Dataset(path) for path in sources], schedule)


def naive_weights(step: int) -> tuple[float, float, float]:
    """Those of SCHEDULE after `step` steps, by hand."""
    return (1.0 if step < 12 else 0.0, 0.5, 0.0 if step < 5 else 2.5 if step < 25 else 4.0)


@pytest.mark.parametrize("length", [17, 64])
def test_a_document_is_drawn_by_the_weights_of_the_window_that_it_begins_in(
    sources: list[Path], length: int
) -> None:
    manifests = [Dataset(path).manifest for path in sources]
    each = [
        naive_documents(path, manifest, 1, 3, 9, source)
        for source, (path, manifest) in enumerate(zip(sources, manifests, strict=True))
    ]

    def documents() -> Iterator[list[int]]:
        read = 0
        for number in itertools.count():
            source = naive_draw(manifests, 9, 1, number, naive_weights(read // length))
            document = next(each[source])
            read += len(document)
            yield document

    stream = laid_end_to_end(documents())
    lane = Lane(scheduled(sources), 1, 3, seed=9)
    for _ in range(40):
        assert_equal(lane.window(length), naive_window(stream, length))
    assert min(place.read for place in lane.place.sources) > 0


def test_shares_of_tokens_by_phase_equal_a_count_by_hand(
    tmp_path: Path, write_data_set: Any
) -> None:
    # Laid out, four tokens and eight: a window of 16 ends with a document, so that nothing is
    # open at a boundary unless an 8 begins in its middle.
    write_data_set(tmp_path / "four", [[10] * 4] * 40, 4, 100, bos_id=None, eos_id=None)
    write_data_set(tmp_path / "eight", [[20] * 8] * 40, 4, 100, bos_id=None, eos_id=None)
    begins, ends, steps = (0, 300, 600), (300, 600, 1200), 1200
    weights: list[Weight] = [[[0, 3.0], [300, 0.0], [600, 1.0]], [[0, 1.0], [300, 2.0], [600, 1.0]]]
    mix = scheduled([tmp_path / "four", tmp_path / "eight"], weights)
    windows = np.zeros((steps, 16), np.int64)
    lane = Lane(mix, 2, 4, seed=3)
    for step in range(steps):
        windows[step] = lane.window(16).tokens
    shares = [(windows[begin:end] == 10).mean() for begin, end in zip(begins, ends, strict=True)]
    assert shares[1] == 0.0
    assert shares[0] == pytest.approx(0.75, abs=0.03) and shares[2] == pytest.approx(0.5, abs=0.03)
    # Draw by draw: a four is drawn where the uniform number is below w4/4 of w4/4 + w8/8.
    counts, read = np.zeros((3, 2), int), 0
    for number in itertools.count():
        phase = sum(read // 16 >= begin for begin in begins) - 1
        if read >= steps * 16:
            break
        key = np.array([3, 2], dtype=np.uint64)
        drawn = int(np.random.Philox(key=key, counter=number + (1 << 192)).random_raw()) / 2**64
        eight = drawn >= (6 / 7, 0.0, 2 / 3)[phase]
        size = 8 if eight else 4
        counts[phase, int(eight)] += size
        read += size
    for phase, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        found = [(windows[begin:end] == token).sum() for token in (10, 20)]
        # An eight that began in the phase before has at most its half here.
        np.testing.assert_allclose(found, counts[phase], rtol=0, atol=4)


def test_constant_weights_are_those_of_a_static_mix_to_the_bit(sources: list[Path]) -> None:
    constant: list[Weight] = [[[0, weight], [7, weight], [20, weight]] for weight in WEIGHTS]
    static, lane = Lane(mix_of(sources), 0, 2, seed=5), Lane(scheduled(sources, constant), 0, 2, 5)
    for _ in range(40):
        assert_equal(lane.window(29), static.window(29))
        assert lane.place == static.place
    # And before the first boundary, whatever comes after it.
    changing: list[Weight] = [[[0, weight], [30, number]] for number, weight in enumerate(WEIGHTS)]
    lane, static = Lane(scheduled(sources, changing), 0, 2, 5), Lane(mix_of(sources), 0, 2, seed=5)
    same = [np.array_equal(lane.window(29).tokens, static.window(29).tokens) for _ in range(60)]
    assert all(same[:30]) and not all(same[30:])


def test_a_data_set_enters_and_leaves_and_what_is_open_is_read_to_its_end(
    tmp_path: Path, write_data_set: Any
) -> None:
    for name, token in (("early", 10), ("late", 20)):
        write_data_set(tmp_path / name, [[token] * 50] * 8, 4, 100, bos_id=None, eos_id=None)
    weights: list[Weight] = [[[0, 1.0], [10, 0.0]], [[0, 0.0], [10, 1.0]]]
    lane = Lane(scheduled([tmp_path / "early", tmp_path / "late"], weights), 0, 4, seed=1)
    tokens = np.concatenate([lane.window(16).tokens for _ in range(40)])
    # 160 tokens are three documents and ten tokens of the fourth, which is read to its end.
    assert tokens.tolist() == [10] * 200 + [20] * 440


def test_a_scheduled_lane_continues_from_any_place_and_step(sources: list[Path]) -> None:
    lane = Lane(scheduled(sources), 1, 3, seed=2)
    places, windows = [lane.place], []
    for _ in range(40):
        windows.append(lane.window(13))
        places.append(lane.place)
    for step, place in enumerate(places[:-1]):
        stored = LanePlace.of(json.loads(json.dumps(asdict(place))))
        resumed = Lane(scheduled(sources), 1, 3, seed=2, place=stored, step=step)
        for later in range(step, min(step + 8, len(windows))):
            assert_equal(resumed.window(13), windows[later])
            assert resumed.place == places[later + 1]


def test_a_source_that_cannot_be_read_on_is_named(sources: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{sources[0]}: 4 shards cannot feed 5 lanes"):
        Lane(mix_of(sources), 0, 5, seed=0)
    places = (SourcePlace(), SourcePlace(0, 7), SourcePlace())
    with pytest.raises(DataError, match=rf"{sources[1]}: lane 0 of 1 has no LanePlace"):
        Lane(mix_of(sources), 0, 1, seed=0, place=LanePlace(0, 0, places))
    with pytest.raises(DataError, match="has no LanePlace"):
        Lane(mix_of(sources), 0, 1, seed=0, place=LanePlace(3, 0, (SourcePlace(),) * 3))


def test_a_lane_names_the_shards_that_it_opens_next_in_each_source(sources: list[Path]) -> None:
    mix = mix_of(sources, (1.0, 1e-9, 1e-9))
    lane = Lane(mix, 0, 1, seed=4)
    orders = [data.order(4, 0, source) for source, data in enumerate(mix.datasets)]
    assert lane.next_shards == [(source, order[0]) for source, order in enumerate(orders)]
    lane.window(1)
    opened = lane.place.sources[0].shard
    assert lane.next_shards == [(0, orders[0][opened + 1]), (1, orders[1][0]), (2, orders[2][0])]


def test_a_lane_opens_no_shard_of_a_source_while_its_weight_is_0(sources: list[Path]) -> None:
    mix = Mix([Dataset(path) for path in sources], (0.0, 1.0, [[0, 0.0], [2, 5.0]]))
    assert [mix.drawn(step) for step in range(4)] == [[1], [1], [1, 2], [1, 2]]
    lane = Lane(mix, 0, 1, seed=4)
    named = [[source for source, _ in lane.next_shards]]
    for _ in range(3):
        lane.window(1)
        named.append([source for source, _ in lane.next_shards])
    assert named == [[1], [1], [1, 2], [1, 2]]


def test_weights_by_hand(tmp_path: Path, write_data_set: Any) -> None:
    pair = Document("pair", "test", 1, np.array([10, 11, 12, 13]), turns=(2,))
    write_data_set(tmp_path, [pair, [20, 21]], 1, 100)
    dataset = Dataset(tmp_path)
    lane = Lane(Mix([dataset], prompt_weight=0.25), 0, 1, seed=1)
    # A weight is that of the token to be predicted: the one before the answer predicts its first.
    tokens, targets, _, weights = lane.window(10)
    assert tokens.tolist() == [1, 10, 11, 12, 13, 2, 1, 20, 21, 2]
    assert targets.tolist() == [10, 11, 12, 13, 2, IGNORE, 20, 21, 2, IGNORE]
    assert weights is not None and weights.dtype == np.float32
    assert weights.tolist() == [0.25, 0.25, 1, 1, 1, 0, 1, 1, 1, 0]
    # A window may begin and end inside of a pair, and a lane continue there.
    _, _, _, first = lane.window(1)
    again = Lane(Mix([dataset], prompt_weight=0.25), 0, 1, seed=1, place=lane.place)
    _, _, _, rest = again.window(3)
    assert first is not None and rest is not None
    assert [*first, *rest] == [0.25, 0.25, 1, 1]


def test_every_prompt_of_a_document_has_the_weight_of_prompts(
    tmp_path: Path, write_data_set: Any
) -> None:
    turns = Document("turns", "test", 1, np.arange(10, 18), turns=(3, 4, 6))
    write_data_set(tmp_path, [turns], 1, 100)
    lane = Lane(Mix([Dataset(tmp_path)], prompt_weight=0.25), 0, 1, seed=1)
    # Prompt 10, 11, 12; answer 13; prompt 14, 15; answer 16, 17 and the end.
    _, targets, _, weights = lane.window(10)
    assert targets.tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 2, IGNORE]
    assert weights is not None
    assert weights.tolist() == [0.25, 0.25, 0.25, 1, 0.25, 0.25, 1, 1, 1, 0]


def test_there_are_no_weights_where_every_one_is_1(tmp_path: Path, write_data_set: Any) -> None:
    pair = Document("pair", "test", 1, np.array([10, 11]), turns=(1,))
    write_data_set(tmp_path / "pairs", [pair], 1, 100)
    write_data_set(tmp_path / "plain", [[10, 11]], 1, 100)
    plain, pairs = Dataset(tmp_path / "plain"), Dataset(tmp_path / "pairs")
    assert not Mix([plain], prompt_weight=0.5).is_weighted
    assert not Mix([pairs]).is_weighted
    assert Mix([plain, pairs], [1.0, 1.0], 0.0).is_weighted
    assert Lane(Mix([pairs]), 0, 1, seed=1).window(3)[3] is None
