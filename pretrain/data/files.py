"""Where the files of a data set are: in a directory, or under a URL, fetched as they are needed.

No torch here: a configuration is checked against the manifest before a rank is launched.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.dataset import durable, shards
from data_prep.dataset.shards import MANIFEST, DataError, Manifest, ShardInfo
from data_prep.dataset.wording import counted
from data_prep.sources import storage
from pretrain.config.data import CacheConfig
from pretrain.data.cache import FileCache

_BLOCK_BYTES = 1 << 20


class UnreachableError(DataError):
    """A data set whose server does not answer, which is no mistake: the same may work later."""


class Files(ABC):
    """The files of a data set at `location`, a directory or a URL."""

    def __init__(self, location: str, manifest: bytes) -> None:
        self.location = location
        self.manifest = shards.parsed_manifest(f"{location}/{MANIFEST}", manifest)
        self.manifest_sha256 = hashlib.sha256(manifest).hexdigest()

    @abstractmethod
    def shard(self, info: ShardInfo, checked: bool) -> contextlib.AbstractContextManager[Path]:
        """A local file with the shard's bytes, which stays there in this block.

        Its size and sha256 are checked unless they were `checked` before. Raises DataError.
        """

    def tokenizer(self) -> bytes:
        """The bytes of the tokenizer's file, whose sha256 is checked. Raises DataError."""
        info = self.manifest.tokenizer
        data = self._bytes(info.file)
        if hashlib.sha256(data).hexdigest() != info.sha256:
            raise DataError(
                f"{self.location}/{info.file}: its sha256 is not the manifest's; copy the data set "
                "again"
            )
        return data

    @abstractmethod
    def _bytes(self, name: str) -> bytes:
        """The bytes of a small file. Raises DataError."""


class LocalFiles(Files):
    """A data set in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        super().__init__(str(directory), shards.manifest_bytes(directory))

    def shard(self, info: ShardInfo, checked: bool) -> contextlib.AbstractContextManager[Path]:
        """See `Files.shard`."""
        path = self._directory / info.name
        if not checked:
            shards.check_shard(path, info)
        return contextlib.nullcontext(path)

    def _bytes(self, name: str) -> bytes:
        path = self._directory / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None


class RemoteFiles(Files):
    """A data set under a URL; its shards are fetched into a cache, which evicts them again."""

    def __init__(self, url: str, cache: CacheConfig) -> None:
        self._url = url.rstrip("/")
        super().__init__(self._url, _fetched(f"{self._url}/{MANIFEST}"))
        self._cache = FileCache(cache.path, cache.bytes)

    def shard(self, info: ShardInfo, checked: bool) -> contextlib.AbstractContextManager[Path]:
        """See `Files.shard`; the cache knows itself what it has checked."""
        name = f"{self._url}/{info.name}"
        return self._cache.held(name, info.sha256, info.bytes, partial(_blocks, name))

    def _bytes(self, name: str) -> bytes:
        return _fetched(f"{self._url}/{name}")


def files_of(location: str | Path, cache: CacheConfig) -> Files:
    """The files of the data set in a directory or under a URL. Raises DataError."""
    if storage.is_url(location):
        return RemoteFiles(str(location), cache)
    return LocalFiles(Path(location))


def name_of(location: str | Path) -> str:
    """The last part of a directory's path or of a URL."""
    text = str(location).rstrip("/")
    return text.rpartition("/")[2] if storage.is_url(text) else Path(text).resolve().name


def manifest_of(location: str | Path) -> Manifest:
    """The manifest of the data set in a directory or under a URL. Raises DataError."""
    if not storage.is_url(location):
        if (url := durable.url_of(Path(location))) and not Path(location).exists():
            raise DataError(f"{location}: a URL has two slashes behind the colon; write {url}")
        return shards.read_manifest(Path(location))
    name = f"{str(location).rstrip('/')}/{MANIFEST}"
    return shards.parsed_manifest(name, _fetched(name))


def incomplete(location: str | Path, manifest: Manifest) -> list[str]:
    """What the data set in a directory lacks of its files: shards by name, and its tokenizer.

    No shard is read. Of a data set under a URL nothing is looked for: each file is fetched later.
    """
    if storage.is_url(location):
        return []
    directory, found = Path(location), []
    there = {path.name for path in directory.iterdir()}
    if missing := [info.name for info in manifest.shards if info.name not in there]:
        more = f" and {counted(len(missing) - 1, 'other shard')}" if missing[1:] else ""
        are = "are" if missing[1:] else "is"
        found.append(f"{directory / missing[0]}{more} {are} missing; copy the data set again")
    try:
        LocalFiles(directory).tokenizer()
    except DataError as error:
        found.append(str(error))
    return found


def _fetched(url: str) -> bytes:
    return b"".join(_blocks(url))


def _blocks(url: str) -> Iterator[bytes]:
    """The bytes under a URL. Raises DataError with the cause, or UnreachableError: it may pass."""
    try:
        with storage.open_binary(url) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kind = UnreachableError if isinstance(error, storage.UnansweredError) else DataError
        raise kind(
            f"{url}: cannot be fetched: {cause}; check the URL, the credentials and the network"
        ) from None
