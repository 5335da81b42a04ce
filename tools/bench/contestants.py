"""One contestant of tools/bench/training.py or memories.py: a training step per line of stdin.

    python contestants.py '{"who": "ours", "memory": "delta", "window": 4096, ...}'

Each contestant is a separate process; peers also have a separate environment. It answers each line
with the step's seconds, its peak resident memory and the bytes of the memory after it; the first
line it writes describes it. Without an `optimizer` a step is forward and backward alone.
"""

from __future__ import annotations

import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.training.heap import keep_freed_memory

Step = Callable[[], int]
"""Trains a step; the bytes of the memory that it leaves behind."""
Losses = Iterator[Tensor]
"""What is back-propagated, one after another."""


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
        "compressive-transformer-pytorch": _compressive_transformer_pytorch,
        "memorizing-transformers-pytorch": _memorizing_transformers_pytorch,
        "recurrent-memory-transformer-pytorch": _recurrent_memory_transformer_pytorch,
        "llama": _llama,
    }[given["who"]](given)
    _tell({"python": platform.python_version(), "torch": torch.__version__, **found})
    for _ in sys.stdin:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        begun = time.perf_counter()
        state = step()
        _tell({"seconds": time.perf_counter() - begun, "peak": _peak(), "state": state})


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _peak() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _batch(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and targets [lanes, window], a document in each lane; one lane unless given."""
    tokens = torch.randint(given["vocab_size"], (given.get("lanes", 1), given["window"] + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _segments(given: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The batch segment by segment."""
    parts = (torch.split(x, given["shape"]["segment"], dim=1) for x in _batch(given))
    return list(zip(*parts, strict=True))


def _training(
    given: dict[str, Any],
    model: nn.Module,
    losses: Callable[[], Losses],
    state: Callable[[], Iterable[Tensor]] = tuple,
) -> Step:
    """A step that back-propagates each of the losses; `state` are its memory's tensors."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> int:
        for loss in losses():
            loss.backward()  # type: ignore[no-untyped-call]
        if given.get("optimizer", True):
            optimizer.step()
        optimizer.zero_grad()
        return sum(tensor.nbytes for tensor in state())

    return step


def _config(given: dict[str, Any]) -> Any:
    from data_prep.dataset import settings
    from pretrain.config.model import ModelConfig

    words = [f"memory.kind={given['memory']}", *given.get("settings", ())]
    shape = [f"{name}={size}" for name, size in given["shape"].items()]
    return settings.load(ModelConfig, None, [*shape, *words])


def _model(given: dict[str, Any]) -> Any:
    from pretrain.model import compiling
    from pretrain.model.transformer import Transformer

    compiling.switch(given.get("compile", False))
    return Transformer(_config(given), given["vocab_size"], given.get("checkpointing", "none"))


def _told(given: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    from pretrain.model import flops

    a_token = flops.training_flops_per_token(_config(given), given["vocab_size"], given["window"])
    tokens = given["window"] * given.get("lanes", 1)
    return {"parameters": _parameters(model), "flops": a_token * tokens}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _ours(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The whole window at once; the memory is empty before it, or with `carry` the last step's."""
    from pretrain.model.state import detached

    model = _model(given)
    tokens, targets = _batch(given)
    starts = torch.zeros(tokens.shape, dtype=torch.bool)

    carried = [model.initial_state(len(tokens), "cpu")]
    weights = None
    if "answers" in given:  # one token in so many is in the loss, the others are of prompts
        weights = (torch.arange(targets.numel()) % given["answers"] == 0).float().view_as(targets)

    def losses() -> Losses:
        output = model(tokens, starts, carried[0], targets, weights=weights)
        if given.get("carry", False):
            carried[0] = detached(output.state)
        yield output.loss / targets.numel()

    def state() -> Iterable[Tensor]:
        return (tensor for memory in carried[0] for tensor in memory)

    return _training(given, model, losses, state), _told(given, model)


def _loop(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Our model, called once per segment, with the gradient through all segments."""
    model = _model(given)
    segments = _segments(given)

    def losses() -> Losses:
        state, total = model.initial_state(1, "cpu"), torch.zeros(())
        for part, wanted in segments:
            starts = torch.zeros(part.shape, dtype=torch.bool)
            output = model(part, starts, state, wanted)
            state, total = output.state, total + output.loss
        yield total / given["window"]

    return _training(given, model, losses), _told(given, model)


def _products(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Only the matrix products of a step's linear maps: one in the forward, two in the backward."""
    shape, window = given["shape"], given["window"] * given.get("lanes", 1)
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

    def step() -> int:
        for size in sizes:
            (x, weight, slope), (y, to_x, to_weight) = operands[size], results[size]
            torch.mm(x, weight.t(), out=y)
            torch.mm(slope, weight, out=to_x)
            torch.mm(slope.t(), x, out=to_weight)
        return 0

    return step, {"flops": sum(3 * 2 * n * k * m for n, k, m in sizes)}


def _infini_transformer_pytorch(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Segment by segment, with the gradient through all segments."""
    from infini_transformer_pytorch import InfiniTransformer

    shape = given["shape"]
    model = InfiniTransformer(
        **_sizes(given),
        dim_head=shape["d_head"],
        use_mem_delta_rule=given["memory"] == "delta",
    )
    segments = _segments(given)
    memories: list[Any] = []

    def losses() -> Losses:
        total = torch.zeros(())
        memories.clear()
        for part, wanted in segments:
            past = memories or None
            logits, _, memories[:] = model(part, past_memories=past, return_new_memories=True)
            total = total + _nats(logits, wanted)
        yield total / given["window"]

    def state() -> Iterable[Tensor]:
        return (tensor for memory in memories for tensor in memory)

    return _training(given, model, losses, state), _of_peer(given, model)


def _compressive_transformer_pytorch(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Each segment is back-propagated alone, with its auxiliary loss, as its README trains.

    Fault left in: the weights of keys and values are detached in place in the second segment of the
    first step, and never train again. Positions are learned, one table for all layers.
    """
    from compressive_transformer_pytorch import CompressiveTransformer

    shape, memory = given["shape"], given["of_peer"]
    model = CompressiveTransformer(
        **_sizes(given),
        seq_len=shape["segment"],
        mem_len=memory["cache"],
        cmem_len=memory["compressed"],
        cmem_ratio=memory["rate"],
        enhanced_recurrence=False,
        gru_gated_residual=False,
    )
    segments = _segments(given)
    memories: list[Tensor] = []

    def losses() -> Losses:
        memories.clear()
        for part, wanted in segments:
            logits, memories[:], auxiliary = model(part, memories=memories or None)
            yield _nats(logits, wanted) / given["window"] + auxiliary / len(segments)

    return _training(given, model, losses, lambda: memories), _of_peer(given, model)


def _memorizing_transformers_pytorch(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """Each segment is back-propagated alone, as its README trains.

    Faults left in: the nearest keys are approximate (faiss's HNSW); one softmax over local and
    retrieved keys instead of a gate. All query heads share one key/value head.
    """
    import faiss
    from memorizing_transformers_pytorch import MemorizingTransformer

    faiss.omp_set_num_threads(given["threads"])
    shape, memory = given["shape"], given["of_peer"]
    directory = tempfile.TemporaryDirectory()
    model = MemorizingTransformer(
        **_sizes(given),
        dim_head=shape["d_head"],
        memorizing_layers=(memory["layer"],),
        max_knn_memories=memory["capacity"],
        num_retrieved_memories=memory["neighbours"],
        xl_max_memories=memory["cache"],
        pad_id=-1,
        knn_memories_directory=directory.name,
    )
    segments = _segments(given)
    caches: list[Tensor] = []
    stored: list[Tensor] = []

    def losses() -> Losses:
        assert directory  # lives as long as the step
        caches.clear()
        with model.knn_memories_context(batch_size=given.get("lanes", 1)) as stores:
            for part, wanted in segments:
                logits, caches[:] = model(part, stores, xl_memories=caches or None)
                yield _nats(logits, wanted) / given["window"]
            stored[:] = [torch.from_numpy(store.db) for store in stores]

    return _training(given, model, losses, lambda: [*caches, *stored]), _of_peer(given, model)


def _recurrent_memory_transformer_pytorch(given: dict[str, Any]) -> tuple[Step, dict[str, Any]]:
    """With the gradient through all segments, as its wrapper trains without `truncate_at_step`.

    A plain residual stream, rotary positions, and no cache beside the memory vectors.
    """
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    shape = given["shape"]
    model = RecurrentMemoryTransformer(
        **_sizes(given),
        dim_head=shape["d_head"],
        num_memory_tokens=given["of_peer"]["vectors"],
        seq_len=shape["segment"],
        abs_pos_emb=False,
        rotary_pos_emb=True,
        use_xl_memories=False,
        use_flash_attn=True,
        num_residual_streams=1,
    )
    segments = _segments(given)
    memories: list[Tensor] = []

    def losses() -> Losses:
        total = torch.zeros(())
        memories.clear()
        for part, wanted in segments:
            logits, *memories[:], _ = model(part, *memories)
            total = total + _nats(logits, wanted)
        yield total / given["window"]

    return _training(given, model, losses, lambda: memories), _of_peer(given, model)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of logits [1, N, V] and targets [1, N]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _sizes(given: dict[str, Any]) -> dict[str, int]:
    """Sizes under the names that all peers for memories give them."""
    shape = given["shape"]
    return {
        "num_tokens": given["vocab_size"],
        "dim": shape["d_model"],
        "depth": shape["n_layers"],
        "heads": shape["n_heads"],
    }


def _of_peer(given: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    return {"parameters": _parameters(model), "version": version(given["who"])}


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

    def losses() -> Losses:
        yield model(input_ids=tokens, labels=tokens).loss

    found = {"parameters": _parameters(model), "version": version("transformers")}
    return _training(given, model, losses), found


if __name__ == "__main__":
    main()
