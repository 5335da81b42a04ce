"""The parallel window against a plain loop over its segments, under ZeRO-3 on two ranks.

    python tools/bench/zero_gathers.py --json out.json

Both train the same model on the same window of 16 segments with gradients through all of them; the
loop calls the model segment by segment with the memory carried, so that ZeRO-3 gathers every layer
for each. Weights are released after use, as for a model that does not fit. The two take turns;
seconds are rank 0's, bytes are those that one rank sends, counted in the collectives.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.config import root as configuration
from pretrain.config.root import Config
from pretrain.jobs.launch import leave, place_in, start_ranks
from pretrain.model import flops
from pretrain.model.transformer import Transformer
from pretrain.planning.simulate import ByteCounter
from pretrain.training.engine import Engine

SETTINGS = (
    *("data.lanes=2", "data.train=none", "run.directory=none", "launch.device=cpu"),
    *("model.d_model=512", "model.n_layers=8", "model.n_heads=8", "model.n_kv_heads=8"),
    *("model.d_head=64", "model.d_ff=1365", "model.segment=64", "train.window_segments=16"),
    "zero.live_parameters=1",
)
_VOCABULARY = 8192
_RANKS = 2

Way = Callable[[Engine, Config, Tensor], Tensor]


def main() -> None:
    """Measure, print a table, write the JSON."""
    parsed = _parser().parse_args()
    place = place_in(os.environ)
    if place is not None:
        _rank(parsed, place.rank, place.init_method)
    with tempfile.TemporaryDirectory() as scratch:
        told_file = Path(scratch) / "told.json"
        if start_ranks([sys.executable, *sys.argv, "--found", str(told_file)], _RANKS):
            sys.exit("the ranks failed")
        found = json.loads(told_file.read_text())
    machine.report(found, _table(found), parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    return parser


def window(engine: Engine, config: Config, tokens: Tensor) -> Tensor:
    """The summed loss of the window, computed in parallel."""
    return _losses(engine, tokens, engine.module.initial_state(1, "cpu"))[0]


def loop(engine: Engine, config: Config, tokens: Tensor) -> Tensor:
    """The summed loss of the window, segment by segment."""
    state, total = engine.module.initial_state(1, "cpu"), torch.zeros(())
    for first in range(0, config.window, config.model.segment):
        segment = tokens[:, first : first + config.model.segment + 1]
        loss, state = _losses(engine, segment, state)
        total = total + loss
    return total


def _losses(engine: Engine, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    starts = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)
    output = engine.forward(tokens[:, :-1], starts, state, tokens[:, 1:])
    assert output.loss is not None
    return output.loss, output.state


WAYS: dict[str, Way] = {"parallel window": window, "loop over segments": loop}


def _rank(parsed: argparse.Namespace, rank: int, method: str) -> None:
    """Measure as one of the ranks; never returns."""
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=_RANKS)
    config = configuration.load(None, [*SETTINGS, *parsed.settings])
    parameters = flops.parameters(config.model, _VOCABULARY)

    def build() -> Transformer:
        return Transformer(config.model, _VOCABULARY, config.train.activation_checkpointing)

    # One engine each, from the same weights: ZeRO-3 records the order of modules for prefetching.
    engines = {name: Engine(build, parameters, config, torch.device("cpu")) for name in WAYS}
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for number in range(3 + parsed.rounds):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, _VOCABULARY, (1, config.window + 1), generator=generator)
        for name, way in WAYS.items():
            done = _step(engines[name], config, tokens, way)
            if number >= 3:
                steps[name].append(done)
    if rank == 0:
        found = {
            "machine": machine.described(),
            "parameters": parameters,
            "segments": config.train.window_segments,
            "tokens": config.window,
            "steps": steps,
        }
        parsed.found.write_text(json.dumps(found))
    dist.barrier()
    leave(0)


def _step(engine: Engine, config: Config, tokens: Tensor, way: Way) -> dict[str, Any]:
    dist.barrier()
    began = time.perf_counter()
    with ByteCounter(fake=False) as counter:
        loss = way(engine, config, tokens)
        engine.backward(loss / config.window)
        engine.step(1e-3)
        sent = counter.sent()
        gathered = counter.moved["allgather_base", _RANKS] * (_RANKS - 1) / _RANKS
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "sent": sent, "gathered": gathered, "loss": float(loss.detach())}


def _table(found: dict[str, Any]) -> list[str]:
    steps = found["steps"]
    parallel, looped = (steps[name] for name in WAYS)
    lines = [
        f"{found['parameters']:,} parameters, {_RANKS} ranks, a window of {found['tokens']:,} "
        f"tokens in {found['segments']} segments",
        "| step | s, median (least to most) | sent by a rank, MB | of which gathers, MB |",
        "|---|---|---|---|",
    ]
    for name in WAYS:
        taken = [step["seconds"] for step in steps[name]]
        last = steps[name][-1]
        lines.append(
            f"| {name} | {statistics.median(taken):.2f} ({min(taken):.2f} to {max(taken):.2f}) | "
            f"{last['sent'] / 1e6:.1f} | {last['gathered'] / 1e6:.1f} |"
        )
    pairs = list(zip(parallel, looped, strict=True))
    faster = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
    fewer = looped[-1]["sent"] / parallel[-1]["sent"]
    apart = max(abs(b["loss"] / a["loss"] - 1) for a, b in pairs)
    lines.append(
        f"the window is {faster:.2f} times faster and sends {fewer:.1f} times less; the losses "
        f"differ by at most {apart:.0e}, relatively"
    )
    return lines


if __name__ == "__main__":
    main()
