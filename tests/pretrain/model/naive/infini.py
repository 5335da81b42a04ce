"""Infini-attention read aloud, in a whole model: a loop over lanes, segments, tokens and heads."""

from __future__ import annotations

import cmath
import math
from typing import Any

import torch
from torch import Tensor

from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer


class Naive:
    """The paper's equations, one token and one head at a time; shares no code with the model."""

    def __init__(
        self, model: Transformer, read_memory: bool = True, initial: ModelState | None = None
    ) -> None:
        self.config = model.config
        self.initial = initial
        self.first: list[Tensor] | None = None  # (M, z) that documents of a lane begin with
        self.weights = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        self.read_memory = read_memory
        self.embedded: list[Tensor] = []

    def __call__(
        self, tokens: Tensor, starts: Tensor, state: ModelState
    ) -> tuple[Tensor, list[list[tuple[Tensor, Tensor]]]]:
        """Logits [B, T, V], and M [K, D, D] and z [K, D] of each lane and layer."""
        logits, states = [], []
        for lane in range(len(tokens)):
            documents = [int(starts[lane, : t + 1].sum()) for t in range(tokens.shape[1])]
            x = self.weights["embedding.weight"][tokens[lane]]
            x.retain_grad()
            self.embedded.append(x)
            after = []
            for layer in range(self.config.n_layers):
                memory = [part[lane] for part in state[layer]] or None
                if self.initial:
                    self.first = [part[lane] for part in self.initial[layer]]
                x, memory = self.block(f"layers.{layer}", x, documents, memory)
                after.append(memory)
            head = self.weights.get("lm_head.weight", self.weights["embedding.weight"])
            logits.append(self.norm("norm", x) @ head.T)
            states.append(after)
        return torch.stack(logits), states

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        return x / scale * self.weights[f"{name}.weight"]

    def block(self, name: str, x: Tensor, documents: list[int], memory: Any) -> tuple[Tensor, Any]:
        attended, memory = self.attention(
            f"{name}.attention", self.norm(f"{name}.attention_norm", x), documents, memory
        )
        x = x + attended
        y = self.norm(f"{name}.feed_forward_norm", x)
        gate, up, down = (
            self.weights[f"{name}.feed_forward.{part}_proj"] for part in ("gate", "up", "down")
        )
        opened = y @ gate.T
        return x + (opened * opened.sigmoid() * (y @ up.T)) @ down.T, memory

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any
    ) -> tuple[Tensor, Any]:
        size, group = self.config.d_head, self.config.n_heads // self.config.n_kv_heads
        q, k, v = (x @ self.weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
        outputs = []
        matrices, normalisers = [], []
        for kv_head in range(self.config.n_kv_heads):
            columns = slice(kv_head * size, (kv_head + 1) * size)
            one = None if memory is None else (memory[0][kv_head], memory[1][kv_head])
            reads, one = self.remember(
                [
                    q[:, h * size : (h + 1) * size]
                    for h in range(kv_head * group, (kv_head + 1) * group)
                ],
                k[:, columns],
                v[:, columns],
                documents,
                one,
                None if self.first is None else (self.first[0][kv_head], self.first[1][kv_head]),
            )
            if one is not None:
                matrices.append(one[0])
                normalisers.append(one[1])
            for member in range(group):
                head = kv_head * group + member
                queries = q[:, head * size : (head + 1) * size]
                local = self.local(queries, k[:, columns], v[:, columns], documents)
                if one is None:
                    outputs.append(local)
                    continue
                g = 1 / (1 + torch.exp(-self.weights[f"{name}.gate"][head]))
                pairs = zip(reads[member], local, strict=True)
                outputs.append(torch.stack([self.mixed(g, read, near) for read, near in pairs]))
        result = torch.cat(outputs, dim=-1) @ self.weights[f"{name}.o_proj.weight"].T
        after = (torch.stack(matrices), torch.stack(normalisers)) if matrices else None
        return result, after

    def mixed(self, g: Tensor, read: Tensor | None, near: Tensor) -> Tensor:
        """Of one token; `read` is None where there was nothing to read."""
        if read is None:
            return near if self.config.memory.when_empty == "local" else (1 - g) * near
        return g * read + (1 - g) * near

    def local(self, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
        rows, segment = [], self.config.segment
        turned_q, turned_k = ([self.turn(x[t], t % segment) for t in range(len(x))] for x in (q, k))
        for t in range(len(q)):
            first = t // segment * segment
            seen = [u for u in range(first, t + 1) if documents[u] == documents[t]]
            scores = torch.stack([turned_q[t] @ turned_k[u] for u in seen])
            weights = torch.exp(scores / math.sqrt(self.config.d_head))
            rows.append(sum(w * v[u] for w, u in zip(weights, seen, strict=True)) / weights.sum())
        return torch.stack(rows)

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Rotary embedding as complex numbers: component i is paired with i + D / 2."""
        half = len(x) // 2
        angles = [position * self.config.rope_theta ** (-2 * i / len(x)) for i in range(half)]
        turns = torch.tensor([cmath.exp(1j * angle) for angle in angles], dtype=torch.complex128)
        turned = torch.complex(x[:half], x[half:]) * turns
        return torch.cat((turned.real, turned.imag))

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
        if memory is None:
            return reads, None
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
