"""Memorizing Transformers: the parallel window equals the loop, and nothing learns from a store."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config.memory import MemorizingConfig, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model import flops
from pretrain.model.memories import nearest
from pretrain.model.memories.memorizing import MemorizingAttention, StoreState, store_layer
from pretrain.model.memories.transformer_xl import CacheState
from pretrain.model.state import ModelState, detached
from pretrain.model.stream import StreamState
from pretrain.model.transformer import Transformer
from tests.pretrain.model import small
from tests.pretrain.model.naive.block import assert_equals_naive
from tests.pretrain.model.naive.memorizing import Naive
from tests.pretrain.model.small import (
    DOCUMENTS,
    SEGMENT,
    TOKENS,
    VOCABULARY,
    assert_close,
    calls_of,
    random_tokens,
    starts_at,
    weighted_sum,
    with_gradient,
)

SETTINGS = {
    "a store of two segments in the last layer": MemorizingConfig(2, 10, 3),
    "a store of the window in the first layer": MemorizingConfig(1, 25, 4),
    "fewer tokens than neighbours, a long cache": MemorizingConfig(2, 5, 8, cache=12),
    "a single neighbour, a short cache": MemorizingConfig(1, 15, 1, cache=3),
}


def build(
    settings: MemorizingConfig = SETTINGS["a store of two segments in the last layer"],
    heads: tuple[int, int] = (4, 2),
    **changes: Any,
) -> Transformer:
    return small.build(MemoryConfig(kind="memorizing", memorizing=settings), heads, **changes)


def random_state(model: Transformer, lanes: int = 2, seed: int = 5, length: int = 8) -> ModelState:
    """What a document of `length` tokens left behind, in another number of tokens in each lane."""
    tokens = random_tokens(lanes, length, seed)
    starts = starts_at(*([[0], [3]] * lanes)[:lanes], length=length)
    return detached(model(tokens, starts, model.initial_state(lanes, "cpu")).state)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_parallel_window_equals_the_loop_over_segments(settings: str, documents: str) -> None:
    model = build(SETTINGS[settings])
    starts = starts_at(*DOCUMENTS[documents])
    assert_equals_naive(model, Naive(model), starts, random_state(model))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_documents_begin_with_the_initial_memory(settings: str, documents: str) -> None:
    model = build(SETTINGS[settings])
    starts, initial = starts_at(*DOCUMENTS[documents]), random_state(model, seed=6, length=13)
    assert_equals_naive(model, Naive(model, initial=initial), starts, random_state(model))


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
def test_query_heads_share_key_value_heads_in_order(heads: tuple[int, int]) -> None:
    model = build(heads=heads)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals_naive(model, Naive(model), starts, random_state(model))


def test_an_empty_memory_equals_the_loop() -> None:
    model = build()
    starts = starts_at(*DOCUMENTS["one document, carried in"])
    assert_equals_naive(model, Naive(model), starts, model.initial_state(2, "cpu"))


def test_a_masked_read_equals_the_loop() -> None:
    model = build()
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals_naive(model, Naive(model, read_memory=False), starts, random_state(model))


def layer(model: Transformer) -> MemorizingAttention:
    attention = model.layers[store_layer(model.config)].attention
    assert isinstance(attention, MemorizingAttention)
    return attention


def run(model: Transformer, starts: Tensor) -> Any:
    """The input x of the store's layer, which requires a gradient, its output, and the carried
    state."""
    attention = layer(model)
    state = random_state(model, 1)
    caught: list[Any] = []

    def keep(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0].detach().requires_grad_()
        caught.append(x)
        return (x, *arguments[1:])

    hooks = [
        attention.register_forward_pre_hook(keep),
        attention.register_forward_hook(lambda _, __, result: caught.append(result.output)),
    ]
    carried = with_gradient(state)
    model(random_tokens(1), starts, carried)
    for hook in hooks:
        hook.remove()
    return *caught, carried


def test_what_is_read_has_a_gradient_for_queries_and_scale_and_none_for_keys_and_values() -> None:
    model, starts = build(), starts_at([])
    attention = layer(model)
    with torch.no_grad():
        attention.gate.fill_(60.0)  # 1 - sigmoid(60) is 0 in float64
    _, output, carried = run(model, starts)
    weighted_sum(output).backward()
    for name in ("k_proj.weight", "v_proj.weight"):
        assert not attention.get_parameter(name).grad.any()  # type: ignore[union-attr]
    for name in ("q_proj.weight", "scale", "o_proj.weight"):
        assert attention.get_parameter(name).grad.any()  # type: ignore[union-attr]
    assert all(part.grad is None for part in carried[store_layer(model.config)])


def test_the_gate_has_a_gradient_where_something_is_read_alone() -> None:
    model, starts = build(), starts_at([0])
    attention = layer(model)
    _, output, _ = run(model, starts)
    of_first, of_next = (
        torch.autograd.grad(output[:, tokens].sum(), attention.gate, retain_graph=True)[0]
        for tokens in (slice(0, SEGMENT), slice(SEGMENT, 2 * SEGMENT))
    )
    assert not of_first.any() and of_next.all()


@pytest.mark.parametrize("initial", [1.0, 7.5])
def test_the_scale_of_every_head_begins_at_its_setting(initial: float) -> None:
    settings = MemorizingConfig(2, 10, 3, initial_scale=initial)
    memory = MemoryConfig(kind="memorizing", memorizing=settings)
    config = ModelConfig(n_layers=2, n_heads=4, n_kv_heads=2, memory=memory)
    assert layer(Transformer(config, 16)).scale.tolist() == [initial] * 4


def test_a_token_s_gradient_ends_in_its_segment() -> None:
    model, starts = build(), starts_at([])
    x, output, _ = run(model, starts)
    weighted_sum(output[:, 3 * SEGMENT : 4 * SEGMENT]).backward()
    reached = x.grad.any(dim=2)[0]
    assert reached[3 * SEGMENT : 4 * SEGMENT].all()
    assert reached.sum() == SEGMENT


def test_tokens_with_nothing_to_read_keep_the_local_attention_to_the_bit() -> None:
    settings = MemorizingConfig(2, 10, 3, cache=1)
    model = build(settings)
    tokens, empty = random_tokens(1), model.initial_state(1, "cpu")
    outputs = []
    for gate in (-3.0, 60.0):
        with torch.no_grad():
            layer(model).gate.fill_(gate)
        outputs.append(model(tokens, starts_at([0, 7]), empty).logits)
    equal = (outputs[0] == outputs[1]).all(dim=2)[0]
    assert equal[:SEGMENT].all() and equal[7 : 2 * SEGMENT].all()
    assert not equal[SEGMENT:7].any() and not equal[2 * SEGMENT :].any()


def test_the_store_is_the_newest_tokens_of_the_open_document() -> None:
    model = build(MemorizingConfig(1, 15, 3))
    tokens, starts = random_tokens(1), starts_at([12])
    empty = model.initial_state(1, "cpu")
    state = model(tokens, starts, empty).state[0]
    assert isinstance(state, StoreState)
    assert state.stored[0].tolist() == [False] * 4 + [True] * 11
    assert not state.keys[0, :4].any() and not state.values[0, :4].any()
    alone = model(tokens[:, 12:], starts_at([], length=11), empty).state[0]
    for name, part, expected in zip(state._fields, state, alone, strict=True):
        assert_close(part, expected, name)
    lengths = state.keys[0, 4:].square().sum(-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layers", "setting", "expected"), [
    (12, 0, 8), (4, 0, 2), (6, 0, 4), (2, 0, 1), (1, 0, 0), (12, 3, 2),
])  # fmt: skip
def test_one_layer_has_the_store_by_default_at_three_quarters(
    layers: int, setting: int, expected: int
) -> None:
    model = build(MemorizingConfig(setting, 10, 3, cache=7), n_layers=layers)
    kinds = [type(memory) for memory in model.initial_state(1, "cpu")]
    assert store_layer(model.config) == expected
    assert kinds == [StoreState if at == expected else CacheState for at in range(layers)]
    assert model.gates() == {f"layers.{expected}.attention.gate": expected}
    for memory in model.initial_state(3, "cpu"):
        assert memory[0].shape == (3, 7, model.config.d_model)


def test_a_new_layer_mixes_both_equally_with_a_scale_of_one() -> None:
    memory = MemoryConfig(kind="memorizing", memorizing=MemorizingConfig(capacity=10))
    attention = layer(Transformer(small.build(memory).config, VOCABULARY))
    assert attention.gate.dtype == torch.float32 and not attention.gate.any()
    assert attention.scale.tolist() == [1.0] * 4


def test_metrics_count_the_tokens_of_the_store_and_of_the_caches() -> None:
    model = build(MemorizingConfig(1, 15, 3, cache=4))
    output = model(random_tokens(2), starts_at([12], []), model.initial_state(2, "cpu"))
    assert model.metrics(output.state) == {"cached_tokens": [8, 8], "store_tokens": [11 + 15]}


@pytest.mark.parametrize("neighbours", [3, 12])
def test_streamed_logits_equal_the_whole_document_s_over_eight_segments(neighbours: int) -> None:
    model = build(MemorizingConfig(1, 15, neighbours), dtype=torch.float32)
    tokens = random_tokens(2, 8 * SEGMENT + 2)
    with torch.no_grad():
        starts = starts_at([0], [0], length=tokens.shape[1])
        whole = model(tokens, starts, model.initial_state(2, "cpu")).logits
    stream, pieces = model.open_stream(2, "cpu"), []
    for now in tokens.split(1, dim=1):
        logits, stream = model.extend(now, stream)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_a_decoded_token_s_work_depends_on_shapes_alone() -> None:
    # On the meta device whatever asks for a number fails.
    model = build(dtype=torch.float32).to("meta")
    stream: StreamState = model.open_stream(2, "meta")
    tokens = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    places = torch.zeros(1, dtype=torch.int64, device="meta")
    logits = model.step(tokens, places, stream, SEGMENT)
    assert logits.shape == (2, 1, VOCABULARY)
    model.counted(stream, SEGMENT)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_a_search_never_holds_all_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, heads, size = 600, 4, 8
    queries, keys = torch.randn(tokens, heads, size), torch.randn(900, 2, size)
    whole = nearest.nearest(queries, keys, 5)
    monkeypatch.setitem(nearest.SCORES, "cpu", 2**16)
    with Largest() as largest:
        found = nearest.nearest(queries, keys, 5)
    assert largest.numbers <= 2**16 < tokens * heads * len(keys) / 30
    for ours, theirs in zip(found, whole, strict=True):
        assert torch.equal(ours.sort(dim=-1).values, theirs.sort(dim=-1).values)


def test_a_window_holds_no_more_scores_than_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(MemorizingConfig(2, 500, 3), segment=100)
    monkeypatch.setitem(nearest.SCORES, "cpu", 2**14)
    tokens = random_tokens(1, 1000)
    starts, empty = starts_at([], length=1000), model.initial_state(1, "cpu")
    with Largest() as largest:
        model(tokens, starts, empty, tokens).loss.backward()
    # A full store is 1000 * 4 * 500 scores; the cache and the segment are 10 * 4 * 100 * 200.
    assert largest.numbers <= 10 * 4 * 100 * 200
    calls = calls_of(model, lambda: model(tokens, starts, empty))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert calls.count(f"layers.1.attention.{name}") == 1


def test_a_search_has_no_backward_in_the_count_of_flops() -> None:
    config = build(MemorizingConfig(2, 1000, 3)).config
    more = build(MemorizingConfig(2, 2000, 3)).config
    forward, training, computed = (
        count(more) - count(config)
        for count in (
            lambda one: sum(flops.forward_flops(one, VOCABULARY, TOKENS).values()) / TOKENS,
            lambda one: flops.training_flops_per_token(one, VOCABULARY, TOKENS),
            lambda one: flops.computed_flops_per_token(one, VOCABULARY, TOKENS, "none"),
        )
    )
    assert forward == training == computed == 2 * 1000 * 4 * 6
