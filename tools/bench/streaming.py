"""Speed and memory of evaluating a stream of a million tokens, and of decoding after it.

    python tools/bench/streaming.py --json out.json

Whole segments go through the model in chunks, with their losses; one row per tenth of the stream.
Then it decodes token by token, at position 4 Ki and at the end of the stream, in turn. The model is
small and its weights are random; neither affects how the cost depends on position.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.decoding import Decoder
from pretrain.model.stream import StreamState
from pretrain.model.transformer import Transformer
from pretrain.training.heap import keep_freed_memory

_VOCABULARY = 8192
_CHUNK = 4096
_EARLY = 4096
_DECODED = 64
_WARM_UP = 8  # chunks, until the heap has its pages


def main() -> None:
    """Measure, print a table, write the JSON."""
    parsed = _parser().parse_args()
    torch.set_num_threads(parsed.threads)
    keep_freed_memory()
    torch.manual_seed(1)
    config = ModelConfig(
        d_model=256, n_layers=6, n_heads=4, n_kv_heads=4, d_head=64, d_ff=682, segment=64,
        memory=MemoryConfig(kind=parsed.memory),
    )  # fmt: skip
    model = Transformer(config, _VOCABULARY).eval()
    tenths, early, late = _streamed(model, parsed.tokens)
    found = {
        "machine": machine.described(),
        "memory": parsed.memory,
        "tokens": parsed.tokens,
        "tenths": tenths,
        "decoding": _decoded(model, early, late, parsed.rounds),
    }
    machine.report(found, _table(found), parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--memory", choices=("linear", "delta"), default="delta")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def _streamed(
    model: Transformer, tokens: int
) -> tuple[list[dict[str, Any]], StreamState, StreamState]:
    """Figures for each tenth, and the stream states after 4 Ki tokens and after all tokens."""
    stream, early = model.open_stream(1, "cpu"), model.open_stream(1, "cpu")
    _, early = model.extend(torch.randint(_VOCABULARY, (1, _EARLY)), early)
    for _ in range(_WARM_UP):
        chunk = torch.randint(_VOCABULARY, (1, _CHUNK))
        _scored(model, chunk, model.open_stream(1, "cpu"))
    tenths: list[dict[str, Any]] = []
    chunks = tokens // _CHUNK
    begun, done = time.perf_counter(), 0
    for number in range(1, chunks + 1):
        chunk = torch.randint(_VOCABULARY, (1, _CHUNK))
        stream = _scored(model, chunk, stream)
        if number * 10 // chunks > len(tenths):
            now = time.perf_counter()
            speed = (number - done) * _CHUNK / (now - begun)
            tenths.append({"tokens_per_second": speed, "resident_bytes": _resident()})
            begun, done = now, number
    return tenths, early, stream


def _scored(model: Transformer, chunk: Tensor, stream: StreamState) -> StreamState:
    """Compute the losses of a chunk [1, n]; returns the stream after it."""
    logits, stream = model.extend(chunk, stream)
    F.cross_entropy(logits[0, :-1], chunk[0, 1:]).item()
    return stream


def _resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _decoded(
    model: Transformer, early: StreamState, late: StreamState, rounds: int
) -> dict[str, list[float]]:
    """Tokens per second from each position, decoding one segment per turn."""
    speeds: dict[str, list[float]] = {"early": [], "late": []}
    decoders = {"early": Decoder(model, early), "late": Decoder(model, late)}
    for _ in range(rounds + 1):
        for name, decoder in decoders.items():
            token = torch.zeros(1, dtype=torch.int64)
            begun = time.perf_counter()
            for _ in range(_DECODED):
                token = decoder.step(token).argmax(dim=-1)
            speeds[name].append(_DECODED / (time.perf_counter() - begun))
    return {name: taken[1:] for name, taken in speeds.items()}


def _table(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['tokens']:,} tokens, memory {found['memory']}",
        "| tenth | tokens/s | resident, MiB |",
        "|---|---|---|",
    ]
    for number, row in enumerate(found["tenths"], 1):
        resident = row["resident_bytes"] / 2**20
        lines.append(f"| {number} | {row['tokens_per_second']:,.0f} | {resident:,.0f} |")
    early, late = (statistics.median(found["decoding"][name]) for name in ("early", "late"))
    ratios = [b / a for a, b in zip(*found["decoding"].values(), strict=True)]
    lines.append(
        f"decoding: {early:.1f} tokens/s after 4 Ki tokens, {late:.1f} after all "
        f"({statistics.median(ratios):.2f} times)"
    )
    return lines


if __name__ == "__main__":
    main()
