"""Muon against torch's own and against AdamW; what is orthogonal, and which rank computes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.config.optim import OptimConfig
from pretrain.training import muon, optim
from tests.pretrain.training.test_adafactor import gradients, optimizer_of, parameters

HIDDEN = "layers.0.m.weight"


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (1, 8), (8, 1)])
def test_singular_values_are_brought_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    # Of Gaussian matrices; the smallest of a square one are near 0 and rise slowest.
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = muon.orthogonal(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = (left.mT @ found @ right.mT).diagonal()
    # Jordan's coefficients end between 0.68 and 1.2.
    assert float(values.median()) > 0.65 and float(values.max()) < 1.25
    rest = left.mT @ found @ right.mT - torch.diag(values)
    assert float(rest.abs().max()) < 1e-3


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert not muon.orthogonal(torch.zeros(3, 4)).any()


def test_hidden_matrices_step_as_torchs_muon_and_the_rest_as_adamw() -> None:
    config = OptimConfig(name="muon", lr=0.02, weight_decay=0.1, gate_lr=0.03)
    ours, theirs = parameters(), parameters()
    optimizer, states = optimizer_of(config, ours)
    peer = torch.optim.Muon(
        [theirs[HIDDEN]], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    rest = {"betas": (0.9, 0.95), "eps": 1e-8}
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs["embedding.weight"]], "lr": 0.02, "weight_decay": 0.1},
            {"params": [theirs["norm.weight"]], "lr": 0.02, "weight_decay": 0.0},
            {"params": [theirs["g"]], "lr": 0.03, "weight_decay": 0.0},
        ],
        **rest,
    )
    for step in range(1, 8):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        peer.step()
        adamw.step()
    for name in ("embedding.weight", "norm.weight", "g"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-8)
    # Theirs iterates in bf16: of seven updates of 0.02 * 0.2, a few parts in a hundred.
    assert float((ours[HIDDEN] - theirs[HIDDEN]).detach().abs().max()) < 7 * 0.02 * 0.2 * 0.1
    _, mine = states.own(HIDDEN)
    torch.testing.assert_close(
        mine["momentum"].view(6, 4), peer.state[theirs[HIDDEN]]["momentum_buffer"]
    )


def test_iterations_are_torchs_to_the_bit_in_bf16() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    matrix = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    theirs = _zeropower_via_newtonschulz(matrix, muon._COEFFICIENTS, muon._STEPS, 1e-7)
    assert torch.equal(muon.orthogonal(matrix.bfloat16()), theirs)


def test_only_the_blocks_matrices_are_orthogonalised() -> None:
    named = parameters()
    named["layers.0.norm.weight"] = nn.Parameter(torch.zeros(2))
    named["recurrence.learned.weight"] = nn.Parameter(torch.zeros(2, 2))
    groups = optim.parameter_groups(
        ((n, p, p.ndim) for n, p in named.items()), ("g",), OptimConfig(name="muon")
    )
    (hidden,) = (group for group in groups if group["orthogonal"])
    assert [id(one) for one in hidden["params"]] == [id(named[HIDDEN])]
    decayed = [group for group in groups if group["weight_decay"]]
    assert sum(len(group["params"]) for group in decayed) == 3


def test_matrices_are_divided_among_ranks_by_their_work() -> None:
    # 8, 64, 1, 27 and 64 cubed units: the two largest to a rank each, then the least busy.
    sides = [(2, 2), (4, 4), (1, 1), (3, 3), (4, 4)]
    assert muon.owners(sides, 2) == [1, 0, 1, 0, 1]
    assert muon.owners(sides, 1) == [0] * 5
    assert muon.owners(sides[:1], 3) == [0]
