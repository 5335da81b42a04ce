"""Where a rank's elements of a parameter lie."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.training.partitions import Partition, with_gradients


def test_a_rank_steps_its_own_elements_of_a_flat_tensor() -> None:
    flat = nn.Parameter(torch.arange(10.0))
    parts = (range(4), range(4, 6))
    one = Partition("w", (2, 3), flat, 7, parts, 1)
    assert one.own == range(4, 6) and one.numel == 6 and one.matrix == (2, 3)
    assert one.of(flat.data).tolist() == [7.0, 8.0]
    assert with_gradients([one]) == []
    flat.grad = -torch.arange(10.0)
    assert with_gradients([one]) == [one]
    assert one.gradient.tolist() == [-7.0, -8.0]


def test_a_parameter_is_replicated_where_every_rank_has_all_of_it() -> None:
    flat = nn.Parameter(torch.zeros(6))
    for parts, replicated in (
        ((range(6), range(6)), True),
        ((range(6),), True),
        ((range(6), range(0)), False),
        ((range(4), range(4, 6)), False),
    ):
        assert Partition("w", (6,), flat, 0, parts, 0).replicated is replicated
