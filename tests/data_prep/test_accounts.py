"""What became of records is written, read and added up."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep import accounts
from data_prep.accounts import ACCOUNTS, REJECTS, Account, Accounts, Sample
from data_prep.dataset.shards import DataError, write_manifest
from tools.promises.data_sets import small


def _accounts(source: str, samples: int) -> Accounts:
    found = Accounts()
    account = found.of(source)
    account.read, account.accepted, account.rejected = 3 + samples, 1, 1
    account.dropped["short"] += samples
    account.duplicates["near"] += 1
    account.changed["ftfy"] += 2
    for line in range(samples):
        found.sample(source, "short", f"id-{line}", "a.txt", line, "x" * 999)
    return found


def test_accounts_come_back_from_their_file_and_add_up(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"made by a data-prep from before 2026-11-24"):
        accounts.load(tmp_path)
    total = Accounts()
    for part in (_accounts("b", 4), _accounts("a", 1), _accounts("b", 3)):
        total.add(part.plain())
    (tmp_path / ACCOUNTS).write_text(json.dumps(total.plain()))
    found = accounts.load(tmp_path)
    assert found.sources == total.sources
    assert found.plain() == json.loads((tmp_path / ACCOUNTS).read_text())
    assert (found.total("read"), found.total("dropped"), found.total("changed")) == (17, 8, 6)
    assert found.of("b") == Account(13, 2, 2, {"short": 7}, {"near": 2}, {"ftfy": 4})  # type: ignore[arg-type]
    # Five of a reason and a source, their texts cut.
    assert [(one.source, one.line) for one in found.samples] == [
        *(("a", 0), ("b", 0), ("b", 1), ("b", 2), ("b", 3), ("b", 0))
    ]
    assert {len(sample.text) for sample in found.samples} == {300}


def test_accounts_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    wrong = _accounts("a", 1)
    wrong.of("a").accepted += 1
    (tmp_path / ACCOUNTS).write_text(json.dumps(wrong.plain()))
    with pytest.raises(DataError, match=r"cleaning\.json: the records of 'a' do not add up"):
        accounts.load(tmp_path)
    for damaged in ("{}", "[]", "{", '{"sources": {}, "samples": [{"id": 1}]}'):
        (tmp_path / ACCOUNTS).write_text(damaged)
        with pytest.raises(DataError, match=r"cleaning\.json: cannot be read"):
            accounts.load(tmp_path)


def _reject(file: str, reason: str = "not an object") -> str:
    return json.dumps({"file": file, "line": 7, "offset": 9, "reason": reason, "detail": "a list"})


def test_rejects_are_counted_by_reason_and_a_cut_list_is_refused(tmp_path: Path) -> None:
    reasons = ["b", "c", "a", "c"]
    (tmp_path / REJECTS).write_text("\n".join(_reject("a/x", reason) for reason in reasons))
    assert next(accounts.rejects(tmp_path)) == Sample("", "b", "", "a/x", 7, "a list")
    assert list(accounts.rejected_by_reason(tmp_path, 4).items()) == [("c", 2), ("a", 1), ("b", 1)]
    with pytest.raises(DataError, match=r"rejects\.jsonl: lists 4 records, the manifest says 5"):
        accounts.rejected_by_reason(tmp_path, 5)
    (tmp_path / REJECTS).write_text('{"file": "a"')
    with pytest.raises(DataError, match=r"rejects\.jsonl: cannot be read"):
        accounts.rejected_by_reason(tmp_path, 1)


def test_accounts_of_other_numbers_than_the_manifest_says_are_a_problem(tmp_path: Path) -> None:
    manifest = small(tmp_path, seed=0, documents=3, count=1)
    assert accounts.verify(tmp_path) == [], "made by another program, without any"
    told = Accounts()
    told.of("test").read = told.of("test").accepted = 3
    (tmp_path / REJECTS).touch()
    (tmp_path / ACCOUNTS).write_text(json.dumps(told.plain()))
    assert accounts.verify(tmp_path) == accounts.problems(tmp_path, manifest) == []
    for kind, counts in (
        ("accepted", "counts 3 accepted, the manifest says 2"),
        ("rejected", "counts 0 rejected, the manifest says 2"),
        ("dropped", "counts 0 dropped, the manifest says 2"),
        ("duplicates", "counts 0 duplicates, the manifest says 2"),
    ):
        changed = {"documents" if kind == "accepted" else kind: 2}
        found = accounts.problems(tmp_path, replace(manifest, **changed))
        assert found[0] == f"{tmp_path / ACCOUNTS}: {counts}"
        # The list of rejects has another number, too.
        assert len(found) == 1 + (kind == "rejected")
    (tmp_path / "manifest.json").write_text("{")
    assert len(accounts.verify(tmp_path)) == 1


def test_a_rewritten_list_of_equal_numbers_is_found_by_its_sha256(tmp_path: Path) -> None:
    manifest = replace(small(tmp_path, seed=0, documents=3, count=1), rejected=2)
    told = Accounts()
    account = told.of("test")
    account.read, account.accepted, account.rejected = 5, 3, 2
    lists = {ACCOUNTS: json.dumps(told.plain()), REJECTS: f"{_reject('a')}\n{_reject('b')}\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    reports = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in lists.items()}
    write_manifest(tmp_path, replace(manifest, reports=reports))
    assert accounts.verify(tmp_path) == []
    for name, old, new in ((REJECTS, "not an object", "blank line"), (ACCOUNTS, "[]", "[ ]")):
        (tmp_path / name).write_text(lists[name].replace(old, new))
        (found,) = accounts.verify(tmp_path)
        assert found.startswith(f"{tmp_path / name}: sha256 differs from the manifest's")
        (tmp_path / name).unlink()
        assert accounts.verify(tmp_path)[0].startswith(f"{tmp_path / name}: is missing; copy it")
        (tmp_path / name).write_text(lists[name])
    # As data sets of earlier versions: their numbers alone are compared.
    write_manifest(tmp_path, manifest)
    assert "reports" not in json.loads((tmp_path / "manifest.json").read_bytes())
    (tmp_path / REJECTS).write_text(f"{_reject('a', 'blank line')}\n{_reject('b')}\n")
    assert accounts.verify(tmp_path) == []
