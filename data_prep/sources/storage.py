"""Where input files are stored: on a local path, or under any URL that fsspec can read.

Local files are opened directly. A remote file is read in ranges, each of which is requested again
where the network fails. Credentials come from where the libraries look for them
(AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ~/.netrc, FSSPEC_S3_ANON), never from here.
fsspec has a thread and connections for each process: nothing of it is passed to a worker.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

T = TypeVar("T")

BLOCK_BYTES = 8 << 20
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_WEB = ("http", "https")
# Seconds before each further attempt; for other servers the libraries retry by themselves.
_WAITS = (0.5, 2.0, 5.0)
_NO_RANGES = "its server does not support byte ranges; copy the file"
_TRANSIENT = (408, 425, 429)
# Errors, and bases of errors, of connections that were not made, or ended before the answer did.
_OF_THE_NETWORK = {
    *("ConnectionError", "TimeoutError", "ClientConnectionError", "ClientPayloadError"),
    *("HTTPClientError", "IncompleteReadError"),
}
# In order: the most reliable sign that a file is still the same comes first.
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified")


class UnansweredError(OSError):
    """A server that was not reached, or could not answer: it may later, without any change here."""


@dataclass(frozen=True)
class Status:
    """Size in bytes, and what changes with the file: its modification time in ns, or an ETag."""

    bytes: int
    version: str


@dataclass(frozen=True)
class Listed:
    """A file that a pattern matches; `relative` is its path below the pattern's fixed part.

    `place` tells a local file from others, whatever its path: device and inode.
    """

    path: str
    relative: str
    status: Status
    place: tuple[int, int] | None = None


def is_url(path: str | Path) -> bool:
    """Whether it is a URL; else it is a local path."""
    return bool(_URL.match(str(path)))


def status(path: str) -> Status:
    """The current status of the file. Raises OSError with the path or URL and the cause."""
    if not is_url(path):
        return local_status(os.stat(path))  # noqa: PTH116
    system, name = _system(path)
    return _status(path, _asked(path, lambda: system.info(name)))


def local_status(found: os.stat_result) -> Status:
    """The status of a local file."""
    return Status(found.st_size, str(found.st_mtime_ns))


def open_binary(path: str, block: int = BLOCK_BYTES) -> BinaryIO:
    """The file's bytes, seekable; of a remote one in ranges of `block` bytes, or as read if 0."""
    if not is_url(path):
        return open(path, "rb")  # noqa: PTH123
    system, name = _system(path)
    opened: Any = _asked(path, lambda: system.open(name, "rb", BLOCK_BYTES, cache_type="none"))
    if getattr(opened, "size", 0) is None:
        # fsspec can only stream it: it is empty, or its server refuses ranges.
        opened.close()
        if status(path).bytes:
            raise OSError(errno.EIO, _NO_RANGES, path)
        return io.BytesIO()
    if cache := getattr(opened, "cache", None):
        fetch, size = cache.fetcher, cache.size
        cache.fetcher = lambda start, stop: _asked(
            path, lambda: _range(fetch, start, min(stop, size))
        )
    return io.BufferedReader(opened, block) if block else opened


def sha256_of(path: str) -> str:
    """Hex sha256 of the file's bytes. Raises OSError with the path or URL and the cause."""
    digest = hashlib.sha256()
    with open_binary(path) as raw:
        while block := raw.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _range(fetch: Callable[[int, int], bytes], start: int, stop: int) -> bytes:
    data = fetch(start, stop)
    if len(data) != stop - start:
        raise ConnectionError(f"received {len(data)} of {stop - start} bytes at {start}")
    return data


def is_web(url: str) -> bool:
    """Whether it is a file on the web, which lists no others."""
    return urlsplit(url).scheme in _WEB


def page(url: str) -> Listed:
    """The file at a URL of the web. Raises OSError with the cause."""
    return Listed(url, unquote(urlsplit(url).path).lstrip("/"), status(url))


def entries(url: str, *, below: bool = False) -> list[tuple[str, str, Status | None]]:
    """(URL, path below this one, status) of what is in a directory; of directories no status.

    `below`: of all files below it, if the server can list them at once; else of these alone.
    Raises OSError with the cause where its server gives no answer, ValueError where fsspec or the
    package for this kind of URL is missing. Not fsspec's own glob, which takes every error for an
    empty directory.
    """
    system, directory = _system(url)
    directory = directory.rstrip("/")

    def ask() -> list[dict[str, Any]]:
        system.invalidate_cache()
        try:
            if below and "s3" in system.protocol:
                return list(system.find(directory, detail=True).values())
            return list(system.ls(directory, detail=True))
        except FileNotFoundError as error:
            if _code(error):  # as of a bucket that does not exist
                raise
            return []

    found = []
    for info in _asked(url, ask):
        is_directory, name = info["type"] == "directory", info["name"].rstrip("/")
        if name != info["name"] and not is_directory:
            continue  # the empty object with which consoles and Hadoop mark a directory
        path = system.unstrip_protocol(name)
        if name != directory:
            state = None if is_directory else _status(path, info)
            found.append((path, name[len(directory) :].lstrip("/"), state))
    return found


def _status(url: str, info: dict[str, Any]) -> Status:
    if info.get("size") is None:
        raise OSError(errno.EIO, "its server does not report its size; copy the file", url)
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return Status(info["size"], version)


def _system(url: str) -> tuple[Any, str]:
    """The file system, of this process, and the file's name in it."""
    import fsspec

    if urlsplit(url).scheme in _WEB:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
        # A .gz file stays compressed, whatever its headers say; proxies and ~/.netrc are used.
        plain = {"Accept-Encoding": "identity"}
        client = {"timeout": timeout, "headers": plain, "auto_decompress": False}
        options = client | {"trust_env": True}
        # url_to_fs takes `::`, as of an IPv6 address, for a chain of file systems.
        return fsspec.filesystem(urlsplit(url).scheme, client_kwargs=options), url
    try:
        system, name = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(str(error)) from None
    return system, name


def _asked(url: str, ask: Callable[[], T]) -> T:
    """Call `ask`, again where that may help. Raises OSError with the URL and the cause."""
    waits = _WAITS if urlsplit(url).scheme in _WEB else ()
    for wait in (*waits, None):
        try:
            return ask()
        except Exception as error:
            # fsspec wraps every error on the web into "file not found".
            cause = error.__cause__ or error if isinstance(error, FileNotFoundError) else error
            if wait is None or not _may_pass(cause):
                kind = UnansweredError if _may_pass(cause) and _is_network(cause) else OSError
                raise kind(errno.EIO, _cause(cause), url) from None
        time.sleep(wait)
    raise AssertionError


def _may_pass(error: BaseException) -> bool:
    if code := _code(error):
        return code >= 500 or code in _TRANSIENT
    return not isinstance(error, FileNotFoundError | PermissionError | ValueError | TypeError)


def _is_network(error: BaseException) -> bool:
    """Whether it is the network's or the server's; botocore's and aiohttp's have no base of both.

    Missing credentials are botocore's, too, and no matter of time.
    """
    names = {one.__name__ for one in type(error).__mro__}
    return bool(_code(error) or names & _OF_THE_NETWORK)


def _code(error: BaseException) -> int:
    """The HTTP status that the server answers with; 0: it is another error."""
    return int(getattr(error, "status", 0) or _answer(error).get("HTTPStatusCode", 0))


def _answer(error: BaseException) -> dict[str, Any]:
    """What an S3 server answers: status and message. s3fs raises other errors because of that."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore's
            return {**response.get("ResponseMetadata", {}), **response.get("Error", {})}
    return {}


def _cause(error: BaseException) -> str:
    if "range requests" in str(error) or "Cannot seek" in str(error):
        return _NO_RANGES
    if code := _code(error):
        message = getattr(error, "message", "") or _answer(error).get("Message", "")
        return f"its server answers {code} {message}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return " ".join(str(error).split()) or type(error).__name__
