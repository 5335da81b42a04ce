"""Optimizers and DeepSpeed without torch's compiler; test_engine looks at what ranks import."""

from __future__ import annotations

import sys

import pytest
import torch

from pretrain.training.uncompiled import AdamW, call_optimizers_as_they_are, without_compiler


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_steps_as_torchs_to_the_bit(fused: bool) -> None:
    call_optimizers_as_they_are()
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 12)) for _ in range(2)]
    kinds = (AdamW, torch.optim.AdamW)
    ours, theirs = (
        kind([w], lr=0.1, weight_decay=0.2, fused=fused)
        for kind, w in zip(kinds, weights, strict=True)
    )
    for step in range(1, 4):
        for optimizer, w in zip((ours, theirs), weights, strict=True):
            optimizer.zero_grad()
            (w * step).sin().sum().backward()
            optimizer.step()
        assert torch.equal(*weights)
    assert weights[0].requires_grad and not weights[0].equal(torch.linspace(-1, 1, 12))
    one, other = (optimizer.state_dict()["state"][0] for optimizer in (ours, theirs))
    assert one.keys() == other.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("triton", [False, True])
def test_what_is_exempted_and_hidden_comes_back(triton: bool) -> None:
    def function() -> None: ...

    before = torch._disable_dynamo, torch.compiler.disable, sys.modules.get("triton")
    with pytest.raises(KeyError), without_compiler(triton):
        assert torch.compiler.disable(function) is function
        assert torch._disable_dynamo(recursive=False)(function) is function
        assert ("triton" in sys.modules and sys.modules["triton"] is None) != triton
        raise KeyError
    assert before == (torch._disable_dynamo, torch.compiler.disable, sys.modules.get("triton"))
    assert torch.compiler.disable(function) is not function
    assert "triton" not in sys.modules or sys.modules["triton"] is not None
