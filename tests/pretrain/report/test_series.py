"""Records become curves by what they contain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.report import runs
from pretrain.report.series import Family, families, numbers
from tests.pretrain.report.directories import train, written


def found(tmp_path: Path, *records: dict[str, Any]) -> dict[tuple[str, str], Family]:
    return families(runs.read(written(tmp_path / "run", records)))


def test_a_number_is_a_curve_and_what_is_no_measurement_is_none(tmp_path: Path) -> None:
    own = found(tmp_path, train(5), train(10))
    assert {"eta_seconds", "stragglers", "mfu", "kind", "step"}.isdisjoint(k for _, k in own)
    steps, losses = own["train", "loss"].curves[""]
    assert own["train", "loss"].single
    assert (steps.tolist(), losses.tolist()) == ([5, 10], [1.6, 0.8])
    assert found(tmp_path / "b", train(5, mfu=0.4))["train", "mfu"].curves[""][1].tolist() == [0.4]


def test_lists_are_layers_and_heads_their_means(tmp_path: Path) -> None:
    own = found(tmp_path, train(5), train(10, memory_norm=[1.0, None]))
    gates, norms = own["train", "gates"], own["train", "memory_norm"]
    assert gates.layers and norms.layers and not gates.single
    assert {name: y.tolist() for name, (_, y) in gates.curves.items()} == {
        "1": [0.5, 0.5],
        "2": [(0.2 + 0.4) / 2] * 2,
    }
    assert norms.curves["1"][1].tolist() == [5.0, 1.0]
    assert np.isnan(norms.curves["2"][1]).tolist() == [False, True]
    assert np.allclose(norms.mean()[1], [10.0, math.nan], equal_nan=True)


def test_a_mapping_is_a_curve_by_name_and_a_table_one_by_row_and_share() -> None:
    rows = [
        {"task": "passkey", "length": 4096, "depth": 0.5, "exact": 0.25, "token_accuracy": 0.5},
        {"task": "passkey", "length": 8192, "depth": None, "exact": 0.0, "token_accuracy": 1.0},
    ]
    named = numbers({"a": 1, "b": {"c": 2.0}, "e": True, "f": "text", "g": []})
    assert dict(named) == {"a": 1.0, "b c": 2.0}
    assert dict(numbers(rows)) == {
        "passkey 4096 0.5 exact": 0.25,
        "passkey 4096 0.5 token accuracy": 0.5,
        "passkey 8192 exact": 0.0,
        "passkey 8192 token accuracy": 1.0,
    }


def test_a_number_that_is_not_finite_is_nan_however_it_is_written() -> None:
    written_by_others = [None, math.inf, -math.inf, math.nan, 10**400]
    assert all(math.isnan(y) for one in written_by_others for _, y in numbers(one))


def test_records_out_of_order_and_without_the_key_make_one_curve_in_order(tmp_path: Path) -> None:
    own = found(tmp_path, train(10, spikes=2), train(5), train(7, spikes=1))
    steps, values = own["train", "spikes"].curves[""]
    assert (steps.tolist(), values.tolist()) == ([7, 10], [1, 2])
