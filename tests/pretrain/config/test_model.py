"""Settings of `model`: shapes that cannot work are refused."""

from __future__ import annotations

import pytest

from tests.pretrain.config.loading import problems


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.tied_embeddings=1"], "model.tied_embeddings: expected true or false, found 1"),
        (["model.n_heads=4", "model.n_kv_heads=3"], "n_heads: 4 query heads cannot share 3"),
        (["model.d_head=7"], "d_head: rotary embedding needs an even number, found 7; choose one"),
        (
            ["model.rope_scaling.low_turns=2"],
            "model.rope_scaling.low_turns: has no effect with kind=none; remove it, or set "
            "kind=llama3 or yarn",
        ),
        (
            ["model.rope_scaling.kind=linear", "model.rope_scaling.original_length=4"],
            "model.rope_scaling.original_length: has no effect with kind=linear; remove it",
        ),
        (
            ["model.rope_scaling.kind=llama3", "model.rope_scaling.truncate=false"],
            "model.rope_scaling.truncate: has no effect with kind=llama3; remove it, or set "
            "kind=yarn",
        ),
        (
            ["model.memory.kind=compressive", "model.memory.compressive.cache=300"],
            "model.memory.compressive.cache: 300 is not a multiple of segment=256; choose one",
        ),
        (
            ["model.memory.kind=compressive", "model.memory.compressive.rate=3"],
            "model.memory.compressive.rate: 3 does not divide segment=256; choose a divisor of it",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_said_in_one_sentence(words: list[str], said: str) -> None:
    (problem,) = problems(*words)
    assert said in problem
