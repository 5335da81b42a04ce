"""The Infini-Transformer: Llama's blocks with Infini-attention, a window of segments at a time.

Knows tensors and its configuration alone: no ranks, no files, no engine. Every parameter is read
inside the forward of the module that owns it and every module runs once a forward, or once a chunk
of a very long window, whatever the data, which is what ZeRO-3 needs. The memory is an argument and
a result, never a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import Checkpointing, ModelConfig
from pretrain.model import local_attention
from pretrain.model.attention import (
    Continuation,
    InfiniAttention,
    OpenSegment,
    Window,
)
from pretrain.model.feed_forward import FeedForward
from pretrain.model.loss import OutputHead
from pretrain.model.memories import infini, infini_backend
from pretrain.model.memories.infini import MemoryState
from pretrain.model.memories.infini_parallel import Parts
from pretrain.model.pointwise import RMSNorm
from pretrain.model.state import ModelState

_CHUNK = 2**15
"""Tokens of all lanes on which a block that is computed again works at once.

Under ZeRO-3 a layer's weights stay gathered from chunk to chunk where `zero.live_parameters` leaves
room for them.
"""


class Output(NamedTuple):
    """What a window yields."""

    logits: Tensor | None
    """[B, T, V]; None where targets were given."""
    loss: Tensor | None
    """The sum of the losses, to be differentiated; None without targets."""
    losses: Tensor | None
    """[B, T] float32, in nats, 0 where ignored, without a gradient; None without targets."""
    state: ModelState
    """The memory after the window, with its gradient."""


class StreamState(NamedTuple):
    """What generation keeps, of constant size at any length."""

    filled: int
    """Tokens of the open segment."""
    layers: tuple[OpenSegment, ...]

    def copied(self) -> StreamState:
        """The same in tensors of its own, so that a text can be gone on with in two ways."""
        return self._replace(layers=tuple(layer.copied() for layer in self.layers))


class Block(nn.Module):
    """Infini-attention and feed-forward, each added to the residual stream after RMSNorm."""

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = InfiniAttention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config, checkpointing)

    def forward(
        self,
        x: Tensor,
        state: MemoryState | OpenSegment | None,
        *,
        layout: Window | Continuation,
        read_memory: bool = True,
        initial: MemoryState | None = None,
    ) -> tuple[Tensor, MemoryState | OpenSegment | None]:
        """x [B, T, d_model] -> the same shape, and the attention's state after it."""
        normed = self.attention_norm(x)
        attended, state = self.attention(
            normed, state, layout=layout, read_memory=read_memory, initial=initial
        )
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), state


class TokenEmbedding(nn.Embedding):
    """Token embeddings, drawn in the constructor as `Projection`'s weights are."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, d_model: int, std: float) -> None:
        self.std = std
        super().__init__(vocab_size, d_model)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.std)


class Transformer(nn.Module):
    """The language model. Initial weights follow torch's global seed, which the caller sets."""

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.embedding = TokenEmbedding(vocab_size, config.d_model, config.init_std)
        self.layers = nn.ModuleList(Block(config, checkpointing) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        tied = self.embedding.weight if config.tied_embeddings else None
        self.lm_head = OutputHead(config.d_model, vocab_size, config.init_std, tied)

    def initial_state(self, lanes: int, device: torch.device | str) -> ModelState:
        """The empty memory of every layer, for `lanes` lanes."""
        if self.config.memory.kind == "none":
            return ()
        dtype = torch.promote_types(torch.float32, self.embedding.weight.dtype)
        heads, size = self.config.n_kv_heads, self.config.d_head
        return tuple(
            infini.empty(lanes, heads, size, torch.device(device), dtype) for _ in self.layers
        )

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        state: ModelState,
        targets: Tensor | None = None,
        read_memory: bool = True,
        parts: Parts | None = None,
        weights: Tensor | None = None,
        initial: ModelState | None = None,
    ) -> Output:
        """One window of each lane, in parallel over its segments.

        tokens [B, T] int64, of any length T, begins at a segment's start; starts [B, T] bool is
        True at each document's first token; state is the memory before the window; targets [B, T]
        int64 asks for losses in place of logits, each times its weight [B, T], float32, where
        `weights` are given. With `read_memory` False every retrieval reads 0, while the memory is
        still written. With `parts` the tokens are one of the parts of the window, of whole
        segments; `state` is still that before the whole of it, as the state returned is that after
        it. `initial` is the memory, a constant, that documents which start in the window begin
        with, and read from the next segment on; None: the empty one.
        """
        x, new_state = self.hidden(tokens, starts, state, read_memory, parts, initial)
        if targets is None:
            return Output(self.lm_head(x), None, None, new_state)
        loss, losses = self.lm_head(x, targets, weights)
        return Output(None, loss, losses, new_state)

    def hidden(
        self,
        tokens: Tensor,
        starts: Tensor,
        state: ModelState,
        read_memory: bool = True,
        parts: Parts | None = None,
        initial: ModelState | None = None,
    ) -> tuple[Tensor, ModelState]:
        """What the output head is given, [B, T, d_model], and the memory after; as `forward`."""
        # A forgotten state would otherwise train a model without memory, in silence.
        remembers = self.config.memory.kind != "none"
        assert len(state) == (len(self.layers) if remembers else 0), "initial_state gives a state"
        x = self.embedding(tokens)
        layouts = self._layouts(starts, x.dtype, parts)
        after, without = [], (None,) * len(self.layers)
        memories = zip(self.layers, state or without, initial or without, strict=True)
        for layer, before, first in memories:
            x, carried = self._layer(layer, x, before, layouts, read_memory, first)
            after.append(carried)
        return self.norm(x), tuple(carried for carried in after if carried is not None)

    def _layouts(self, starts: Tensor, dtype: torch.dtype, parts: Parts | None) -> list[Window]:
        """That of the window; or those of the chunks in which a long one goes through a layer."""
        device = starts.device.type
        kernel = local_attention.choose(self.config.local_attention, device, dtype)
        products = infini_backend.choose(
            self.config.memory.kernel, device, dtype, self.config.d_head
        )
        lanes, tokens = starts.shape
        # Parts compose their maps of the memory over all that they hold, so they stay whole.
        if self.checkpointing == "full" and torch.is_grad_enabled() and parts is None:
            segments = max(1, _CHUNK // lanes // self.config.segment)
            tokens = min(tokens, segments * self.config.segment)
        return [
            Window.of(chunk, self.config, kernel, dtype, products, parts)
            for chunk in torch.split(starts, tokens, dim=1)
        ]

    def _layer(
        self,
        layer: nn.Module,
        x: Tensor,
        state: MemoryState | None,
        layouts: Sequence[Window],
        read_memory: bool,
        initial: MemoryState | None,
    ) -> tuple[Tensor, MemoryState | None]:
        """The layer over the window, chunk after chunk: the memory passes between them."""
        if len(layouts) == 1:
            return self._block(layer, x, state, layouts[0], read_memory, initial)
        done = []
        for chunk, layout in zip(torch.split(x, layouts[0].tokens, dim=1), layouts, strict=True):
            chunk, state = self._block(layer, chunk, state, layout, read_memory, initial)
            done.append(chunk)
        return torch.cat(done, dim=1), state

    def _block(
        self,
        layer: nn.Module,
        x: Tensor,
        state: MemoryState | None,
        layout: Window,
        read_memory: bool,
        initial: MemoryState | None,
    ) -> tuple[Tensor, MemoryState | None]:
        if self.checkpointing != "full" or not torch.is_grad_enabled():
            result = layer(x, state, layout=layout, read_memory=read_memory, initial=initial)
        else:
            result = checkpoint(
                layer,
                x,
                state,
                layout=layout,
                read_memory=read_memory,
                initial=initial,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        hidden, carried = result
        return hidden, carried

    def open_stream(self, lanes: int, device: torch.device | str) -> StreamState:
        """The state before the first token of one document in each of `lanes` lanes."""
        memories = self.initial_state(lanes, device) or (None,) * len(self.layers)
        like = self.embedding.weight.new_empty(0, device=device)
        return StreamState(
            0, tuple(OpenSegment.empty(one, lanes, self.config, like) for one in memories)
        )

    @torch.no_grad()
    def extend(self, tokens: Tensor, stream: StreamState) -> tuple[Tensor, StreamState]:
        """The logits [B, n, V] of the next tokens [B, n], n > 0, of each lane's document.

        Equal to the whole document's logits, whatever the chunks it comes in. Whole segments go
        through in parallel; a caller bounds their number by the length of its chunks. The stream
        that was given is used up: what it holds is written in place.
        """
        segment = self.config.segment
        logits = []
        while tokens.shape[1]:
            whole = tokens.shape[1] // segment * segment if stream.filled == 0 else 0
            taken = whole or min(tokens.shape[1], segment - stream.filled)
            now, tokens = tokens[:, :taken], tokens[:, taken:]
            if whole:
                logits.append(self._whole_segments(now, stream))
            else:
                places = torch.arange(taken, device=now.device) + stream.filled
                logits.append(self.step(now, places, stream, stream.filled + taken))
                stream = self.counted(stream, taken)
        return torch.cat(logits, dim=1), stream

    def _whole_segments(self, tokens: Tensor, stream: StreamState) -> Tensor:
        """Their logits; the memory is written in place."""
        state = tuple(layer.memory for layer in stream.layers if layer.memory is not None)
        # An empty memory reads as 0, so the document's start needs no mark.
        output: Output = self(tokens, torch.zeros_like(tokens, dtype=torch.bool), state)
        for before, after in zip(state, output.state, strict=True):
            for part, new in zip(before, after, strict=True):
                part.copy_(new)
        assert output.logits is not None
        return output.logits

    @torch.no_grad()
    def step(self, tokens: Tensor, places: Tensor, stream: StreamState, reach: int) -> Tensor:
        """The logits [B, n, V] of tokens [B, n] at `places` [n], int64, of the open segment.

        Writes their keys and values into the stream, which `counted` then takes on. They attend
        to the segment's first `reach` places, as far as something stands there at or before their
        own: with the whole segment as reach every step is the same work on the same tensors.
        """
        x = self.embedding(tokens)
        layout = Continuation.of(places, reach, self.config, x.dtype)
        for layer, segment in zip(self.layers, stream.layers, strict=True):
            x, _ = layer(x, segment, layout=layout)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    @torch.no_grad()
    def counted(self, stream: StreamState, count: int) -> StreamState:
        """The stream after a `step` of `count` tokens; the memory is written where they fill it."""
        filled = stream.filled + count
        if filled < self.config.segment:
            return stream._replace(filled=filled)
        for layer, segment in zip(self.layers, stream.layers, strict=True):
            assert isinstance(layer, Block)
            layer.attention.close(segment)
        return stream._replace(filled=0)
