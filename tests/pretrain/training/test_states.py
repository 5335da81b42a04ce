"""The states of optimizers over parts of parameters: their names, shapes and pieces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.checkpoint.pieces import extent_of, whole_tensors
from pretrain.config.optim import OptimConfig
from pretrain.training import optim
from pretrain.training.partitions import Partition
from pretrain.training.states import Place, States

SHAPES = {"layers.0.m.weight": (5, 3), "embedding.weight": (4, 2), "norm.weight": (3,)}
RANKS = 3
WEIGHT = "layers.0.m.weight"


def states_of(name: str, rank: int, replicated: bool, ema_decay: float = 0.0) -> States:
    """The states of a rank, or of all of them where each has everything."""
    config = OptimConfig(name=name, ema_decay=ema_decay)  # type: ignore[arg-type]
    places, groups = {}, []
    for key, shape in SHAPES.items():
        numel = nn.Parameter(torch.zeros(shape)).numel()
        size = -(-numel // RANKS)
        ends = [min(one * size, numel) for one in range(RANKS + 1)]
        parts = tuple(
            range(numel) if replicated else range(*ends[one : one + 2]) for one in range(RANKS)
        )
        flat = nn.Parameter(torch.zeros(2 + len(parts[rank])))
        (group,) = optim.parameter_groups([(key, flat, len(shape))], (), config)
        places[key] = Place(Partition(key, shape, flat, 2, parts, rank), optim.kept(group, shape))
        groups.append(group)
    return States(optim.make(groups, config, torch.float32, fused=False), places, None)


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_pieces_of_all_ranks_make_every_tensor_once(
    name: str, ema_decay: float, replicated: bool
) -> None:
    ranks = [states_of(name, rank, replicated, ema_decay) for rank in range(RANKS)]
    assert ("embedding.weight/ema" in ranks[0].shapes()) == bool(ema_decay)
    pieces = [piece for rank in range(RANKS) for piece in ranks[rank].pieces(rank, RANKS)]
    made = whole_tensors(map(extent_of, pieces))
    assert {key: info.shape for key, info in made.items()} == ranks[0].shapes()
    assert {info.dtype for info in made.values()} == {"F32"}


def test_each_optimizer_keeps_what_it_needs_of_a_matrix() -> None:
    kinds = {
        name: {
            key.split("/")[1]: shape
            for key, shape in states_of(name, 0, False).shapes().items()
            if key.startswith(WEIGHT)
        }
        for name in ("adamw", "adafactor", "muon")
    }
    assert kinds == {
        "adamw": {"param": (5, 3), "exp_avg": (5, 3), "exp_avg_sq": (5, 3)},
        "adafactor": {"param": (5, 3), "row": (5,), "column": (3,)},
        "muon": {"param": (5, 3), "momentum": (5, 3)},
    }


def test_views_are_of_this_ranks_elements_and_write_through() -> None:
    states = states_of("adamw", 1, False)
    offset, views = states.own(WEIGHT)
    assert offset == 5 and all(view.shape == (5,) for view in views.values())
    views["exp_avg"].fill_(7.0)
    _, again = states.own(WEIGHT)
    assert again["exp_avg"].tolist() == [7.0] * 5
    # Two moments of what the rank holds of 15, 8 and 3 numbers, and of two that are padding each.
    assert states.nbytes == 2 * 4 * (5 + 3 + 1 + 3 * 2)


def test_an_average_begins_with_the_masters_and_follows_them() -> None:
    states = states_of("adamw", 1, False, 0.9)
    assert states.kinds == {"exp_avg", "exp_avg_sq", "ema"}
    _, views = states.own(WEIGHT)
    views["param"].data.copy_(torch.arange(5.0))
    states.average(0.0)
    assert views["ema"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    views["param"].data.fill_(8.0)
    states.average(0.75)
    assert views["ema"].tolist() == [2.0, 2.75, 3.5, 4.25, 5.0]
    states.exchange()
    assert views["param"].tolist() == [2.0, 2.75, 3.5, 4.25, 5.0]
    assert views["ema"].tolist() == [8.0] * 5


def test_steps_are_counted_in_every_state() -> None:
    states = states_of("muon", 0, False)
    assert states.steps == 0
    states.steps = 5
    assert states.steps == 5
