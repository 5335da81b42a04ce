"""FLOPs and parameters of the model, counted from its shape.

A multiply-add is 2 FLOPs. Matrix products are counted, elementwise work is not; the softmax's
causal square counts in full, as in PaLM's definition of MFU and in torch's counter. A backward
counts as two forwards, less the gradients that are not computed; recomputation by activation
checkpointing and the loss is not useful work.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pretrain.config.model import ModelConfig
from pretrain.config.training import Checkpointing
from pretrain.model.memories.kinds import attention_of, recurrence_of
from pretrain.model.transformer import on_meta

# Dense peaks, FLOP/s in bf16, from NVIDIA's data sheets (half of the figure "with sparsity"). Names
# must match exactly: a slice of a GPU (MIG) or another variant has another rate.
_PEAKS = {
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "GH200 120GB": 989e12,
    "GH200 480GB": 989e12,
    "B200": 2250e12,
}


def forward_flops(config: ModelConfig, vocab_size: int, window: int) -> dict[str, int]:
    """FLOPs of one forward over `window` tokens of one lane, by part, as in training.

    A recurrence over the whole stack counts with a full memory, as in a long document.
    """
    recurrence = recurrence_of(config.memory)
    if recurrence is None:
        parts = _stack_flops(config, window)
    else:
        segments, rest = divmod(window, config.segment)
        parts = {}
        for tokens, times in ((config.segment, segments), (rest, int(rest > 0))):
            places = recurrence.places(config, tokens)
            for part, count in _stack_flops(replace(config, segment=places), places).items():
                parts[part] = parts.get(part, 0) + times * count
    return parts | {"output_head": window * head_flops(config, vocab_size)}


def head_flops(config: ModelConfig, vocab_size: int) -> int:
    """FLOPs of the logits of one token."""
    return 2 * config.d_model * vocab_size


def _stack_flops(config: ModelConfig, places: int) -> dict[str, int]:
    """FLOPs of one forward of all layers over `places` places of a lane, by part."""
    return attention_of(config.memory).flops(config, places) | {
        "feed_forward": config.n_layers * places * 2 * 3 * config.d_model * config.d_ff
    }


def reading_flops_per_token(config: ModelConfig, window: int) -> float:
    """FLOPs of a forward alone, per token of a window: as of a preface, without logits and without
    what is computed for an auxiliary loss."""
    whole = sum(forward_flops(config, 0, window).values())
    return (whole - attention_of(config.memory).auxiliary_flops(config, window)) / window


def training_flops_per_token(config: ModelConfig, vocab_size: int, window: int) -> float:
    """Useful FLOPs of forward and backward, per token of a window."""
    whole = sum(forward_flops(config, vocab_size, window).values())
    return (3 * whole - attention_of(config.memory).missing_flops(config, window)) / window


def computed_flops_per_token(
    config: ModelConfig, vocab_size: int, window: int, checkpointing: Checkpointing
) -> float:
    """FLOPs of forward and backward per token of a window, including recomputation.

    The memory reports what its backward recomputes. With `selective` two of the feed-forward's
    three products are recomputed, with `full` the whole block except the third product, whose
    result is not needed. The window is assumed to fit into one chunk of the feed-forward.
    """
    parts = forward_flops(config, vocab_size, window)
    whole = sum(parts.values())
    memory = attention_of(config.memory)
    again = memory.recomputed_flops(config, window)
    if checkpointing == "selective":
        again += parts["feed_forward"] * 2 // 3
    if checkpointing == "full":
        again += whole - parts["output_head"] - parts["feed_forward"] // 3
    return (3 * whole + again - memory.missing_flops(config, window)) / window


def passing_flops(
    config: ModelConfig, segments: int, parts: int, checkpointing: Checkpointing
) -> int:
    """FLOPs of forward and backward that a part of `segments` segments of a lane's window needs in
    addition to its share of the window, to pass its memories on to the other `parts`.
    """
    passes = 4 if checkpointing == "full" else 3
    return passes * attention_of(config.memory).passing_flops(config, segments, parts)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The dense peak in FLOP/s of a GPU, by its `torch.cuda.get_device_name`.

    None for an unknown device and for any dtype but bf16 (the float32 peak depends on whether TF32
    is on).
    """
    if dtype != torch.bfloat16:
        return None
    return _PEAKS.get(device_name.removeprefix("NVIDIA "))


def parameters(config: ModelConfig, vocab_size: int) -> int:
    """The number of weights; tied embeddings count once."""
    return sum(parameter.numel() for parameter in on_meta(config, vocab_size).parameters())
