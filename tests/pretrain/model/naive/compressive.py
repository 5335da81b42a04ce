"""The Compressive Transformer read aloud: a loop over lanes, segments, tokens and heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer
from tests.pretrain.model.naive.infini import Naive

Slot: TypeAlias = Tensor | None
Memory: TypeAlias = tuple[list[Slot], list[Slot]]
"""Compressed slots and cached inputs; None: holds nothing."""


class NaiveCompressive(Naive):
    """A model whose layers have this memory; `auxiliary` sums the losses of all layers."""

    def __init__(
        self, model: Transformer, read_memory: bool = True, initial: ModelState | None = None
    ) -> None:
        super().__init__(model, read_memory, initial)
        self.auxiliary = torch.zeros((), dtype=torch.float64)

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any
    ) -> tuple[Tensor, Any]:
        memory = slots_of(memory)
        held, segment = 0, self.config.segment
        outputs: list[Tensor] = []
        for first in range(0, len(x), segment):
            tokens = list(range(first, min(first + segment, len(x))))
            for t in tokens:
                reads = self.read_memory and documents[t] == held
                outputs.append(self.token(name, x, t, documents, memory if reads else ([], [])))
                if reads:
                    self.reconstruct(name, x[t], memory[1][:segment])
            if documents[tokens[-1]] != held:
                held = documents[tokens[-1]]
                empty: Memory = ([None] * len(memory[0]), [None] * len(memory[1]))
                memory = slots_of(self.first) if self.first else empty
            entering = [x[t].detach() if documents[t] == held else None for t in tokens]
            memory = self.entered(name, memory, entering + [None] * (segment - len(tokens)))
        result = torch.stack(outputs) @ self.weights[f"{name}.o_proj.weight"].T
        return result, [part for slots in memory for part in stacked(slots, x.shape[1])]

    def token(self, name: str, x: Tensor, t: int, documents: list[int], memory: Memory) -> Tensor:
        """The heads of token t, end to end; each slot and token has a position of its own."""
        segment = self.config.segment
        slots = memory[0] + memory[1]
        seen = [(i - len(slots), slot) for i, slot in enumerate(slots) if slot is not None]
        for u in range(t // segment * segment, t + 1):
            if documents[u] == documents[t]:
                seen.append((u % segment, x[u]))
        heads = []
        places = [at for at, _ in seen]
        for q, keys, values in self.heads(name, x[t], [h for _, h in seen], self.weights):
            (turned,) = self.turned(q[None], [t % segment])
            heads.append(softmax_mean(turned, self.turned(keys, places), values))
        return torch.cat(heads)

    def turned(self, x: Tensor, places: list[int]) -> Tensor:
        """Rotary embedding of x [n, D], as complex numbers: i is paired with i + D / 2."""
        half = x.shape[1] // 2
        speeds = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.tensor(places, dtype=torch.float64)[:, None] * speeds
        turns = torch.polar(torch.ones_like(angles), angles)
        turned = torch.complex(x[:, :half], x[:, half:]) * turns
        return torch.cat((turned.real, turned.imag), dim=1)

    def heads(
        self, name: str, h: Tensor, seen: Sequence[Tensor], weights: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """In each head, the query of h, and the keys and values of what it sees."""
        size, group = self.config.d_head, self.config.n_heads // self.config.n_kv_heads
        w_q, w_k, w_v = (weights[f"{name}.{part}_proj.weight"] for part in "qkv")
        q, keys, values = w_q @ h, torch.stack([*seen]) @ w_k.T, torch.stack([*seen]) @ w_v.T
        for head in range(self.config.n_heads):
            of_key = slice(head // group * size, (head // group + 1) * size)
            yield q[head * size : (head + 1) * size], keys[:, of_key], values[:, of_key]

    def reconstruct(self, name: str, h: Tensor, old: list[Slot]) -> None:
        """|| A(sg h, sg old) - A(sg h, f(sg old)) ||^2, with the weights under sg."""
        fixed = {key: weight.detach() for key, weight in self.weights.items()}
        blocks = [block for block in self.blocks(old) if block]
        if not blocks:
            return
        inputs = [m for block in blocks for m in block]
        made = [self.compress(name, block) for block in blocks]
        wanted, found = (
            torch.cat([softmax_mean(*head) for head in self.heads(name, h.detach(), seen, fixed)])
            for seen in (inputs, made)
        )
        weight = self.config.memory.compressive.reconstruction_weight
        self.auxiliary = self.auxiliary + weight * ((wanted - found) ** 2).sum()

    def compress(self, name: str, block: list[Tensor]) -> Tensor:
        """The convolution at one place: a matrix for each input of its kernel."""
        kernel = self.weights[f"{name}.compression.weight"].split(self.config.d_model, dim=1)
        return sum(w @ m for w, m in zip(kernel, block, strict=True))  # type: ignore[return-value]

    def blocks(self, inputs: list[Slot]) -> list[list[Tensor]]:
        """The inputs c by c; [] for a block that is not whole."""
        rate = self.config.memory.compressive.rate
        found = []
        for first in range(0, len(inputs), rate):
            block = [m for m in inputs[first : first + rate] if m is not None]
            found.append(block if len(block) == rate else [])
        return found

    def entered(self, name: str, memory: Memory, entering: list[Slot]) -> Memory:
        """The memory after a segment."""
        compressed, cached = memory
        leaving, cached = cached[: len(entering)], cached[len(entering) :] + entering
        made = [
            self.compress(name, block).detach() if block else None for block in self.blocks(leaving)
        ]
        return (compressed + made)[len(made) :], cached


def softmax_mean(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    weights = torch.exp(keys @ q / math.sqrt(len(q)))
    return weights @ values / weights.sum()


def slots_of(state: Sequence[Tensor]) -> Memory:
    """One lane's [compressed, held, cached, held] as lists."""
    compressed, cached = (
        [m.detach() if h else None for m, h in zip(inputs, held, strict=True)]
        for inputs, held in (state[:2], state[2:])
    )
    return compressed, cached


def stacked(slots: list[Slot], width: int) -> tuple[Tensor, Tensor]:
    nothing = torch.zeros(width, dtype=torch.float64)
    held = torch.tensor([slot is not None for slot in slots])
    return torch.stack([nothing if slot is None else slot for slot in slots]), held
