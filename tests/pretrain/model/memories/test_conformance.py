"""What every kind of memory must do: a new one joins by a line in KINDS."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.memory import (
    MEMORY_KINDS,
    AutoCompressorConfig,
    CompressiveConfig,
    FullConfig,
    MemorizingConfig,
    MemoryConfig,
    RMTConfig,
)
from pretrain.model import flops
from pretrain.model.loss import IGNORE
from pretrain.model.memories.kinds import attention_of
from pretrain.model.state import ModelState, detached, joined, of_lanes
from pretrain.model.stream import StreamState
from pretrain.model.transformer import Transformer
from tests.pretrain.model.small import (
    SEGMENT,
    TOKENS,
    VOCABULARY,
    assert_close,
    build,
    calls_of,
    empty_weights_outside_their_modules,
    random_tokens,
    starts_at,
    weighted_sum,
    with_gradient,
)

KINDS = {
    "none": MemoryConfig(kind="none"),
    "full": MemoryConfig(kind="full", full=FullConfig(segments=2)),
    "transformer_xl": MemoryConfig(kind="transformer_xl"),
    "compressive": MemoryConfig(
        kind="compressive", compressive=CompressiveConfig(compressed=2, rate=SEGMENT)
    ),
    "memorizing": MemoryConfig(
        kind="memorizing", memorizing=MemorizingConfig(layer=2, capacity=10, neighbours=3)
    ),
    "linear": MemoryConfig(kind="linear"),
    "linear, local when empty": MemoryConfig(kind="linear", when_empty="local"),
    "delta, paper": MemoryConfig(kind="delta", normaliser="paper"),
    "delta, inclusive": MemoryConfig(kind="delta", normaliser="inclusive"),
    "rmt": MemoryConfig(kind="rmt", rmt=RMTConfig(vectors=3)),
    "autocompressor": MemoryConfig(
        kind="autocompressor", autocompressor=AutoCompressorConfig(vectors=2, capacity=3)
    ),
}
REACH = {"transformer_xl": 2, "memorizing": 3}
"""Segments that a kind's past reaches in a model of two layers, if that has an end."""

IN_PARALLEL = {name: memory for name, memory in KINDS.items() if not memory.traits.recurrent}
"""Those that compute all segments of a window, or of a chunk of it, at once."""

of_every_kind = pytest.mark.parametrize("memory", KINDS.values(), ids=KINDS)


def test_every_kind_of_the_configuration_is_here() -> None:
    assert {memory.kind for memory in KINDS.values()} == set(MEMORY_KINDS)


def used_state(model: Transformer, lanes: int = 2, seed: int = 5) -> ModelState:
    """What a document of three segments left behind."""
    tokens = random_tokens(lanes, 3 * SEGMENT, seed)
    starts = starts_at(*[[0]] * lanes, length=3 * SEGMENT)
    return detached(model(tokens, starts, model.initial_state(lanes, "cpu")).state)


def tensors(of: ModelState) -> list[Tensor]:
    return [tensor for layer in of for tensor in layer]


@torch.no_grad()
def logits_of(model: Transformer, tokens: Tensor, starts: Tensor, before: ModelState) -> Tensor:
    return model(tokens, starts, before).logits  # type: ignore[no-any-return]


@of_every_kind
def test_an_empty_state_is_zero_of_a_fixed_size_a_lane(memory: MemoryConfig) -> None:
    model = build(memory)
    empty, used = tensors(model.initial_state(3, "cpu")), tensors(used_state(model, 3))
    assert bool(empty) == memory.traits.remembers
    for before, after in zip(empty, used, strict=True):
        assert len(before) == 3 and not before.any() and after.any()
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


@of_every_kind
def test_a_document_begins_with_the_empty_memory(memory: MemoryConfig) -> None:
    model, tokens = build(memory), random_tokens()
    empty = model.initial_state(2, "cpu")
    expected = model(tokens, starts_at([], []), empty)
    found = model(tokens, starts_at([0], [0]), used_state(model))
    assert_close(found.logits, expected.logits, "logits")
    for ours, theirs in zip(tensors(found.state), tensors(expected.state), strict=True):
        assert_close(ours, theirs, "state")


@of_every_kind
def test_a_masked_read_is_that_of_an_empty_memory_and_writes_as_ever(memory: MemoryConfig) -> None:
    model, tokens, starts = build(memory, n_layers=1), random_tokens(), starts_at([6], [13])
    masked, read = (
        model(tokens, starts, used_state(model), read_memory=read) for read in (False, True)
    )
    segment = tokens[:, :SEGMENT], starts[:, :SEGMENT]
    empty = model(*segment, model.initial_state(2, "cpu"))
    assert_close(masked.logits[:, :SEGMENT], empty.logits, "logits")
    if memory.traits.recurrent:
        return  # it writes what its layers computed, which differs where they read nothing
    for ours, theirs in zip(tensors(masked.state), tensors(read.state), strict=True):
        assert_close(ours, theirs, "state")


@of_every_kind
def test_the_carried_memory_reaches_its_own_document_alone(memory: MemoryConfig) -> None:
    model, tokens, starts = build(memory), random_tokens(1), starts_at([12])
    one, other = (logits_of(model, tokens, starts, used_state(model, 1, seed)) for seed in (5, 6))
    differs = (one != other).any(dim=2)[0]
    reached = min(12, REACH.get(memory.kind, TOKENS) * SEGMENT) * memory.traits.remembers
    assert differs[:reached].all() and not differs[reached:].any()


@of_every_kind
def test_what_documents_begin_with_reaches_their_next_segments_alone(memory: MemoryConfig) -> None:
    model, tokens, starts = build(memory), random_tokens(1), starts_at([7])
    empty, initial = model.initial_state(1, "cpu"), used_state(model, 1)
    without, begun = (
        model(tokens, starts, empty, initial=first).logits for first in (None, initial)
    )
    # Products of pools of different sizes are rounded differently.
    differs = (without - begun).abs().amax(dim=2)[0] > 1e-12
    reached = REACH.get(memory.kind, TOKENS) * SEGMENT * memory.traits.remembers
    since = torch.arange(TOKENS) - 2 * SEGMENT
    assert torch.equal(differs, (since >= 0) & (since < reached))


@of_every_kind
def test_a_token_changes_nothing_before_it(memory: MemoryConfig) -> None:
    model, tokens = build(memory), random_tokens(1)
    starts = starts_at([8, 17])
    carried = used_state(model, 1)
    before = logits_of(model, tokens, starts, carried)
    for t in range(TOKENS):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % VOCABULARY
        after = logits_of(model, changed, starts, carried)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@of_every_kind
def test_another_document_changes_nothing(memory: MemoryConfig) -> None:
    model, tokens = build(memory), random_tokens(1)
    first_tokens = [0, 3, 4, 10, 19, TOKENS]
    starts = starts_at(first_tokens[:-1])
    carried = used_state(model, 1)
    before = logits_of(model, tokens, starts, carried)
    for first, end in itertools.pairwise(first_tokens):
        changed = tokens.clone()
        changed[0, first:end] = (tokens[0, first:end] + 1) % VOCABULARY
        differs = (logits_of(model, changed, starts, carried) != before).any(dim=2)[0]
        assert differs[first:end].all()
        assert not differs[:first].any() and not differs[end:].any()


@of_every_kind
def test_a_segment_learns_from_the_next_where_the_kind_says_so_and_within_a_window(
    memory: MemoryConfig,
) -> None:
    if memory.traits.whole_window:
        return  # its segments attend to each other
    alone = replace(memory.autocompressor, backprop_segments=1)
    for learns, model in (
        (memory.traits.learns_to_write, build(memory)),
        (memory.traits.learns_to_write and memory.kind != "autocompressor",
         build(replace(memory, autocompressor=alone))),
    ):  # fmt: skip
        tokens, targets = random_tokens(1, 2 * SEGMENT), random_tokens(1, 2 * SEGMENT, seed=2)
        targets[:, :SEGMENT] = IGNORE
        embedded: list[Tensor] = []
        model.embedding.register_forward_hook(lambda *given, to=embedded: to.append(given[2]))
        empty = model.initial_state(1, "cpu")
        loss = model(tokens, starts_at([0], length=2 * SEGMENT), empty, targets).loss
        (gradient,) = torch.autograd.grad(loss, embedded)
        assert bool(gradient[:, :SEGMENT].any()) == learns


@of_every_kind
def test_windows_fed_one_after_another_equal_one_long_window(memory: MemoryConfig) -> None:
    model, tokens = build(memory), random_tokens()
    starts = starts_at([6, 7, 15], [10])
    whole = model(tokens, starts, used_state(model))
    state, pieces = used_state(model), []
    lengths = [10, 10, 3] if memory.traits.whole_window else [10, 5, 8]
    for now, first in zip(tokens.split(lengths, 1), starts.split(lengths, 1), strict=True):
        output = model(now, first, state)
        state = output.state
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), whole.logits, "logits")
    for ours, theirs in zip(state, whole.state, strict=True):
        for name, part, expected in zip(ours._fields, ours, theirs, strict=True):
            assert_close(part, expected, name)


@pytest.mark.parametrize(
    "chunks",
    [
        [33],
        [1] * 33,
        [3, 20, 1, 1, 8],
        [5, 5, 5, 5, 5, 5, 3],
        [4, 1, 6, 19, 3],
    ],
    ids=str,
)
@of_every_kind
def test_streamed_logits_equal_the_whole_document_s(
    memory: MemoryConfig, chunks: list[int]
) -> None:
    # Larger weights make a recurrence through the whole stack amplify the rounding.
    model = build(memory, dtype=torch.float32, std=0.2)
    tokens = random_tokens(2, 33)
    whole = logits_of(model, tokens, starts_at([0], [0], length=33), model.initial_state(2, "cpu"))
    stream, pieces = model.open_stream(2, "cpu"), []
    for now in tokens.split(chunks, dim=1):
        logits, stream = model.extend(now, stream)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [[33], [3, 20, 1, 1, 8], [4, 1, 6, 19, 3]], ids=str)
@of_every_kind
def test_logits_of_the_last_token_alone_are_those_among_all(
    memory: MemoryConfig, chunks: list[int]
) -> None:
    model, tokens, computed = build(memory), random_tokens(2, 33), []
    model.lm_head.register_forward_pre_hook(lambda _, given: computed.append(given[0].numel()))
    every, one = (model.open_stream(2, "cpu") for _ in range(2))
    for now in tokens.split(chunks, dim=1):
        expected, every = model.extend(now, every)
        computed.clear()
        last, one = model.extend(now, one, last=True)
        # A chunk has at most the rest of a segment, whole segments, and the begin of another.
        assert sum(computed) <= 3 * 2 * model.config.d_model
        assert_close(last, expected[:, -1:], "logits")
    for ours, theirs in zip(one.layers, every.layers, strict=True):
        kept = (*ours.memory, *ours.cache), (*theirs.memory, *theirs.cache)
        assert all(torch.equal(part, whole) for part, whole in zip(*kept, strict=True))


@pytest.mark.parametrize("chunks", [[32], [3, 20, 1, 8], [4, 16, 12]], ids=str)
@of_every_kind
def test_a_stream_that_is_read_is_the_one_that_comes_with_logits(
    memory: MemoryConfig, chunks: list[int]
) -> None:
    model, tokens = build(memory), random_tokens(2, 32)
    every, one = (model.open_stream(2, "cpu") for _ in range(2))
    for now in tokens.split(chunks, dim=1):
        _, every = model.extend(now, every)
        one = model.read(now, one)
        assert one.filled == every.filled
        parts = zip(_tensors_of(one), _tensors_of(every), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in parts)


def _tensors_of(stream: StreamState) -> Iterator[Tensor]:
    for layer in stream.layers:
        yield from (*layer.memory, *layer.cache)
    yield from stream.recurrence or ()


@of_every_kind
def test_the_top_layer_has_no_output_where_whole_segments_are_read(memory: MemoryConfig) -> None:
    model, computed = build(memory), []
    *_, top = model.layers.blocks()
    for part in (top.attention.o_proj, top.feed_forward):
        part.register_forward_hook(lambda *_: computed.append(1))
    stream = model.read(random_tokens(2, 4 * SEGMENT), model.open_stream(2, "cpu"))
    # The vectors of a recurrence come from the top layer.
    assert bool(computed) == (model.recurrence is not None)
    model.read(random_tokens(2, 1), stream)
    assert computed


@of_every_kind
def test_a_stream_takes_the_same_space_at_any_length(memory: MemoryConfig) -> None:
    model = build(memory, dtype=torch.float32)

    def numbers(length: int) -> int:
        _, stream = model.extend(random_tokens(1, length), model.open_stream(1, "cpu"))
        kept = [x for layer in stream.layers for x in (*layer.memory, *layer.cache)]
        kept += stream.recurrence or ()
        return sum(x.untyped_storage().nbytes() for x in kept)

    assert numbers(SEGMENT * 40 + 3) == numbers(SEGMENT + 3)


@of_every_kind
def test_checkpointed_activations_give_the_same_gradients_to_the_bit(memory: MemoryConfig) -> None:
    tokens, starts = random_tokens(), starts_at([6, 7, 15], [10])

    def gradients(checkpointing: Literal["none", "full"]) -> list[Tensor]:
        model = build(memory, checkpointing=checkpointing)
        carried = with_gradient(used_state(model))
        output = model(tokens, starts, carried, tokens)
        weighted_sum(output.loss, *(part for memory in output.state for part in memory)).backward()
        inputs = [*model.parameters(), *(part for memory in carried for part in memory)]
        return [x.grad for x in inputs if x.grad is not None]

    plain, again = gradients("none"), gradients("full")
    assert len(plain) >= 20
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("memory", IN_PARALLEL.values(), ids=IN_PARALLEL)
def test_a_long_window_is_computed_again_in_chunks_with_the_same_gradients(
    memory: MemoryConfig,
) -> None:
    # Two lanes of 16,403 tokens: a chunk of 16,384, and 19 that a document begins with.
    length = 2**14 + 19
    tokens = random_tokens(length=length)
    starts = starts_at([6, 2**14], [10, 9_001, 2**14 + 5], length=length)

    def results(checkpointing: Literal["none", "full"]) -> list[Tensor]:
        model = build(memory, checkpointing=checkpointing)
        carried = with_gradient(used_state(model))
        output = model(tokens, starts, carried, tokens)
        after = [part for memory in output.state for part in memory]
        weighted_sum(output.loss, *after).backward()
        inputs = [*model.parameters(), *(part for memory in carried for part in memory)]
        return [output.losses, *after, *(x.grad for x in inputs if x.grad is not None)]

    torch.testing.assert_close(results("full"), results("none"), rtol=1e-9, atol=1e-9)
    model = build(memory, checkpointing="full")
    state = model.initial_state(2, "cpu")
    calls = calls_of(model, lambda: model(tokens, starts, state, tokens).loss.backward())
    assert calls.count("layers.1.attention.q_proj") == 2 * 2


@pytest.mark.parametrize("tied", [True, False])
@of_every_kind
def test_weights_are_read_only_inside_the_module_that_owns_them(
    memory: MemoryConfig, tied: bool
) -> None:
    model, tokens = build(memory, tied_embeddings=tied), random_tokens()
    starts, before = starts_at([6], [10]), used_state(model)

    def computed() -> list[Tensor]:
        streamed, _ = model.extend(tokens, model.open_stream(2, "cpu"))
        return [logits_of(model, tokens, starts, before), streamed]

    expected = computed()
    empty_weights_outside_their_modules(model)
    for ours, theirs in zip(computed(), expected, strict=True):
        assert torch.equal(ours, theirs)


@of_every_kind
def test_lanes_apart_are_the_lanes_together(memory: MemoryConfig) -> None:
    model, tokens, starts = build(memory), random_tokens(3), starts_at([4], [], [11, 12])
    before = used_state(model, 3)
    whole = model(tokens, starts, before)
    apart = [
        model(tokens[rows], starts[rows], of_lanes(before, rows))
        for rows in (slice(0, 1), slice(1, 3))
    ]
    after = joined([output.state for output in apart])
    assert [type(layer) for layer in after] == [type(layer) for layer in before]
    assert_close(torch.cat([output.logits for output in apart]), whole.logits, "logits")
    for ours, theirs in zip(tensors(after), tensors(whole.state), strict=True):
        assert_close(ours, theirs, "state")


@of_every_kind
def test_a_state_has_as_many_bytes_on_the_meta_device(memory: MemoryConfig) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        real = build(memory, dtype=dtype)
        model = build(memory, dtype=dtype).to("meta")
        found = tensors(model.initial_state(3, "meta"))
        assert [t.nbytes for t in found] == [t.nbytes for t in tensors(used_state(real, 3))]
        assert all(tensor.is_meta for tensor in found)


@of_every_kind
def test_metrics_are_finite_squares_that_add_up_over_lanes(memory: MemoryConfig) -> None:
    model = build(memory)
    whole = used_state(model, 3)
    found = model.metrics(whole)
    parts = [model.metrics(of_lanes(whole, [lane])) for lane in range(3)]
    for name, layers in found.items():
        assert len(layers) == (1 if name == "store_tokens" else len(whole))
        for index, value in enumerate(layers):
            assert 0 <= value < float("inf")
            assert value == pytest.approx(sum(part[name][index] for part in parts))


@of_every_kind
def test_flops_are_positive_and_those_that_torch_counts(memory: MemoryConfig) -> None:
    model = build(memory, heads=(4, 2), dtype=torch.float32, d_head=32, segment=20)
    tokens, starts = random_tokens(1, 80), starts_at([], length=80)
    # A memory may cost the more the fuller it is, up to its capacity.
    before = detached(model(tokens, starts, model.initial_state(1, "cpu")).state)
    # torch counts the products of the plain path, but not those inside its fused CPU kernel. With
    # gradients, as in training: an auxiliary loss is computed only then.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, starts, before)
    parts = flops.forward_flops(model.config, VOCABULARY, 80)
    assert all(part > 0 for part in parts.values())
    # A product with a vector, as sigma(Q) z, is not counted by torch.
    assert counter.get_total_flops() <= sum(parts.values()) <= 1.03 * counter.get_total_flops()
    assert attention_of(memory).recomputed_flops(model.config, 80) < sum(parts.values())


@of_every_kind
def test_gates_are_float32_parameters_of_the_layers_attention(memory: MemoryConfig) -> None:
    model = Transformer(build(memory).config, VOCABULARY)
    named = dict(model.named_parameters())
    own = attention_of(memory).gates
    in_attention = {name for name in named if ".attention." in name}
    assert set(model.gates()) == {name for name in in_attention if name.rpartition(".")[2] in own}
    assert all(named[name].dtype == torch.float32 for name in model.gates())
    assert bool(model.gates()) == bool(attention_of(memory).gates)
