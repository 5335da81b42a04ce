"""What the loader's benchmark starts beside itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    return importlib.import_module("loader")


@pytest.mark.timeout(60)
def test_the_server_of_a_measurement_that_fails_is_ended(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"bytes")
    with pytest.raises(ZeroDivisionError), bench._served(tmp_path) as url:
        with urlopen(f"{url}/shard") as answer:
            assert answer.read() == b"bytes"
        raise ZeroDivisionError
    with pytest.raises(URLError):
        urlopen(f"{url}/shard")
