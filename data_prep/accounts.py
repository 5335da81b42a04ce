"""What became of every record: read = accepted + rejected + dropped + duplicates, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.dataset import shards
from data_prep.dataset.parsing import json_value
from data_prep.dataset.shards import DataError, Manifest
from data_prep.dataset.wording import counted

ACCOUNTS = "cleaning.json"
REJECTS = "rejects.jsonl"

# Samples of what was left out, for each source and reason, and characters of each.
_SAMPLES = 5
SAMPLE_CHARACTERS = 300


@dataclass
class Account:
    """A source's records. `changed` counts documents that a step altered, by step."""

    read: int = 0
    accepted: int = 0
    rejected: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    duplicates: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def is_whole(self) -> bool:
        """Whether every record that was read is accounted for."""
        left_out = self.dropped.total() + self.duplicates.total()
        return self.read == self.accepted + self.rejected + left_out


@dataclass(frozen=True)
class Sample:
    """A record that is not in the data set. `text` is how it begins; of a reject, what is wrong."""

    source: str
    reason: str
    id: str
    file: str
    line: int
    text: str


class Accounts:
    """The accounts of all sources, and samples of what was left out."""

    def __init__(self) -> None:
        self.sources: dict[str, Account] = {}
        self._samples: dict[tuple[str, str], list[Sample]] = {}

    @property
    def samples(self) -> list[Sample]:
        """By source and reason, those of one reason in the order in which they were added."""
        return [sample for key in sorted(self._samples) for sample in self._samples[key]]

    def of(self, source: str) -> Account:
        """The source's account."""
        if source not in self.sources:
            self.sources[source] = Account()
        return self.sources[source]

    def sample(self, source: str, reason: str, id: str, file: str, line: int, text: str) -> None:
        """Keep the beginning of the text, unless there are samples enough of the reason."""
        if self.wants_sample(source, reason):
            sample = Sample(source, reason, id, file, line, text[:SAMPLE_CHARACTERS])
            self._samples.setdefault((source, reason), []).append(sample)

    def wants_sample(self, source: str, reason: str) -> bool:
        """Whether there are too few samples of the reason yet."""
        return len(self._samples.get((source, reason), [])) < _SAMPLES

    def total(self, kind: str) -> int:
        """Records of one kind over all sources, by the name of an account's field."""
        values = [getattr(account, kind) for account in self.sources.values()]
        return sum(value if isinstance(value, int) else value.total() for value in values)

    def add(self, plain: Mapping[str, Any]) -> None:
        """Add what `plain()` of other records gave."""
        for name, numbers in plain["sources"].items():
            account = self.of(name)
            account.read += numbers["read"]
            account.accepted += numbers["accepted"]
            account.rejected += numbers["rejected"]
            account.dropped.update(numbers["dropped"])
            account.duplicates.update(numbers["duplicates"])
            account.changed.update(numbers["changed"])
        for sample in plain["samples"]:
            self.sample(**sample)

    def plain(self) -> dict[str, Any]:
        """JSON-able; the order does not depend on the order in which records were added."""
        return {
            "sources": {name: vars(account) for name, account in sorted(self.sources.items())},
            "samples": [vars(sample) for sample in self.samples],
        }


def load(directory: Path) -> Accounts:
    """The accounts of a data set. Raises DataError where they cannot be read or do not add up."""
    path, accounts = directory / ACCOUNTS, Accounts()
    try:
        accounts.add(json_value(path.read_bytes()))
        wrong = [name for name, account in accounts.sources.items() if not account.is_whole()]
    except FileNotFoundError:
        raise DataError(
            f"{path}: is missing: lost, or the data set was made by a data-prep from before "
            "2026-11-24; copy it again, report on it with that version, or prepare it again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: cannot be read; prepare the data set again") from None
    if wrong:
        raise DataError(f"{path}: the records of {wrong[0]!r} do not add up to those read")
    return accounts


def verify(directory: Path) -> list[str]:
    """The problems of a data set and of what it says became of the records; empty: it is whole.

    Reads all of it. One sentence per file, as `shards.verify` gives them.
    """
    found = shards.verify(directory)
    try:
        manifest = shards.read_manifest(directory)
    except DataError:
        return found
    return found + problems(directory, manifest)


def problems(directory: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the accounts and the list of rejects of a data set; one sentence each.

    A data set that has neither, and had no rejects, was not made by data-prep, and needs none.
    """
    paths = (directory / ACCOUNTS, directory / REJECTS)
    is_ours = manifest.rejected or manifest.reports or any(path.exists() for path in paths)
    if not is_ours:
        return []
    found = []
    for path, check in zip(paths, (_check_accounts, _check_rejects), strict=True):
        try:
            # A changed reason or detail leaves all numbers as they were.
            if sha256 := manifest.reports.get(path.name):
                shards.check_file(path, sha256)
            check(directory, manifest)
        except DataError as error:
            found.append(str(error))
    return found


def _check_accounts(directory: Path, manifest: Manifest) -> None:
    accounts = load(directory)
    numbers = {"accepted": manifest.documents}
    numbers |= {name: getattr(manifest, name) for name in ("rejected", "dropped", "duplicates")}
    for name, expected in numbers.items():
        if (total := accounts.total(name)) != expected:
            path = directory / ACCOUNTS
            raise DataError(f"{path}: counts {total} {name}, the manifest says {expected}")


def _check_rejects(directory: Path, manifest: Manifest) -> None:
    rejected_by_reason(directory, manifest.rejected)


def rejects(directory: Path) -> Iterator[Sample]:
    """The rejected records in order, without a source. Raises DataError where they are damaged."""
    path = directory / REJECTS
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                one = json_value(line)
                yield Sample("", one["reason"], "", one["file"], one["line"], one["detail"])
    except FileNotFoundError:
        raise DataError(
            f"{path}: is missing; copy it again, or prepare the data set again"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: cannot be read; prepare the data set again") from None


def rejected_by_reason(directory: Path, expected: int) -> dict[str, int]:
    """Rejected records by reason, the commonest first.

    Raises DataError where the list cannot be read or does not hold the `expected` number.
    """
    counts = Counter(sample.reason for sample in rejects(directory))
    if counts.total() != expected:
        path = directory / REJECTS
        raise DataError(
            f"{path}: lists {counted(counts.total(), 'record')}, the manifest says {expected}"
        )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
