"""Promise 8: shards that are damaged on disk or on their way from a server."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from data_prep.dataset.shards import DataError
from data_prep.sources import storage
from pretrain.config.data import CacheConfig
from pretrain.data.lanes import Dataset, Mix
from pretrain.data.loader import Loader
from tools.promises import data_sets
from tools.promises.campaign import Promise, Room, check
from tools.promises.servers import Web, faulty

LANES, LENGTH, BATCHES, SHARDS = 2, 64, 40, 4
_BLOCK = 512  # of a tar

Damage = Callable[[bytearray, random.Random], bytes]


def _bit(data: bytearray, choose: random.Random) -> bytes:
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    return bytes(data)


def _cut(data: bytearray, choose: random.Random) -> bytes:
    return bytes(data[: choose.randrange(len(data))])


def _cut_at_a_member(data: bytearray, choose: random.Random) -> bytes:
    return bytes(data[: _BLOCK * choose.randrange(len(data) // _BLOCK)])


def _without_a_block(data: bytearray, choose: random.Random) -> bytes:
    start = _BLOCK * choose.randrange(len(data) // _BLOCK)
    return bytes(data[:start] + data[start + _BLOCK :])


def _zeros(data: bytearray, choose: random.Random) -> bytes:
    start = _BLOCK * choose.randrange(len(data) // _BLOCK)
    size = choose.choice([_BLOCK, 4096])
    data[start : start + size] = bytes(len(data[start : start + size]))
    return bytes(data)


def _twice(data: bytearray, choose: random.Random) -> bytes:
    return bytes(data + data)


def _longer(data: bytearray, choose: random.Random) -> bytes:
    return bytes(data + choose.randbytes(choose.randrange(1, 2000)))


def _two_blocks_swapped(data: bytearray, choose: random.Random) -> bytes:
    first, second = choose.sample(range(len(data) // _BLOCK), 2)
    one, other = (slice(_BLOCK * n, _BLOCK * (n + 1)) for n in (first, second))
    data[one], data[other] = data[other], data[one]
    return bytes(data)


DAMAGES: tuple[Damage, ...] = (
    *(_bit, _cut, _cut_at_a_member, _without_a_block, _zeros, _twice, _longer),
    _two_blocks_swapped,
)


def never_shortens(seed: int, room: Room) -> dict[str, Any]:
    """One shard is damaged, or another one's bytes; read from disk or through a web server."""
    choose = random.Random(seed)
    whole = room.made("whole", lambda path: data_sets.small(path, seed=1, count=SHARDS))
    expected = _expected(room)
    served = room.here / "served"
    shutil.copytree(whole, served / "set")
    name = f"shard-{choose.randrange(SHARDS):05d}.tar"
    what = _damage(served / "set" / name, whole, choose)
    changed = (served / "set" / name).read_bytes() != (whole / name).read_bytes()
    remote = seed % 2 == 1
    read = _from_a_server if remote else _from_disk
    found, error = read(served, room.here / "cache", choose)
    right = all(map(np.array_equal, found, expected))
    check(right, "a window differs from that of the whole data set")
    if error is None:
        check(not changed and len(found) == BATCHES, "the damage was read in silence")
    else:
        check(name in str(error) or (remote and not changed), f"another cause: {error}")
    return {"shard": name, "damage": what, "remote": remote, "windows": len(found)}


def _damage(path: Path, whole: Path, choose: random.Random) -> str:
    damage = choose.choice([*DAMAGES, None, "another"])
    if damage is None:
        return "none"
    if isinstance(damage, str):
        names = sorted(one.name for one in whole.glob("*.tar"))
        path.write_bytes((whole / choose.choice(names)).read_bytes())
        return "another shard"
    path.write_bytes(damage(bytearray(path.read_bytes()), choose))
    return damage.__name__.strip("_")


def _expected(room: Room) -> list[np.ndarray]:
    def make(path: Path) -> None:
        path.mkdir()
        found, error = _windows(Dataset(room.shared / "whole"))
        assert error is None
        np.save(path / "windows.npy", np.stack(found))

    return list(np.load(room.made("expected", make) / "windows.npy"))


def _windows(dataset: Dataset) -> tuple[list[np.ndarray], DataError | None]:
    """The windows of all lanes up to an error, and the error."""
    found = []
    try:
        with Loader(Mix([dataset]), range(LANES), LANES, LENGTH, 1, None, 2, 1) as loader:
            for _ in range(BATCHES):
                found.append(next(loader).tokens.numpy())
    except DataError as error:
        return found, error
    return found, None


def _from_disk(
    served: Path, cache: Path, choose: random.Random
) -> tuple[list[np.ndarray], DataError | None]:
    return _windows(Dataset(served / "set"))


def _from_a_server(
    served: Path, cache: Path, choose: random.Random
) -> tuple[list[np.ndarray], DataError | None]:
    waits = mock.patch.object(storage, "_WAITS", (0.01, 0.01, 0.01))
    with waits, Web(served) as web, faulty(web.port) as proxy:
        proxy.faults.extend(choose.choices([None, "reset", "refuse"], [8, 1, 1], k=200))
        place = f"http://127.0.0.1:{proxy.port}/set"
        try:
            dataset = Dataset(place, CacheConfig(str(cache), 1.0))
        except DataError as error:  # the network stayed broken
            return [], error
        return _windows(dataset)


PROMISES = (
    Promise(
        8, "shards",
        "damaged shards never shorten data in silence, on disk and from object stores",
        1000, "damaged shards", never_shortens,
        how="bits, cuts, blocks left out, zeroed, swapped or doubled, another shard's bytes; half "
        "of them read over HTTP through a proxy that resets and refuses connections.",
    ),
)  # fmt: skip
