"""How fast the loader feeds a rank, compared with a model's step.

    python tools/bench/loader.py data/stdlib --json out.json

Each round measures, for one rank with `data.workers` threads: the loader while it fetches each
shard from a web server on this machine; the loader while it verifies each shard at first use; the
loader once all shards are verified; the ledger's hash of the same windows;
and a training step of a small model on them. The rate is also compared with the tokens/s of a GPU
that trains the 1B recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import torch

from pretrain.config import root as configuration
from pretrain.config.data import CacheConfig
from pretrain.config.root import Config
from pretrain.data.lanes import Dataset, Mix
from pretrain.data.loader import Batch, Loader
from pretrain.model import flops
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer
from pretrain.planning.plan import GPUS
from pretrain.training.ledger import extended

# The 1B recipe's window and lanes per rank, with a model small enough for a CPU.
SETTINGS = (
    *("data.lanes=8", "model.segment=2048", "train.window_segments=4", "run.directory=none"),
    *("model.d_model=256", "model.n_layers=4", "model.n_heads=4", "model.n_kv_heads=4"),
    "model.d_ff=688",
)
# MFU of the 1B recipe that is assumed, of an H100's dense bf16 peak.
_SHARE = 0.5
_VOCABULARY = 128_256
# A process of its own: its work is not the loader's. Its port is what it prints.
_SERVER = """
import asyncio, sys
from aiohttp import web
async def serve():
    app = web.Application()
    app.router.add_static("/", sys.argv[1])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(serve())
"""


def main() -> None:
    """Measure, print a table, write the JSON."""
    parsed = _parser().parse_args()
    words = [*SETTINGS, f"data.train={parsed.data}", *parsed.settings]
    config = configuration.load(None, words)
    dataset = Dataset(parsed.data)
    if len(dataset.manifest.shards) < config.data.lanes:
        sys.exit(f"{parsed.data} has {len(dataset.manifest.shards)} shards; lower data.lanes")
    model = Transformer(config.model, dataset.manifest.tokenizer.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rates: dict[str, list[float]] = {}
    for _ in range(parsed.rounds):
        for name, rate in _round(config, parsed, model, optimizer).items():
            rates.setdefault(name, []).append(rate)
    found = {
        "machine": machine.described(),
        "documents": dataset.manifest.documents,
        "tokens": dataset.manifest.tokens,
        "tokens_a_batch": config.data.lanes * config.window,
        "workers": config.data.workers,
        "tokens_per_second": rates,
        "gpu_1b": _rate_of_a_gpu(),
    }
    machine.report(found, _table(found), parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("data", type=Path, help="a data set of data-prep with 8 or more shards")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=100, help="batches to load (default 100)")
    return parser


def _round(
    config: Config, parsed: argparse.Namespace, model: Transformer, optimizer: torch.optim.AdamW
) -> dict[str, float]:
    """Tokens/s of each part."""
    mix = Mix([Dataset(parsed.data)])
    size = config.data.lanes * config.window
    epoch = max(1, mix.datasets[0].manifest.tokens // size)
    with _served(parsed.data) as url, tempfile.TemporaryDirectory() as cache:
        fetched, _ = _read(Mix([Dataset(url, CacheConfig(cache))]), config, epoch)
    first, _ = _read(mix, config, epoch)
    for shard in range(len(mix.datasets[0].manifest.shards)):
        mix.datasets[0].check(shard)
    seconds, batch = _read(mix, config, parsed.batches)
    began = time.perf_counter()
    for tokens, starts in zip(batch.tokens, batch.starts, strict=True):
        extended("", tokens.numpy(), starts.numpy())
    hashed = time.perf_counter() - began
    return {
        "loader, shards fetched on the way": epoch * size / fetched,
        "loader, shards checked on the way": epoch * size / first,
        "loader": parsed.batches * size / seconds,
        "ledger's hash": size / hashed,
        "training step": _step_rate(batch, model, optimizer),
    }


@contextlib.contextmanager
def _served(directory: Path) -> Iterator[str]:
    """A URL of the data set."""
    command = [sys.executable, "-c", _SERVER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:  # or the end of Popen would wait for it
            server.kill()


def _read(mix: Mix, config: Config, batches: int) -> tuple[float, Batch]:
    """Seconds for the first `batches` batches of a new loader, and the last batch."""
    lanes, data = range(config.data.lanes), config.data
    began = time.perf_counter()
    with Loader(
        mix, lanes, data.lanes, config.window, config.run.seed, None, data.prefetch, data.workers
    ) as loader:
        for _ in range(batches):
            batch = next(loader)
    return time.perf_counter() - began, batch


def _step_rate(batch: Batch, model: Transformer, optimizer: torch.optim.AdamW) -> float:
    """Tokens/s of a step on one lane of the batch."""
    state: ModelState = model.initial_state(1, "cpu")
    began = time.perf_counter()
    output = model(batch.tokens[:1], batch.starts[:1], state, batch.targets[:1])
    (output.loss / batch.tokens.shape[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return batch.tokens.shape[1] / (time.perf_counter() - began)


def _rate_of_a_gpu() -> float:
    """Tokens/s of an H100 that trains the 1B recipe at the assumed MFU."""
    recipe = configuration.load(machine.ROOT / "configs/1b.yaml")
    peak = flops.peak_flops(GPUS["h100"].name, torch.bfloat16)
    assert peak is not None
    return _SHARE * peak / flops.training_flops_per_token(recipe.model, _VOCABULARY, recipe.window)


def _table(found: dict[str, Any]) -> list[str]:
    rates = found["tokens_per_second"]
    lines = [
        f"{found['documents']:,} documents of {found['tokens'] / found['documents']:,.0f} tokens, "
        f"batches of {found['tokens_a_batch']:,} tokens, {found['workers']} reading threads",
        "| one rank | tokens/s, median (least to most) |",
        "|---|---|",
    ]
    for name, values in rates.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        lines.append(f"| {name} | {statistics.median(values):,.0f} ({spread}) |")
    ratio = statistics.median(
        a / b for a, b in zip(rates["loader"], rates["training step"], strict=True)
    )
    loader = statistics.median(rates["loader"])
    lines.append(
        f"the loader is {ratio:,.0f} times as fast as the step here, ten times as fast as a GPU "
        f"that trains at {loader / 10:,.0f} tokens/s; the 1B recipe at {_SHARE:.0%} of an "
        f"H100's bf16 peak trains at {found['gpu_1b']:,.0f} (computed)"
    )
    return lines


if __name__ == "__main__":
    main()
