"""Transformer-XL against the paper read aloud (naive/), and where gradients end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.config.memory import MemoryConfig, TransformerXLConfig
from pretrain.model.state import ModelState, detached
from pretrain.model.transformer import Transformer
from tests.pretrain.model import small
from tests.pretrain.model.naive.block import assert_equals_naive
from tests.pretrain.model.naive.transformer_xl import Naive
from tests.pretrain.model.small import DOCUMENTS, SEGMENT, random_tokens, starts_at, with_gradient

CACHES = [2, SEGMENT, 2 * SEGMENT + 2]
"""Shorter than a segment, as long, and longer."""


def build(cache: int = 0, heads: tuple[int, int] = (4, 2), layers: int = 2) -> Transformer:
    memory = MemoryConfig(kind="transformer_xl", transformer_xl=TransformerXLConfig(cache))
    return small.build(memory, heads, n_layers=layers)


def used(model: Transformer, seed: int = 5, length: int = 3 * SEGMENT) -> ModelState:
    """What the last tokens of a document of `length` tokens left behind."""
    tokens = random_tokens(2, length, seed)
    empty = model.initial_state(2, "cpu")
    return detached(model(tokens, starts_at([0], [0], length=length), empty).state)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("cache", CACHES)
def test_a_window_equals_the_loop_over_its_tokens(cache: int, documents: str) -> None:
    model = build(cache)
    assert_equals_naive(model, Naive(model), starts_at(*DOCUMENTS[documents]), used(model))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("cache", CACHES)
def test_documents_begin_with_the_initial_cache(cache: int, documents: str) -> None:
    model = build(cache)
    naive = Naive(model, initial=used(model, seed=6, length=8))
    assert_equals_naive(model, naive, starts_at(*DOCUMENTS[documents]), used(model))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("carried", [0, 1, 3, 4])
def test_slots_that_hold_nothing_yet_are_not_attended_to(cache: int, carried: int) -> None:
    model = build(cache)
    state = used(model, length=carried) if carried else model.initial_state(2, "cpu")
    assert [int(layer.held.sum()) for layer in state] == [2 * min(carried, cache)] * 2
    assert_equals_naive(model, Naive(model), starts_at([], [9]), state)


@pytest.mark.parametrize("length", [1, 3, SEGMENT, SEGMENT + 1])
@pytest.mark.parametrize("cache", CACHES)
def test_a_window_may_be_shorter_than_a_segment(cache: int, length: int) -> None:
    model = build(cache)
    for starts in (starts_at([], [length - 1], length=length), starts_at([0], [], length=length)):
        assert_equals_naive(model, Naive(model), starts, used(model))


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
def test_query_heads_share_key_value_heads_in_order(heads: tuple[int, int]) -> None:
    model = build(heads=heads)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals_naive(model, Naive(model), starts, used(model))


@pytest.mark.parametrize("cache", CACHES)
def test_a_masked_read_sees_the_segment_alone_and_caches_as_ever(cache: int) -> None:
    model = build(cache)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals_naive(model, Naive(model, read_memory=False), starts, used(model))


@pytest.mark.parametrize("seed", range(8))
def test_documents_and_caches_at_random_equal_the_loop(seed: int) -> None:
    generator = torch.manual_seed(seed)
    length, cache = (int(torch.randint(1, 24, (), generator=generator)) for _ in range(2))
    model = build(cache)
    starts = torch.rand(2, length, generator=generator) < 0.2
    carried, first = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(2))
    initial = used(model, 6, first) if seed % 2 else None
    assert_equals_naive(model, Naive(model, initial=initial), starts, used(model, 5, carried))


# Where gradients end.


def inputs_of_attention(model: Transformer) -> list[Tensor]:
    """The inputs [B, T, d_model] of the first layer's attention in the forwards that follow."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        given[0].retain_grad()
        seen.append(given[0])

    model.layers[0].attention.register_forward_pre_hook(keep)
    return seen


def test_cached_inputs_have_no_gradient_in_the_window_nor_before_it() -> None:
    model = build(layers=1)
    seen, carried = inputs_of_attention(model), with_gradient(used(model))
    starts = starts_at([], [], length=2 * SEGMENT)
    output = model(random_tokens(2, 2 * SEGMENT), starts, carried)
    # The second segment attends to the first one's cached inputs.
    output.logits[:, SEGMENT:].square().sum().backward()
    gradient = seen[-1].grad
    assert gradient is not None
    assert not gradient[:, :SEGMENT].any() and gradient[:, SEGMENT:].all()
    assert all(part.grad is None for layer in carried for part in layer)


@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_keys_and_values_of_cached_inputs_train_their_projection(part: str) -> None:
    """A token's own input trains it in one direction alone; cached inputs have others."""
    model = build(layers=1)
    seen = inputs_of_attention(model)
    weight = model.get_parameter(f"layers.0.attention.{part}.weight")

    def beside_the_own_input(state: ModelState) -> Tensor:
        model.zero_grad()
        logits = model(random_tokens(2, 1), starts_at([], [], length=1), state).logits
        logits[0].square().sum().backward()
        own = seen[-1][0, 0] / seen[-1][0, 0].norm()
        assert weight.grad is not None
        return weight.grad - torch.outer(weight.grad @ own, own)

    alone = beside_the_own_input(model.initial_state(2, "cpu"))
    torch.testing.assert_close(alone, torch.zeros_like(alone))
    assert beside_the_own_input(used(model)).abs().max() > 1e-3


def test_the_state_after_a_window_is_a_constant() -> None:
    model = build()
    output = model(random_tokens(), starts_at([], []), with_gradient(used(model)))
    assert output.logits.requires_grad
    assert not any(part.requires_grad for layer in output.state for part in layer)


# What is kept.


def test_the_cache_is_the_last_inputs_of_the_open_document_and_0_where_it_has_fewer() -> None:
    model = build(cache=7, layers=1)
    inputs = inputs_of_attention(model)
    after = model(random_tokens(), starts_at([], [19]), used(model)).state[0]
    assert torch.equal(after.inputs[0], inputs[-1][0, -7:]) and after.held[0].all()
    assert after.held[1].tolist() == [False] * 3 + [True] * 4
    assert torch.equal(after.inputs[1, 3:], inputs[-1][1, 19:])
    assert not after.inputs[1, :3].any()


def test_the_default_cache_is_a_segment_and_the_log_counts_its_slots() -> None:
    model = build()
    state = used(model, length=3)
    assert state[0].inputs.shape == (2, SEGMENT, 10)  # type: ignore[attr-defined]
    assert model.metrics(state) == {"cached_tokens": [6.0, 6.0]}
