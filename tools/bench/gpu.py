"""Speed of the recipes' training steps on a GPU, and of the kernels compared with each other.

    python tools/bench/gpu.py --json out.json

Steps: forward, backward and AdamW of `configs/1b.yaml` whole and of `configs/8b.yaml` with two
layers, by the trainer's own engine on one GPU, one lane, for each window and choice of kernels in
turn: tokens/s, the useful FLOPs as shares of the rate that plain bf16 matrix products reach in the
same run and of the data sheet's peak, and the peak memory allocated. Kernels: each kernel of the
local attention and of the memory at the recipes' shapes, in turn, forward and backward. Those that
cannot run here are listed with the reason. `--only` chooses among products, copies, attention,
memory and steps; figures are written after each row, and `--seconds` bounds the whole.
`--tiny --device cpu` runs the same code on small shapes, with Triton's interpreter if
TRITON_INTERPRET=1 is set: it only tests the code, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import machine
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import root as configuration
from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.model import compiling, flops, local_attention
from pretrain.model.local_attention import KernelError
from pretrain.model.memories import infini, infini_backend
from pretrain.model.memories.infini import InfiniAttention, MemoryState
from pretrain.model.memories.infini_grad import Products
from pretrain.model.memories.kinds import attention_of
from pretrain.model.transformer import Transformer
from pretrain.model.window import Window
from pretrain.training.engine import Engine

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_VOCABULARY = 128_256
_RECIPES = {"1b": (), "8b": ("model.n_layers=2",)}
_TINY = (
    *("model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1"),
    *("model.d_head=16", "model.d_ff=64", "model.segment=32"),
)

_MEMORY = ("torch", "mixed", "triton", "torch, compiled", "mixed, compiled")
_STEPS: tuple[
    tuple[Literal["flash", "varlen", "sdpa"], Literal["torch", "mixed", "triton"]], ...
] = (
    *(("varlen", "torch"), ("varlen", "mixed"), ("varlen", "triton")),
    *(("flash", "mixed"), ("sdpa", "torch")),
)
_PARTS = ("products", "copies", "attention", "memory", "steps")

Row = dict[str, Any]


def main() -> None:
    """Measure, print the tables, write the JSON; exit code 2 without a GPU."""
    parsed = _parser().parse_args()
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False, so nothing is measured", file=sys.stderr)
        sys.exit(2)
    device = torch.device(parsed.device, 0) if parsed.device == "cuda" else torch.device("cpu")
    parsed.until = time.monotonic() + parsed.seconds
    results: Row = {"command": " ".join(sys.argv), "machine": machine.described() | _device(device)}
    results |= {"kernels": [], "steps": []}
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            init_method=f"file://{scratch}/store", rank=0, world_size=1,
        )  # fmt: skip
        for _ in _measured(results, device, parsed):
            if parsed.json:
                machine.write(results, parsed.json)
        dist.destroy_process_group()
    machine.report(results, _tables(results), parsed.json)


def _measured(results: Row, device: torch.device, parsed: argparse.Namespace) -> Iterator[None]:
    """Add the chosen measurements to `results`, one at a time."""
    results["product_rate"] = _product_rate(device, parsed)
    yield
    if "copies" in parsed.only:
        results["copy_rate"] = _copy_rate(device, parsed)
        yield
    for name in parsed.recipes:
        for row in _kernels(name, device, parsed):
            results["kernels"].append(row)
            yield
    for name in parsed.recipes if "steps" in parsed.only else ():
        for row in _steps(name, device, results["product_rate"], parsed):
            results["steps"].append(row)
            yield


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to test the code itself")
    parser.add_argument("--windows", type=int, nargs="+", metavar="TOKENS",
                        help="window lengths (default 8, 32 and 128 Ki)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=_PARTS,
                        help="what to measure (default all; products always)")  # fmt: skip
    parser.add_argument("--recipes", nargs="+", choices=list(_RECIPES), default=list(_RECIPES))
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="after which no further round begins")  # fmt: skip
    return parser


def _recipe(name: str, parsed: argparse.Namespace) -> Config:
    words = [
        *_RECIPES[name],
        *(_TINY if parsed.tiny else ()),
        *("data.lanes=1", "train.micro_batch=1", f"launch.device={parsed.device}"),
    ]
    return configuration.load(CONFIGS / f"{name}.yaml", words)


def _device(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": "cpu"}
    if device.type == "cuda":
        found = {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    for package in ("triton", "flash-attn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _product_rate(device: torch.device, parsed: argparse.Namespace) -> float:
    """FLOP/s of bf16 matrix products: the best of the shapes of the recipes' feed-forward."""
    best = 0.0
    for name in _RECIPES:
        shape = _recipe(name, parsed).model
        tokens = 64 if parsed.tiny else 16_384
        left, right = (
            torch.randn(size, device=device, dtype=torch.bfloat16)
            for size in ((tokens, shape.d_model), (shape.d_model, shape.d_ff))
        )
        product = {"product": partial(torch.matmul, left, right)}
        seconds = min(_seconds(product, 20, device, parsed.until)["product"])
        best = max(best, 2 * tokens * shape.d_model * shape.d_ff / seconds)
    return best


def _copy_rate(device: torch.device, parsed: argparse.Namespace) -> float:
    """Bytes/s of a copy of a large tensor, read and written both counted."""
    source = torch.zeros(2**20 if parsed.tiny else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    return 2 * source.nbytes / min(_seconds(copy, 20, device, parsed.until)["copy"])


def _seconds(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, until: float
) -> dict[str, list[float]]:
    """Seconds of each contestant, taking turns, after two warm-up rounds.

    No round begins after `until` but the first that is measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        if turn > 2 and time.monotonic() > until:
            break
        for name, act in contestants.items():
            _wait(device)
            begun = time.perf_counter()
            act()
            _wait(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kernels(name: str, device: torch.device, parsed: argparse.Namespace) -> Iterator[Row]:
    """A layer's local attention, memory write and memory read, with two kernels each."""
    shape = _recipe(name, parsed).model
    tokens = 4 * shape.segment
    for part, contestants in _parts(shape, tokens, device).items():
        if ("memory" if part.startswith("memory") else "attention") not in parsed.only:
            continue
        able = {kernel: act for kernel, act in contestants.items() if callable(act)}
        seconds = _seconds(able, parsed.rounds, device, parsed.until)
        for kernel, act in contestants.items():
            taken = {"milliseconds": [1e3 * s for s in seconds[kernel]]} if kernel in able else {}
            obstacle = {} if kernel in able else {"obstacle": act}
            yield {"recipe": name, "part": part, "kernel": kernel, "tokens": tokens,
                   **taken, **obstacle}  # fmt: skip


def _parts(
    shape: ModelConfig, tokens: int, device: torch.device
) -> dict[str, dict[str, Callable[[], object] | str]]:
    """The contestants by part: a forward and backward, or why the kernel cannot run."""
    dtype = torch.bfloat16
    layer = attention_of(shape.memory)(shape).to(device, dtype)
    assert isinstance(layer, InfiniAttention)
    starts = torch.zeros(1, tokens, dtype=torch.bool, device=device)
    window = Window.of(starts, shape, local_attention.sdpa, dtype)

    def drawn(heads: int) -> Tensor:
        size = (1, tokens // shape.segment, shape.segment, heads, shape.d_head)
        return torch.randn(size, device=device, dtype=dtype).requires_grad_()

    queries, keys, values = (
        drawn(heads) for heads in (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    )
    local = drawn(shape.n_heads)
    size, heads = shape.d_head, shape.n_kv_heads
    carried = MemoryState(
        torch.zeros(1, heads, size, size, device=device), torch.ones(1, heads, size, device=device)
    )
    before = MemoryState(*(
        part[:, None].expand(-1, queries.shape[1], *part.shape[1:]).clone().requires_grad_()
        for part in carried
    ))  # fmt: skip

    def attend(kernel: Literal["flash", "varlen", "sdpa"]) -> Callable[[], object]:
        run = local_attention.choose(kernel, device.type, dtype, size)(
            starts.view(-1, shape.segment)
        )
        inputs = [x.flatten(0, 1) for x in (queries, keys, values)]
        return lambda: _backward(run(*inputs))

    def memory(kernel: str) -> Products:
        name, _, compiled = kernel.partition(", ")
        if compiled and device.type != "cuda":
            raise KernelError("torch.compile is measured on a GPU alone")
        setting = cast(Literal["torch", "mixed", "triton"], name)
        return infini_backend.choose(setting, device.type, dtype, size)

    def write(kernel: str) -> Callable[[], object]:
        given = keys, values, carried, window.writable, window.reset, layer.divisor, memory(kernel)
        return _switched(kernel, lambda: _sum(infini.advance(*given)))

    def read(kernel: str) -> Callable[[], object]:
        products = memory(kernel)
        given = (local, queries, *before, window.readable, layer.gate)
        return _switched(kernel, lambda: _backward(products.gated_read(*given)))

    return {
        "local attention": {k: _able(attend, k) for k in ("sdpa", "varlen", "flash")},
        f"memory, {shape.memory.kind}: write": {k: _able(write, k) for k in _MEMORY},
        "memory: gated read": {k: _able(read, k) for k in _MEMORY},
    }


def _switched(kernel: str, act: Callable[[], object]) -> Callable[[], object]:
    """`act` with the pure functions compiled if the contestant's name says so."""

    def run() -> object:
        compiling.switch(kernel.endswith("compiled"))
        try:
            return act()
        finally:
            compiling.switch(False)

    return run


def _sum(states: tuple[MemoryState, MemoryState]) -> None:
    before, after = states
    _backward(before.matrix.sum() + before.normaliser.sum() + after.matrix.sum())


def _backward(output: Tensor) -> None:
    torch.autograd.backward(output.sum())


def _able(make: Callable[[Any], Callable[[], object]], kernel: str) -> Callable[[], object] | str:
    try:
        return make(kernel)
    except KernelError as error:
        return str(error)


def _steps(
    name: str, device: torch.device, rate: float, parsed: argparse.Namespace
) -> Iterator[Row]:
    """Training steps of a recipe; stops at the first window that does not fit into memory."""
    config = _recipe(name, parsed)
    vocabulary = 64 if parsed.tiny else _VOCABULARY
    engine = Engine(
        lambda: Transformer(config.model, vocabulary, config.train.activation_checkpointing),
        flops.parameters(config.model, vocabulary), config, device,
    )  # fmt: skip
    for window in parsed.windows or ([64] if parsed.tiny else [8192, 32_768, 131_072]):
        useful = flops.training_flops_per_token(config.model, vocabulary, window)
        for row in _window_steps(engine, config.model, vocabulary, window, device, parsed):
            if "seconds" in row:
                speed = window / statistics.median(row["seconds"])
                row |= {"tokens_per_second": speed, "of_products": speed * useful / rate}
                peak = flops.peak_flops(_device(device)["device"], torch.bfloat16)
                row["of_peak"] = None if peak is None else speed * useful / peak
            yield {"recipe": name, "layers": config.model.n_layers, "window": window, **row}
        if "obstacle" in row and "out of memory" in row["obstacle"]:
            break
    del engine
    gc.collect()


def _window_steps(
    engine: Engine, shape: ModelConfig, vocabulary: int, window: int, device: torch.device,
    parsed: argparse.Namespace,
) -> list[Row]:  # fmt: skip
    """A row per choice of kernels; the choices take turns."""
    model = engine.module
    assert isinstance(model, Transformer)
    tokens = torch.randint(vocabulary, (1, window), device=device)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    peaks: dict[str, int] = {}

    def step(choice: str, config: ModelConfig) -> None:
        model.config = model.layers.config = config
        for layer in model.layers.blocks():
            layer.attention.config = config
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        output = engine.forward(tokens, starts, model.initial_state(1, device), tokens)
        assert output.loss is not None
        engine.backward(output.loss / window)
        engine.step(0.0)
        if device.type == "cuda":
            peaks[choice] = torch.cuda.max_memory_allocated(device)

    rows: list[Row] = []
    able: dict[str, Callable[[], object]] = {}
    for choice, config in _choices(shape).items():
        try:
            size = shape.d_head
            local_attention.choose(config.local_attention, device.type, torch.bfloat16, size)
            kernel = config.memory.kernel
            infini_backend.choose(kernel, device.type, torch.bfloat16, size)
            able[choice] = partial(step, choice, config)
        except KernelError as error:
            rows.append({"kernels": choice, "obstacle": str(error)})
    try:
        seconds = _seconds(able, parsed.rounds, device, parsed.until)
    except torch.cuda.OutOfMemoryError:
        return [{"kernels": choice, "obstacle": "out of memory"} for choice in able]
    return rows + [
        {"kernels": choice, "seconds": taken, "peak_bytes": peaks.get(choice)}
        for choice, taken in seconds.items()
    ]


def _choices(shape: ModelConfig) -> dict[str, ModelConfig]:
    return {
        f"{attention}, {kernel}": replace(
            shape, local_attention=attention, memory=replace(shape.memory, kernel=kernel)
        )
        for attention, kernel in _STEPS
    }


def _tables(results: dict[str, Any]) -> list[str]:
    lines = [
        f"plain bf16 matrix products: {results['product_rate'] / 1e12:.4g} TFLOP/s",
        *([f"copies: {results['copy_rate'] / 1e12:.3g} TB/s"] if "copy_rate" in results else []),
        "",
        "| recipe | part | kernel | tokens | ms, median (least to most) |",
        "|---|---|---|---|---|",
    ]
    for row in results["kernels"]:
        taken = row.get("milliseconds")
        shown = row.get("obstacle") or _spread(taken, "{:.3g}")
        lines.append(
            f"| {row['recipe']} | {row['part']} | {row['kernel']} | {row['tokens']:,} | {shown} |"
        )
    lines += [
        "",
        "| recipe | layers | window | kernels | s/step | tokens/s | of products | peak | GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["steps"]:
        start = f"| {row['recipe']} | {row['layers']} | {row['window']:,} | {row['kernels']} "
        if "obstacle" in row:
            lines.append(f"{start}| {row['obstacle']} | | | | |")
            continue
        peak, memory = row["of_peak"], row["peak_bytes"]
        lines.append(
            f"{start}| {_spread(row['seconds'], '{:.3g}')} | {row['tokens_per_second']:,.0f} "
            f"| {row['of_products']:.1%} | {'n/a' if peak is None else f'{peak:.1%}'} "
            f"| {'n/a' if memory is None else f'{memory / 2**30:.1f}'} |"
        )
    return lines


def _spread(taken: list[float], form: str) -> str:
    shown = [form.format(x) for x in (statistics.median(taken), min(taken), max(taken))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


if __name__ == "__main__":
    main()
