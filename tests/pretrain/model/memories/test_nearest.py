"""The search is exact, for any size, dtype and distribution of the scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.model.memories.nearest import Found, attend_to_found, nearest


def draw(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=dtype)


def by_sorting(queries: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores and rows of the largest of all products, the largest first."""
    group = queries.shape[1] // keys.shape[1]
    scores = torch.einsum("nhd,rhd->nhr", queries, keys.repeat_interleave(group, dim=1))
    values, rows = scores.sort(dim=-1, descending=True)
    return values[..., :count], rows[..., :count]


def in_order(found: Found) -> tuple[Tensor, Tensor]:
    values, order = found.scores.sort(dim=-1, descending=True)
    return values, found.rows.gather(-1, order)


@pytest.mark.parametrize("count", [1, 2, 5, 32])
@pytest.mark.parametrize("size", [32, 33, 100, 127, 256, 1000, 4099])
def test_the_neighbours_are_those_of_sorting_all_products(size: int, count: int) -> None:
    queries, keys = (draw(*s, dtype=torch.float64) for s in ((7, 4, 6), (size, 2, 6)))
    values, rows = by_sorting(queries, keys, count)
    found, found_rows = in_order(nearest(queries, keys, count))
    torch.testing.assert_close(found, values, rtol=1e-12, atol=1e-12)
    assert torch.equal(found_rows, rows)


@pytest.mark.parametrize("step", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_neighbours_that_lie_in_one_block_are_all_found(step: int) -> None:
    # Whatever is a block, rows of this spacing are one for some step.
    keys = torch.rand(4096, 1, 1, generator=torch.manual_seed(1))
    best = torch.arange(16) * step + 3
    keys[best] += 1
    found = nearest(torch.ones(1, 1, 1), keys, 16)
    assert found.rows.flatten().sort().values.tolist() == best.tolist()


def test_rows_that_are_hidden_are_not_found_and_missing_ones_have_no_score() -> None:
    queries, keys = draw(5, 2, 4), draw(600, 2, 4)
    visible = torch.zeros(600, dtype=torch.bool)
    visible[[7, 300, 599]] = True
    found = nearest(queries, keys, 4, visible)
    finite = found.scores > -torch.inf
    assert finite.sum(dim=-1).eq(3).all()
    assert found.rows[finite].view(-1, 3).sort().values.eq(torch.tensor([7, 300, 599])).all()


def test_a_store_smaller_than_the_number_of_neighbours_is_found_whole() -> None:
    found = nearest(draw(5, 2, 4), draw(3, 2, 4), 8)
    assert found.rows.shape == found.scores.shape == (5, 2, 8)
    assert found.rows[..., :3].sort().values.eq(torch.arange(3)).all()
    assert found.scores[..., 3:].eq(-torch.inf).all()


def test_bf16_finds_the_neighbours_of_the_same_numbers_in_float32() -> None:
    queries, keys = draw(50, 4, 16).bfloat16(), draw(3000, 2, 16).bfloat16()
    found, expected = nearest(queries, keys, 8), nearest(queries.float(), keys.float(), 8)
    assert found.scores.dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_missing_neighbours_take_no_share_even_with_a_negative_scale() -> None:
    queries, keys, values = (
        draw(*s, dtype=torch.float64) for s in ((1, 3, 4, 5),) + ((1, 6, 2, 5),) * 2
    )
    few, many = (
        Found(*(part[None] for part in nearest(queries[0], keys[0, :3], count))) for count in (3, 7)
    )
    scale = torch.tensor([-2.0, 0.0, 0.5, 30.0], dtype=torch.float64)
    expected, found = (attend_to_found(queries, scale, one, keys, values) for one in (few, many))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_attention_to_neighbours_has_the_gradients_of_attention_to_all() -> None:
    """With as many neighbours as keys, it is plain attention."""
    shapes = ((2, 3, 4, 5), (2, 6, 2, 5), (2, 6, 2, 5))
    queries, keys, values = (draw(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes))
    scale = torch.tensor([-1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    results = []
    for plain in (True, False):
        inputs = [queries.clone().requires_grad_(), scale.clone().requires_grad_()]
        if plain:
            k, v = (x.repeat_interleave(2, dim=2) for x in (keys, values))
            logits = torch.einsum("bnhd,brhd->bnhr", inputs[0], k) * inputs[1][:, None]
            heads = torch.einsum("bnhr,brhd->bnhd", logits.softmax(-1), v)
        else:
            lanes = [nearest(q.detach(), k, 6) for q, k in zip(queries, keys, strict=True)]
            found = Found(*map(torch.stack, zip(*lanes, strict=True)))
            heads = attend_to_found(*inputs, found, keys, values)
        heads.sin().sum().backward()
        results.append([heads, *(x.grad for x in inputs)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
