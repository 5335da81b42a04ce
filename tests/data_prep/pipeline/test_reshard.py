"""Another number of shards: to the byte what the pipeline makes, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import accounts, cli, config
from data_prep.accounts import Accounts
from data_prep.dataset import shards
from data_prep.dataset.settings import SettingsError
from data_prep.dataset.shards import DataError
from data_prep.pipeline import pipeline, reshard
from data_prep.pipeline.workspace import WorkspaceError

DOCUMENTS = 60
Make = Callable[[int], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """What the pipeline makes of one corpus with so many shards; 0: as it sees fit."""
    home = tmp_path_factory.mktemp("reshard")
    source = random.Random(3)
    texts = [
        f"document {n} reads and writes {n * n}. " * source.randrange(1, 40)
        for n in range(DOCUMENTS)
    ]
    lines = [json.dumps({"text": text}) for text in texts]
    (home / "a.jsonl").write_text("\n".join([*lines, "[]", ""]))
    made: dict[int, Path] = {}

    def data_set(count: int) -> Path:
        if count not in made:
            made[count] = home / f"of {count}"
            words = [f"root={home}", f"output={made[count]}", "sources=[{name: s, paths: ['a.*']}]"]
            sizes = ["tokenizer.vocab_size=320", f"shards.count={count}", "shards.tokens=5000"]
            pipeline.run(config.load(None, [*words, *sizes, "workers=1"]))
        return made[count]

    return data_set


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.mark.parametrize(("before", "count"), [(0, 7), (7, 1), (7, 7), (7, DOCUMENTS)])
def test_it_is_to_the_byte_what_the_pipeline_makes(
    make: Make, tmp_path: Path, before: int, count: int
) -> None:
    assert reshard.run(make(before), tmp_path / "set", count)
    assert hashes(tmp_path / "set") == hashes(make(count))
    assert shards.verify(tmp_path / "set") == []


def test_there_and_back_again_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    reshard.run(make(7), tmp_path / "there", 23)
    reshard.run(tmp_path / "there", tmp_path / "back", 7)
    assert hashes(tmp_path / "back") == hashes(make(7))


def test_reports_of_any_name_are_carried_over_and_nothing_else(make: Make, tmp_path: Path) -> None:
    for path in make(7).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "notes.txt").write_bytes(b"{}")
    (tmp_path / "shard-00003.tar.tmp").write_bytes(b"left by a killed writer")
    output = tmp_path.with_name("output")
    reshard.run(tmp_path, output, 2)
    assert hashes(output) == {
        **hashes(make(2)),
        "notes.txt": hashlib.sha256(b"{}").hexdigest(),
    }


def start(source: Path, output: Path) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=slowly, args=(source, output))
    process.start()
    return process


def slowly(source: Path, output: Path) -> None:
    """Slow enough to be killed before it ends, on any machine."""
    write = shards.write_shard
    slow = lambda *given: time.sleep(0.02) or write(*given)  # noqa: E731
    pytest.MonkeyPatch().setattr(shards, "write_shard", slow)
    reshard.run(source, output, 25)


def marks(output: Path) -> int:
    return len(list((output / "work" / "shards").glob("*.json")))


def test_a_killed_command_continues_where_it_was(make: Make, tmp_path: Path) -> None:
    output = tmp_path / "set"
    for goal in (1, 9, 17):
        before = {path: path.stat().st_ino for path in output.glob("*.tar")}
        process = start(make(7), output)
        while marks(output) < goal:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
        kept = [path for path, inode in before.items() if path.stat().st_ino == inode]
        # The last one may have had its name, and not yet its mark.
        assert len(kept) >= len(before) - 1
    reshard.run(make(7), output, 25)
    assert hashes(output) == hashes(make(25))


def test_a_run_that_was_killed_while_it_cleared_up_is_finished(make: Make, tmp_path: Path) -> None:
    reshard.run(make(7), tmp_path / "set", 3)
    (tmp_path / "set" / "work").mkdir()
    assert not reshard.run(make(7), tmp_path / "set", 3)
    assert hashes(tmp_path / "set") == hashes(make(3))


def test_a_damaged_shard_is_named_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    for path in make(7).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "shard-00006.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "shard-00006.tar").write_bytes(data)
    output = tmp_path.with_name("output-of-damaged")
    with pytest.raises(DataError, match=r"shard-00006\.tar: sha256 differs"):
        reshard.run(tmp_path, output, 3)
    assert list(output.glob("*.tar*")) == []
    (tmp_path / "shard-00006.tar").write_bytes((make(7) / "shard-00006.tar").read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(DataError, match=r"tokenizer\.model: is missing, or is not the manifest's"):
        reshard.run(tmp_path, output, 3)
    (tmp_path / "tokenizer.model").write_bytes((make(7) / "tokenizer.model").read_bytes())
    reshard.run(tmp_path, output, 3)
    assert hashes(output) == hashes(make(3))


def test_damaged_accounts_are_listed_by_both_commands_and_not_copied(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, output = tmp_path / "damaged", tmp_path / "output"
    shutil.copytree(make(7), directory)
    assert accounts.verify(directory) == []
    (directory / "rejects.jsonl").unlink()
    (directory / "cleaning.json").write_text("garbage")
    remedy = "copy it again or prepare the data set again; `data-prep verify` lists every problem"
    damage = "sha256 differs from the manifest's: damaged or of another data set"
    expected = [
        f"{directory}/cleaning.json: {damage}; {remedy}",
        f"{directory}/rejects.jsonl: is missing; {remedy}",
    ]
    assert accounts.verify(directory) == expected
    assert cli.main(["verify", str(directory)]) == 1
    assert "\n".join(["damaged: 2 problems", *expected]) in capsys.readouterr().err
    assert cli.main(["reshard", str(directory), "--output", str(output), "--shards", "3"]) == 1
    assert "\n".join(expected) in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["work"]
    for name in ("rejects.jsonl", "cleaning.json"):
        shutil.copyfile(make(7) / name, directory / name)
    (directory / "tokenizer.model").unlink()
    (problem,) = accounts.verify(directory)
    assert "tokenizer.model: is missing" in problem


def test_impossible_requests_are_refused_at_once(make: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as raised:
        reshard.run(make(7), make(7) / "inside", DOCUMENTS + 1)
    assert raised.value.problems == [
        f"--shards: 61 shards cannot be made of {DOCUMENTS} documents, since a document is never "
        "cut; choose 1 to 60",
        f"--output: {make(7) / 'inside'} lies in {make(7)}; give a directory outside of it",
    ]
    (tmp_path / "link").symlink_to(make(7))
    with pytest.raises(SettingsError, match="lies in"):
        reshard.run(make(7), tmp_path / "link", 3)
    with pytest.raises(SettingsError, match="--shards: 0 shards"):
        reshard.run(make(7), tmp_path / "set", 0)
    assert hashes(make(7)).keys() >= {"manifest.json"} and not (make(7) / "work").exists()


def test_another_data_set_in_the_output_is_refused_and_left_alone(
    make: Make, tmp_path: Path
) -> None:
    before = hashes(make(3))
    with pytest.raises(WorkspaceError, match="holds another data set"):
        reshard.run(make(7), make(3), 4)
    assert hashes(make(3)) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match="is not empty, and not what this command started"):
        reshard.run(make(7), tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_one_that_was_started_with_another_number_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(shards, "write_manifest", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reshard.run(make(7), tmp_path / "set", 4)
    with pytest.raises(WorkspaceError, match="not what this command started"):
        reshard.run(make(7), tmp_path / "set", 5)
    assert reshard.run(make(7), tmp_path / "set", 4)


def test_no_more_than_a_document_is_held_in_memory(tmp_path: Path, write_data_set: Any) -> None:
    each = 1 << 14
    manifest = write_data_set(tmp_path / "a", [np.full(each, n) for n in range(400)], 2, 1000)
    told = Accounts()
    told.of("test").read = told.of("test").accepted = manifest.documents
    (tmp_path / "a" / "cleaning.json").write_text(json.dumps(told.plain()))
    (tmp_path / "a" / "rejects.jsonl").touch()
    reshard.run(tmp_path / "a", tmp_path / "imports", 1)
    tracemalloc.start()
    reshard.run(tmp_path / "a", tmp_path / "b", 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shards.verify(tmp_path / "b") == []
    assert peak < 8 * 8 * each < manifest.shards[0].bytes / 5


def test_the_command_says_what_it_made_and_what_was_wrong(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reshard", str(make(7)), "--output", str(tmp_path / "set"), "--shards"]
    assert cli.main([*words, "99"]) == 2
    assert "--shards: 99 shards cannot be made of 60 documents" in capsys.readouterr().err
    assert cli.main([*words, "3"]) == 0
    shown = capsys.readouterr().out
    assert f"in 3 shards, in the order of {make(7)}" in shown and "nothing to do" not in shown
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert cli.main([*words, "3"]) == 0
    assert "is finished already, from the same data set: nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
