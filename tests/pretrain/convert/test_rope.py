"""The rotary embedding of a config.json: what is wrong with it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pretrain.convert import rope
from tests.pretrain.convert.conftest import YARN


@pytest.mark.parametrize(
    "wrong", [{"mscale": "x"}, {"mscale": [1]}, {"mscale_all_dim": True}], ids=str
)
def test_scales_of_yarn_that_are_no_numbers_are_named(wrong: dict[str, Any]) -> None:
    ((key, value),) = wrong.items()
    given = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, **wrong}
    _, said = rope.imported({"rope_parameters": given}, None)
    assert said == [f"{key}: expected a number, found {value!r}"]


def test_yarns_factor_follows_from_both_scales_and_from_neither_alone() -> None:
    def factor(**scales: Any) -> float:
        found, said = rope.imported({"rope_parameters": {**YARN, **scales}}, None)
        assert said == []
        value = found["rope_scaling"]["attention_factor"]
        assert isinstance(value, float)
        return value

    both = (0.07 * math.log(4) + 1) / (0.04 * math.log(4) + 1)
    assert factor(mscale=0.7, mscale_all_dim=0.4) == pytest.approx(both, rel=1e-12)
    assert factor(mscale=0.7) == factor(mscale=0, mscale_all_dim=0.4) == factor() == 0.0
