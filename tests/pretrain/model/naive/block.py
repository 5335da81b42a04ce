"""A model without a memory, one lane, one token and one head at a time; others add to it."""

from __future__ import annotations

import cmath
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.model.memories.contract import Attended
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer
from tests.pretrain.model.small import assert_close, random_tokens, weighted_sum, with_gradient


class Seen(NamedTuple):
    """A token that another one attends to."""

    position: int
    key: Tensor
    """[K * D], without its position."""
    value: Tensor
    """[K * D]."""


class NaiveModel:
    """Llama's blocks around an attention, here one without memory; no code is the model's."""

    def __init__(
        self, model: Transformer, read_memory: bool = True, initial: ModelState | None = None
    ) -> None:
        self.config = model.config
        self.initial = initial
        self.weights = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        self.read_memory = read_memory
        self.embedded: list[Tensor] = []
        self.auxiliary = torch.zeros((), dtype=torch.float64)
        """The sum of all layers' auxiliary losses so far."""

    def __call__(
        self, tokens: Tensor, starts: Tensor, state: ModelState
    ) -> tuple[Tensor, list[list[tuple[Tensor, ...]]]]:
        """Logits [B, T, V], and the memory of each lane and layer."""
        logits, states = [], []
        for lane in range(len(tokens)):
            documents = [int(starts[lane, : t + 1].sum()) for t in range(tokens.shape[1])]
            x = self.weights["embedding.weight"][tokens[lane]]
            x.retain_grad()
            self.embedded.append(x)
            after = []
            for layer in range(self.config.n_layers):
                memory, first = (
                    [part[lane] for part in of[layer]] if of else [] for of in (state, self.initial)
                )
                x, kept = self.block(f"layers.{layer}", x, documents, memory, first)
                after.append(kept)
            head = self.weights.get("lm_head.weight", self.weights["embedding.weight"])
            logits.append(self.norm("norm", x) @ head.T)
            states.append(after)
        return torch.stack(logits), states

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        return x / scale * self.weights[f"{name}.weight"]

    def block(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        heads, memory = self.attention(
            f"{name}.attention", self.norm(f"{name}.attention_norm", x), documents, memory, first
        )
        x = x + self.project(f"{name}.attention.o_proj", heads)
        y = self.norm(f"{name}.feed_forward_norm", x)
        opened, up = (
            self.project(f"{name}.feed_forward.{part}_proj", y) for part in ("gate", "up")
        )
        return x + self.project(f"{name}.feed_forward.down_proj", opened * opened.sigmoid() * up), (
            memory
        )

    def project(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights.get(f"{name}.weight", self.weights.get(name))
        assert weight is not None
        y = x @ weight.T
        if (bias := self.weights.get(f"{name}.bias")) is not None:
            y = y + bias
        norm = name.replace("_proj", "_norm")
        if f"{norm}.weight" not in self.weights:
            return y
        return self.norm(norm, y.unflatten(-1, (-1, self.config.d_head))).flatten(-2)

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any, first: Any
    ) -> tuple[Tensor, Any]:
        """The heads [T, H * D] of x [T, d_model], and the memory after them: here none.

        `documents` numbers each token's from 0, the one whose `memory` was carried in; those that
        start later begin with the memory `first`, the empty one if that is empty.
        """
        q, k, v = (self.project(f"{name}.{part}_proj", x) for part in "qkv")
        return self.local(q, k, v, documents), ()

    def local(self, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
        """[T, H * D] of the attention inside segments and documents."""
        rows, segment = [], self.config.span
        for t in range(len(q)):
            first = t // segment * segment
            own = [u for u in range(first, t + 1) if documents[u] == documents[t]]
            rows.append(self.attended(q[t], t - first, [Seen(u - first, k[u], v[u]) for u in own]))
        return torch.stack(rows)

    def attended(self, query: Tensor, position: int, seen: list[Seen]) -> Tensor:
        """What a query [H * D] at `position` reads from the tokens that it sees."""
        size, group = self.config.d_head, self.config.n_heads // self.config.n_kv_heads
        keys, values = (
            torch.stack(parts).unflatten(1, (-1, size)).unbind(1)
            for parts in ([one.key for one in seen], [one.value for one in seen])
        )
        positions = [one.position for one in seen]
        heads = []
        for head, q in enumerate(query.unflatten(0, (-1, size))):
            (q,) = self.turn(q[None], [position])
            scores = self.turn(keys[head // group], positions) @ q
            weights = torch.exp(scores / math.sqrt(size))
            heads.append(weights @ values[head // group] / weights.sum())
        return torch.cat(heads)

    def turn(self, x: Tensor, positions: list[int]) -> Tensor:
        """Rotary embedding of x [n, D] as complex numbers: component i is paired with i + D / 2."""
        half = x.shape[1] // 2
        rates = [self.config.rope_theta ** (-i / half) for i in range(half)]
        turns = [[cmath.exp(1j * position * rate) for rate in rates] for position in positions]
        turned = torch.complex(*x.split(half, dim=1)) * torch.tensor(turns, dtype=torch.complex128)
        return torch.cat((turned.real, turned.imag), dim=1)


def assert_equals_naive(
    model: Transformer,
    naive: NaiveModel,
    starts: Tensor,
    state: ModelState,
) -> None:
    """Logits, auxiliary loss, final state and every gradient, those of the carried state and
    embeddings too."""
    tokens = random_tokens(*starts.shape)
    model.zero_grad()
    embedded: list[Tensor] = []
    auxiliary = [torch.zeros((), dtype=torch.float64)]

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    def keep_loss(module: nn.Module, inputs: Any, output: Attended) -> None:
        if output.auxiliary is not None:
            auxiliary.append(output.auxiliary)

    hooks = [model.embedding.register_forward_hook(keep)]
    hooks += [layer.register_forward_hook(keep_loss) for layer in model.layers]
    carried = with_gradient(state)
    output = model(tokens, starts, carried, read_memory=naive.read_memory, initial=naive.initial)
    for hook in hooks:
        hook.remove()
    final = [part for memory in output.state for part in memory]
    assert output.logits is not None and output.losses is None
    found_loss = torch.stack(auxiliary).sum()
    (weighted_sum(output.logits, *final) + 0.3 * found_loss).backward()

    naive_carried = with_gradient(state)
    logits, states = naive(tokens, starts, naive_carried)
    naive_final = [
        torch.stack([lane[layer][part] for lane in states])
        for layer, memory in enumerate(state)
        for part in range(len(memory))
    ]
    (weighted_sum(logits, *naive_final) + 0.3 * naive.auxiliary).backward()

    assert_close(output.logits, logits, "logits")
    assert_close(found_loss, naive.auxiliary, "auxiliary loss")
    for ours, theirs in zip(final, naive_final, strict=True):
        assert_close(ours, theirs, "final state")
    for name, parameter in model.named_parameters():
        # A weight that the naive loop never read, ours multiplied by 0 or masked.
        assert_close(_gradient(parameter), _gradient(naive.weights[name]), name)
    expected = torch.stack([x.grad for x in naive.embedded])
    assert_close(embedded[0].grad, expected, "input embeddings")
    for before, naive_before in zip(carried, naive_carried, strict=True):
        for a, b in zip(before, naive_before, strict=True):
            assert_close(_gradient(a), _gradient(b), "carried state")


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad
