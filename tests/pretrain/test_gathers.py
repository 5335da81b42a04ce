"""How often ZeRO-3 gathers weights, counted in the collectives of two real ranks.

The third step is counted: in the first two DeepSpeed learns the order in which weights are needed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.config.root import load
from pretrain.jobs.launch import leave, place_in
from pretrain.model import flops
from pretrain.model.memories.kinds import is_of_memory
from pretrain.model.transformer import Transformer
from pretrain.planning.plan import block_gathers
from pretrain.planning.simulate import ByteCounter
from pretrain.training.engine import PERSISTENT_ELEMENTS, Engine
from tests.pretrain import kinds
from tests.ranks import work

WIDTH = 320  # squared it is just above what stays gathered
VOCABULARY = WIDTH
LAYERS = 4
SETTINGS = (
    *("data.lanes=2", "data.train=none", "run.directory=none", "launch.device=cpu"),
    *(f"model.d_model={WIDTH}", f"model.n_layers={LAYERS}", "model.n_heads=5"),
    *("model.n_kv_heads=5", f"model.d_ff={WIDTH}", "model.segment=8", "train.window_segments=4"),
    "model.tied_embeddings=false",
)
BLOCK = (4 + 3) * WIDTH**2  # weights, but for those that stay gathered
OUTSIDE = VOCABULARY * WIDTH  # the embedding's, and as many of the output projection
SCARCE, ROOM = "zero.live_parameters=1", f"zero.live_parameters={5 * BLOCK // 2}"
FULL = "train.activation_checkpointing=full"
RMT, SUMMARIES = "model.memory.kind=rmt", "model.memory.kind=autocompressor"
# So many that they do not stay gathered.
MANY = "model.memory.autocompressor={vectors: 320, capacity: 1}"
ONCE = f"zero.live_parameters={LAYERS * BLOCK + 2 * OUTSIDE}"
SEGMENTS = 3  # of a recurrence's window, whose layers run once for each
LOOPED = f"train.window_segments={SEGMENTS}"
CASES = {
    **{"scarce, full": [SCARCE, FULL], "room, full": [ROOM, FULL], "all": []},
    **{kind: [SCARCE, *kinds.words(kind)] for kind in kinds.LAYER_LOCAL},
    **{"rmt, scarce": [RMT, SCARCE, LOOPED], "rmt, once": [RMT, ONCE, LOOPED]},
    "summaries, scarce": [SUMMARIES, MANY, SCARCE, LOOPED],
}


def _rank(told: Path) -> None:
    place = place_in(os.environ)
    assert place is not None
    dist.init_process_group(
        "gloo", init_method=place.init_method, rank=place.rank, world_size=place.size
    )
    counts = {name: _third_step([*SETTINGS, *settings]) for name, settings in CASES.items()}
    if place.rank == 0:
        told.write_text(json.dumps(counts))
    dist.barrier()
    leave(0)


def _third_step(words: list[str]) -> dict[str, Any]:
    """Elements of the weights that its passes gathered, of one micro-batch of one window."""
    config = load(None, words)
    engine = Engine(
        lambda: Transformer(config.model, VOCABULARY, config.train.activation_checkpointing),
        flops.parameters(config.model, VOCABULARY),
        config,
        torch.device("cpu"),
    )
    assert isinstance(engine.module, Transformer)
    sizes = {name: int(p.ds_numel) for name, p in engine.module.named_parameters()}
    large = {name: n for name, n in sizes.items() if n > PERSISTENT_ELEMENTS}
    own = sum(n for name, n in large.items() if is_of_memory(name))
    assert sum(large.values()) - own == LAYERS * BLOCK + 2 * OUTSIDE
    tokens = torch.arange(config.window)[None] % VOCABULARY
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    counted: dict[str, Any] = {"own": own, "planned": block_gathers(config, VOCABULARY)}
    for _ in range(3):
        state = engine.module.initial_state(1, "cpu")
        with ByteCounter(fake=False) as counter:
            loss = engine.forward(tokens, starts, state, tokens).loss
            counted["forward"] = counter.moved.get(("allgather_base", 2), 0) // 4
            counter.restart()
            engine.backward(loss / config.window)
            counted["backward"] = counter.moved.get(("allgather_base", 2), 0) // 4
            counted["reduced"] = counter.moved["reduce_scatter_base", 2] // 4
        assert engine.step(1.0).applied
    return counted


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    told = tmp_path_factory.mktemp("gathers") / "told.json"
    work(__file__, 2, told)
    counts: dict[str, dict[str, int]] = json.loads(told.read_text())
    return counts


@pytest.mark.parametrize("kind", kinds.LAYER_LOCAL)
def test_each_layers_weights_are_gathered_once_a_window_and_pass(
    gathered: dict[str, dict[str, int]], kind: str
) -> None:
    # 4 segments, of which a loop over the model would gather each.
    own = gathered[kind]["own"]
    assert gathered[kind]["forward"] == LAYERS * BLOCK + 2 * OUTSIDE + own
    # The output projection is still there when the backward begins.
    assert gathered[kind]["backward"] == LAYERS * BLOCK + OUTSIDE + own


def test_a_block_that_is_computed_again_is_gathered_no_more_often_if_it_may_stay_for_its_backward(
    gathered: dict[str, dict[str, int]],
) -> None:
    both = gathered["room, full"]["forward"] + gathered["room, full"]["backward"]
    assert both <= 2 * (LAYERS * BLOCK + 2 * OUTSIDE)
    # Where it may not, it is gathered to be computed again, and for its backward.
    assert gathered["scarce, full"]["backward"] > 1.5 * LAYERS * BLOCK


def test_a_model_that_may_stay_gathered_whole_is_gathered_once_a_window(
    gathered: dict[str, dict[str, int]],
) -> None:
    assert gathered["all"]["forward"] == LAYERS * BLOCK + 2 * OUTSIDE
    assert gathered["all"]["backward"] == 0


def test_every_gradient_is_reduced_once_a_window(gathered: dict[str, dict[str, int]]) -> None:
    for counts in gathered.values():
        large = LAYERS * BLOCK + 2 * OUTSIDE + counts["own"]
        assert 0 <= counts["reduced"] - large < LAYERS * 2000


def test_a_recurrence_gathers_each_block_once_a_segment_or_once_if_all_weights_may_stay(
    gathered: dict[str, dict[str, int]],
) -> None:
    for name in ("rmt, scarce", "summaries, scarce"):
        counts = gathered[name]
        more = counts["own"]
        assert counts["planned"] == SEGMENTS
        assert counts["forward"] == SEGMENTS * LAYERS * BLOCK + 2 * OUTSIDE + more
        assert counts["backward"] <= SEGMENTS * LAYERS * BLOCK + OUTSIDE + more
    once = gathered["rmt, once"]
    assert once["planned"] == 1
    # Where there is just room, DeepSpeed gathers one or another weight once more.
    assert once["forward"] < 1.1 * (LAYERS * BLOCK + 2 * OUTSIDE)
    assert once["backward"] < 1.1 * (LAYERS * BLOCK + 2 * OUTSIDE)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
