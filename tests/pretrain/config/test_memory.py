"""Settings of `model.memory`: those of other kinds are refused."""

from __future__ import annotations

from dataclasses import fields

import pytest

from pretrain.config.memory import MEMORY_KINDS, MemoryConfig
from tests.pretrain.config.loading import problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.memory.kind=dleta"], "autocompressor; found 'dleta'"),
        (
            ["model.memory.kind=delta", "model.memory.transformer_xl.cache=9"],
            "model.memory.transformer_xl: has no effect with memory.kind=delta; remove it, or set "
            "memory.kind=transformer_xl",
        ),
        (
            ["model.memory.kind=transformer_xl", "model.memory.initial_gate=1"],
            "model.memory.initial_gate: has no effect with memory.kind=transformer_xl; remove it, "
            "or set memory.kind=linear or delta",
        ),
        (
            ["model.memory.compressive.rate=4"],
            "model.memory.compressive: has no effect with memory.kind=delta; remove it, or set",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem


def test_the_settings_of_a_kind_are_those_of_a_group_or_of_infini_attention() -> None:
    names = {field.name for field in fields(MemoryConfig)} - {"kind"}
    assert names == {name for traits in MEMORY_KINDS.values() for name in traits.settings}
