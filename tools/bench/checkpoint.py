"""How long a checkpoint stalls training, saved in the background or in the foreground.

    python tools/bench/checkpoint.py data/stdlib --json out.json

Two ranks under ZeRO-3 train a model of some 60 million parameters. Each round
measures steps with no save in flight; a save in the background and the steps until it is
committed; and a save that is waited for, like the last one of a run. The times are rank 0's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
import torch.distributed as dist

from pretrain.checkpoint.attempts import Attempt
from pretrain.checkpoint.ranks import GroupRanks
from pretrain.config import root as configuration
from pretrain.jobs.launch import StopFlag, leave, place_in, start_ranks
from pretrain.training.run import Run
from pretrain.training.saver import Saver, reserved

MODEL = (
    *("model.d_model=768", "model.n_layers=8", "model.n_heads=12", "model.n_kv_heads=12"),
    *("model.d_head=64", "model.d_ff=2048", "model.segment=64", "train.window_segments=2"),
    *("data.lanes=2", "train.steps=100000", "optim.warmup_steps=1000", "launch.device=cpu"),
    "wandb.mode=disabled",
)
_RANKS = 2


def main() -> None:
    """Measure, print a table, write the JSON."""
    parsed = _parser().parse_args()
    place = place_in(os.environ)
    if place is not None:
        _rank(parsed, place.rank, place.init_method)
    scratch = Path(tempfile.mkdtemp(dir=parsed.scratch))
    try:
        words = [sys.executable, *sys.argv, "--scratch", str(scratch)]
        if start_ranks(words, _RANKS):
            sys.exit("the ranks failed")
        found = json.loads((scratch / "told.json").read_text())
    finally:
        shutil.rmtree(scratch)
    machine.report(found, _table(found), parsed.json)


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser(__doc__)
    parser.add_argument("data", type=Path, help="a data set of data-prep with 2 or more shards")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps without a save (default 4)")
    parser.add_argument("--scratch", type=Path, help="where checkpoints are written and removed")
    return parser


def _rank(parsed: argparse.Namespace, rank: int, method: str) -> None:
    """Measure as one of the ranks; never returns."""
    StopFlag()  # the launcher blocked the signals
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=_RANKS)
    directory = parsed.scratch / "run"
    directory.mkdir(exist_ok=True)
    words = [*MODEL, f"data.train={parsed.data}", f"run.directory={directory}"]
    config = configuration.load(None, words)
    run = Run(config, Attempt(directory, 1), torch.device("cpu"))
    copy = reserved(run.engine, run.share.owned, run.state)
    saver = Saver(
        run.engine, run.share.owned, copy, run.attempt, config.checkpoint, run.described,
        GroupRanks(dist.new_group(backend="gloo")), lambda step: None, lambda step: None, None,
    )  # fmt: skip
    with run.data.loader(run.share.lanes, run.state) as loader:

        def step() -> float:
            batch = next(loader)
            dist.barrier()
            began = time.perf_counter()
            (weight,) = run.ranks.sum([run.stepper.own_weight(batch)])
            run.state, _ = run.stepper.step(run.state, batch, weight)
            return time.perf_counter() - began

        for _ in range(3):
            step()
        rounds = [_round(run, saver, step, parsed.steps) for _ in range(parsed.rounds)]
    if rank == 0:
        parameters = run.engine.module.parameters()
        found = {
            "machine": machine.described(),
            "parameters": sum(p.ds_numel for p in parameters),  # type: ignore[attr-defined]
            "copied_bytes_a_rank": copy.bytes,
            "rounds": rounds,
        }
        (parsed.scratch / "told.json").write_text(json.dumps(found))
    dist.barrier()
    leave(0)


def _round(run: Run, saver: Saver, step: Any, steps: int) -> dict[str, Any]:
    """Seconds of steps without and during a save, and of each kind of save."""
    alone = [step() for _ in range(steps)]
    saver.save(run.state, finish=False)
    stall, beside, saved = saver.stall, [], saver.note()
    while not all(run.ranks.gather(saved is not None)):
        beside.append(step())
        saved = saved or saver.note()
    assert saved is not None
    step()  # so that the next save has a step of its own
    dist.barrier()
    saver.save(run.state, finish=True)
    return {
        "step_alone": alone,
        "step_beside_a_save": beside,
        "stall_in_the_background": stall,
        "save_in_the_background": saved.seconds,
        "stall_in_the_foreground": saver.stall,
    }


def _table(found: dict[str, Any]) -> list[str]:
    rounds = found["rounds"]
    rows = [
        ("training stalled by a save in the foreground", "stall_in_the_foreground"),
        ("training stalled by a save in the background", "stall_in_the_background"),
        ("from the copy to the commit, in the background", "save_in_the_background"),
        ("step without a save", "step_alone"),
        ("step during a save", "step_beside_a_save"),
    ]
    lines = [
        f"{found['parameters']:,} parameters, {_RANKS} ranks, "
        f"{found['copied_bytes_a_rank'] / 1e6:.0f} MB per rank",
        "| seconds | median | least to most |",
        "|---|---|---|",
    ]
    for name, key in rows:
        values = [one for r in rounds for one in (r[key] if isinstance(r[key], list) else [r[key]])]
        spread = f"{min(values):.3f} to {max(values):.3f}" if values else "none"
        median = f"{statistics.median(values):.3f}" if values else "none"
        lines.append(f"| {name} | {median} | {spread} |")
    ratios = [r["stall_in_the_foreground"] / r["stall_in_the_background"] for r in rounds]
    lines.append(f"the stall is {statistics.median(ratios):.1f} times shorter in the background")
    return lines


if __name__ == "__main__":
    main()
