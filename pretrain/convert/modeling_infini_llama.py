"""An Infini-Transformer for Hugging Face's transformers; `pretrain export` adds it to the weights.

Needs torch and transformers (5.24 or later) alone. Texts are computed segment by segment, so that
space stays constant at any length: the cache holds a memory of fixed size, and keys and values of
the segment that is not yet full. Infini-attention: arXiv 2404.07143, equations 4 to 11.

Padding takes no part: the real tokens of each text are laid out in blocks, of which each is one
segment, or the rest of one, of every text; afterwards their outputs go back to where they came
from. So a text of a batch is computed as it is alone, wherever its padding is.

Shapes: B texts, T tokens of a call, n of a block, N of a segment, w places of a segment that are
taken, H query heads, K key/value heads, G = H / K query heads that share one, D size of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

_ROPES = ("default", "linear", "llama3", "yarn")


class InfiniLlamaConfig(PreTrainedConfig):
    """Llama's configuration; `infini` holds the segment and the memory's settings.

    `qkv_bias`: biases of queries, keys and values; `qk_norm`: RMSNorm of each head's queries and
    keys, before positions and the memory.
    """

    model_type = "infini_llama"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        head_dim: int = 64,
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 2**20,
        rope_parameters: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        infini: dict[str, Any] | None = None,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.initializer_range = initializer_range
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        memory = {"kind": "delta", "normaliser": "inclusive", "when_empty": "zero"}
        self.infini = infini or {"segment": 2048, "memory": memory}
        self.use_cache = use_cache
        super().__init__(**others)


class LayerState(NamedTuple):
    """What a layer keeps; its tensors are replaced, never written."""

    keys: Tensor | None = None
    """[B, w, K, D] without positions, for the memory; a text has its own number of them."""
    turned_keys: Tensor | None = None
    """The same with positions, for the local attention."""
    values: Tensor | None = None
    matrix: Tensor | None = None
    """M [B, K, D, D] in float32, 0 for a text without a full segment; None before any has one."""
    normaliser: Tensor | None = None
    """z [B, K, D] in float32."""


class InfiniCache:
    """What generation carries from token to token, of bounded size."""

    # As transformers ask of a cache: it is not replayed by a graph, nor taken back.
    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self) -> None:
        self.layers: list[LayerState] = []
        self.seen: list[int] = []
        """Tokens of each text so far, without padding."""
        self.columns = 0
        """Tokens so far, padding included."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let text i continue from what text beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the texts `indices`, in that order."""
        self.seen = [self.seen[index] for index in indices.tolist()]
        self.layers = [
            LayerState(
                *(x if x is None else x.index_select(0, indices.to(x.device)) for x in layer)
            )
            for layer in self.layers
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each text `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))


class Block(NamedTuple):
    """Tokens that are computed at once, of each text those of one segment or of a part of it."""

    places: Tensor
    """[B, n], of a token in its segment; 0 for padding."""
    slots: Tensor
    """[B, n], where its key is kept: its place; w for padding, which is behind what is kept."""
    held: Tensor
    """[B, n]: it has a memory to read."""
    full: Tensor
    """[B]: its segment is full after this."""
    holding: Tensor
    """[B]: it has a memory."""
    width: int
    """w, with the tokens of this block."""
    left: int
    """w after full segments have been written to the memory."""
    written: str
    """"all", "some" or "none" of the texts are full."""
    even: bool
    """All texts are at the same place, without padding."""

    @property
    def visible(self) -> Tensor:
        """[B, 1, n, w]: it attends to that place. Padding sees what is at place 0, so that its
        outputs are numbers."""
        return (torch.arange(self.width, device=self.places.device) <= self.places[..., None])[
            :, None
        ]

    def to(self, device: torch.device) -> Block:
        """The same on a device."""
        moved = (x.to(device) if isinstance(x, Tensor) else x for x in self)
        return Block(*moved)  # type: ignore[arg-type]


@dataclass
class Layout:
    """Where the tokens of a call [B, T] are computed: in L columns of each of R texts."""

    blocks: list[tuple[slice, Block]]
    """Of those columns each block's."""
    source: Tensor
    """[R, L]: which of the B * T tokens is there."""
    back: Tensor
    """[B, T]: the column of a token; that of the token before for padding."""
    text: Tensor
    """[B, T]: its text."""
    numbers: Tensor
    """[R, L]: a token's number in its text; -1 where there is none."""
    seen: list[int]
    """Tokens of each text after this call."""
    packed: bool
    """Rows held several texts, so that R is not B."""
    plain: bool
    """The columns of the layout are those of the call."""

    def arranged(self, given: Tensor) -> Tensor:
        """[B, T, ...] -> [R, L, ...]."""
        return given if self.plain else given.flatten(0, 1)[self.source.to(given.device)]

    def returned(self, blocks: list[Tensor], first: int = 0, last: int = 0) -> Tensor:
        """What was computed of the columns from `first` on, [R, n, ...] of each block -> [B, T or
        `last`, ...]."""
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        if self.plain:
            return whole[:, -last:] if last else whole
        text, back = (index[:, -last:].to(whole.device) for index in (self.text, self.back))
        return whole[text, back - first]

    def spread(self, weights: list[Tensor], columns: Tensor) -> Tensor:
        """Weights [R, n, H, w] of each block -> [B, H, T, tokens so far]; `columns` of those."""
        found = []
        for (own, block), weight in zip(self.blocks, weights, strict=True):
            start = (self.numbers[:, own] - block.places).clamp(min=0).to(columns.device)
            index = (start[..., None] + torch.arange(block.width, device=columns.device)).clamp(
                max=columns.shape[1] - 1
            )
            index = columns.gather(1, index.flatten(1)).view_as(index)[:, :, None]
            room = weight.new_zeros(*weight.shape[:3], columns.shape[1])
            found.append(room.scatter_add(3, index.expand_as(weight), weight))
        return self.returned(found).transpose(1, 2)


def laid_out(real: Tensor, positions: Tensor | None, seen: list[int], segment: int) -> Layout:
    """Lay out the tokens `real` [B, T] that follow `seen` ones of each text.

    Positions [B or 1, T] count on by one; where they begin again at 0, so does a text, in rows of
    several. Raises ValueError for others. All tensors are of the CPU: no token is looked at.
    """
    row, column = real.nonzero(as_tuple=True)
    text, packed = _texts(row, column, positions, seen)
    seen = [0] * (int(text[-1]) + 1) if packed else seen
    before, counts = torch.tensor(seen), torch.bincount(text, minlength=len(seen))
    index = torch.arange(len(text)) - (counts.cumsum(0) - counts)[text]
    room = segment - before % segment
    # All texts are at a segment's start after the first block.
    first = max(int(torch.minimum(room, counts).max()), 1)
    at = torch.where(index < room[text], index, first + index - room[text])
    width = max(first, int(at.max()) + 1) if len(at) else first
    source = torch.zeros(len(seen), width, dtype=torch.long)
    numbers = torch.full((len(seen), width), -1)
    source[text, at], numbers[text, at] = row * real.shape[1] + column, before[text] + index
    nearest = torch.arange(real.shape[1]).where(real, real.int().argmax(1, keepdim=True))
    nearest = nearest.cummax(1).values
    back, texts = torch.zeros(2, *real.shape, dtype=torch.long)
    back[row, column], texts[row, column] = at, text
    plain = not packed and bool(real.all()) and len(set(seen)) == 1
    return Layout(
        blocks=list(_blocks(numbers, before % segment, first, segment, plain)),
        source=source,
        back=back.gather(1, nearest),
        text=texts.gather(1, nearest),
        numbers=numbers,
        seen=(before + counts).tolist(),
        packed=packed,
        plain=plain,
    )


def _texts(
    row: Tensor, column: Tensor, positions: Tensor | None, seen: list[int]
) -> tuple[Tensor, bool]:
    """The text of each real token, and whether a row holds several. See `laid_out`."""
    if positions is None or len(row) < 2:
        return row, False
    place = positions[row if len(positions) > 1 else 0, column]
    other_row = row[1:] != row[:-1]
    odd = (place[1:] != place[:-1] + 1) & ~other_row
    again = odd & (place[1:] == 0)
    # `generate` counts on from the 0 that it gives to padding.
    wrong = odd & ~again & (column[1:] == column[:-1] + 1)
    if bool(wrong.any()) or (any(seen) and bool(again.any())):
        raise ValueError(
            "position_ids: expected positions that count on by one, or, without a cache, begin "
            "again at 0 where another text does; a memory knows no other order"
        )
    if not bool(again.any()):
        return row, False
    return F.pad((again | other_row).cumsum(0), (1, 0)), True


def _blocks(
    numbers: Tensor, filled: Tensor, first: int, segment: int, even: bool
) -> Iterator[tuple[slice, Block]]:
    """The blocks, of which the first has `first` columns of `numbers` [R, L] (see `Layout`), after
    `filled` [R] tokens of each text's open segment."""
    starts = [0, *range(first, numbers.shape[1], segment)]
    for start, end in zip(starts, [*starts[1:], numbers.shape[1]], strict=True):
        number = numbers[:, start:end]
        real = number >= 0
        filled = filled + real.sum(1)
        places = number.clamp(min=0) % segment
        width, full = max(int(filled.max()), 1), filled == segment
        filled = filled.masked_fill(full, 0)
        held = number >= segment
        yield (
            slice(start, end),
            Block(
                places=places,
                slots=places.masked_fill(~real, width),
                held=held,
                full=full,
                holding=held.any(1),
                width=width,
                left=int(filled.max()),
                written="all" if bool(full.all()) else "some" if bool(full.any()) else "none",
                even=even,
            ),
        )


class InfiniRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        precise = x.float()
        scale = precise.square().mean(dim=-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (precise * scale).to(x.dtype)


class InfiniMLP(nn.Module):
    """The SwiGLU feed-forward."""

    def __init__(self, config: InfiniLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, hidden] -> [B, n, hidden]."""
        hidden: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return hidden


class InfiniAttention(nn.Module):
    """Local attention in a segment, gated with a memory of the segments before."""

    def __init__(self, config: InfiniLlamaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        heads = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads))
        if config.qk_norm:
            self.q_norm = InfiniRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = InfiniRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        block: Block,
        turns: tuple[Tensor, Tensor],
        weighed: bool,
        state: LayerState,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """x [B, n, hidden] -> the same shape, the local attention's weights [B, H, n, w] where
        they are asked for (`weighed`), and what is kept then."""
        queries, keys, values = (
            projection(x).unflatten(2, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        turned, turned_keys = (_turned(part, *turns).to(values.dtype) for part in (queries, keys))
        kept = [
            _extended(old, new, block)
            for old, new in zip(state[:3], (keys, turned_keys, values), strict=True)
        ]
        weighed = weighed or self.config._attn_implementation == "eager"
        local, weights = self._local(turned, kept[1], kept[2], block, weighed)
        # Autocast would round the memory.
        with torch.autocast(x.device.type, enabled=False):
            heads = self._gated(local, queries, block, state)
            memory = state.matrix, state.normaliser
            if block.written != "none":
                memory = self._written(kept[0], kept[2], block, state)
        left = [part[:, : block.left] for part in kept]
        now = LayerState(left[0], left[1], left[2], *memory)
        return self.o_proj(heads.flatten(2)), weights, now

    def _local(
        self, queries: Tensor, keys: Tensor, values: Tensor, block: Block, weighed: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Heads [B, n, H, D] of what is visible, and the weights [B, H, n, w] of a plain softmax
        where it is asked for."""
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))
        if not weighed:
            heads = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=block.visible, enable_gqa=True
            )
            return heads.transpose(1, 2), None
        groups = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        scores = queries @ keys.transpose(2, 3) / math.sqrt(self.config.head_dim)
        scores = scores.float().masked_fill(~block.visible, -math.inf)
        weights = scores.softmax(dim=-1).to(queries.dtype)
        return (weights @ values).transpose(1, 2), weights

    def _gated(self, local: Tensor, queries: Tensor, block: Block, state: LayerState) -> Tensor:
        """Equations 7 and 10; local, queries [B, n, H, D]."""
        share = self.gate.float().sigmoid()[:, None]
        only_local = self.config.infini["memory"]["when_empty"] == "local"
        if state.matrix is None or state.normaliser is None:
            return local if only_local else ((1 - share) * local.float()).to(local.dtype)
        groups = (self.config.num_key_value_heads, -1)
        features = torch.unflatten(_features(queries), 2, groups)
        denominator = torch.einsum("bnkgd,bkd->bnkg", features, state.normaliser)
        denominator = denominator.where(block.held[..., None, None], 1)
        read = torch.einsum("bnkgd,bkde->bnkge", features, state.matrix) / denominator[..., None]
        mixed = torch.lerp(local.float(), read.flatten(2, 3), share).to(local.dtype)
        return mixed.where(block.held[..., None, None], local) if only_local else mixed

    def _written(
        self, keys: Tensor, values: Tensor, block: Block, state: LayerState
    ) -> tuple[Tensor, Tensor]:
        """M and z after the full segments, equations 8 and 9; keys, values [B, N, K, D]."""
        memory = self.config.infini["memory"]
        features, values = _features(keys), values.float()
        normaliser = features.sum(dim=1)
        if state.normaliser is not None:
            normaliser = normaliser + state.normaliser
        if memory["kind"] == "delta" and state.matrix is not None:
            divisor = normaliser if memory["normaliser"] == "inclusive" else state.normaliser
            denominator = torch.einsum("bnkd,bkd->bnk", features, divisor)
            denominator = denominator.where(block.holding[:, None, None], 1)
            held = torch.einsum("bnkd,bkde->bnke", features, state.matrix)
            values = values - held / denominator[..., None]
        matrix = torch.einsum("bnkd,bnke->bkde", features, values)
        if state.matrix is not None:
            matrix = matrix + state.matrix
        if block.written == "some":
            full = block.full[:, None, None]
            matrix = matrix.where(full[..., None], 0 if state.matrix is None else state.matrix)
            before = 0 if state.normaliser is None else state.normaliser
            normaliser = normaliser.where(full, before)
        return matrix, normaliser


class InfiniDecoderLayer(GradientCheckpointingLayer):
    """Infini-attention and feed-forward, each added to the residual stream after RMSNorm."""

    def __init__(self, config: InfiniLlamaConfig) -> None:
        super().__init__()
        self.self_attn = InfiniAttention(config)
        self.mlp = InfiniMLP(config)
        self.input_layernorm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        block: Block,
        cosine: Tensor,
        sine: Tensor,
        weighed: bool,
        *state: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """x [B, n, hidden] -> the same shape, the local attention's weights where they are asked
        for (`weighed`), and what the attention keeps then.

        `state` is laid open, since only arguments that are tensors have gradients under every kind
        of checkpointing.
        """
        attended, weights, now = self.self_attn(
            self.input_layernorm(x), block, (cosine, sine), weighed, LayerState(*state)
        )
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights, *now


class InfiniLlamaPreTrainedModel(PreTrainedModel):
    """What transformers ask of a model."""

    config_class = InfiniLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InfiniDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["self_attn.gate"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # so that nothing asks to take tokens back

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # `eager` or `sdpa`, as the configuration says at each call

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, InfiniRMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, InfiniAttention):
            nn.init.constant_(module.gate, self.config.infini["memory"].get("initial_gate", 0.0))


class Asked(NamedTuple):
    """What a caller wants besides the last hidden states."""

    hidden: set[int]
    """Hidden states after so many layers, 0 for the embedding."""
    weights: bool
    """Those of the local attention."""
    first: int
    """Of the layout's columns, the first that is wanted after the last layer."""


@dataclass
class Computed:
    """What came of the blocks, each in columns of the layout."""

    last: list[Tensor]
    """After the last layer [R, n, hidden] of each block, from `Asked.first` on."""
    hidden: dict[int, list[Tensor]]
    """The same of other layers."""
    weights: list[list[Tensor]]
    """For each layer [R, n, H, w] of each block."""


class InfiniLlamaModel(InfiniLlamaPreTrainedModel):
    """The blocks between embedding and output head."""

    def __init__(self, config: InfiniLlamaConfig) -> None:
        super().__init__(config)
        kind = config.rope_parameters.get("rope_type", "default")
        if kind not in _ROPES:
            raise ValueError(f"rope_parameters: rope_type {kind!r}, expected one of {_ROPES}")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            InfiniDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        last: int = 0,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of tokens [B, T]; see `InfiniLlamaForCausalLM.forward`.

        `last`: the last so many tokens' alone, 0 for all.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("expected input_ids or inputs_embeds, one of the two")
        if cache is None:
            cache = others.get("past_key_values")
        keeps = bool(use_cache) or cache is not None
        cache = _opened(cache, len(given))
        real = _real(attention_mask, given)
        _require_places(position_ids, others)
        places = None
        if position_ids is not None and real.shape[1] > 1:
            places = position_ids[..., -real.shape[1] :].reshape(-1, real.shape[1]).cpu()
        layout = laid_out(real, places, cache.seen, self.config.infini["segment"])
        hidden, weights = _asked(others, self.config)
        last = 0 if hidden else last
        first = int(layout.back[:, -last:].min()) if last else 0
        columns = None
        if weights:
            columns = _columns(attention_mask, real, cache, layout).to(given.device)
        computed = self._computed(given, layout, cache, Asked(hidden, weights, first))
        cache.seen, cache.columns = layout.seen, cache.columns + real.shape[1]
        after = self.norm(layout.returned(computed.last, first, last))
        between = {level: layout.returned(one) for level, one in computed.hidden.items() if one}
        levels = (between | {len(self.layers): after}).get
        return BaseModelOutputWithPast(
            last_hidden_state=after,
            cache=cache if keeps and not layout.packed else None,
            hidden_states=tuple(
                levels(level) if level in hidden else None for level in range(len(self.layers) + 1)
            )
            if hidden
            else None,
            attentions=None
            if columns is None
            else tuple(layout.spread(one, columns) for one in computed.weights),
        )

    def _computed(
        self, given: Tensor, layout: Layout, cache: InfiniCache, asked: Asked
    ) -> Computed:
        """Compute the tokens or embeddings `given`, block by block; `cache.layers` are replaced."""
        tokens = layout.arranged(given)
        states = cache.layers or [LayerState()] * len(self.layers)
        found = Computed([], {level: [] for level in asked.hidden}, [[] for _ in self.layers])
        for columns, own in layout.blocks:
            x = tokens[:, columns] if given.dim() == 3 else self.embed_tokens(tokens[:, columns])
            block = own.to(x.device)
            turns = _rotary(self.config, block.places, x)
            after = []
            for level, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
                if level in asked.hidden:
                    found.hidden[level].append(x)
                x, weights, *kept = layer(x, block, *turns, asked.weights, *state)
                after.append(LayerState(*kept))
                if asked.weights:
                    found.weights[level].append(weights.transpose(1, 2))
            states = after
            if columns.stop > asked.first:
                found.last.append(x[:, max(asked.first - columns.start, 0) :])
        cache.layers = states
        return found


class InfiniLlamaForCausalLM(InfiniLlamaPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: InfiniLlamaConfig) -> None:
        super().__init__(config)
        self.model = InfiniLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **others: Any
    ) -> Any:
        # A text is computed segment by segment anyway; chunks would need a cache before it begins.
        generation_config.prefill_chunk_size = None
        _require_new(input_ids, generation_config, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, **others)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after each of the tokens [B, T], which continue the texts that `cache` holds.

        `attention_mask` [B, T or more], of which the last T count: a 0 marks padding, which is
        neither remembered nor counted; its outputs are those of the token before. `position_ids`
        [B or 1, T] count on by one; they say no more than where texts begin, if a row holds several
        (without a cache). `labels` [B, T]: the loss is transformers' own, divided by
        `num_items_in_batch` where that is given. `logits_to_keep` asks for those of the last so
        many tokens, 0 for all, or of the places in a tensor. `output_attentions`: weights [B, H, T,
        tokens so far] of the local attention, without the memory's share; `others` else are what
        transformers pass to every model. Raises ValueError for what has no meaning here.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            return_dict=True,
            **others,
        )
        logits = self.lm_head(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=output.cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def _opened(cache: Any, batch: int) -> InfiniCache:
    """The cache to continue from, a new one without any. Raises ValueError for another's."""
    cache = InfiniCache() if cache is None else cache
    if not isinstance(cache, InfiniCache):
        raise ValueError(
            f"cache: is a {type(cache).__name__}, expected what an earlier call returned; keys and "
            "values of all tokens, as of other models, cannot stand for a memory"
        )
    cache.seen = cache.seen or [0] * batch
    if len(cache.seen) != batch:
        raise ValueError(
            f"cache: holds {len(cache.seen)} texts, expected {batch} as in the input (with beams "
            "and num_return_sequences: let its batch_repeat_interleave repeat each)"
        )
    return cache


def _require_new(input_ids: Tensor, options: Any, given: dict[str, Any]) -> None:
    """Raises ValueError where a cache to continue from holds all of the text that `generate` is
    given, or another one: transformers would read the text once more, or only a part of it."""
    cache, mask, embeddings = (
        given.get(name) for name in ("cache", "attention_mask", "inputs_embeds")
    )
    if not isinstance(cache, InfiniCache) or not cache.columns:
        return
    length = (input_ids if embeddings is None else embeddings).shape[1]
    # An attention_mask of 1s is taken away, and its length kept.
    total = getattr(options, "_mask_length", None) if mask is None else mask.shape[1]
    total = length if total is None or embeddings is not None else total
    if cache.columns >= total or (length < total != cache.columns + length):
        raise ValueError(
            f"cache: holds {cache.columns} tokens, and {length} are given of a text of {total}; "
            "expected the whole text, which goes on behind what the cache holds, or what is new "
            "alone with an attention_mask of the whole"
        )


def _require_places(position_ids: Tensor | None, others: dict[str, Any]) -> None:
    """Raises ValueError where only arguments for other kernels say where texts begin in a row."""
    told = [name for name in ("cu_seq_lens_q", "seq_idx") if others.get(name) is not None]
    if told and position_ids is None:
        raise ValueError(
            f"{told[0]}: says which texts lie in a row, and has no effect here; expected "
            "position_ids that begin again at 0 with each text"
        )


def _real(mask: Any, given: Tensor) -> Tensor:
    """Which of the tokens [B, T] are no padding, on the CPU."""
    batch, length = given.shape[:2]
    if not length:
        raise ValueError("input_ids: hold no token, expected one or more")
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask: expected [{batch}, {length} or more], 1 for tokens and 0 for "
            "padding; a memory has no other masks"
        )
    own: Tensor = mask[:, -length:].cpu()
    if bool(((own != 0) & (own != 1)).any()):
        raise ValueError(
            "attention_mask: has numbers besides 1 for tokens and 0 for padding; where texts begin "
            "in a row, position_ids say, which begin again at 0 with each"
        )
    return own.bool().expand(batch, -1)


def _asked(options: dict[str, Any], config: InfiniLlamaConfig) -> tuple[set[int], bool]:
    """Of which layers hidden states are wanted, and whether attentions are."""
    hidden, attentions = (
        getattr(config, name) if options.get(name) is None else options[name]
        for name in ("output_hidden_states", "output_attentions")
    )
    levels = config.num_hidden_layers + 1
    if isinstance(hidden, bool) or hidden is None:
        return set(range(levels)) if hidden else set(), bool(attentions)
    numbers = [hidden] if isinstance(hidden, int) else hidden
    return {one % levels for one in numbers if -levels <= one < levels}, bool(attentions)


def _columns(mask: Tensor | None, real: Tensor, cache: InfiniCache, layout: Layout) -> Tensor:
    """The column [B, tokens so far] of each text's first, second, ... token among all that it was
    given, padding included."""
    total = cache.columns + real.shape[1]
    whole = F.pad(real, (cache.columns, 0), value=True)
    if mask is not None and mask.shape[1] == total:
        whole = mask.bool().cpu()
    if layout.packed or not torch.equal(whole.sum(1), torch.tensor(layout.seen)):
        raise ValueError(
            "output_attentions: expected one text in a row, and with padding before an "
            "attention_mask of all tokens so far"
        )
    return (~whole).int().argsort(dim=1, stable=True)


def _extended(kept: Tensor | None, new: Tensor, block: Block) -> Tensor:
    """What is kept [B, w before, K, D] with `new` [B, n, K, D] in its slots: [B, w, K, D]."""
    if kept is None:
        kept = new[:, :0]
    if block.even:
        return torch.cat((kept.to(new.dtype), new), dim=1)
    room = F.pad(kept.to(new.dtype), (0, 0, 0, 0, 0, block.width + 1 - kept.shape[1]))
    return room.scatter(1, block.slots[..., None, None].expand_as(new), new)[:, : block.width]


def _features(x: Tensor) -> Tensor:
    """ELU + 1, in float32."""
    x = x.float()
    return x.clamp(max=0).exp() + x.clamp(min=0)


def _rotary(config: InfiniLlamaConfig, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, n, 1, D / 2] of places [B, n] in a segment."""
    # What transformers take for yarn's keys that are not there.
    rope = {
        "rope_type": "default",
        "original_max_position_embeddings": config.max_position_embeddings,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
        **config.rope_parameters,
    }
    exponents = torch.arange(0, config.head_dim, 2, device=places.device).float() / config.head_dim
    powers = rope["rope_theta"] ** exponents
    frequencies, scale = 1.0 / powers, 1.0
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = torch.lerp(frequencies / rope["factor"], frequencies, kept)
    if rope["rope_type"] == "yarn":
        kept = 1 - _ramp(rope, config.head_dim, powers)
        frequencies = 1.0 / (rope["factor"] * powers) * (1 - kept) + frequencies * kept
        scale = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0
    angles = (places[..., None].float() * frequencies)[:, :, None, :]
    return (angles.cos() * scale).to(like.dtype), (angles.sin() * scale).to(like.dtype)


def _ramp(rope: dict[str, Any], size: int, like: Tensor) -> Tensor:
    """Yarn's share of the lowered frequency in each pair of a head's `size` components."""

    def pair(turns: float) -> float:
        times = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return size * math.log(times) / (2 * math.log(rope["rope_theta"]))

    first, last = pair(rope["beta_fast"]), pair(rope["beta_slow"])
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(len(like), dtype=like.dtype, device=like.device)
    return ((pairs - first) / (last - first)).clamp(0, 1)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, n, heads, D] turned by its places, component i with component i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
