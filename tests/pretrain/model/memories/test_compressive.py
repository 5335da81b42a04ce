"""The Compressive Transformer against a naive loop, its gradients' routes, and its reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.memory import CompressiveConfig, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.memories.compressive import CompressiveState
from pretrain.model.memories.contract import Attended
from pretrain.model.state import ModelState, detached, mapped
from pretrain.model.transformer import Transformer
from tests.pretrain.model import small
from tests.pretrain.model.naive.block import assert_equals_naive
from tests.pretrain.model.naive.compressive import NaiveCompressive
from tests.pretrain.model.small import (
    TOKENS,
    VOCABULARY,
    assert_close,
    calls_of,
    random_tokens,
    starts_at,
    weighted_sum,
    with_gradient,
)

SEGMENT = 4
# Of a window of 23 tokens: five whole segments and one of three tokens.
SHAPES = {
    "two segments cached, slots of two segments": CompressiveConfig(8, 4, 2, 0.7),
    "one segment cached, some slots of a segment fall out": CompressiveConfig(0, 3, 2, 0.7),
    "fewer slots than a segment makes": CompressiveConfig(0, 1, 2, 0.7),
    "a segment is one block": CompressiveConfig(4, 2, 4, 0.7),
    "as many slots as inputs": CompressiveConfig(8, 5, 1, 0.7),
    "a cache of more than the window": CompressiveConfig(28, 3, 2, 0.7),
}
USUAL = SHAPES["one segment cached, some slots of a segment fall out"]

DOCUMENTS: dict[str, tuple[list[int], list[int]]] = {
    "one document, carried in": ([], []),
    "first tokens of a window and of segments": ([0], [4, 20]),
    "last tokens of segments and of the window": ([3, 15], [7, 22]),
    "several in a segment": ([8, 9, 11], [0, 1, 2, 3, 21]),
    "inside blocks": ([5, 13], [1, 11]),
    "between blocks": ([6], [2, 10]),
    "random places": ([2, 11, 18], [7, 8, 16]),
}


def build(shape: CompressiveConfig = USUAL, **changes: Any) -> Transformer:
    memory = MemoryConfig(kind="compressive", compressive=shape)
    return small.build(memory, **{"segment": SEGMENT, **changes})


def random_state(model: Transformer, lanes: int = 2, seed: int = 5) -> ModelState:
    """What a document left that filled the first lane and started lately in the others."""
    generator = torch.manual_seed(seed)
    layers = []
    for layer in model.initial_state(lanes, "cpu"):
        assert isinstance(layer, CompressiveState)
        parts = []
        for inputs, gaps in ((layer.compressed, 1), (layer.cached, 2)):
            held = torch.ones(inputs.shape[:2], dtype=torch.bool)
            held[1:, :gaps] = False
            random = torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
            parts += [random * held[..., None], held]
        layers.append(CompressiveState(*parts))
    return tuple(layers)


class Results:
    """A forward of a model, with what a test needs of its graph."""

    def __init__(
        self, model: Transformer, starts: Tensor, state: ModelState, **arguments: Any
    ) -> None:
        tokens = random_tokens(len(starts), starts.shape[1])
        self.embedded: list[Tensor] = []
        losses: list[Tensor] = []

        def keep_input(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            self.embedded.append(output)

        def keep_loss(module: nn.Module, inputs: Any, output: Attended) -> None:
            assert output.auxiliary is not None
            losses.append(output.auxiliary)

        hooks = [model.embedding.register_forward_hook(keep_input)]
        hooks += [layer.register_forward_hook(keep_loss) for layer in model.layers]
        output = model(tokens, starts, state, **arguments)
        for hook in hooks:
            hook.remove()
        self.logits: Tensor = output.logits
        self.state: ModelState = output.state
        self.auxiliary = torch.stack(losses).sum()


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_parallel_window_equals_the_loop_over_segments(shape: str, documents: str) -> None:
    model = build(SHAPES[shape], n_layers=2 if SHAPES[shape] == USUAL else 1)
    starts = starts_at(*DOCUMENTS[documents])
    assert_equals_naive(model, NaiveCompressive(model), starts, random_state(model))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_documents_begin_with_the_initial_memory(shape: str, documents: str) -> None:
    model = build(SHAPES[shape], n_layers=2 if SHAPES[shape] == USUAL else 1)
    initial = random_state(model, seed=6)
    naive = NaiveCompressive(model, initial=initial)
    assert_equals_naive(model, naive, starts_at(*DOCUMENTS[documents]), random_state(model))


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
def test_query_heads_share_key_value_heads_in_order(heads: tuple[int, int]) -> None:
    model = build(heads=heads)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals_naive(model, NaiveCompressive(model), starts, random_state(model))


def test_an_empty_memory_and_one_that_fills() -> None:
    model = build()
    starts = starts_at(*DOCUMENTS["one document, carried in"])
    assert_equals_naive(model, NaiveCompressive(model), starts, model.initial_state(2, "cpu"))


def test_a_masked_read_equals_the_loop_that_reads_nothing() -> None:
    model = build()
    starts = starts_at(*DOCUMENTS["random places"])
    naive = NaiveCompressive(model, read_memory=False)
    assert_equals_naive(model, naive, starts, random_state(model))


@pytest.mark.parametrize("length", [1, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_window_may_be_shorter_than_a_segment(shape: str, length: int) -> None:
    model = build(SHAPES[shape], n_layers=1)
    for places in ([], []), ([length - 1], [0]):
        starts = starts_at(*places, length=length)
        assert_equals_naive(model, NaiveCompressive(model), starts, random_state(model))


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor | None]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [*named.values()], retain_graph=True, allow_unused=True)
    return dict(zip(named, found, strict=True))


def reached(found: dict[str, Tensor | None]) -> set[str]:
    return {name for name, gradient in found.items() if gradient is not None and gradient.any()}


def test_the_reconstruction_loss_trains_the_compression_alone() -> None:
    model = build()
    ours = Results(model, starts_at([], [7]), random_state(model))
    found = reached(gradients(model, ours.auxiliary))
    assert found == {f"layers.{layer}.attention.compression.weight" for layer in range(2)}
    ours.auxiliary.backward()
    assert ours.embedded[0].grad is None or not ours.embedded[0].grad.any()


def test_the_targets_loss_trains_all_but_the_compression() -> None:
    model = build()
    ours = Results(model, starts_at([], [7]), random_state(model))
    found = reached(gradients(model, weighted_sum(ours.logits)))
    named = {name for name, _ in model.named_parameters()}
    assert found == {name for name in named if "compression" not in name}


def test_no_gradient_reaches_inputs_of_earlier_segments() -> None:
    model = build(n_layers=1)
    ours = Results(model, starts_at([]), random_state(model, 1))
    weighted_sum(ours.logits[:, 3 * SEGMENT :]).backward()
    assert ours.embedded[0].grad is not None
    seen = ours.embedded[0].grad.ne(0).any(dim=2)[0]
    assert not seen[: 3 * SEGMENT].any() and seen[3 * SEGMENT :].all()


def test_no_gradient_reaches_the_carried_memory_or_leaves_with_it() -> None:
    model = build()
    carried = with_gradient(random_state(model))
    ours = Results(model, starts_at([], [7]), carried)
    (weighted_sum(ours.logits) + ours.auxiliary).backward()
    assert all(part.grad is None for layer in carried for part in layer)
    assert not any(part.requires_grad for layer in ours.state for part in layer)


@pytest.mark.parametrize("kept", ["compressed_held", "cached_held"])
def test_keys_and_values_learn_from_what_is_kept_at_every_step(kept: str) -> None:
    # Of a window of one token the gradients are products with its own input, and with the slots.
    model = build(n_layers=1)
    inputs: list[Tensor] = []
    model.layers[0].get_submodule("attention_norm").register_forward_hook(
        lambda module, given, output: inputs.append(output.detach().flatten())
    )
    (state,) = random_state(model, 1)
    assert isinstance(state, CompressiveState)
    flags = {name: torch.zeros_like(getattr(state, name)) for name in state._fields[1::2]}
    flags[kept] = getattr(state, kept)
    carried = state._replace(**flags)

    def of_slots(read_memory: bool) -> list[float]:
        ours = Results(model, starts_at([], length=1), (carried,), read_memory=read_memory)
        found = gradients(model, weighted_sum(ours.logits) + ours.auxiliary)
        own = F.normalize(inputs[-1], dim=0)
        weights = [found[f"layers.0.attention.{part}_proj.weight"] for part in "kv"]
        return [float((w - torch.outer(w @ own, own)).norm()) for w in weights if w is not None]

    assert of_slots(False) == pytest.approx([0, 0], abs=1e-12)
    for _ in range(2):
        keys, values = of_slots(True)
        assert keys > 1e-3 and values > 1e-3


def test_the_loss_compares_what_leaves_the_cache_and_no_more() -> None:
    # Two segments are cached: the older one leaves when the window's only segment is full.
    model = build(SHAPES["two segments cached, slots of two segments"], n_layers=1)
    state = random_state(model, 1)
    starts = starts_at([], length=SEGMENT)
    before = Results(model, starts, state).auxiliary
    assert before > 0
    for row in range(8):
        changed = tuple(mapped(torch.clone, layer) for layer in state)
        assert isinstance(changed[0], CompressiveState)
        changed[0].cached[0, row] += 1
        after = Results(model, starts, changed).auxiliary
        assert bool(after != before) == (row < SEGMENT)


def test_nothing_leaves_the_cache_of_a_document_s_first_segments() -> None:
    model = build(SHAPES["two segments cached, slots of two segments"])
    for length, some in ((SEGMENT, False), (2 * SEGMENT, False), (2 * SEGMENT + 1, True)):
        ours = Results(model, starts_at([0], length=length), random_state(model, 1))
        assert bool(ours.auxiliary > 0) == some


def test_the_auxiliary_loss_is_part_of_the_loss_and_reported_apart() -> None:
    model, tokens, starts = build(), random_tokens(), starts_at([], [7])
    state = random_state(model)
    output = model(tokens, starts, state, tokens)
    expected = Results(model, starts, state).auxiliary
    assert_close(output.auxiliary, expected.detach(), "auxiliary loss")
    logits = model(tokens, starts, state).logits
    plain = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(output.loss, plain + expected)
    with torch.no_grad():
        assert model(tokens, starts, state, tokens).auxiliary is None


def test_a_compression_of_means_is_exact_for_equal_inputs() -> None:
    model = build(SHAPES["two segments cached, slots of two segments"], n_layers=1)
    width = model.config.d_model
    with torch.no_grad():
        compression = model.get_parameter("layers.0.attention.compression.weight")
        compression.copy_(torch.eye(width, dtype=torch.float64).repeat(1, 2) / 2)
    (state,) = random_state(model, 1)
    assert isinstance(state, CompressiveState)
    same = state._replace(cached=state.cached[:, :1].expand_as(state.cached).clone())
    ours = Results(model, starts_at([], length=SEGMENT), (same,))
    assert ours.auxiliary < 1e-20
    (after,) = ours.state
    assert isinstance(after, CompressiveState)
    torch.testing.assert_close(after.compressed[:, -2:], same.cached[:, :2])


def test_the_reach_is_that_of_cache_and_compressed_slots() -> None:
    # One layer, so that nothing is passed on: 4 cached inputs, and 3 slots of 2 older ones each.
    model = build(n_layers=1)
    tokens, starts = random_tokens(1, 5 * SEGMENT), starts_at([0], length=5 * SEGMENT)
    state = model.initial_state(1, "cpu")
    with torch.no_grad():
        before = model(tokens, starts, state).logits
        for t in range(4 * SEGMENT):
            changed = tokens.clone()
            changed[0, t] = (tokens[0, t] + 1) % VOCABULARY
            differs = (model(changed, starts, state).logits != before).any(dim=2)[0, 4 * SEGMENT :]
            within = t >= 4 * SEGMENT - (4 + 3 * 2)
            assert differs.all() if within else not differs.any()


def test_a_block_of_two_documents_makes_no_slot() -> None:
    # The second document starts at the second token of the block of tokens 4 and 5.
    model = build(SHAPES["one segment cached, some slots of a segment fall out"])
    output = Results(model, starts_at([5], length=3 * SEGMENT), random_state(model, 1))
    for layer in output.state:
        assert isinstance(layer, CompressiveState)
        assert layer.compressed_held.tolist() == [[False, False, True]]
        assert layer.cached_held.all()
        assert not layer.compressed[:, :2].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_logits_equal_the_whole_document_s_for_any_shape(shape: str) -> None:
    model, length = build(SHAPES[shape], dtype=torch.float32), 7 * SEGMENT + 3
    tokens = random_tokens(2, length)
    stream, pieces = model.open_stream(2, "cpu"), []
    with torch.no_grad():
        starts = starts_at([0], [0], length=length)
        whole = model(tokens, starts, model.initial_state(2, "cpu")).logits
        for now in tokens.split([1, 5, 13, 2, 3, 7], dim=1):
            logits, stream = model.extend(now, stream)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_metrics_count_what_is_held() -> None:
    model = build(n_layers=1)
    output = Results(model, starts_at([5], [], length=3 * SEGMENT), random_state(model))
    found = model.metrics(detached(output.state))
    assert found == {"cached_tokens": [8.0], "compressed_slots": [4.0]}


def test_each_projection_runs_once_a_window() -> None:
    model, tokens = build(), random_tokens()
    state = random_state(model)
    output: list[Tensor] = []
    calls = calls_of(
        model, lambda: output.append(model(tokens, starts_at([3], []), state, tokens).loss)
    )
    output[0].backward()
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "compression"):
        assert calls.count(f"layers.0.attention.{part}") == 1
    assert TOKENS > 5 * SEGMENT


def test_by_default_the_compressions_gradient_is_small_beside_that_of_the_language_model() -> None:
    """Else it would fill `train.clip_norm`, which bounds the norm of all gradients together."""
    torch.manual_seed(0)
    memory = MemoryConfig(kind="compressive", compressive=CompressiveConfig(compressed=32))
    config = ModelConfig(d_model=64, n_layers=2, d_head=16, d_ff=128, segment=32, memory=memory)
    model = Transformer(config, 256)
    tokens = random_tokens(2, 256)
    model(
        tokens, starts_at([], [], length=256), model.initial_state(2, "cpu"), tokens
    ).loss.backward()
    squares = {True: 0.0, False: 0.0}
    for name, parameter in model.named_parameters():
        squares["compression" in name] += float(parameter.grad.square().sum())
    assert 0 < squares[True] < 1e-4 * squares[False]
