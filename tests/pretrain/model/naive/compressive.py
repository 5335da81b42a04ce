"""The Compressive Transformer read aloud: a loop over lanes, segments, tokens and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tests.pretrain.model.naive.block import NaiveModel, Seen

Slot: TypeAlias = Tensor | None
Memory: TypeAlias = tuple[list[Slot], list[Slot]]
"""Compressed slots and cached inputs; None: holds nothing."""


class NaiveCompressive(NaiveModel):
    """A model whose layers have this memory."""

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        begins_with = slots_of(first) if first else None
        memory = slots_of(memory)
        held, segment = 0, self.config.segment
        outputs: list[Tensor] = []
        for begin in range(0, len(x), segment):
            tokens = list(range(begin, min(begin + segment, len(x))))
            for t in tokens:
                reads = self.read_memory and documents[t] == held
                outputs.append(self.token(name, x, t, documents, memory if reads else ([], [])))
                if reads:
                    self.reconstruct(name, x[t], memory[1][:segment])
            if documents[tokens[-1]] != held:
                held = documents[tokens[-1]]
                empty: Memory = ([None] * len(memory[0]), [None] * len(memory[1]))
                memory = begins_with or empty
            entering = [x[t].detach() if documents[t] == held else None for t in tokens]
            memory = self.entered(name, memory, entering + [None] * (segment - len(tokens)))
        return torch.stack(outputs), [
            part for slots in memory for part in stacked(slots, x.shape[1])
        ]

    def token(self, name: str, x: Tensor, t: int, documents: list[int], memory: Memory) -> Tensor:
        """The heads of token t, end to end; each slot and token has a position of its own."""
        first = t // self.config.segment * self.config.segment
        slots = memory[0] + memory[1]
        seen = [(i - len(slots), slot) for i, slot in enumerate(slots) if slot is not None]
        seen += [(u - first, x[u]) for u in range(first, t + 1) if documents[u] == documents[t]]
        query = self.project(f"{name}.q_proj", x[t])
        return self.attended(query, t - first, self.keys_and_values(name, seen))

    def keys_and_values(self, name: str, seen: list[tuple[int, Tensor]]) -> list[Seen]:
        """Those of inputs at their positions."""
        inputs = torch.stack([h for _, h in seen])
        keys, values = (self.project(f"{name}.{part}_proj", inputs) for part in "kv")
        positions = [position for position, _ in seen]
        return [Seen(*parts) for parts in zip(positions, keys, values, strict=True)]

    def reconstruct(self, name: str, h: Tensor, old: list[Slot]) -> None:
        """|| A(sg h, sg old) - A(sg h, f(sg old)) ||^2, with the weights under sg."""
        blocks = [block for block in self.blocks(old) if block]
        if not blocks:
            return
        made = [self.compress(name, block) for block in blocks]
        trained = self.weights
        self.weights = {key: weight.detach() for key, weight in trained.items()}
        query = self.project(f"{name}.q_proj", h.detach())
        # At position 0 nothing is turned.
        wanted, found = (
            self.attended(query, 0, self.keys_and_values(name, [(0, m) for m in inputs]))
            for inputs in ([m for block in blocks for m in block], made)
        )
        self.weights = trained
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
