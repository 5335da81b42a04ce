"""What became of every record: read = accepted + rejected + dropped + duplicates, by source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ACCOUNTS = "cleaning.json"
REJECTS = "rejects.jsonl"

# Samples of what was left out, for each source and reason; their text is cut to so many characters.
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


class Accounts:
    """The accounts of all sources, and samples of what was left out."""

    def __init__(self) -> None:
        self.sources: dict[str, Account] = {}
        self._samples: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def of(self, source: str) -> Account:
        """The source's account."""
        if source not in self.sources:
            self.sources[source] = Account()
        return self.sources[source]

    def sample(self, source: str, reason: str, id: str, file: str, line: int, text: str) -> None:
        """Keep the text's beginning, unless there are samples enough of the reason."""
        if self.wants_sample(source, reason):
            place = {"source": source, "reason": reason, "id": id, "file": file, "line": line}
            kept = self._samples.setdefault((source, reason), [])
            kept.append({**place, "text": text[:SAMPLE_CHARACTERS]})

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
        """JSON-able, in an order of its own."""
        return {
            "sources": {
                name: {**vars(account), "dropped": dict(account.dropped),
                       "duplicates": dict(account.duplicates), "changed": dict(account.changed)}
                for name, account in sorted(self.sources.items())
            },
            "samples": [sample for key in sorted(self._samples) for sample in self._samples[key]],
        }  # fmt: skip
