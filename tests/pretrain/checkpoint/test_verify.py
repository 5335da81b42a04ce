"""Every damage is found by sizes and checksums before anything is parsed, and passed over."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import load, manifest
from pretrain.checkpoint.load import Checkpoint, Found, newest_good
from pretrain.checkpoint.ranks import Ranks, SoloRanks
from pretrain.checkpoint.verify import still_good, verify

TENSORS = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
LAYOUTS = ["rank-00000-of-00002.json", "rank-00001-of-00002.json"]
SEALS = ["manifest.json", "manifest.sha256"]
FILES = [*TENSORS, *LAYOUTS, *SEALS]

# Damages the checkpoint in `newest`; `older` is a good one.
Damage = Callable[[Path, Path], None]


def flip(name: str, seed: int) -> Damage:
    def damage(newest: Path, older: Path) -> None:
        data = bytearray((newest / name).read_bytes())
        bit = random.Random(seed).randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (newest / name).write_bytes(data)

    return damage


def cut(name: str, seed: int) -> Damage:
    def damage(newest: Path, older: Path) -> None:
        size = (newest / name).stat().st_size
        os.truncate(newest / name, random.Random(seed).randrange(size) if seed else 0)

    return damage


def grow(name: str) -> Damage:
    def damage(newest: Path, older: Path) -> None:
        with (newest / name).open("ab") as file:
            file.write(b" ")

    return damage


def remove(*names: str) -> Damage:
    return lambda newest, older: [(newest / name).unlink() for name in names] and None


def swap(one: str, other: str) -> Damage:
    def damage(newest: Path, older: Path) -> None:
        first, second = (newest / one).read_bytes(), (newest / other).read_bytes()
        (newest / one).write_bytes(second)
        (newest / other).write_bytes(first)

    return damage


def take_from_older(*names: str) -> Damage:
    return lambda newest, older: [shutil.copy(older / n, newest / n) for n in names] and None


def link(name: str) -> Damage:
    def damage(newest: Path, older: Path) -> None:
        elsewhere = newest.parent / "elsewhere"
        (newest / name).rename(elsewhere)
        (newest / name).symlink_to(elsewhere)

    return damage


def directory_instead(name: str) -> Damage:
    def damage(newest: Path, older: Path) -> None:
        (newest / name).unlink()
        (newest / name).mkdir()

    return damage


def forge(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another manifest, under a checksum that agrees with it."""

    def damage(newest: Path, older: Path) -> None:
        value = json.loads((newest / "manifest.json").read_bytes())
        changed = change(value)
        data = changed if isinstance(changed, bytes) else json.dumps(value).encode()
        (newest / "manifest.json").write_bytes(data)
        seal = f"{hashlib.sha256(data).hexdigest()}  manifest.json\n"
        (newest / "manifest.sha256").write_text(seal)

    return damage


def silent_damages() -> Iterator[tuple[str, Damage]]:
    """Damages after which no manifest but a genuine one may reach the parser."""
    for name in FILES:
        yield from ((f"bit flipped in {name} {i}", flip(name, i)) for i in range(24))
        yield from ((f"{name} cut {i}", cut(name, i)) for i in range(8))
        yield f"{name} grown", grow(name)
        yield f"{name} missing", remove(name)
        yield f"{name} of the older", take_from_older(name)
        yield f"{name} a link", link(name)
        yield f"{name} a directory", directory_instead(name)
    for one, other in itertools.combinations(FILES, 2):
        yield f"{one} and {other} swapped", swap(one, other)
    yield "manifest and checksum of the older", take_from_older(*SEALS)
    yield "all files missing", remove(*FILES)


FOREIGN: dict[str, Callable[[Path], object]] = {
    ".DS_Store": lambda path: path.write_bytes(bytes(4)),
    "._manifest.json": lambda path: path.write_bytes(bytes(4)),
    "Thumbs.db": lambda path: path.write_text("small"),
    ".nfs0001": lambda path: path.write_bytes(b""),
    "notes.txt": lambda path: path.write_text("mine"),
    "rank-00002-of-00003.json": lambda path: path.write_text("{}"),
    "manifest.json.tmp": lambda path: path.write_text("{}"),
    "@eaDir": lambda path: path.mkdir(),
    ".snapshot": lambda path: path.symlink_to("/nowhere"),
    "state.pt": lambda path: path.write_bytes(b"\x80\x04."),
    "pipe": os.mkfifo,
}


def forged_manifests() -> Iterator[tuple[str, Damage]]:
    """Manifests that are sealed, but are not of this checkpoint or of any."""
    texts = {
        "empty": b"",
        "list": b"[]",
        "null": b"null",
        "object": b"{}",
        "deep": b"[" * 100_000,
        "not UTF-8": b"\xff\xfe\xfa",
        "number for files": b'{"format_version": 1, "step": 2, "ranks": 2, "files": 3}',
    }
    yield from ((f"manifest {kind}", forge(lambda _, t=text: t)) for kind, text in texts.items())
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "another version": lambda value: value.update(format_version=0),
        "another step": lambda value: value.update(step=1),
        "three ranks": lambda value: value.update(ranks=3),
        "huge ranks": lambda value: value.update(ranks="many"),
        "a file less": lambda value: value["files"].pop(LAYOUTS[0]) and None,
        "a path": lambda value: value["files"].update({"../x": {"bytes": 0, "sha256": ""}}),
        "no tensors": lambda value: value.pop("tensors") and None,
    }
    yield from ((f"manifest with {kind}", forge(change)) for kind, change in changes.items())


SILENT = dict(silent_damages())
FORGED = dict(forged_manifests())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, save_on_ranks: Any) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    for step in (1, 2):
        save_on_ranks(root, step)
    return root


@pytest.fixture
def root(tmp_path: Path, pristine: Path) -> Path:
    """Steps 1 and 2, both good."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def assert_refused(root: Path, damage: Damage, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The newest is passed over for the older; what reached a parser meanwhile."""
    newest, older = root / "step-00000002", root / "step-00000001"
    damage(newest, older)
    parsed: list[bytes] = []
    loads = json.loads

    def reached(*_: object, **__: object) -> None:
        raise AssertionError("safetensors was asked to open a file before all were verified")

    with monkeypatch.context() as patched:
        patched.setattr(load, "safe_open", reached)
        patched.setattr(manifest.json, "loads", lambda data: parsed.append(data) or loads(data))
        found = newest_good(root, SoloRanks())
    assert found.path == older
    ((name, reason),) = found.passed_over
    assert name == "step-00000002"
    assert reason
    return parsed


def test_at_least_two_hundred_damages_are_tried() -> None:
    assert len(SILENT) + len(FORGED) >= 200


@pytest.mark.parametrize("kind", SILENT)
def test_damage_is_refused_before_it_is_parsed_and_the_older_one_is_taken(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = {path.read_bytes() for path in root.glob("*/manifest.json")}
    parsed = assert_refused(root, SILENT[kind], monkeypatch)
    assert set(parsed) <= genuine


@pytest.mark.parametrize("kind", FORGED)
def test_a_sealed_manifest_that_is_not_of_this_checkpoint_is_refused(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(root, FORGED[kind], monkeypatch)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_system_laid_beside_the_files_is_said_and_makes_nothing_bad(
    root: Path, name: str, tensors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    newest = root / "step-00000002"
    FOREIGN[name](newest / name)
    with caplog.at_level(logging.WARNING):
        found = newest_good(root, SoloRanks())
    assert found == Found(newest, ())
    assert caplog.messages == [f"checkpoint {newest.name}: not part of it, and not read: {name}"]
    assert still_good(newest)
    with Checkpoint(newest) as checkpoint:
        assert checkpoint.tensor("random").equal(tensors(2)["random"])


def test_the_older_one_is_whole_after_the_fall_back(root: Path, tensors: Any) -> None:
    flip(TENSORS[1], 5)(root / "step-00000002", root)
    found = newest_good(root, SoloRanks())
    assert found.path is not None
    with Checkpoint(found.path) as checkpoint:
        assert checkpoint.step == 1
        assert checkpoint.trainer == {"step": 1}
        assert checkpoint.tensor("random").equal(tensors(1)["random"])


def test_a_directory_under_another_steps_name_is_refused(root: Path) -> None:
    (root / "step-00000002").rename(root / "step-00000003")
    assert verify(root / "step-00000003", SoloRanks()) == (
        "manifest.json is of step 2, not of this directory"
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", FILES)
def test_whichever_rank_finds_the_damage_all_ranks_tell_the_same(
    root: Path, run_ranks: Any, size: int, name: str
) -> None:
    flip(name, 1)(root / "step-00000002", root)

    def work(ranks: Ranks) -> str | None:
        return verify(root / "step-00000002", ranks)

    reasons = run_ranks(size, work)
    assert len(set(reasons)) == 1
    told = name if name not in SEALS else "manifest.json differs from its checksum"
    assert told in str(reasons[0])


def test_the_reason_names_the_file_and_what_is_wrong_with_it(root: Path) -> None:
    newest = root / "step-00000002"
    size = (newest / TENSORS[0]).stat().st_size
    cut(TENSORS[0], 0)(newest, newest)
    assert verify(newest, SoloRanks()) == f"{TENSORS[0]} has 0 bytes, expected {size}"
    (newest / TENSORS[0]).unlink()
    assert verify(newest, SoloRanks()) == f"{TENSORS[0]}: missing"
    assert verify(root / "step-00000009", SoloRanks()) == "is not a directory"
