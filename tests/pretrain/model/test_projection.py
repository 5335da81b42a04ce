"""One product, and the three ways by which its gradient reaches what it was made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.model.projection import HeadNorm, Projected, Projection

Product = tuple[Projection, Tensor, Projected, list[Tensor]]


@pytest.fixture
def product() -> Product:
    """The projection, its input [2, 3, 4], the product, and a gradient for each of its three."""
    generator = torch.manual_seed(1)
    projection = Projection(4, 5, 1.0, bias=True).double()
    with torch.no_grad():
        projection.bias.normal_(generator=generator)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    gradients = [torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    found = projection(x, shared=True)
    assert isinstance(found, Projected)
    return projection, x, found, gradients


def by_hand(
    projection: Projection, x: Tensor, whole: Tensor, of_weight: Tensor, of_input: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x [b, t, i] and W [o, i] for those of the three products [b, t, o]."""
    to_x = torch.einsum("bto,oi->bti", whole + of_input, projection.weight)
    return to_x, torch.einsum("bto,bti->oi", whole + of_weight, x)


def test_all_three_are_the_product(product: Product) -> None:
    projection, x, found, _ = product
    assert all(torch.equal(one, projection(x)) for one in found)


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]], ids=str)
def test_gradients_reach_what_each_product_says(product: Product, used: list[int]) -> None:
    projection, x, found, gradients = product
    torch.autograd.backward([found[i] for i in used], [gradients[i] for i in used])
    given = [g if i in used else torch.zeros_like(g) for i, g in enumerate(gradients)]
    for one, expected in zip((x, projection.weight), by_hand(projection, x, *given), strict=True):
        if one.grad is None:
            assert not expected.any()
        else:
            torch.testing.assert_close(one.grad, expected, rtol=1e-12, atol=1e-12)
    assert (x.grad is None) == (used == [1])
    assert (projection.weight.grad is None) == (used == [2])
    # The bias is one of the weights: its gradient is the sum of theirs over all rows.
    assert (projection.bias.grad is None) == (used == [2])
    if projection.bias.grad is not None:
        expected = (given[0] + given[1]).sum(dim=(0, 1))
        torch.testing.assert_close(projection.bias.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_a_norm_of_heads_keeps_the_three_gradients_apart(product: Product, used: list[int]) -> None:
    projection, x, found, _ = product
    norm = HeadNorm(5, 1e-3).double()
    nn.init.normal_(norm.weight)
    normed = norm(found)
    assert all(torch.equal(one, norm(projection(x))) for one in normed)
    torch.stack([normed[i] for i in used]).square().sum().backward()
    assert (x.grad is None) == (used == [1])
    assert (projection.weight.grad is None) == (used == [2])
    assert (norm.weight.grad is None) == (used == [2])


def test_a_new_bias_is_0_and_a_new_norm_1() -> None:
    assert not Projection(4, 5, 1.0, bias=True).bias.any()
    assert torch.equal(HeadNorm(4, 1e-5).weight, torch.ones(4))
    assert Projection(4, 5, 1.0).bias is None


def test_no_gradient_is_computed_for_an_input_or_a_weight_that_needs_none() -> None:
    projection = Projection(4, 5, 1.0)
    projection(torch.randn(3, 4), shared=True).whole.sum().backward()
    assert projection.weight.grad is not None
    frozen, x = Projection(4, 5, 1.0).requires_grad_(False), torch.randn(3, 4, requires_grad=True)
    frozen(x, shared=True).whole.sum().backward()
    assert x.grad is not None and frozen.weight.grad is None
    assert not frozen(torch.randn(3, 4), shared=True).whole.requires_grad
