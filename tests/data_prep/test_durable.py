"""Files are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import durable


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with durable.replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_failed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    durable.write_bytes(path, b"old")
    with pytest.raises(KeyError), durable.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\nfrom data_prep import durable\n"
        "with durable.replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half of something long'); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "f"
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    durable.write_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_bytes_and_names_are_synced_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    seen = []
    sync = os.fsync

    def recorded(descriptor: int) -> None:
        seen.append((Path(f"/proc/self/fd/{descriptor}").resolve().name, path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    durable.write_bytes(path, b"data")
    assert seen == [("f.tmp", False), (tmp_path.name, True)]


def test_equal_values_give_equal_json(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "a", {"b": 1, "a": ["\u00e9"]})
    durable.write_json(tmp_path / "b", {"a": ["\u00e9"], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text(encoding="utf-8")) == {"a": ["\u00e9"], "b": 1}
    with pytest.raises(ValueError, match="JSON"):
        durable.write_json(tmp_path / "c", float("nan"))


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "f").write_bytes(data)
    assert durable.sha256_of(tmp_path / "f") == hashlib.sha256(data).hexdigest()
