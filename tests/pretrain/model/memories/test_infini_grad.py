"""The memory's products with operands of less precision, against those of float32."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from pretrain.model.memories import infini, infini_grad
from pretrain.model.memories.infini import MemoryState
from pretrain.model.memories.infini_grad import MIXED, TORCH, Products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("queries", "keys", "values", "local", "matrix", "normaliser", "gate")


def inputs() -> dict[str, Tensor]:
    """Two lanes of three segments of 9 tokens, 4 query heads on 2 memories of 16."""
    generator = torch.manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {
        "queries": drawn(2, 3, 9, 4, 16),
        "keys": drawn(2, 3, 9, 2, 16),
        "values": drawn(2, 3, 9, 2, 16),
        "local": drawn(2, 3, 9, 4, 16),
        "matrix": drawn(2, 2, 16, 16),
        "normaliser": 5 + drawn(2, 2, 16).abs(),
        "gate": drawn(4),
    }
    return {name: x.to(DEVICE).requires_grad_() for name, x in found.items()}


def results(products: Products) -> dict[str, Tensor]:
    """The gated read and the state after it by Linear + Delta, and all gradients."""
    x = inputs()
    starts = torch.zeros(2, 3, 9, dtype=torch.bool, device=DEVICE)
    starts[0, 1, 4] = True
    reset = [None, starts[:, 1].any(dim=1), None]
    writable = torch.ones_like(starts)
    writable[0, 1, :4] = False
    before, after = infini.advance(
        *(x["keys"], x["values"], MemoryState(x["matrix"], x["normaliser"])),
        *(writable, reset, "inclusive", products),
    )
    readable = ~starts.cumsum(dim=2).bool()
    mixed = products.gated_read(x["local"], x["queries"], *before, readable, x["gate"])
    generator = torch.manual_seed(2)
    found = {"mixed": mixed, **after._asdict()}
    weighted = [
        (part * torch.randn(part.shape, generator=generator).to(DEVICE)).sum()
        for part in found.values()
    ]
    gradients = torch.autograd.grad(sum(weighted, start=torch.zeros((), device=DEVICE)),
                                    [x[name] for name in NAMES])  # fmt: skip
    named = {f"gradient of {name}": g for name, g in zip(NAMES, gradients, strict=True)}
    return {name: part.detach() for name, part in found.items()} | named


def with_operands(dtype: torch.dtype) -> Products:
    functions = infini_grad.sums, infini_grad.delta_transition, infini_grad.gated_read
    return Products(*(functools.partial(one, operand=dtype) for one in functions))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU multiplies operands of bf16 into float32 alone")
def test_operands_of_float32_give_the_same_numbers_to_the_bit() -> None:
    ours, theirs = results(with_operands(torch.float32)), results(TORCH)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_bf16_operands_give_the_float32_numbers_to_bf16_s_rounding() -> None:
    ours, theirs = results(MIXED), results(TORCH)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype == torch.float32
        off = float((ours[name] - expected).abs().max() / expected.abs().max())
        assert off < 3e-2, f"{name}: off by {off:.1e} of its largest number"
        # Neither is a product of the memory's.
        assert (off == 0) == (name in ("normaliser", "gradient of local")), name
