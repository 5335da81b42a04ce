"""The Infini-Transformer: Llama's blocks with a segment memory, a window of segments at a time.

Depends only on tensors and its configuration: no ranks, no files, no engine. As ZeRO-3 requires,
every parameter is read inside the forward of the module that owns it, and every module runs once
per forward (or once per chunk of a very long window, or once per segment of a recurrence over the
whole stack), whatever the data. The memory is an argument and a result, never a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from pretrain.config.model import ModelConfig
from pretrain.config.training import Checkpointing
from pretrain.model import local_attention
from pretrain.model.feed_forward import FeedForward
from pretrain.model.loss import OutputHead
from pretrain.model.memories.contract import Attended, Carried
from pretrain.model.memories.kinds import attention_of, recurrence_of
from pretrain.model.pointwise import RMSNorm
from pretrain.model.state import ModelState, State, overwrite
from pretrain.model.stream import OpenSegment, StreamState
from pretrain.model.window import Continuation, Parts, Window

_CHUNK = 2**15
"""Tokens, over all lanes, that a checkpointed block processes at once.

Under ZeRO-3 a layer's weights stay gathered from chunk to chunk if `zero.live_parameters` allows
it.
"""


class Output(NamedTuple):
    """The model's output for a window."""

    logits: Tensor | None
    """[B, T, V], or [n, V] of n places; None if targets were given."""
    loss: Tensor | None
    """The differentiable sum of the losses, including the memory's auxiliary loss and the z-loss;
    None without targets."""
    losses: Tensor | None
    """[B, T] float32, the cross-entropy in nats, 0 where ignored, without a gradient; None without
    targets."""
    state: ModelState
    """The memory after the window, with its gradient."""
    auxiliary: Tensor | None = None
    """The memory's part of `loss`, without a gradient; None for a memory without one."""
    z_loss: Tensor | None = None
    """The z-loss in `loss`, without a gradient; None without a coefficient or targets."""


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream after RMSNorm."""

    def __init__(self, config: ModelConfig, layer: int, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = attention_of(config.memory).of_layer(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config, checkpointing)

    def forward(
        self, x: Tensor, past: Carried | OpenSegment, layout: Window | Continuation
    ) -> Attended:
        """x [B, T, d_model] -> the same shape; see `Attention.forward`."""
        attended: Attended = self.attention(self.attention_norm(x), past, layout)
        x = x + attended.output
        return attended._replace(output=x + self.feed_forward(self.feed_forward_norm(x)))

    def memory_after(self, x: Tensor, past: Carried, window: Window) -> State:
        """The state that `forward` returns for x [B, T, d_model], without computing its output."""
        return self.attention.memory_after(self.attention_norm(x), window, past)


class Stack(nn.ModuleList):
    """The blocks; a list of modules, of which each is called by itself."""

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing) -> None:
        super().__init__(Block(config, layer, checkpointing) for layer in range(config.n_layers))
        self.config = config
        self.checkpointing = checkpointing

    def windows(
        self,
        starts: Tensor,
        dtype: torch.dtype,
        read_memory: bool = True,
        parts: Parts | None = None,
    ) -> list[Window]:
        """The layout of all tokens, or of each chunk if a long window is processed in chunks."""
        kernel = local_attention.choose(
            self.config.local_attention, starts.device.type, dtype, self.config.d_head
        )
        lanes, tokens = starts.shape
        # A part composes its memory map over all of its segments, so it is not divided.
        if self.checkpointing == "full" and torch.is_grad_enabled() and parts is None:
            segments = max(1, _CHUNK // lanes // self.config.span)
            tokens = min(tokens, segments * self.config.span)
        passing = parts if self.config.memory.traits.remembers else None
        return [
            Window.of(chunk, self.config, kernel, dtype, read_memory, passing)
            for chunk in torch.split(starts, tokens, dim=1)
        ]

    def empty(self, lanes: int, like: Tensor) -> ModelState:
        """The empty memory of every layer; of a recurrent model's layers it has no tensors."""
        return tuple(block.attention.empty(lanes, like) for block in self.blocks())

    def over(
        self, x: Tensor, pasts: Sequence[Carried], windows: Sequence[Window]
    ) -> tuple[Tensor, ModelState, Tensor | None]:
        """All layers over x [B, T, d_model]: the same shape, the memory after it, and the sum of
        the memory's auxiliary losses, None without any."""
        after, losses = [], []
        for layer, past in zip(self, pasts, strict=True):
            x, state, auxiliary = self._layer(layer, x, past, windows)
            after.append(state)
            losses.append(auxiliary)
        return x, tuple(after), _sum(losses)

    def metrics(self, state: ModelState) -> dict[str, list[float]]:
        """See `Transformer.metrics`."""
        found: dict[str, list[float]] = {}
        for block, memory in zip(self.blocks(), state, strict=True):
            for name, value in block.attention.metrics(memory).items():
                found.setdefault(name, []).append(float(value))
        return found

    def memory_after(self, x: Tensor, pasts: Sequence[Carried], starts: Tensor) -> ModelState:
        """The memory that `over` returns, without the output of the top layer, which it does not
        depend on."""
        (window,) = self.windows(starts, x.dtype)
        after: list[State] = []
        for block, past in zip(self.blocks(), pasts, strict=True):
            if len(after) == len(self) - 1:
                after.append(block.memory_after(x, past, window))
            else:
                x, state, _ = block(x, past, window)
                after.append(state)
        return tuple(after)

    def opened(self, lanes: int, length: int, like: Tensor) -> tuple[OpenSegment, ...]:
        """An empty segment of `length` tokens after the empty memory of every layer."""
        pairs = zip(self.blocks(), self.empty(lanes, like), strict=True)
        return tuple(block.attention.opened(one, lanes, length, like) for block, one in pairs)

    def continued(self, x: Tensor, segments: Sequence[OpenSegment], layout: Continuation) -> Tensor:
        """All layers over some places x [B, n, d_model] of open segments, which they write to."""
        for block, segment in zip(self, segments, strict=True):
            x = block(x, segment, layout).output
        return x

    def reopen(self, segments: Sequence[OpenSegment], state: ModelState) -> None:
        """Copy `state` into the memories before the open segments, which are empty."""
        for block, segment, memory in zip(self.blocks(), segments, state, strict=True):
            segment.remember(memory)
            block.attention.reopen(segment)

    def close(self, segments: Sequence[OpenSegment]) -> None:
        """Write the segments, which are full, to their memories."""
        for block, segment in zip(self.blocks(), segments, strict=True):
            block.attention.close(segment)

    def _layer(
        self, layer: nn.Module, x: Tensor, past: Carried, windows: Sequence[Window]
    ) -> Attended:
        """The layer over the window, chunk by chunk, with the memory passed between chunks."""
        if len(windows) == 1:
            return self._block(layer, x, past, windows[0])
        outputs, losses = [], []
        for chunk, window in zip(torch.split(x, windows[0].tokens, dim=1), windows, strict=True):
            output, state, auxiliary = self._block(layer, chunk, past, window)
            past = past._replace(before=state)
            outputs.append(output)
            losses.append(auxiliary)
        return Attended(torch.cat(outputs, dim=1), past.before, _sum(losses))

    def _block(self, layer: nn.Module, x: Tensor, past: Carried, window: Window) -> Attended:
        if self.checkpointing != "full" or not torch.is_grad_enabled():
            attended: Attended = layer(x, past, window)
        else:
            attended = checkpoint(
                layer, x, past, window, use_reentrant=False, preserve_rng_state=False
            )
        return attended

    def blocks(self) -> Iterator[Block]:
        """Each of them, in order."""
        for block in self:
            assert isinstance(block, Block)
            yield block


class TokenEmbedding(nn.Embedding):
    """Token embeddings, initialised in the constructor like `Projection`'s weights."""

    weight: nn.Parameter

    def __init__(self, vocab_size: int, d_model: int, std: float) -> None:
        self.std = std
        super().__init__(vocab_size, d_model)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.std)


class Transformer(nn.Module):
    """The language model. Initial weights depend on torch's global seed, which the caller sets.

    `z_loss` is the coefficient of the z-loss, see `OutputHead`.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        checkpointing: Checkpointing = "none",
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = checkpointing
        self.embedding = TokenEmbedding(vocab_size, config.d_model, config.init_std)
        self.layers = Stack(config, checkpointing)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        tied = self.embedding.weight if config.tied_embeddings else None
        self.lm_head = OutputHead(config.d_model, vocab_size, config.init_std, tied, z_loss)
        recurrence = recurrence_of(config.memory)
        self.recurrence = None if recurrence is None else recurrence(config)

    def initial_state(self, lanes: int, device: torch.device | str) -> ModelState:
        """The empty memory of every layer, or of the recurrence, for `lanes` lanes."""
        like = self.embedding.weight.new_empty(0, device=device)
        if self.recurrence is not None:
            return (self.recurrence.empty(lanes, like),)
        return self.layers.empty(lanes, like)

    def metrics(self, state: ModelState) -> dict[str, list[float]]:
        """The memory's metrics for the log, by name, one per layer, or one for the recurrence; see
        `Attention.metrics`."""
        if self.recurrence is not None:
            (memory,) = state
            return {name: [float(x)] for name, x in self.recurrence.metrics(memory).items()}
        return self.layers.metrics(state)

    def gates(self) -> dict[str, int]:
        """The names of the parameters that are gates, each with its layer, from 0; see
        `Attention.gates`."""
        return {
            f"layers.{layer}.attention.{gate}": layer
            for layer, block in enumerate(self.layers.blocks())
            for gate in block.attention.gates
        }

    def begins_as_eos(self) -> tuple[str, ...]:
        """The names of the parameters that begin as the embedding of EOS in a model whose other
        weights were trained without them."""
        recurrence = self.recurrence
        return (
            () if recurrence is None or not recurrence.from_eos else ("recurrence.learned.weight",)
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
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Output:
        """One window of each lane, in parallel over its segments.

        tokens [B, T] int64, of any length T, begin at a segment boundary; starts [B, T] bool is
        True at each document's first token; state is the memory before the window. With targets
        [B, T] int64 the output has losses instead of logits, multiplied by `weights` [B, T],
        float32, if given. With `places`, lanes and tokens int64 [n], logits are of these alone,
        [n, V]. With `read_memory` False nothing is read, but the memory is still
        written. With `parts`, the tokens are this rank's part of the window, in whole segments,
        while `state` and the returned state are those before and after the whole window. `initial`
        is the memory, a constant, with which documents that start in the window begin; they read
        it from the next segment on. None is the empty memory.
        """
        x, after, auxiliary = self._hidden(tokens, starts, state, read_memory, parts, initial)
        if targets is None:
            return Output(self.lm_head(x if places is None else x[places]), None, None, after)
        loss, losses, z_loss = self.lm_head(x, targets, weights)
        given = z_loss if self.lm_head.z_loss else None
        if auxiliary is None:
            return Output(None, loss, losses, after, None, given)
        return Output(None, loss + auxiliary, losses, after, auxiliary.detach(), given)

    @torch.no_grad()
    def memory_after(self, tokens: Tensor, starts: Tensor, state: ModelState) -> ModelState:
        """The memory that `forward` returns, in less time: it does not need the output of the top
        layer. Not for a model whose weights ZeRO-3 gathers module by module."""
        if self.recurrence is not None:
            return self._hidden(tokens, starts, state, True, None, None)[1]
        x = self.embedding(tokens)
        return self.layers.memory_after(x, [Carried(one) for one in state], starts)

    def _hidden(
        self,
        tokens: Tensor,
        starts: Tensor,
        state: ModelState,
        read_memory: bool,
        parts: Parts | None,
        initial: ModelState | None,
    ) -> tuple[Tensor, ModelState, Tensor | None]:
        # A missing state would otherwise silently train a model without memory.
        recurrence = self.recurrence
        expected = len(self.layers) if recurrence is None else 1
        assert len(state) == expected, "as many memories as initial_state returns"
        x = self.embedding(tokens)
        if recurrence is not None:
            carried = Carried(state[0], None if initial is None else initial[0])
            x, memory = recurrence.over(x, starts, carried, read_memory, self._segment)
            return x, (memory,), None
        windows = self.layers.windows(starts, x.dtype, read_memory, parts)
        first = initial or (None,) * len(state)
        pasts = [Carried(*pair) for pair in zip(state, first, strict=True)]
        x, after, auxiliary = self.layers.over(x, pasts, windows)
        return self.norm(x), after, auxiliary

    def _segment(self, x: Tensor, window: Window) -> Tensor:
        """All layers and the final norm over the places of one segment of a recurrence."""
        pasts = [Carried(nothing) for nothing in self.layers.empty(len(x), x)]
        output: Tensor = self.norm(self.layers.over(x, pasts, [window])[0])
        return output

    def open_stream(self, lanes: int, device: torch.device | str) -> StreamState:
        """The state before the first token of one document in each of `lanes` lanes."""
        like = self.embedding.weight.new_empty(0, device=device)
        length, recurrence = self.config.span, None
        if self.recurrence is not None:
            length = self.recurrence.places(self.config, length)
            recurrence = self.recurrence.empty(lanes, like)
        return StreamState(0, self.layers.opened(lanes, length, like), recurrence)

    @torch.no_grad()
    def extend(
        self, tokens: Tensor, stream: StreamState, last: bool = False
    ) -> tuple[Tensor, StreamState]:
        """The logits [B, n, V] of the next tokens [B, n], n > 0, of each lane's document.

        Equal to the logits of the whole document at once, however it is split into chunks. With
        `last` they are those of the last token alone, [B, 1, V]. Whole segments are computed in
        parallel; the caller bounds memory by the length of its chunks. The given stream must not be
        used again, since its tensors are updated in place.
        """
        *earlier, final = self._pieces(tokens, stream.filled)
        if last:
            for piece in earlier:
                stream = self.read(piece, stream)
            earlier = []
        logits = []
        for piece in (*earlier, final):
            if self._is_whole(piece, stream):
                logits.append(self._whole_segments(piece, stream, last))
            else:
                places = torch.arange(piece.shape[1], device=piece.device) + stream.filled
                reach = stream.filled + piece.shape[1]
                logits.append(self.step(piece, places, stream, reach, last))
                stream = self.counted(stream, piece.shape[1])
        return torch.cat(logits, dim=1), stream

    @torch.no_grad()
    def read(self, tokens: Tensor, stream: StreamState) -> StreamState:
        """The stream that `extend` returns, in less time (see `memory_after`)."""
        for piece in self._pieces(tokens, stream.filled):
            if self.recurrence is not None or not self._is_whole(piece, stream):
                _, stream = self.extend(piece, stream, last=True)
                continue
            before = tuple(segment.memory for segment in stream.layers)
            after = self.memory_after(piece, torch.zeros_like(piece, dtype=torch.bool), before)
            self.layers.reopen(stream.layers, after)
        return stream

    def _pieces(self, tokens: Tensor, filled: int) -> list[Tensor]:
        """The tokens cut before and behind those that are whole segments."""
        segment, count = self.config.span, tokens.shape[1]
        first = min(-filled % segment, count)
        rest = (count - first) % segment
        pieces = torch.split(tokens, [first, count - first - rest, rest], dim=1)
        return [piece for piece in pieces if piece.shape[1]]

    def _is_whole(self, piece: Tensor, stream: StreamState) -> bool:
        return stream.filled == 0 and piece.shape[1] % self.config.span == 0

    def _whole_segments(self, tokens: Tensor, stream: StreamState, last: bool) -> Tensor:
        """The logits of whole segments, or of their `last` token; the memory is updated in
        place."""
        layers, recurrence = stream.layers, stream.recurrence
        state = tuple(layer.memory for layer in layers) if recurrence is None else (recurrence,)
        lanes, count = tokens.shape
        # A stream begins with the empty memory, so the document's start need not be marked.
        starts, places = torch.zeros_like(tokens, dtype=torch.bool), None
        if last:
            each = torch.arange(lanes, device=tokens.device)
            places = each, torch.full_like(each, count - 1)
        output: Output = self(tokens, starts, state, places=places)
        if self.recurrence is None or recurrence is None:
            self.layers.reopen(layers, output.state)
        else:
            overwrite(recurrence, output.state[0])
            self.recurrence.reopen(recurrence, self._continued(layers))
        assert output.logits is not None
        return output.logits[:, None] if last else output.logits

    @torch.no_grad()
    def step(
        self, tokens: Tensor, places: Tensor, stream: StreamState, reach: int, last: bool = False
    ) -> Tensor:
        """The logits [B, n, V] of tokens [B, n] at `places` [n], int64, of the open segment, or
        with `last` [B, 1, V] of the last one.

        Writes their keys and values into the stream; `counted` then advances it. Each token attends
        to the places among the segment's first `reach` that are at or before its own; with the
        whole segment as reach, every step does the same work on the same tensors.
        """
        x = self.embedding(tokens)
        if self.recurrence is None or stream.recurrence is None:
            layout = Continuation.of(places, reach, self.config, x.dtype)
        else:
            layout = self.recurrence.layout(stream.recurrence, places, reach)
        x = self._continued(stream.layers)(x, layout)
        logits: Tensor = self.lm_head(x[:, -1:] if last else x)
        return logits

    def _continued(
        self, segments: Sequence[OpenSegment]
    ) -> Callable[[Tensor, Continuation], Tensor]:
        """All layers and the final norm over some places x [B, n, d_model] of open segments."""

        def run(x: Tensor, layout: Continuation) -> Tensor:
            output: Tensor = self.norm(self.layers.continued(x, segments, layout))
            return output

        return run

    @torch.no_grad()
    def counted(self, stream: StreamState, count: int) -> StreamState:
        """The stream advanced by `count` tokens; writes the memory if they fill the segment."""
        filled = stream.filled + count
        if filled < self.config.span:
            return stream._replace(filled=filled)
        if self.recurrence is not None and stream.recurrence is not None:
            self.recurrence.close(stream.recurrence, self._continued(stream.layers))
            return stream._replace(filled=0)
        self.layers.close(stream.layers)
        return stream._replace(filled=0)


def on_meta(config: ModelConfig, vocab_size: int) -> Transformer:
    """The model on the meta device: names, shapes and sizes without data."""
    with torch.device("meta"), _Undrawn():
        return Transformer(config, vocab_size)


class _Undrawn(TorchFunctionMode):
    """Leaves out `nn.init.normal_`, which changes nothing on the meta device.

    torch imports its compiler to run it there: 1.5 s.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if function is nn.init.normal_:
            return named["tensor"]
        return function(*args, **named)


def _sum(losses: Sequence[Tensor | None]) -> Tensor | None:
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else None
