"""Decoding token by token over fixed tensors, against whole documents and plain streaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.config.memory import AutoCompressorConfig, MemoryConfig, RMTConfig
from pretrain.config.model import ModelConfig
from pretrain.model.decoding import Decoder
from pretrain.model.stream import StreamState
from pretrain.model.transformer import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEGMENT = 8
MEMORIES = [MemoryConfig(kind="none"), MemoryConfig(kind="linear", when_empty="local"),
            MemoryConfig(kind="delta"),
            MemoryConfig(kind="rmt", rmt=RMTConfig(vectors=3)),
            MemoryConfig(kind="autocompressor",
                         autocompressor=AutoCompressorConfig(vectors=2, capacity=3))]  # fmt: skip


def build(memory: MemoryConfig) -> Transformer:
    torch.manual_seed(1)
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_ff": 48}
    config = ModelConfig(segment=SEGMENT, memory=memory, init_std=0.2, **shape)
    model = Transformer(config, 50).eval().to(DEVICE)
    for name, weight in model.named_parameters():
        if name.endswith("gate"):
            nn.init.normal_(weight)
    return model


def documents(length: int) -> Tensor:
    generator = torch.manual_seed(2)
    return torch.randint(50, (2, length), generator=generator).to(DEVICE)


def decoded(model: Transformer, tokens: Tensor, prompt: int) -> Tensor:
    """The logits after each token from the prompt's end on: [B, T - prompt, V]."""
    stream = model.open_stream(len(tokens), DEVICE)
    if prompt:
        _, stream = model.extend(tokens[:, :prompt], stream)
    decoder = Decoder(model, stream)
    return torch.stack([decoder.step(t).clone() for t in tokens[:, prompt:].unbind(1)], dim=1)


def tensors(stream: StreamState) -> list[Tensor]:
    of_layers = [tensor for layer in stream.layers for tensor in (*layer.memory, *layer.cache)]
    return [*(stream.recurrence or ()), *of_layers]


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: memory.kind)
@pytest.mark.parametrize("prompt", [0, 3, SEGMENT, 2 * SEGMENT + 7])
def test_decoded_logits_are_those_of_the_whole_document(memory: MemoryConfig, prompt: int) -> None:
    model, tokens = build(memory), documents(4 * SEGMENT + 3)
    with torch.no_grad():
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        whole = model(tokens, starts, model.initial_state(2, DEVICE)).logits
    torch.testing.assert_close(
        decoded(model, tokens, prompt), whole[:, prompt:], rtol=1e-5, atol=1e-5
    )


class Calls(TorchDispatchMode):
    """Every operator called, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, ...]] = []

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        shapes = [str(tuple(leaf.shape)) for leaf in given if isinstance(leaf, Tensor)]
        self.seen.append((str(call), *shapes))
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: memory.kind)
def test_a_step_over_the_whole_segment_is_the_same_work_on_the_same_tensors(
    memory: MemoryConfig,
) -> None:
    """What a graph needs; and why the millionth token costs what the first does."""
    model, tokens = build(memory), documents(3 * SEGMENT)
    stream = model.open_stream(2, DEVICE)
    places = [tensor.data_ptr() for tensor in tensors(stream)]
    steps = []
    for token in tokens.unbind(1):
        place = torch.tensor([stream.filled], device=DEVICE)
        with Calls() as calls:
            model.step(token[:, None], place, stream, SEGMENT)
        steps.append(calls.seen)
        stream = model.counted(stream, 1)
        assert [tensor.data_ptr() for tensor in tensors(stream)] == places
    assert len(steps[0]) > 50 and all(step == steps[0] for step in steps)
    # None of them waits for a number of the device, which a capture forbids.
    names = {name for name, *_ in steps[0]}
    assert not names & {"aten._local_scalar_dense.default", "aten.nonzero.default"}


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: memory.kind)
def test_places_that_are_not_filled_are_not_seen(memory: MemoryConfig) -> None:
    model, tokens = build(memory), documents(SEGMENT)
    expected, _ = model.extend(tokens, model.open_stream(2, DEVICE))
    stream = model.open_stream(2, DEVICE)
    for part in tensors(stream)[-3:]:
        part.fill_(1e3)
    found = []
    for index, token in enumerate(tokens.unbind(1)):
        place = torch.tensor([index], device=DEVICE)
        found.append(model.step(token[:, None], place, stream, SEGMENT))
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)
