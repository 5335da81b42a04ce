"""The memory's numbers: robustness and the eigenvalues that the docstring claims."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.memories import infini
from pretrain.model.memories.infini import Divisor, LinearAttention, MemoryState
from pretrain.model.memories.infini_grad import gated_read, sigma
from pretrain.model.window import Resets, resets

# What each rule divides by; None: Linear.
LINEAR = None
DELTA: list[Divisor | None] = ["paper", "inclusive"]


def random_segments(segments: int, seed: int = 1, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """K and V, [1, S, 8, 2, 4], float32."""
    generator = torch.manual_seed(seed)
    keys = torch.randn(1, segments, 8, 2, 4, generator=generator)
    values = torch.randn(1, segments, 8, 2, 4, generator=generator)
    return keys * scale, values * scale


def keys_of(features: Tensor) -> Tensor:
    """The K [B, S, N, 2, D] whose sigma(K) is `features` [B, S, 2, N, D]."""
    return torch.where(features > 1, features - 1, features.log()).transpose(2, 3)


def advance(
    keys: Tensor,
    values: Tensor,
    carried: MemoryState,
    reset: Resets,
    rule: Divisor | None,
) -> tuple[MemoryState, MemoryState]:
    return infini.advance(keys, values, carried, None, reset, rule)


def read(queries: Tensor, before: MemoryState) -> Tensor:
    """What the queries [B, S, N, 2, D] retrieve: the gates are wide open."""
    everywhere = torch.ones(queries.shape[:3], dtype=torch.bool)
    gate = torch.full((2,), 100.0)
    return gated_read(torch.zeros_like(queries), queries, *before, everywhere, gate)


def nothing(dtype: torch.dtype = torch.float32) -> MemoryState:
    return MemoryState(torch.zeros(1, 2, 4, 4, dtype=dtype), torch.zeros(1, 2, 4, dtype=dtype))


def test_sigma_is_elu_plus_1_and_keeps_what_that_rounds_to_0() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    torch.testing.assert_close(sigma(x), F.elu(x) + 1, rtol=1e-12, atol=1e-15)
    far = torch.tensor([-20.0, -80.0])
    torch.testing.assert_close(sigma(far), far.exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", [LINEAR, *DELTA])
def test_a_young_document_keeps_its_digits_beside_an_old_one(rule: Divisor | None) -> None:
    old_keys, old_values = random_segments(3, seed=1, scale=1e6)
    keys, values = random_segments(3, seed=2)
    starting = torch.tensor([[False, False, False, True, False, False]])
    both = torch.cat((old_keys, keys), dim=1), torch.cat((old_values, values), dim=1)
    _, after = advance(*both, nothing(), resets(starting), rule)
    _, alone = advance(keys, values, nothing(), [None] * 3, rule)
    assert torch.equal(after.matrix, alone.matrix)
    assert torch.equal(after.normaliser, alone.normaliser)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("rule", [LINEAR, *DELTA])
def test_a_document_that_overflowed_does_not_poison_the_next(
    rule: Divisor | None, poison: float
) -> None:
    keys, values = random_segments(2)
    carried = MemoryState(*(torch.full_like(part, poison) for part in nothing()))
    starting = resets(torch.tensor([[True, False]]))
    _, after = advance(keys, values, carried, starting, rule)
    _, alone = advance(keys, values, nothing(), [None] * 2, rule)
    assert torch.equal(after.matrix, alone.matrix)
    assert torch.equal(after.normaliser, alone.normaliser)


def smallest_eigenvalue(rule: Divisor | None, keys: Tensor, first: Tensor) -> float:
    """Of the map from M_{s-1} to M_s, applied to a basis as M; `first` wrote z_{s-1}."""
    basis = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)
    carried = MemoryState(basis, first.sum(dim=-2))
    raw = keys_of(keys)
    _, after = advance(raw, torch.zeros_like(raw), carried, [None], rule)
    return torch.linalg.eigvalsh(after.matrix).min().item()


def test_delta_s_eigenvalues_are_as_large_as_the_segment_against_a_short_first_part() -> None:
    # n equal keys k on a z of m of them: the update is I - (n / m) k k^T / (k^T k) by the paper,
    # I - (n / (m + n)) k k^T / (k^T k) with the inclusive normaliser.
    key = sigma(torch.randn(4, generator=torch.manual_seed(3), dtype=torch.float64))
    paper, inclusive = DELTA
    for first, new in ((1, 76), (16, 64), (64, 64)):
        before, keys = (key.expand(1, 1, 2, count, 4) for count in (first, new))
        assert smallest_eigenvalue(paper, keys, before[:, 0]) == pytest.approx(1 - new / first)
        assert smallest_eigenvalue(inclusive, keys, before[:, 0]) == pytest.approx(
            1 - new / (first + new)
        )


def test_the_inclusive_normaliser_keeps_every_eigenvalue_within_zero_and_one() -> None:
    identity = torch.eye(4, dtype=torch.float64)
    for seed in range(50):
        generator = torch.manual_seed(seed)
        keys = sigma(torch.randn(1, 1, 2, 9, 4, generator=generator, dtype=torch.float64))
        before = torch.rand(1, 2, 4, generator=generator, dtype=torch.float64) * 0.1
        carried = MemoryState(identity.expand(1, 2, 4, 4), before)
        raw = keys_of(keys)
        _, after = advance(raw, torch.zeros_like(raw), carried, [None], DELTA[1])
        eigenvalues = torch.linalg.eigvalsh(after.matrix)
        assert eigenvalues.min() > -1e-12 and eigenvalues.max() < 1 + 1e-12


def test_delta_replaces_what_a_key_recalls() -> None:
    """Equation 9's purpose: written twice under one key, only the newer value is left."""
    key = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).expand(1, 2, 2, 1, 4)
    values = torch.randn(1, 2, 1, 2, 4, generator=torch.manual_seed(1), dtype=torch.float64)
    _, after = advance(keys_of(key), values, nothing(torch.float64), [None] * 2, DELTA[0])
    torch.testing.assert_close(after.matrix, key[:, 1].mT @ values[:, 1].transpose(1, 2))


def test_an_empty_memory_reads_as_zero_with_a_zero_gradient() -> None:
    queries = torch.randn(1, 1, 3, 2, 4).requires_grad_()
    empty = MemoryState(*(part[:, None].requires_grad_() for part in nothing()))
    retrieved = read(queries, empty)
    retrieved.sum().backward()
    assert not retrieved.any()
    for gradient in (queries.grad, empty.matrix.grad, empty.normaliser.grad):
        assert gradient is not None and not gradient.any()


def test_features_that_underflow_read_and_write_nothing() -> None:
    keys = torch.full((1, 1, 3, 2, 4), -200.0).requires_grad_()
    assert not sigma(keys).any()
    carried = MemoryState(*(part + 1 for part in nothing()))
    before, after = advance(keys, torch.ones_like(keys), carried, [None], DELTA[0])
    assert torch.equal(after.matrix, carried.matrix)
    retrieved = read(keys, before)
    (retrieved.sum() + after.matrix.sum()).backward()
    assert not retrieved.any() and keys.grad is not None and keys.grad.isfinite().all()


def test_sums_of_bf16_keys_fall_not_short_over_many_segments() -> None:
    """Summed in bf16, z would lose 7 to 14 percent by 128 to 512 segments."""
    keys = torch.randn(1, 512, 8, 2, 4, generator=torch.manual_seed(1)).bfloat16()
    _, after = advance(keys, keys, nothing(), [None] * 512, LINEAR)
    exact, values = sigma(keys.double()).transpose(2, 3), keys.double().transpose(2, 3)
    torch.testing.assert_close(
        after.normaliser.double(), exact.sum(dim=(1, 3)), rtol=1e-5, atol=0.0
    )
    torch.testing.assert_close(
        after.matrix.double(), (exact.mT @ values).sum(dim=1), rtol=1e-5, atol=1e-3
    )


def test_the_logged_norm_is_of_m_alone_summed_as_squares_over_lanes() -> None:
    layer = LinearAttention(ModelConfig(memory=MemoryConfig(kind="linear")))
    matrix = torch.zeros(2, 1, 4, 4)
    matrix[0, 0, 0, 0], matrix[0, 0, 1, 2], matrix[1, 0, 3, 3] = 3.0, 4.0, 1.0
    found = layer.metrics(MemoryState(matrix, torch.arange(8.0).view(2, 1, 4)))
    assert {name: value.item() for name, value in found.items()} == {"memory_norm": 26.0}
