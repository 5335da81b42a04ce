"""An Infini-Transformer for Hugging Face's transformers; `pretrain export` adds it to the weights.

Needs torch and transformers (5.24 or later) alone. Texts are computed segment by segment, so that
space stays constant at any length: the cache holds a memory of fixed size, and keys and values of
the segment that is not yet full. Infini-attention: arXiv 2404.07143, equations 4 to 11.

Shapes: B texts, n tokens of a chunk, N of a segment, H query heads, K key/value heads, G = H / K
query heads that share one, D size of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class InfiniLlamaConfig(PreTrainedConfig):
    """Llama's configuration; `infini` holds the segment and the memory's settings.

    `qkv_bias`: biases of queries, keys and values; `qk_norm`: RMSNorm of each head's queries and
    keys, before positions and the memory.
    """

    model_type = "infini_llama"

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


@dataclass
class LayerCache:
    """What a layer keeps; its tensors are replaced, never written."""

    keys: Tensor
    """[B, filled, K, D] without positions, for the memory."""
    turned_keys: Tensor
    """The same with positions, for the local attention."""
    values: Tensor
    matrix: Tensor | None = None
    """M [B, K, D, D] in float32; None before the first segment is full."""
    normaliser: Tensor | None = None
    """z [B, K, D] in float32."""


class InfiniCache:
    """What generation carries from token to token, of bounded size."""

    # As transformers ask of a cache: it is not replayed by a graph, nor taken back.
    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self) -> None:
        self.layers: list[LayerCache] = []
        self.seen = 0
        """Tokens of each text so far."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each text so far."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let text i continue from what text beam_idx[i] was."""
        for layer in self.layers:
            for name, value in vars(layer).items():
                if value is not None:
                    setattr(layer, name, value.index_select(0, beam_idx.to(value.device)))


@dataclass
class InfiniOutput(ModelOutput):
    """Logits [B, T, V], a loss where labels were given, and the cache after the last token."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: InfiniCache | None = None


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

    def forward(self, x: Tensor, cache: LayerCache | None) -> tuple[Tensor, LayerCache]:
        """x [B, n, hidden], tokens of one segment -> the same shape, and what is kept then."""
        queries, keys, values = (
            projection(x).unflatten(2, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        filled = 0 if cache is None else cache.keys.shape[1]
        table = _rotary(self.config, filled, keys.shape[1], x)
        now = LayerCache(keys, _turned(keys, *table), values)
        if cache is not None:
            now.matrix, now.normaliser = cache.matrix, cache.normaliser
            for name in ("keys", "turned_keys", "values"):
                whole = torch.cat((getattr(cache, name), getattr(now, name)), dim=1)
                setattr(now, name, whole)
        visible = torch.ones(keys.shape[1], now.keys.shape[1], dtype=torch.bool, device=x.device)
        local = F.scaled_dot_product_attention(
            _turned(queries, *table).transpose(1, 2),
            now.turned_keys.transpose(1, 2),
            now.values.transpose(1, 2),
            attn_mask=visible.tril(filled),
            enable_gqa=True,
        ).transpose(1, 2)
        heads = self._gated(local, queries, now)
        if now.keys.shape[1] == self.config.infini["segment"]:
            now = self._written(now)
        return self.o_proj(heads.flatten(2)), now

    def _gated(self, local: Tensor, queries: Tensor, now: LayerCache) -> Tensor:
        """Equations 7 and 10; local, queries [B, n, H, D]."""
        share = self.gate.float().sigmoid()[:, None]
        if now.matrix is None or now.normaliser is None:
            if self.config.infini["memory"]["when_empty"] == "local":
                return local
            return ((1 - share) * local.float()).to(local.dtype)
        groups = (self.config.num_key_value_heads, -1)
        features = torch.unflatten(_features(queries), 2, groups)
        denominator = torch.einsum("bnkgd,bkd->bnkg", features, now.normaliser)
        read = torch.einsum("bnkgd,bkde->bnkge", features, now.matrix) / denominator[..., None]
        return torch.lerp(local.float(), read.flatten(2, 3), share).to(local.dtype)

    def _written(self, now: LayerCache) -> LayerCache:
        """The memory after a full segment, equations 8 and 9, and an empty segment."""
        memory = self.config.infini["memory"]
        features, values = _features(now.keys), now.values.float()
        normaliser = features.sum(dim=1)
        if now.normaliser is not None:
            normaliser = normaliser + now.normaliser
        if memory["kind"] == "delta" and now.matrix is not None:
            divisor = normaliser if memory["normaliser"] == "inclusive" else now.normaliser
            denominator = torch.einsum("bnkd,bkd->bnk", features, divisor)
            held = torch.einsum("bnkd,bkde->bnke", features, now.matrix)
            values = values - held / denominator[..., None]
        matrix = torch.einsum("bnkd,bnke->bkde", features, values)
        if now.matrix is not None:
            matrix = matrix + now.matrix
        keys, turned_keys, values = (x[:, :0] for x in (now.keys, now.turned_keys, now.values))
        return LayerCache(keys, turned_keys, values, matrix, normaliser)


class InfiniDecoderLayer(nn.Module):
    """Infini-attention and feed-forward, each added to the residual stream after RMSNorm."""

    def __init__(self, config: InfiniLlamaConfig) -> None:
        super().__init__()
        self.self_attn = InfiniAttention(config)
        self.mlp = InfiniMLP(config)
        self.input_layernorm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cache: LayerCache | None) -> tuple[Tensor, LayerCache]:
        """x [B, n, hidden] -> the same shape, and what the attention keeps then."""
        attended, cache = self.self_attn(self.input_layernorm(x), cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class InfiniLlamaPreTrainedModel(PreTrainedModel):
    """What transformers ask of a model."""

    config_class = InfiniLlamaConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _is_stateful = True  # so that nothing asks to take tokens back

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


class InfiniLlamaModel(InfiniLlamaPreTrainedModel):
    """The blocks between embedding and output head."""

    def __init__(self, config: InfiniLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            InfiniDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = InfiniRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids: Tensor, cache: InfiniCache, keep: int) -> Tensor:
        """input_ids [B, T] -> hidden states of the last `keep` tokens; `cache` is updated."""
        segment = self.config.infini["segment"]
        kept: list[Tensor] = []
        while input_ids.shape[1]:
            chunk = input_ids[:, : segment - cache.seen % segment]
            input_ids = input_ids[:, chunk.shape[1] :]
            x = self.embed_tokens(chunk)
            after = []
            for index, layer in enumerate(self.layers):
                x, state = layer(x, cache.layers[index] if cache.layers else None)
                after.append(state)
            cache.layers, cache.seen = after, cache.seen + chunk.shape[1]
            if input_ids.shape[1] < keep:
                kept.append(self.norm(x)[:, -max(keep - input_ids.shape[1], 0) :])
        return torch.cat(kept, dim=1)


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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: InfiniCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits after each of `input_ids` [B, T], which continue the text that `cache` holds.

        All texts of a batch have their tokens at the same places: padding would be written to the
        memory, so an attention mask with a 0 in it raises ValueError. `logits_to_keep` asks for
        the logits of the last so many tokens, 0 for all.
        """
        if cache is None and attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "an Infini-Transformer takes no padding: it would be remembered; give texts of "
                "one length, or one text at a time"
            )
        cache = InfiniCache() if cache is None else cache
        hidden = self.model(input_ids, cache, logits_to_keep or input_ids.shape[1])
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            predicted = logits[:, :-1].float().flatten(0, 1)
            loss = F.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=-100)
        keeps = self.config.use_cache if use_cache is None else use_cache
        output = InfiniOutput(loss=loss, logits=logits, cache=cache if keeps else None)
        return output if return_dict or return_dict is None else output.to_tuple()


def _features(x: Tensor) -> Tensor:
    """ELU + 1, in float32."""
    x = x.float()
    return x.clamp(max=0).exp() + x.clamp(min=0)


def _rotary(config: InfiniLlamaConfig, first: int, length: int, like: Tensor) -> list[Tensor]:
    """Cosines and sines [length, 1, D / 2] of the places first, first + 1, ... of a segment."""
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
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
    places = torch.arange(first, first + length, device=like.device).float()
    angles = (places[:, None] * frequencies)[:, None, :]
    return [(angles.cos() * scale).to(like.dtype), (angles.sin() * scale).to(like.dtype)]


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
