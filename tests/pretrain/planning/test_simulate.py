"""What is found without memory, GPU and other ranks, against runs that have them.

Activations against the CPU allocator's own records; a rank's part, peak and traffic against two
real ranks of this file (`_rank`), where the same counter counts ordinary tensors and real
collectives.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from pretrain.config.memory import MEMORY_KINDS
from pretrain.config.root import Config, load
from pretrain.jobs.launch import leave, place_in
from pretrain.model import flops, loss
from pretrain.model.memories import nearest
from pretrain.model.transformer import Transformer
from pretrain.planning.plan import memory, passed_bytes, sent_bytes
from pretrain.planning.simulate import ByteCounter, activations, in_use, simulate
from pretrain.training.engine import PERSISTENT_ELEMENTS, Engine, build_ops
from pretrain.training.parallel import SequenceGroup
from tests.pretrain import kinds
from tests.ranks import work

VOCABULARY = 2000
LANES = 2  # of a micro-batch
STORE = "model.memory.memorizing"
RANKS = 2


def config(*words: str) -> Config:
    """A model of whose parameters some stay gathered and some do not."""
    return load(
        None,
        [
            "run.directory=x", "data.train=y", f"data.lanes={RANKS * LANES}",
            "model.d_model=128", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2",
            "model.d_head=32", "model.d_ff=300", "model.segment=64", "launch.device=cpu", *words,
        ],
    )  # fmt: skip


def test_a_counter_counts_what_lives_and_the_most_that_lived_at_a_time() -> None:
    with ByteCounter(fake=False) as counter:
        one = torch.zeros(100)
        two = one + 1
        assert (counter.live, counter.peak) == (800, 800)
        two = two.view(10, 10)  # no memory of its own
        assert counter.live == 800
        del two
        assert (counter.live, counter.peak) == (400, 800)
        counter.restart()
        assert counter.peak == 400
        one.add_(1)
        assert (counter.live, counter.peak) == (400, 400)


def test_a_ring_sends_all_but_a_ranks_share_and_twice_that_to_sum() -> None:
    counter = ByteCounter(fake=False)
    counter.moved = {
        ("allgather_base", 4): 800,
        ("allgather_base", 2): 60,
        ("reduce_scatter_base", 4): 400,
        ("allreduce", 4): 80,
        ("allreduce", 1): 7,
        ("broadcast", 4): 9,
    }
    assert counter.sent() == 0.75 * (800 + 400 + 2 * 80) + 0.5 * 60


def allocated(settings: Config) -> int:
    """The peak of a real forward and backward, by what the CPU allocator tells the profiler.

    But for the memory after the window, which is held as in a step.
    """
    shape, checkpointing = settings.model, settings.train.activation_checkpointing
    model = Transformer(shape, VOCABULARY, checkpointing)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_without_gradient)
    batch = torch.zeros(LANES, settings.window, dtype=torch.int64)
    starts = torch.zeros(LANES, settings.window, dtype=torch.bool)
    state = in_use(model.initial_state(LANES, "cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(batch, starts, state, batch)
        output.loss.backward()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - sum(t.nbytes for layer in output.state for t in layer if t.dtype != torch.bool)


def _without_gradient(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@kinds.of_every_kind
def test_activations_are_those_that_the_allocator_recorded(kind: str, checkpointing: str) -> None:
    own = f"train.activation_checkpointing={checkpointing}"
    words = [*kinds.words(kind), own, "model.n_layers=2"]
    if MEMORY_KINDS[kind].recurrent:
        words.append("train.window_segments=4")  # each is a forward and backward of the stack
    settings = config(*words)
    # Which slots hold something is real in the simulation, like documents, and is not counted.
    tolerance = 0.002 if kind in ("none", "full", "linear", "delta") else 0.01
    assert activations(settings, VOCABULARY, LANES).peak == pytest.approx(
        allocated(settings), rel=tolerance
    )


def test_a_block_computed_again_keeps_its_input_alone() -> None:
    small = activations(config("train.activation_checkpointing=full"), VOCABULARY, LANES)
    large = activations(
        config("train.activation_checkpointing=full", "model.n_layers=11"), VOCABULARY, LANES
    )
    a_layer = (large.kept - small.kept) / 8
    # float32 inputs alone: the memories before and after are counted by themselves.
    assert a_layer == pytest.approx(LANES * 1024 * 128 * 4, rel=0.001)
    assert small.block == pytest.approx(large.block, rel=0.001)


@pytest.mark.parametrize("kind", ["transformer_xl", "linear"])
def test_one_block_needs_as_much_however_many_there_are(kind: str) -> None:
    small, large = (
        activations(config(*kinds.words(kind), f"model.n_layers={count}"), VOCABULARY, LANES)
        for count in (3, 60)
    )
    assert large.block == small.block > LANES * 1024 * 300 * 4


def test_a_store_is_counted_in_whatever_layer_it_is() -> None:
    words = [*kinds.words("memorizing"), "model.n_layers=6"]
    by_layer = [
        activations(config(*words, f"{STORE}.layer={layer}"), VOCABULARY, LANES)
        for layer in (0, 1, 5, 6)
    ]
    assert by_layer == by_layer[:1] * 4
    cached = activations(
        config("model.memory.kind=transformer_xl", "model.n_layers=6"), VOCABULARY, LANES
    )
    # Of every query and head k scores, shares and rows of neighbours at the least.
    assert by_layer[0].kept - cached.kept > LANES * 1024 * 4 * 4 * (4 + 4 + 8)


def test_logits_and_scores_are_held_in_the_chunks_of_a_gpu() -> None:
    tokens, vocabulary = LANES * 1024, 2**15
    found = activations(config(), vocabulary, LANES)
    # One chunk of float32 logits, and the gradients of the head and of its input.
    assert tokens * vocabulary == 2**26
    assert found.loss == pytest.approx(4 * (2**26 + 128 * vocabulary + tokens * 128), rel=0.02)
    words = ["model.segment=256", "train.window_segments=2", f"{STORE}.capacity={2**17}"]
    searched = activations(config(*kinds.words("memorizing"), *words), VOCABULARY, LANES)
    assert searched.peak > 4 * 256 * 4 * 2**17  # scores of a segment's tokens and heads
    assert (loss.CHUNK_LOGITS["cpu"], nearest.SCORES["cpu"]) == (2**24, 2**21)


def test_a_kernel_that_only_a_gpu_has_is_counted_too() -> None:
    words = ("train.precision=bf16", "launch.device=auto")
    by_kernel = [
        activations(config(*words, f"model.local_attention={kernel}"), VOCABULARY, LANES)
        for kernel in ("flash", "varlen", "auto")
    ]
    assert by_kernel[0] == by_kernel[1] == by_kernel[2]


# Two real ranks.


def _rank(path: Path) -> None:
    """Count three steps of the engine on ordinary tensors."""
    place = place_in(os.environ)
    assert place is not None
    dist.init_process_group(
        "gloo", init_method=place.init_method, rank=place.rank, world_size=place.size
    )
    told = []
    for words in WORDS:
        settings = config(*words)
        with ByteCounter(fake=False) as counter:
            engine = Engine(
                lambda settings=settings: Transformer(
                    settings.model, VOCABULARY, settings.train.activation_checkpointing
                ),
                flops.parameters(settings.model, VOCABULARY),
                settings,
                torch.device("cpu"),
            )
            shared = settings.parallel.sequence > 1
            parts = SequenceGroup(settings.parallel.sequence) if shared else None
            for _ in range(3):
                state = in_use(engine.module.initial_state(LANES, "cpu"))
                batch = torch.zeros(LANES, settings.part, dtype=torch.int64)
                starts = torch.zeros(LANES, settings.part, dtype=torch.bool)
                counter.restart()
                preface = bool(settings.data.preface)
                initial = state if preface else None
                given = {"parts": parts, "initial": initial}
                engine.backward(engine.forward(batch, starts, state, batch, **given).loss)
                before = counter.sent()
                engine.step(1.0)
                once = counter.sent() - before
                if preface:
                    with engine.evaluating():
                        none = torch.zeros(0, dtype=torch.int64)
                        engine.forward(batch, starts, state, parts=parts, places=(none, none))
            sent = {"sent": counter.sent() - once, "once": once}
            told.append({"held": engine.held(), "peak": counter.peak, **sent})
        del engine
    if place.rank == 0:
        path.write_text(json.dumps(told))
    dist.destroy_process_group()
    leave(0)


def _alone(directory: Path) -> None:
    """The same by simulation: for each case a process of its own, as a command is.

    They are forked from one that has imported all; it has no threads, which would be lost.
    """
    build_ops(lambda text: None)
    for case, words in enumerate(WORDS):
        child = os.fork()
        if child == 0:
            found = simulate(config(*words), VOCABULARY, RANKS, LANES)
            (directory / f"alone.{case}").write_text(json.dumps(asdict(found)))
            leave(0)
        assert os.waitpid(child, 0)[1] == 0
    leave(0)


WORDS = [
    ("train.precision=bf16", "train.activation_checkpointing=full"),
    # Matrices of a block that are gathered several at a time, too.
    ("train.precision=float32", "model.tied_embeddings=false", "model.d_ff=1000"),
    ("parallel.sequence=2", f"data.lanes={LANES}", "train.activation_checkpointing=full"),
    ("data.preface=z", "parallel.sequence=2", f"data.lanes={LANES}"),
    # States with flags, and a loop over the stack; activations of every kind are compared above.
    tuple(kinds.words("compressive")),
    (
        "model.memory.kind=rmt",
        "train.window_segments=4",
        "zero.live_parameters=1",
        "model.d_ff=1000",
    ),
    ("optim.name=adafactor", "train.activation_checkpointing=full"),
    ("optim.name=muon", "train.precision=bf16"),
]
CASES = pytest.mark.parametrize("case", range(len(WORDS)), ids=[" ".join(w) for w in WORDS])


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """For each case what two real ranks and a simulated one told."""
    directory = tmp_path_factory.mktemp("counted")
    work(__file__, RANKS, "rank", directory / "real")
    real = json.loads((directory / "real").read_text())
    work(__file__, 1, "alone", directory)
    alone = [json.loads((directory / f"alone.{case}").read_text()) for case in range(len(WORDS))]
    return list(zip(real, alone, strict=True))


@CASES
def test_a_simulated_rank_holds_what_a_real_one_holds(counted: list[Any], case: int) -> None:
    real, alone = counted[case]
    assert alone["held"] == real["held"]
    assert real["held"]["persistent"] > 0


@CASES
def test_a_simulated_rank_sends_what_a_real_one_sends(counted: list[Any], case: int) -> None:
    real, alone = counted[case]
    assert alone["sent"] == real["sent"] > 0
    assert alone["once"] == real["once"] > 0


@CASES
def test_a_simulated_rank_needs_at_most_what_a_real_one_needs(
    counted: list[Any], case: int
) -> None:
    real, alone = counted[case]
    assert alone["peak"] == pytest.approx(real["peak"], rel=0.01)


@CASES
def test_the_formulas_give_what_a_real_rank_holds_and_sends(counted: list[Any], case: int) -> None:
    real, _ = counted[case]
    settings = config(*WORDS[case])
    planned = memory(settings, VOCABULARY, RANKS)
    # A forward alone leaves the head's weight gathered for the next one; `gathered` counts it.
    kept = VOCABULARY * settings.model.d_model * 4 if settings.data.preface else 0
    held = {**planned.held, "persistent": planned.held["persistent"] + kept}
    assert held == real["held"]
    # Norms of gradients and the like are agreed on in a few bytes.
    sent = sent_bytes(settings, VOCABULARY, RANKS) + passed_bytes(settings, RANKS)
    sent -= kept * (RANKS - 1) / RANKS
    really = real["sent"] + real["once"]
    if settings.model.memory.traits.recurrent:
        # The plan says "at most": a backward finds most blocks gathered by that of a later segment.
        assert 0.5 * sent < really <= sent
    else:
        assert sent == pytest.approx(really, abs=100)
        # Of several micro-batches, each sends its own, and the step what is sent once.
        more = replace(settings, data=replace(settings.data, lanes=3 * settings.data.lanes))
        more = replace(more, train=replace(more.train, micro_batch=LANES))
        sent = sent_bytes(more, VOCABULARY, RANKS) + passed_bytes(more, RANKS)
        sent -= 3 * kept * (RANKS - 1) / RANKS
        assert sent == pytest.approx(3 * real["sent"] + real["once"], abs=300)
    # How documents lie takes a few thousandths more, which only the real ranks count.
    assert 0.998 * real["peak"] <= planned.total <= 1.1 * real["peak"]


def test_some_parameters_stay_gathered_and_some_do_not() -> None:
    sizes = [p.numel() for p in Transformer(config().model, VOCABULARY).parameters()]
    assert min(sizes) <= PERSISTENT_ELEMENTS < max(sizes)


WORK: dict[str, Callable[[Path], None]] = {"rank": _rank, "alone": _alone}

if __name__ == "__main__":
    WORK[sys.argv[1]](Path(sys.argv[2]))
