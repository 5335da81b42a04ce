"""What optimizers keep, store and send, by hand for a model of a few matrices."""

from __future__ import annotations

import pytest

from pretrain.config.root import Config, load
from pretrain.model.transformer import Transformer, on_meta
from pretrain.planning import states

RANKS = 3
# Embedding 20 x 8, one block: q, k, v, o 8 x 8, three of 8 x 16; three norms of 8, two gates.
HIDDEN = [(8, 8)] * 4 + [(16, 8)] * 2 + [(8, 16)]
EMBEDDING, VECTORS = (20, 8), [8] * 3 + [2]


def model_of(name: str, *words: str) -> tuple[Config, Transformer]:
    config = load(None, [
        "run.directory=x", "data.train=y", "model.d_model=8", "model.n_layers=1", "model.n_heads=2",
        "model.n_kv_heads=2", "model.d_head=4", "model.d_ff=16", f"optim.name={name}", *words,
    ])  # fmt: skip
    model = on_meta(config.model, 20)
    shapes = sorted(tuple(p.shape) for p in model.parameters())
    assert shapes == sorted([*HIDDEN, EMBEDDING, *((size,) for size in VECTORS)])
    return config, model


def share(numbers: int) -> int:
    return -(-numbers // RANKS)


def shares(copies_of_hidden: int, of_embedding: int, of_vectors: int) -> int:
    """Elements that the largest rank holds, with so many tensors of a parameter's shape."""
    return (
        copies_of_hidden * sum(share(rows * columns) for rows, columns in HIDDEN)
        + of_embedding * share(160)
        + of_vectors * sum(map(share, VECTORS))
    )


FACTORS = [size for shape in (*HIDDEN, EMBEDDING) for size in shape]


@pytest.mark.parametrize(
    ("name", "held", "stored"),
    [
        ("adamw", shares(3, 3, 3), shares(3, 3, 3)),
        ("muon", shares(2, 3, 3), shares(2, 3, 3)),
        (
            "adafactor",
            shares(1, 1, 2) + sum(FACTORS),
            shares(1, 1, 2) + sum(map(share, FACTORS)),
        ),
    ],
)
def test_masters_and_states_are_counted_for_a_rank_and_a_checkpoint(
    name: str, held: int, stored: int
) -> None:
    config, model = model_of(name)
    assert states.held_bytes(config, model, RANKS) == 4 * held
    assert states.stored_bytes(config, model, RANKS) == 4 * stored
    config, model = model_of(name, "optim.ema_decay=0.9")
    average = shares(1, 1, 1)
    assert states.held_bytes(config, model, RANKS) == 4 * (held + average)
    assert states.stored_bytes(config, model, RANKS) == 4 * (stored + average)


def test_what_an_optimizer_sends_is_counted() -> None:
    assert states.sent_bytes(*model_of("adamw"), RANKS) == 0
    # Of each parameter the squares of weights and updates; of matrices rows and columns too.
    sums = 2 * (len(HIDDEN) + 1 + len(VECTORS)) + sum(FACTORS)
    expected = 2 * 4 * sums * (RANKS - 1) / RANKS
    assert states.sent_bytes(*model_of("adafactor"), RANKS) == expected
    # Rank 0 orthogonalises the first of 16 x 8 and two of 8 x 8: more than it holds.
    expected = 2 * (128 + 2 * 64) * 2 * (RANKS - 1) / RANKS
    config, model = model_of("muon", "train.precision=bf16")
    assert states.sent_bytes(config, model, RANKS) == pytest.approx(expected)
