"""FLOPs against torch's own counter, parameters against the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.config.training import Checkpointing
from pretrain.model import flops
from pretrain.model.transformer import Transformer
from pretrain.model.window import Parts
from pretrain.planning.simulate import in_use
from tests.pretrain import kinds

VOCABULARY = 300
WINDOW = 256
KINDS = [
    *(kinds.memory(kind) for kind in kinds.KINDS),
    MemoryConfig(kind="delta", normaliser="paper"),
]
NAMES = [*kinds.KINDS, "delta, paper"]
SHARING = [memory for memory in KINDS if memory.traits.shares_windows]


def config(memory: MemoryConfig, **changes: Any) -> ModelConfig:
    return ModelConfig(
        **{
            "d_model": 48,
            "n_layers": 3,
            "n_heads": 4,
            "n_kv_heads": 2,
            "d_head": 16,
            "d_ff": 80,
            "segment": 32,
            "memory": memory,
            "local_attention": "sdpa",
            **changes,
        }
    )


def counted(
    shape: ModelConfig, checkpointing: Checkpointing | None, parts: Parts | None = None
) -> int:
    """Of a training step, or of a forward to logits where `checkpointing` is None."""
    model = Transformer(shape, VOCABULARY, checkpointing or "none")
    tokens = torch.randint(VOCABULARY, (1, WINDOW))
    starts = torch.zeros(1, WINDOW, dtype=torch.bool)
    # torch counts the products of the plain path, but not those inside its fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        # With slots that hold something: the reads of a recurrence count in full.
        state = in_use(model.initial_state(1, "cpu"))
        output = model(tokens, starts, state, tokens if checkpointing else None, parts=parts)
        if output.loss is not None:
            output.loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("memory", KINDS, ids=NAMES)
def test_a_forward_has_the_flops_that_torch_counts(memory: MemoryConfig) -> None:
    # torch does not count sigma(Q) z and sigma(K) z, 1 / d_head of the memory's products.
    shape = config(memory)
    ours = sum(flops.forward_flops(shape, VOCABULARY, WINDOW).values())
    assert counted(shape, None) <= ours <= 1.01 * counted(shape, None)


@pytest.mark.parametrize("memory", KINDS, ids=NAMES)
def test_a_forward_without_gradients_and_logits_has_the_flops_that_torch_counts(
    memory: MemoryConfig,
) -> None:
    shape = config(memory)
    with torch.no_grad():
        read = counted(shape, None) - WINDOW * flops.head_flops(shape, VOCABULARY)
    assert read <= flops.reading_flops_per_token(shape, WINDOW) * WINDOW <= 1.01 * read


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("memory", KINDS, ids=NAMES)
def test_a_step_has_three_forwards_and_what_it_computes_again_to_one_percent(
    memory: MemoryConfig, checkpointing: Any
) -> None:
    shape = config(memory)
    ours = flops.computed_flops_per_token(shape, VOCABULARY, WINDOW, checkpointing) * WINDOW
    assert ours == pytest.approx(counted(shape, checkpointing), rel=0.01)
    useful = flops.training_flops_per_token(shape, VOCABULARY, WINDOW) * WINDOW
    assert useful == pytest.approx(counted(shape, "none"), rel=0.03)
    without = flops.computed_flops_per_token(shape, VOCABULARY, WINDOW, "none") * WINDOW
    if checkpointing != "none":
        more = counted(shape, checkpointing) - counted(shape, "none")
        assert ours - without == pytest.approx(more, rel=0.02)


class Alike:
    """The first of two parts of a window that are alike."""

    index, count = 0, 2

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return torch.stack([own, own])


@pytest.mark.parametrize("memory", SHARING, ids=str)
def test_a_part_of_a_window_takes_its_share_and_what_passing_its_memory_on_takes(
    memory: MemoryConfig,
) -> None:
    shape = config(memory)
    more = flops.passing_flops(shape, WINDOW // 32, 2, "none")
    assert counted(shape, None, Alike()) - counted(shape, None) == more // 3
    # Of the backward the first products lack one: a scan starts from constants.
    taken = counted(shape, "none", Alike()) - counted(shape, "none")
    assert taken == pytest.approx(more, rel=0.1)


def test_parts_are_the_products_of_their_shapes() -> None:
    shape = config(MemoryConfig(kind="delta"), n_layers=1)
    parts = flops.forward_flops(shape, VOCABULARY, 40)  # a whole segment and 8 tokens
    assert parts == {
        "projections": 2 * 40 * 48 * (64 + 32 + 32) + 2 * 40 * 64 * 48,
        "local_attention": 2 * 2 * 4 * 16 * (32 * 32 + 8 * 8),
        "feed_forward": 3 * 2 * 40 * 48 * 80,
        "output_head": 2 * 40 * 48 * 300,
        "memory_read": 2 * 40 * 4 * (16 * 16 + 16),
        "memory_write": 2 * 40 * 2 * 16 * 16,
        "memory_delta": 2 * 2 * (40 * (16 + 16 * 16) + 2 * 16**3),
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("memory", [KINDS[0], KINDS[-1]], ids=str)
def test_parameters_count_tied_embeddings_once(memory: MemoryConfig, tied: bool) -> None:
    shape = config(memory, tied_embeddings=tied)
    attention = 48 * (64 + 32 + 32) + 64 * 48 + 4 * memory.traits.remembers  # a gate a head
    outside = (1 if tied else 2) * 300 * 48 + 48
    expected = 3 * (attention + 3 * 48 * 80 + 2 * 48) + outside
    assert flops.parameters(shape, VOCABULARY) == expected


def test_biases_and_norms_count_as_parameters_and_cost_no_products() -> None:
    memory = MemoryConfig(kind="delta")
    shape, plain = config(memory, qkv_bias=True, qk_norm=True), config(memory)
    # A bias of 4 query heads and twice 2 others, of 16 each; a norm of queries and one of keys.
    more = flops.parameters(shape, VOCABULARY) - flops.parameters(plain, VOCABULARY)
    assert more == 3 * ((4 + 2 + 2) * 16 + 2 * 16)
    assert flops.forward_flops(shape, VOCABULARY, 40) == flops.forward_flops(plain, VOCABULARY, 40)


def test_peaks_are_dense_and_never_guessed() -> None:
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12
    assert flops.peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert flops.peak_flops("NVIDIA H200", torch.bfloat16) == 989e12
    for unknown in ("cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H300"):
        assert flops.peak_flops(unknown, torch.bfloat16) is None
    assert flops.peak_flops("NVIDIA H200", torch.float32) is None
