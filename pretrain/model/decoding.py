"""Decoding token by token, on a GPU as the replay of one CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.model.stream import StreamState
from pretrain.model.transformer import Transformer


class Decoder:
    """Decodes one token per step after a stream, which the decoder then owns.

    On a GPU a step is captured once, as a graph over fixed tensors, and replayed for every token:
    one launch per token instead of dozens per layer. The memory update when a segment is full is
    not part of the graph.
    """

    def __init__(self, model: Transformer, stream: StreamState) -> None:
        like = stream.layers[0].cache[0]
        self._model = model
        self._stream = stream
        self._tokens = torch.zeros(len(like), 1, dtype=torch.int64, device=like.device)
        self._place = torch.full((1,), stream.filled, dtype=torch.int64, device=like.device)
        self._graph = self._captured() if like.is_cuda else None

    def step(self, tokens: Tensor) -> Tensor:
        """The logits [B, V] after each lane's next token [B]; valid until the next step."""
        self._tokens.copy_(tokens[:, None])
        self._place.fill_(self._stream.filled)
        if self._graph is None:
            self._logits = self._computed(self._stream.filled + 1)
        else:
            self._graph.replay()
        self._stream = self._model.counted(self._stream, 1)
        return self._logits[:, -1]

    def _computed(self, reach: int) -> Tensor:
        return self._model.step(self._tokens, self._place, self._stream, reach)

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of a step that attends to the whole segment.

        The warm-up calls write to the KV cache at the next token's place, which that token
        overwrites.
        """
        device, reach = self._tokens.device, self._model.config.span
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            # Libraries allocate workspaces in their first calls, which cannot be captured.
            for _ in range(3):
                self._computed(reach)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._computed(reach)
        return graph
