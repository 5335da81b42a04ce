"""JSON that others wrote."""

from __future__ import annotations

import pytest

from data_prep.dataset.parsing import json_value


def test_a_value_is_read() -> None:
    assert json_value(b'{"a": [1, "\xc3\xbc"]}') == json_value('{"a": [1, "ü"]}') == {"a": [1, "ü"]}


def test_an_integer_of_any_length_is_a_number() -> None:
    assert json_value("[1e2, 12, %s]" % ("9" * 4300)) == [100.0, 12, int("9" * 4300)]
    assert json_value("[12, -%s]" % ("9" * 4301)) == [12.0, float("-inf")]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, '{"a":' * 100_000])
def test_whatever_is_wrong_is_a_value_error(data: str | bytes) -> None:
    with pytest.raises(ValueError):
        json_value(data)
