"""Pointwise functions and their backwards against PyTorch's own, compiled and as written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model import compiling
from pretrain.model.pointwise import RMSNorm, swiglu
from pretrain.model.rotary import rotary, rotate
from pretrain.model.transformer import Transformer


def numbers(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """Values, and gradients of a weighted sum by every input."""
    results = []
    for function in (ours, theirs):
        value = function(*inputs)
        weights = torch.arange(value.numel(), dtype=value.dtype).view(value.shape).sin()
        results.append([value, *torch.autograd.grad((value * weights).sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_rms_norm_is_pytorch_s() -> None:
    norm = RMSNorm(6, eps=0.1)
    assert torch.equal(norm.weight, torch.ones(6))

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert_same(
        ours, lambda x, w: F.rms_norm(x, (6,), w, 0.1), numbers(2, 5, 6), numbers(6, seed=2)
    )


def test_rms_norm_of_bf16_is_computed_in_float32() -> None:
    x = numbers(4, 64).detach().bfloat16()
    norm = RMSNorm(64, eps=1e-5).bfloat16()
    assert torch.equal(norm(x), F.rms_norm(x.float(), (64,), eps=1e-5).bfloat16())


def test_swiglu_is_silu_times_up() -> None:
    inputs = numbers(3, 7), numbers(3, 7, seed=2)
    assert_same(swiglu, lambda gate, up: F.silu(gate) * up, *inputs)


def test_rotation_turns_pairs_of_components_and_its_gradient_turns_back() -> None:
    table = rotary(3, 5, ModelConfig(d_head=8), torch.device("cpu"), torch.float64)

    def by_halves(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cosine, sine = table
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    assert_same(lambda x: rotate(x, table), by_halves, numbers(2, 5, 3, 8))


@pytest.fixture
def compiled() -> Iterator[None]:
    compiling.switch(True)
    yield
    compiling.switch(False)


def step_of(model: Transformer) -> list[Tensor]:
    """Loss, memory and gradients of a window with a document's start in it."""
    model.zero_grad()
    tokens = torch.arange(40)[None] % 17
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 21] = True
    output = model(tokens, starts, model.initial_state(1, "cpu"), tokens)
    assert output.loss is not None
    output.loss.backward()
    states = [part for layer in output.state for part in layer]
    return [output.loss, *states, *(weight.grad for weight in model.parameters())]


def test_a_compiled_step_is_the_step_as_written(compiled: None) -> None:
    config = ModelConfig(d_model=16, n_layers=1, n_heads=4, n_kv_heads=2, d_head=8, d_ff=24,
                         segment=16, memory=MemoryConfig(kind="delta"))  # fmt: skip
    torch.manual_seed(1)
    model = Transformer(config, 17)
    fused = step_of(model)
    compiling.switch(False)
    torch.testing.assert_close(fused, step_of(model), rtol=1e-4, atol=1e-5)


def test_a_block_can_be_left_out_of_compiling() -> None:
    compiling.switch(True)
    try:
        with pytest.raises(KeyError), compiling.left_out():
            assert not compiling._on
            raise KeyError
        assert compiling._on
    finally:
        compiling.switch(False)
    with compiling.left_out():
        pass
    assert not compiling._on
