"""Data sets under URLs, read through real servers on this machine with faults in between."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError, read_manifest
from data_prep.sources import storage
from pretrain.config.data import CacheConfig
from pretrain.config.root import load
from pretrain.data.files import UnreachableError, manifest_of, name_of
from pretrain.data.lanes import Dataset, Mix
from pretrain.data.loader import Loader
from pretrain.jobs import launch
from pretrain.jobs.start_checks import data_problems, refuse
from tools.promises.servers import Proxy, Web, faulty

LANES, LENGTH, SHARDS = 2, 50, 6


@pytest.fixture
def directory(tmp_path: Path, write_data_set: Any) -> Path:
    """A data set of six shards, several windows each."""
    documents = [np.full(40 + n % 7, n % 90 + 3) for n in range(90)]
    write_data_set(tmp_path / "served" / "books", documents, SHARDS, 100)
    return tmp_path / "served" / "books"


@pytest.fixture
def web(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(storage, "_WAITS", (0.01, 0.01, 0.01))
    with Web(directory.parent) as server:
        yield server


@pytest.fixture
def proxy(web: Web) -> Iterator[Proxy]:
    with faulty(web.port) as server:
        yield server


def cache_in(tmp_path: Path, gigabytes: float = 1.0) -> CacheConfig:
    return CacheConfig(str(tmp_path / "cache"), gigabytes)


def read(dataset: Dataset, batches: int = 60) -> list[np.ndarray]:
    """Tokens of the first windows of all lanes: 60 are two epochs."""
    with Loader(Mix([dataset]), range(LANES), LANES, LENGTH, 1, None, 2, 1) as loader:
        return [next(loader).tokens.numpy() for _ in range(batches)]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def shards_asked(web: Web) -> list[str]:
    return [line.split("/")[-1] for line in web.asked if "GET" in line and ".tar" in line]


def test_batches_from_a_web_server_are_those_of_the_directory(
    web: Web, directory: Path, tmp_path: Path
) -> None:
    remote = Dataset(f"http://127.0.0.1:{web.port}/books/", cache_in(tmp_path))
    assert_equal(read(remote), read(Dataset(directory)))
    # Two epochs, each shard fetched once.
    assert sorted(shards_asked(web)) == [f"shard-{n:05d}.tar" for n in range(SHARDS)]
    assert remote.files.tokenizer() == (directory / "tokenizer.model").read_bytes()
    assert remote.manifest == read_manifest(directory)


def test_a_second_process_of_the_node_fetches_nothing(web: Web, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{web.port}/books"
    first = read(Dataset(url, cache_in(tmp_path)))
    web.asked.clear()
    assert_equal(read(Dataset(url, cache_in(tmp_path))), first)
    assert shards_asked(web) == []


def test_batches_are_the_same_where_the_cache_holds_less_than_an_epoch(
    web: Web, directory: Path, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in directory.glob("*.tar")]
    bound = (LANES + 1) * max(sizes)
    cache = CacheConfig(str(tmp_path / "cache"), bound / 1e9)
    remote = Dataset(f"http://127.0.0.1:{web.port}/books", cache)
    assert_equal(read(remote), read(Dataset(directory)))
    assert len(shards_asked(web)) > SHARDS
    held = [path.stat().st_size for path in cache.path.iterdir()]
    assert sum(held) <= bound


def test_the_next_shard_is_fetched_before_its_lane_opens_it(web: Web, tmp_path: Path) -> None:
    dataset = Dataset(f"http://127.0.0.1:{web.port}/books", cache_in(tmp_path))
    with Loader(Mix([dataset]), range(1), LANES, LENGTH, 1, None, 1, 1) as loader:
        batch = next(loader)
        assert batch.places[0].sources[0].shard == 0
        (opened, following) = dataset.order(1, 0)[::LANES][:2]
        for _ in range(500):
            if dataset.checked[following]:
                break
            time.sleep(0.01)
        assert dataset.checked[opened] and dataset.checked[following]


@pytest.mark.parametrize("fault", ["reset", "refuse", "slow"])
def test_a_fault_of_the_network_is_passed_over(
    proxy: Proxy, directory: Path, tmp_path: Path, fault: str
) -> None:
    dataset = Dataset(f"http://127.0.0.1:{proxy.port}/books", cache_in(tmp_path))
    proxy.faults.extend([None, fault, None, None, fault, fault])
    assert_equal(read(dataset), read(Dataset(directory)))
    assert proxy.done == [fault] * 3


def test_a_network_that_stays_broken_ends_in_one_sentence(proxy: Proxy, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{proxy.port}/books"
    dataset = Dataset(url, cache_in(tmp_path))
    proxy.faults.extend(["reset"] * 100)
    with pytest.raises(DataError) as raised:
        read(dataset)
    message = str(raised.value)
    assert message.startswith(f"{url}/shard-0000") and "\n" not in message
    assert ".tar: cannot be fetched: " in message
    assert message.endswith("; check the URL, the credentials and the network")


@pytest.mark.parametrize(
    ("status", "cause"),
    [(403, "its server answers 403 Forbidden"), (404, "its server answers 404 Not Found")],
)
def test_a_shard_that_is_refused_ends_in_one_sentence(
    web: Web, tmp_path: Path, status: int, cause: str
) -> None:
    url = f"http://127.0.0.1:{web.port}/books"
    dataset = Dataset(url, cache_in(tmp_path))
    for number in range(SHARDS):
        web.statuses[f"books/shard-{number:05d}.tar"] = status
    with pytest.raises(DataError, match=rf"shard-0000.*: cannot be fetched: {cause}; check"):
        read(dataset)


@pytest.mark.parametrize("fault", ["unanswered", "unreachable"])
def test_a_server_that_does_not_answer_at_the_start_is_no_mistake_of_the_users(
    web: Web, fault: str
) -> None:
    url = f"http://127.0.0.1:{web.port if fault == 'unanswered' else _unused_port()}/books"
    web.statuses["books/manifest.json"] = 503
    config = load(None, ["run.directory=r", f"data.train={url}", "data.lanes=2"])
    with pytest.raises(UnreachableError) as raised:
        data_problems(config)
    assert str(raised.value).startswith(f"data.train: {url}/manifest.json: cannot be fetched: ")
    assert launch.exit_code(raised.value) == 1  # a job is requeued after it, unlike after 2
    web.statuses["books/manifest.json"] = 404
    mistyped = load(None, ["run.directory=r", f"data.train=http://127.0.0.1:{web.port}/books"])
    (problem,) = data_problems(mistyped)
    assert "its server answers 404 Not Found" in problem


def test_an_answer_that_is_cut_off_at_the_start_is_no_mistake_of_the_users(proxy: Proxy) -> None:
    proxy.faults.extend(["reset"] * 100)
    with pytest.raises(UnreachableError, match=r"manifest\.json: cannot be fetched: "):
        manifest_of(f"http://127.0.0.1:{proxy.port}/books")


def test_mistakes_are_told_beside_a_server_that_does_not_answer(
    web: Web, tmp_path: Path, directory: Path
) -> None:
    url = f"http://127.0.0.1:{web.port}/books"
    web.statuses["books/manifest.json"] = 503
    words = ["run.directory=r", f"data.train={url}", "data.lanes=3"]
    with pytest.raises(UnreachableError):
        refuse([], load(None, words))
    with pytest.raises(SettingsError) as raised:
        refuse(["model.x: is wrong"], load(None, [*words, f"data.validation={tmp_path}/no"]))
    first, second, third = raised.value.problems
    assert first == "model.x: is wrong" and second.startswith("data.validation: ")
    assert third.startswith(f"data.train: {url}/manifest.json: cannot be fetched: its server ")
    with pytest.raises(SettingsError, match=r"data\.validation: .*shards for data\.lanes=9"):
        refuse([], load(None, [*words, "data.lanes=9", f"data.validation={directory}"]))


def test_a_cache_that_no_shard_fits_into_is_refused_before_the_start(web: Web) -> None:
    url = f"http://127.0.0.1:{web.port}/books"
    largest = max(shard.bytes for shard in manifest_of(url).shards)
    words = ["run.directory=r", f"data.train={url}", "data.lanes=2"]
    for bytes, fits in ((largest, True), (largest - 1, False)):
        found = data_problems(load(None, [*words, f"data.cache.gigabytes={bytes / 1e9:.9f}"]))
        assert fits == (not found)
    assert f"{url} has a shard of {largest / 1e9:.3g} GB" in found[0]


def _unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_a_shard_that_was_changed_is_refused_by_its_name(
    web: Web, directory: Path, tmp_path: Path
) -> None:
    for path in directory.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"corpus", b"CORPUS")[:-1] + b"x")
    with pytest.raises(DataError) as raised:
        read(Dataset(f"http://127.0.0.1:{web.port}/books", cache_in(tmp_path)))
    assert "is not the file that the manifest lists (its sha256 differs)" in str(raised.value)


def test_a_manifest_that_is_not_there_or_not_ours_is_refused(web: Web, directory: Path) -> None:
    url = f"http://127.0.0.1:{web.port}/other"
    with pytest.raises(DataError) as raised:
        manifest_of(url)
    assert str(raised.value) == (
        f"{url}/manifest.json: cannot be fetched: its server answers 404 Not Found; check the "
        "URL, the credentials and the network"
    )
    path = directory / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["checksum"]
    path.write_text(json.dumps({**plain, "format_version": 9}))
    with pytest.raises(DataError, match=r"/books/manifest\.json: has format version 9"):
        manifest_of(f"http://127.0.0.1:{web.port}/books")


def test_a_url_with_one_slash_is_said_to_lack_the_other() -> None:
    with pytest.raises(DataError, match=r"^s3:/b/x: a URL has two slashes .*; write s3://b/x$"):
        manifest_of("s3:/b/x")


def test_a_tokenizer_of_another_digest_is_refused(
    web: Web, directory: Path, tmp_path: Path
) -> None:
    (directory / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match=r"tokenizer\.model: its sha256 is not the manifest's"):
        Dataset(f"http://127.0.0.1:{web.port}/books", cache_in(tmp_path)).files.tokenizer()
    with pytest.raises(
        DataError, match=r"books/tokenizer\.model: its sha256 is not the manifest's"
    ):
        Dataset(directory).files.tokenizer()


def test_batches_from_an_s3_server_with_faults_before_it_are_those_of_the_directory(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    _, port = server.get_host_and_port()
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with faulty(port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        for path in directory.iterdir():
            client.put_object(Bucket="corpora", Key=f"books/{path.name}", Body=path.read_bytes())
        dataset = Dataset("s3://corpora/books", cache_in(tmp_path))
        proxy.faults.extend([None, "reset", None, None, "refuse", "slow"])
        assert_equal(read(dataset), read(Dataset(directory)))
        assert proxy.done == ["reset", "refuse", "slow"]
        client.delete_object(Bucket="corpora", Key="books/manifest.json")
        with pytest.raises(
            DataError, match=r"s3://corpora/books/manifest\.json: cannot be fetched"
        ):
            manifest_of("s3://corpora/books")
    server.stop()


def test_a_data_set_is_named_by_the_last_part_of_its_place(tmp_path: Path) -> None:
    assert name_of("s3://bucket/books/") == name_of("https://host/x/books") == "books"
    assert name_of(tmp_path / "books") == "books"
