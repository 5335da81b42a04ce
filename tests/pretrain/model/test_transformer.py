"""The model against the paper read aloud (naive/), and its own equalities."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config.memory import FullConfig, MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.loss import IGNORE
from pretrain.model.memories.infini import MemoryState
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer, on_meta
from tests.pretrain.model import small
from tests.pretrain.model.naive.block import NaiveModel, assert_equals_naive
from tests.pretrain.model.naive.infini import Naive
from tests.pretrain.model.small import (
    DOCUMENTS,
    VOCABULARY,
    assert_close,
    calls_of,
    random_tokens,
    starts_at,
)

RULES = {
    "linear": MemoryConfig(kind="linear"),
    "delta, paper": MemoryConfig(kind="delta", normaliser="paper"),
    "delta, inclusive": MemoryConfig(kind="delta", normaliser="inclusive"),
    "linear, local when empty": MemoryConfig(kind="linear", when_empty="local"),
    "none": MemoryConfig(kind="none"),
    "full": MemoryConfig(kind="full", full=FullConfig(segments=2)),
}
WITH_MEMORY = [rule for rule, memory in RULES.items() if memory.traits.remembers]


def build(rule: str, heads: tuple[int, int] = (4, 2), **changes: Any) -> Transformer:
    return small.build(RULES[rule], heads, **changes)


def random_state(model: Transformer, lanes: int = 2, seed: int = 5) -> ModelState:
    """What earlier segments of a document might have left: z is a sum of features, so positive."""
    generator = torch.manual_seed(seed)
    empty = model.initial_state(lanes, "cpu")
    if not model.config.memory.traits.remembers:
        return empty
    return tuple(
        MemoryState(
            torch.randn(layer.matrix.shape, generator=generator, dtype=layer.matrix.dtype),
            5 + 5 * torch.rand(layer.normaliser.shape, generator=generator, dtype=torch.float64),
        )
        for layer in empty
    )


def assert_equals(
    model: Transformer,
    starts: Tensor,
    state: ModelState,
    read_memory: bool = True,
    initial: ModelState | None = None,
) -> None:
    naive = Naive if model.config.memory.traits.remembers else NaiveModel
    assert_equals_naive(model, naive(model, read_memory, initial), starts, state)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_parallel_window_equals_the_loop_over_segments(rule: str, documents: str) -> None:
    model = build(rule)
    assert_equals(model, starts_at(*DOCUMENTS[documents]), random_state(model))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("rule", WITH_MEMORY)
def test_documents_begin_with_the_initial_memory(rule: str, documents: str) -> None:
    model = build(rule)
    initial = random_state(model, seed=6)
    assert_equals(model, starts_at(*DOCUMENTS[documents]), random_state(model), True, initial)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("rule", ["linear", "delta, inclusive"])
def test_query_heads_share_key_value_heads_in_order(rule: str, heads: tuple[int, int]) -> None:
    model = build(rule, heads)
    assert_equals(model, starts_at(*DOCUMENTS["random places"]), random_state(model))


@pytest.mark.parametrize("rule", WITH_MEMORY)
def test_an_empty_memory_reads_as_zero_with_finite_gradients(rule: str) -> None:
    model = build(rule)
    starts = starts_at(*DOCUMENTS["one document, carried in"])
    assert_equals(model, starts, model.initial_state(2, "cpu"))


@pytest.mark.parametrize("rule", ["linear", "delta, inclusive"])
def test_a_masked_read_equals_the_loop_that_reads_zero(rule: str) -> None:
    model = build(rule)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals(model, starts, random_state(model), read_memory=False)


def test_untied_embeddings_have_a_weight_of_their_own() -> None:
    model = build("linear", tied_embeddings=False)
    assert "lm_head.weight" in dict(model.named_parameters())
    assert_equals(model, starts_at([3], []), random_state(model))


def logits_of(
    model: Transformer,
    tokens: Tensor,
    starts: Tensor,
    state: ModelState | None = None,
    read_memory: bool = True,
) -> Tensor:
    with torch.no_grad():
        carried = random_state(model, len(tokens)) if state is None else state
        output = model(tokens, starts, carried, read_memory=read_memory)
    return output.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", RULES)
def test_an_earlier_segment_speaks_through_memory_alone(rule: str) -> None:
    model, tokens = build(rule), random_tokens(1)
    starts = starts_at([0])
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % VOCABULARY

    def reached(read_memory: bool) -> Tensor:
        old, new = (logits_of(model, x, starts, None, read_memory) for x in (tokens, changed))
        return (old != new).any(dim=2)[0, model.config.span :]

    assert reached(True).all() == (rule in WITH_MEMORY)
    assert not reached(False).any()


def test_losses_are_those_of_the_logits() -> None:
    model, tokens = build("linear"), random_tokens()
    starts = starts_at([6], [10])
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE
    output = model(tokens, starts, model.initial_state(2, "cpu"), targets)
    logits = logits_of(model, tokens, starts, model.initial_state(2, "cpu"))
    expected = -logits.log_softmax(2).gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    expected[:, -1] = 0
    assert output.logits is None
    assert_close(output.losses, expected, "losses")


def test_logits_can_be_of_some_places_alone() -> None:
    model, tokens = build("linear"), random_tokens()
    starts, state = starts_at([6], [10]), model.initial_state(2, "cpu")
    every = logits_of(model, tokens, starts, state)
    lanes, at = torch.tensor([1, 0, 1]), torch.tensor([4, 9, 4])
    output = model(tokens, starts, state, places=(lanes, at))
    assert output.losses is None and output.logits.shape == (3, every.shape[2])
    assert_close(output.logits, every[lanes, at], "logits")
    none = torch.zeros(0, dtype=torch.int64)
    assert model(tokens, starts, state, places=(none, none)).logits.shape == (0, every.shape[2])


def test_every_module_runs_once_a_window_whatever_the_data() -> None:
    model, tokens = build("delta, inclusive"), random_tokens()
    state = random_state(model)
    expected = [name for name, module in model.named_modules() if name != "layers"]
    for places in DOCUMENTS.values():
        calls = calls_of(model, lambda p=places: model(tokens, starts_at(*p), state, tokens))
        assert sorted(calls) == sorted(expected)


def test_full_checkpointing_computes_each_block_again_in_the_backward() -> None:
    tokens, starts = random_tokens(), starts_at([6], [10])

    def runs(checkpointing: Literal["none", "full"]) -> int:
        model = build("linear", checkpointing=checkpointing)
        state = model.initial_state(2, "cpu")
        calls = calls_of(model, lambda: model(tokens, starts, state, tokens).loss.backward())
        return calls.count("layers.1.attention.q_proj")

    assert (runs("none"), runs("full")) == (1, 2)


def test_gates_start_where_the_configuration_says_and_only_where_there_is_memory() -> None:
    config = ModelConfig(memory=MemoryConfig(kind="linear", initial_gate=-1.5), n_layers=2)
    gates = {
        name: p for name, p in Transformer(config, 11).named_parameters() if name.endswith("gate")
    }
    assert len(gates) == 2
    for gate in gates.values():
        assert gate.dtype == torch.float32
        assert torch.equal(gate, torch.full((config.n_heads,), -1.5))
    without = Transformer(ModelConfig(memory=MemoryConfig(kind="none")), 11)
    assert not [name for name, _ in without.named_parameters() if name.endswith("gate")]
    assert without.initial_state(3, "cpu") == ((),) * 4


def test_initial_weights_follow_the_seed_and_shrink_into_the_residual_stream() -> None:
    config = ModelConfig(d_model=128, n_layers=8, init_std=0.03, tied_embeddings=False)

    def initial(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return dict(Transformer(config, 500).named_parameters())

    first, again, other = initial(1), initial(1), initial(2)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.dim() == 2:
            assert not torch.equal(weight, other[name])
            residual = "o_proj" in name or "down_proj" in name
            expected = 0.03 / 4 if residual else 0.03
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name


def test_a_bf16_model_keeps_its_memory_in_float32() -> None:
    model = build("delta, inclusive", dtype=torch.bfloat16)
    tokens = random_tokens()
    output = model(tokens, starts_at([6], []), model.initial_state(2, "cpu"), tokens)
    assert output.losses.dtype == torch.float32
    assert {part.dtype for memory in output.state for part in memory} == {torch.float32}
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    exact = build("delta, inclusive")
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    expected = exact(tokens, starts_at([6], []), exact.initial_state(2, "cpu"), tokens)
    assert output.losses.mean().item() == pytest.approx(expected.losses.mean().item(), rel=0.02)


def test_a_model_without_data_has_the_shapes_of_one_with_it_and_draws_no_weights() -> None:
    called = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    model = build("delta, inclusive")
    with Noting():
        empty = on_meta(model.config, VOCABULARY)
    assert called and not [name for name in called if "normal" in name]
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert {name: weight.shape for name, weight in empty.named_parameters()} == shapes
    assert all(weight.is_meta for weight in empty.parameters())
