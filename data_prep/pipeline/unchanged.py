"""Whether the input files are still those that a finished data set was made of.

Sizes and sha256 are in the manifest. What is known of a file without reading it, its modification
time or ETag, is in a file of its own: the manifest is the same wherever the input lies.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from data_prep.dataset import durable
from data_prep.dataset.shards import InputInfo, Manifest
from data_prep.pipeline.workspace import Work
from data_prep.sources import storage
from data_prep.sources.storage import Status

VERSIONS = "inputs.json"
"""The file of the modification times and ETags, beside the manifest."""


def write(work: Work) -> None:
    """Record which versions of its files the data set is made of."""
    versions = {name: found.version for name, found in _surveyed(work).items()}
    durable.write_json(work.output / VERSIONS, versions)


def changed(work: Work, manifest: Manifest) -> list[str]:
    """The names of files that are not those of the manifest, or of which there is one alone.

    A file of the same size but another version, or on a server that tells none, is hashed, if its
    hash is known: of one that was not read to its end (`limit`) it is not. Of a data set without a
    record of versions, as earlier ones are, the sizes alone are compared.
    """
    now, then = _listed(work), {file.path: file for file in manifest.inputs}
    names = now.keys() | then.keys()
    sizes = [name for name in names if not _is_as_long(now.get(name), then.get(name))]
    versions = _recorded(work)
    if sizes or versions is None:
        return sorted(sizes)
    return sorted(
        name
        for name, (path, status) in now.items()
        if not _is_same(versions.get(name), status.version, then[name].sha256)
        and not _holds(path, then[name].sha256)
    )


def renew(work: Work) -> None:
    """Record the present versions of unchanged files, so that none is hashed another time."""
    now = {name: status.version for name, (_, status) in _listed(work).items()}
    if _recorded(work) not in (None, now):
        # A finished data set may be where nothing can be written.
        with contextlib.suppress(OSError):
            durable.write_json(work.output / VERSIONS, now)


def _is_same(then: str | None, now: str, sha256: str) -> bool:
    """Whether a file of the same size need not be read; without a version it is, if that helps."""
    return then == now and bool(now or not sha256)


def _holds(path: str, sha256: str) -> bool:
    return bool(sha256) and storage.sha256_of(path) == sha256


def _recorded(work: Work) -> dict[str, str] | None:
    """The version of each file, by its name; None where they are not recorded."""
    try:
        plain = json.loads((work.output / VERSIONS).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}  # damaged: all is hashed
    return plain if isinstance(plain, dict) else {}


def _listed(work: Work) -> dict[str, tuple[str, Status]]:
    """(path, status) of each file of the run, by its name."""
    read = {file.name: (file.path, file.listed) for file in work.files}
    return read | {name: (str(path), _status(path)) for name, path in work.evaluation_files.items()}


def _surveyed(work: Work) -> dict[str, Status]:
    """The status of each file when it was read."""
    read = {file.name: found.status for file, found in zip(work.files, work.surveys, strict=True)}
    return read | {name: _status(path) for name, path in work.evaluation_files.items()}


def _status(path: Path) -> Status:
    return storage.status(str(path))


def _is_as_long(now: tuple[str, Status] | None, then: InputInfo | None) -> bool:
    return now is not None and then is not None and now[1].bytes == then.bytes
