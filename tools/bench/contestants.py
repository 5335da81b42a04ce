"""One contestant of tools/bench/training.py: trains one step for each line it reads on stdin.

    python contestants.py '{"who": "ours", "memory": "delta", "window": 4096, ...}'

Each contestant is a separate process; peers also have a separate environment. It answers each line
with the step's seconds and its peak resident memory; the first line it writes describes it.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.training.heap import keep_freed_memory

Step = Callable[[], None]


def main() -> None:
    """Build the model, describe it, then train one step per line read."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    if given.get("keep_freed_memory", True):
        keep_freed_memory()
    torch.manual_seed(1)
    step, found = {
        "ours": _ours,
        "loop": _loop,
        "products": _products,
        "infini-transformer-pytorch": _infini_transformer_pytorch,
        "llama": _llama,
    }[given["who"]](given)
    _tell({"python": platform.python_version(), "torch": torch.__version__, **found})
    for _ in sys.stdin:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        begun = time.perf_counter()
        step()
        _tell({"seconds": time.perf_counter() - begun, "peak": _peak()})


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _peak() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _batch(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and targets [1, window] of one document."""
    tokens = torch.randint(given["vocab_size"], (1, given["window"] + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _training(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _model(given: dict[str, Any]) -> Any:
    from pretrain.config import MemoryConfig, ModelConfig
    from pretrain.model import compiling
    from pretrain.model.transformer import Transformer

    compiling.switch(given.get("compile", False))
    config = ModelConfig(**given["shape"], memory=MemoryConfig(kind=given["memory"]))
    return Transformer(config, given["vocab_size"], given.get("checkpointing", "none"))


def _told(given: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    from pretrain.config import MemoryConfig, ModelConfig
    from pretrain.model import flops

    config = ModelConfig(**given["shape"], memory=MemoryConfig(kind=given["memory"]))
    a_token = flops.training_flops_per_token(config, given["vocab_size"], given["window"])
    return {"parameters": _parameters(model), "flops": a_token * given["window"]}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _ours(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    model = _model(given)
    tokens, targets = _batch(given)
    starts = torch.zeros(tokens.shape, dtype=torch.bool)

    def loss() -> Tensor:
        total: Tensor = model(tokens, starts, model.initial_state(1, "cpu"), targets).loss
        return total / targets.numel()

    return _training(model, loss), _told(given, model)


def _loop(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Our model, called once per segment, with the gradient through all segments."""
    model = _model(given)
    tokens, targets = _batch(given)
    length = given["shape"]["segment"]

    def loss() -> Tensor:
        state, total = model.initial_state(1, "cpu"), torch.zeros(())
        for part, wanted in zip(tokens.split(length, 1), targets.split(length, 1), strict=True):
            starts = torch.zeros(part.shape, dtype=torch.bool)
            _, loss, _, state = model(part, starts, state, wanted)
            total = total + loss
        return total / targets.numel()

    return _training(model, loss), _told(given, model)


def _products(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Only the matrix products of a step's linear maps: one in the forward, two in the backward."""
    shape, window = given["shape"], given["window"]
    width, heads = shape["d_model"], shape["n_heads"] * shape["d_head"]
    maps = shape["n_layers"] * [(width, heads)] * 3 + shape["n_layers"] * [(heads, width)]
    maps += shape["n_layers"] * ([(width, shape["d_ff"])] * 2 + [(shape["d_ff"], width)])
    # The output head's run in chunks, so that the logits fit into memory.
    chunk = min(window, 512)
    sizes = [(window, *pair) for pair in maps] + [(chunk, width, given["vocab_size"])] * (
        window // chunk
    )
    operands, results = {}, {}
    for size in set(sizes):
        rows, inner, outer = size
        of_x, of_weight, of_y = (rows, inner), (outer, inner), (rows, outer)
        operands[size] = tuple(torch.randn(shape) for shape in (of_x, of_weight, of_y))
        results[size] = tuple(torch.empty(shape) for shape in (of_y, of_x, of_weight))

    def step() -> None:
        for size in sizes:
            (x, weight, slope), (y, to_x, to_weight) = operands[size], results[size]
            torch.mm(x, weight.t(), out=y)
            torch.mm(slope, weight, out=to_x)
            torch.mm(slope.t(), x, out=to_weight)

    return step, {"flops": sum(3 * 2 * n * k * m for n, k, m in sizes)}


def _infini_transformer_pytorch(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Segment by segment, with the gradient through all segments."""
    from infini_transformer_pytorch import InfiniTransformer

    shape = given["shape"]
    model = InfiniTransformer(
        num_tokens=given["vocab_size"],
        dim=shape["d_model"],
        depth=shape["n_layers"],
        dim_head=shape["d_head"],
        heads=shape["n_heads"],
        use_mem_delta_rule=given["memory"] == "delta",
    )
    tokens, targets = _batch(given)

    def loss() -> Tensor:
        memories, total = None, torch.zeros(())
        for part, wanted in zip(
            tokens.split(shape["segment"], 1), targets.split(shape["segment"], 1), strict=True
        ):
            logits, _, memories = model(part, past_memories=memories, return_new_memories=True)
            total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        return total / targets.numel()

    found = {"parameters": _parameters(model), "version": version("infini-transformer-pytorch")}
    return _training(model, loss), found


def _llama(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """transformers' Llama with full causal SDPA over the window."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = given["shape"]
    config = LlamaConfig(
        vocab_size=given["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        head_dim=shape["d_head"],
        max_position_embeddings=given["window"],
        attn_implementation="sdpa",
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    tokens, _ = _batch(given)

    def loss() -> Tensor:
        total: Tensor = model(input_ids=tokens, labels=tokens).loss
        return total

    found = {"parameters": _parameters(model), "version": version("transformers")}
    return _training(model, loss), found


if __name__ == "__main__":
    main()
