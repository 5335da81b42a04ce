"""Adafactor against transformers' own, and its sums over parts of matrices against whole ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as Peer

from pretrain.config.optim import OptimConfig
from pretrain.training import adafactor, optim
from pretrain.training.partitions import Partition
from pretrain.training.states import Place, States

SHAPES = {"layers.0.m.weight": (6, 4), "embedding.weight": (5, 7), "norm.weight": (4,), "g": (3,)}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = {
        name: nn.Parameter(torch.randn(shape, generator=generator) * 0.1)
        for name, shape in SHAPES.items()
    }
    found["g"].data.zero_()  # as gates begin
    return found


def optimizer_of(
    config: OptimConfig, named: dict[str, nn.Parameter]
) -> tuple[torch.optim.Optimizer, States]:
    """Ours over whole parameters, on one rank."""
    groups = optim.parameter_groups(((n, p, p.ndim) for n, p in named.items()), ("g",), config)
    of = {id(p): group for group in groups for p in group["params"]}
    made = optim.make(groups, config, torch.float32, fused=False)
    places = {
        name: Place(
            Partition(name, tuple(p.shape), p, 0, (range(p.numel()),), 0),
            optim.kept(of[id(p)], tuple(p.shape)),
        )
        for name, p in named.items()
    }
    states = States(made, places, None)
    for group in made.param_groups:
        group["lr"] = group["peak"]
    return made, states


def gradients(named: dict[str, nn.Parameter], step: int) -> None:
    """The same in every run; of the embedding, some rows have none, as unused tokens do."""
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        # In some steps updates are clipped and in some not.
        size = 10.0 if step == 3 else 1.0
        parameter.grad = torch.randn(parameter.shape, generator=generator) * size
    rows = named["embedding.weight"].grad
    assert rows is not None
    rows[step % 2 :: 2] = 0


def test_steps_are_those_of_transformers_adafactor_on_whole_matrices() -> None:
    config = OptimConfig(name="adafactor", weight_decay=0.0, gate_lr=0.03)
    ours, theirs = parameters(), parameters()
    optimizer, states = optimizer_of(config, ours)
    gate = theirs.pop("g")
    options = {"relative_step": False, "warmup_init": False, "weight_decay": 0.0}
    peers = [
        Peer(theirs.values(), lr=0.01, scale_parameter=True, **options),
        Peer([gate], lr=0.03, scale_parameter=False, **options),
    ]
    for step in range(1, 8):
        gradients(ours, step)
        gradients({**theirs, "g": gate}, step)
        optimizer.step()
        for peer in peers:
            peer.step()
    for name, parameter in {**theirs, "g": gate}.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-5, atol=1e-7)
    assert len(states.factors) == 2 * 2
    for name in ("layers.0.m.weight", "embedding.weight"):
        state = peers[0].state[theirs[name]]
        for own, peer in (("row", "exp_avg_sq_row"), ("column", "exp_avg_sq_col")):
            torch.testing.assert_close(states.factors[f"{name}/{own}"], state[peer], rtol=1e-5,
                                       atol=0)  # fmt: skip


def test_a_first_step_is_as_computed_by_hand() -> None:
    named = {"w": nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))}
    config = OptimConfig(name="adafactor", lr=0.1, weight_decay=0.5)
    optimizer, _ = optimizer_of(config, named)
    named["w"].grad = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    optimizer.step()
    # Row means 1 and 4, column means 2.5: R C / mean(R) = G^2, so U is all 1 and not clipped.
    # RMS(X) = 2.5: X (1 - 0.1 * 0.5) - 0.1 * 2.5.
    expected = torch.tensor([[2.6, 3.55], [-0.25, -0.25]])
    torch.testing.assert_close(named["w"].data, expected)


def test_an_update_is_clipped_to_its_root_mean_square() -> None:
    config = OptimConfig(name="adafactor", gate_lr=0.1)
    named = {"g": nn.Parameter(torch.zeros(4))}
    optimizer, _ = optimizer_of(config, named)
    for gradient in (torch.full((4,), 1e-3), torch.full((4,), 1.0)):
        before = named["g"].detach().clone()
        named["g"].grad = gradient
        optimizer.step()
        # The second's second moment is still small: unclipped, it would move by 1.3 rates.
        moved = (before - named["g"]).abs()
        torch.testing.assert_close(moved, torch.full((4,), 0.1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("cuts", [(0, 24), (0, 9, 24), (0, 1, 2, 15, 15, 24), (0, 8, 16, 24)])
def test_sums_over_parts_of_a_matrix_that_end_anywhere_add_up_to_the_whole(
    cuts: tuple[int, ...],
) -> None:
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    parts = tuple(range(*ends) for ends in itertools.pairwise(cuts))
    row, column, padding = torch.zeros(6), torch.zeros(4), 3
    divided = torch.zeros(24)
    factors = gradient.square().mean(dim=1), gradient.square().mean(dim=0)
    for rank, part in enumerate(parts):
        flat = nn.Parameter(torch.zeros(padding + len(part) + padding))
        flat.grad = torch.ones_like(flat)
        flat.grad[padding : padding + len(part)] = gradient.view(-1)[part.start : part.stop]
        one = Partition("w", (6, 4), flat, padding, parts, rank)
        own = adafactor._sums(one)
        row, column = row + own[0], column + own[1]
        adafactor._divide(one, *factors)
        divided[part.start : part.stop] = one.gradient
        assert bool((flat.grad[:padding] == 1).all() and (flat.grad[-padding:] == 1).all())
    torch.testing.assert_close(row / 4, factors[0])
    torch.testing.assert_close(column / 6, factors[1])
    whole = gradient / (torch.outer(*factors) / factors[0].mean()).sqrt()
    torch.testing.assert_close(divided.view(6, 4), whole)
