"""Infini-attention read aloud, in a whole model: a loop over lanes, segments, tokens and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.pretrain.model.naive.block import NaiveModel


class Naive(NaiveModel):
    """The paper's equations, one token and one head at a time."""

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        local, _ = super().attention(name, x, documents, memory, first)
        size, group = self.config.d_head, self.config.n_heads // self.config.n_kv_heads
        q, k, v = (
            self.project(f"{name}.{part}_proj", x).unflatten(1, (-1, size)).unbind(1)
            for part in "qkv"
        )
        near = local.unflatten(1, (-1, size)).unbind(1)
        outputs, after = [], []
        for kv_head in range(self.config.n_kv_heads):
            members = range(kv_head * group, (kv_head + 1) * group)
            reads, kept = self.remember(
                [q[head] for head in members],
                k[kv_head],
                v[kv_head],
                documents,
                (memory[0][kv_head], memory[1][kv_head]),
                (first[0][kv_head], first[1][kv_head]) if first else None,
            )
            after.append(kept)
            for head, read in zip(members, reads, strict=True):
                g = 1 / (1 + torch.exp(-self.weights[f"{name}.gate"][head]))
                pairs = zip(read, near[head], strict=True)
                outputs.append(torch.stack([self.mixed(g, *pair) for pair in pairs]))
        matrices, normalisers = zip(*after, strict=True)
        return torch.cat(outputs, dim=-1), (torch.stack(matrices), torch.stack(normalisers))

    def mixed(self, g: Tensor, read: Tensor | None, near: Tensor) -> Tensor:
        """Of one token; `read` is None where there was nothing to read."""
        if read is None:
            return near if self.config.memory.when_empty == "local" else (1 - g) * near
        return g * read + (1 - g) * near

    def remember(
        self,
        queries: list[Tensor],
        k: Tensor,
        v: Tensor,
        documents: list[int],
        memory: Any,
        initial: Any,
    ) -> tuple[list[list[Tensor | None]], Any]:
        """What each query head reads at each token, and (M, z) after the last segment."""
        reads: list[list[Tensor | None]] = [[] for _ in queries]
        matrix, z = memory
        held = 0  # documents are counted from 0, the one that was carried in
        for first in range(0, len(k), self.config.segment):
            segment = range(first, min(first + self.config.segment, len(k)))
            for t in segment:
                for head, q in enumerate(queries):
                    may = self.read_memory and documents[t] == held and bool((z != 0).any())
                    reads[head].append(self.recall(feature(q[t]), matrix, z) if may else None)
            if documents[segment[-1]] != held:
                matrix, z = initial or (0 * matrix, 0 * z)
                held = documents[segment[-1]]
            matrix, z = self.write(k, v, [t for t in segment if documents[t] == held], matrix, z)
        return reads, (matrix, z)

    def recall(self, feature_: Tensor, matrix: Tensor, z: Tensor) -> Tensor:
        if bool((z == 0).all()):
            return 0 * matrix[0]
        return (feature_ @ matrix) / (feature_ @ z)

    def write(
        self, k: Tensor, v: Tensor, tokens: list[int], matrix: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        z_after = z + sum(feature(k[t]) for t in tokens)
        after = matrix
        for t in tokens:
            value = v[t]
            if self.config.memory.kind == "delta":
                inclusive = self.config.memory.normaliser == "inclusive"
                value = value - self.recall(feature(k[t]), matrix, z_after if inclusive else z)
            after = after + torch.outer(feature(k[t]), value)
        return after, z_after


def feature(x: Tensor) -> Tensor:
    """ELU + 1."""
    return torch.where(x > 0, x + 1, torch.exp(x))
