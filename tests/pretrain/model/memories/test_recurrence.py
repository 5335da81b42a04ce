"""Both recurrences against their naive loops (naive/recurrence.py), and what they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config.memory import AutoCompressorConfig, MemoryConfig, RMTConfig
from pretrain.config.optim import OptimConfig
from pretrain.model.memories.recurrence import VectorState
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer
from pretrain.training.optim import parameter_groups
from tests.pretrain.model import small
from tests.pretrain.model.naive.autocompressor import NaiveAutoCompressor
from tests.pretrain.model.naive.block import assert_equals_naive
from tests.pretrain.model.naive.recurrence import NaiveRecurrence
from tests.pretrain.model.naive.rmt import NaiveRMT
from tests.pretrain.model.small import (
    DOCUMENTS,
    SEGMENT,
    TOKENS,
    assert_close,
    calls_of,
    random_tokens,
    starts_at,
)

SUMMARIES = AutoCompressorConfig(vectors=2, capacity=3)
KINDS: dict[str, tuple[MemoryConfig, type[NaiveRecurrence]]] = {
    "rmt": (MemoryConfig(kind="rmt", rmt=RMTConfig(vectors=3)), NaiveRMT),
    "autocompressor": (
        MemoryConfig(kind="autocompressor", autocompressor=SUMMARIES),
        NaiveAutoCompressor,
    ),
}
of_both = pytest.mark.parametrize("kind", KINDS)


def build(kind: str, heads: tuple[int, int] = (4, 2), **changes: Any) -> Transformer:
    return small.build(KINDS[kind][0], heads, **changes)


def random_state(model: Transformer, held: tuple[int, ...], seed: int = 5) -> ModelState:
    """A lane for each of `held`, in which as many segments' vectors are held, the newest."""
    (empty,) = model.initial_state(len(held), "cpu")
    assert isinstance(empty, VectorState)
    slots = empty.held.shape[1]
    holds = torch.arange(slots) >= slots - torch.tensor(held)[:, None].clamp(max=slots)
    share = empty.vectors.shape[1] // slots
    vectors = torch.randn(
        empty.vectors.shape, generator=torch.manual_seed(seed), dtype=empty.vectors.dtype
    )
    return (VectorState(vectors * holds.repeat_interleave(share, 1)[..., None], holds),)


def assert_equals(
    model: Transformer,
    starts: Tensor,
    state: ModelState,
    read_memory: bool = True,
    initial: ModelState | None = None,
) -> None:
    _, naive = KINDS[model.config.memory.kind]
    assert_equals_naive(model, naive(model, read_memory, initial), starts, state)


@pytest.mark.parametrize("documents", DOCUMENTS)
@of_both
def test_a_window_equals_the_naive_loop(kind: str, documents: str) -> None:
    model = build(kind)
    assert_equals(model, starts_at(*DOCUMENTS[documents]), random_state(model, (3, 1)))


@pytest.mark.parametrize("documents", DOCUMENTS)
@of_both
def test_documents_begin_with_the_initial_memory(kind: str, documents: str) -> None:
    model = build(kind)
    carried, initial = random_state(model, (1, 3)), random_state(model, (0, 2), seed=6)
    assert_equals(model, starts_at(*DOCUMENTS[documents]), carried, True, initial)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
@of_both
def test_query_heads_share_key_value_heads_in_order(kind: str, heads: tuple[int, int]) -> None:
    model = build(kind, heads)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals(model, starts, random_state(model, (2, 3)))


@pytest.mark.parametrize("held", [(0, 0), (0, 2)])
@of_both
def test_an_empty_memory_takes_no_part_in_attention(kind: str, held: tuple[int, int]) -> None:
    model = build(kind)
    assert_equals(model, starts_at([], []), random_state(model, held))


@of_both
def test_a_masked_read_equals_the_loop_that_reads_nothing(kind: str) -> None:
    model = build(kind)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals(model, starts, random_state(model, (3, 1)), read_memory=False)


@of_both
def test_every_module_runs_once_a_segment_whatever_the_data(kind: str) -> None:
    model, tokens = build(kind), random_tokens()
    segments = -(-TOKENS // SEGMENT)
    once = ["", "embedding", "recurrence.learned", "lm_head"]
    expected = dict.fromkeys(once, 1) | {
        name: segments
        for name, _ in model.named_modules()
        if name not in (*once, "layers", "recurrence")
    }
    for places in DOCUMENTS.values():
        for held in ((0, 0), (3, 1)):
            state = random_state(model, held)
            calls = calls_of(model, lambda p=places, s=state: model(tokens, starts_at(*p), s))
            assert {name: calls.count(name) for name in calls} == expected


@of_both
def test_full_checkpointing_computes_each_block_of_each_segment_again(kind: str) -> None:
    model, tokens = build(kind, checkpointing="full"), random_tokens()
    state = random_state(model, (1, 2))
    calls = calls_of(
        model, lambda: model(tokens, starts_at([6], []), state, tokens).loss.backward()
    )
    assert calls.count("layers.1.attention.q_proj") == 2 * 5


@of_both
def test_a_copied_stream_continues_by_itself(kind: str) -> None:
    model, tokens = build(kind), random_tokens(2, 4 * SEGMENT)
    _, stream = model.extend(tokens[:, :7], model.open_stream(2, "cpu"))
    other = stream.copied()
    model.extend(random_tokens(2, 4 * SEGMENT, seed=9), stream)
    again, _ = model.extend(tokens[:, 7:], other)
    expected, _ = model.extend(tokens, model.open_stream(2, "cpu"))
    assert_close(again, expected[:, 7:], "logits")


@of_both
def test_learned_vectors_differ_and_decay_like_the_embedding(kind: str) -> None:
    model = Transformer(build(kind).config, 31)
    learned = dict(model.named_parameters())["recurrence.learned.weight"]
    distances = torch.cdist(learned, learned) + torch.eye(len(learned))
    assert distances.min() > 0.01
    assert 0.01 < learned.std() < 0.04
    named = [(name, p, p.dim()) for name, p in model.named_parameters()]
    groups = parameter_groups(named, model.gates(), OptimConfig())
    (own,) = (group for group in groups if any(p is learned for p in group["params"]))
    assert any(p is model.embedding.weight for p in own["params"])
    assert own["weight_decay"] > 0


@of_both
def test_a_bf16_model_has_finite_gradients(kind: str) -> None:
    model, tokens = build(kind, dtype=torch.bfloat16), random_tokens()
    output = model(tokens, starts_at([6], []), model.initial_state(2, "cpu"), tokens)
    assert output.state[0].vectors.dtype == torch.bfloat16
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
