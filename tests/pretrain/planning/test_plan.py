"""The plan: the shipped recipes in figures, what will not fit, and what is asked for."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.dataset.settings import SettingsError
from pretrain.cli.main import main
from pretrain.config import root as configuration
from pretrain.config.root import Config
from pretrain.model import flops
from pretrain.planning import plan as planning
from pretrain.planning.plan import GPUS, Cluster, Plan, cluster, lines, make, summary, warnings
from pretrain.planning.simulate import Activations, Simulation, activations

ROOT = Path(__file__).parents[3]
RECIPES = sorted(
    path
    for path in (ROOT / "configs").glob("*.yaml")
    if "pretrain plan" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module", autouse=True)
def activations_are_found_once() -> Iterator[None]:
    """Once for all that they depend on: they take most of a plan's time."""
    found: dict[str, Activations] = {}

    def once(config: Config, vocab_size: int, lanes: int) -> Activations:
        train = config.train.precision, config.train.activation_checkpointing
        same = repr((config.model, train, config.part, config.parallel, vocab_size, lanes))
        if same not in found:
            found[same] = activations(config, vocab_size, lanes)
        return found[same]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "activations", once)
        yield


def header(path: Path) -> str:
    """The comment on top of a recipe, as one line."""
    text = path.read_text(encoding="utf-8")
    comments = re.match(r"(#.*\n)+", text)
    assert comments is not None
    return " ".join(comments[0].replace("#", " ").split())


@functools.cache
def planned(path: Path, *more: str) -> Plan:
    """The plan that the header's own command makes."""
    found = re.search(r"pretrain plan (configs/\S+) --nodes (\d+) --gpu (\w+) --vocab-size (\d+)",
                      header(path))  # fmt: skip
    assert found is not None, path
    assert ROOT / found[1] == path
    config = configuration.load(path, more)
    return make(config, int(found[4]), cluster(found[3], int(found[2]), 8, 0.4), False)


def small(*words: str) -> Config:
    return configuration.load(
        None,
        ["run.directory=x", "data.train=y", "train.precision=bf16", "train.micro_batch=1",
         "model.segment=64", "train.window_segments=4", *words],
    )  # fmt: skip


def asked(**changes: Any) -> Cluster:
    return replace(Cluster(GPUS["h100"], 1, 8, 0.4), **changes)


def test_there_are_six_recipes_for_gpus() -> None:
    assert [path.stem for path in RECIPES] == [
        *("1b", "8b", "booksum_8b", "booksum_8b_tune", "paper_pg19", "passkey_1b")
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_header_says_what_the_plan_says(path: Path) -> None:
    plan = planned(path)
    assert summary(plan) in header(path)
    assert f"{plan.parameters:,} parameters" in header(path)
    assert "computed, not measured" in header(path)
    assert warnings(plan) == []
    segments = {"passkey_1b": 2, "booksum_8b": 4}.get(path.stem, 16)
    assert plan.tokens == plan.config.data.lanes * segments * 2048


def test_the_recipes_have_the_published_numbers_of_weights() -> None:
    # Llama's own counts (Hugging Face, meta-llama), and a gate a head and layer.
    assert planned(ROOT / "configs/1b.yaml").parameters == 1_235_814_400 + 16 * 32
    assert planned(ROOT / "configs/8b.yaml").parameters == 8_030_261_248 + 32 * 32


def test_the_buffer_that_gathered_weights_arrive_in_is_counted_beside_them() -> None:
    # All but norms and gates, in bf16; 50 million weights ahead, and a matrix that fills them up.
    large = 1_235_814_400 - 33 * 2048
    gathered = planned(ROOT / "configs/1b.yaml").memory.gathered
    assert gathered == 2 * (large + 50_000_000 + 2048 * 8192)


def test_the_papers_model_has_the_papers_memory() -> None:
    model = planned(ROOT / "configs/paper_pg19.yaml").config.model
    # Table 2: 1.6M numbers, d_k (d_v + 1) H l.
    numbers = model.d_head * (model.d_head + 1) * model.n_kv_heads * model.n_layers
    assert numbers == 1_585_152
    shape = (model.n_layers, model.n_heads, model.d_head, model.d_model, model.d_ff)
    assert shape == (12, 8, 128, 1024, 4096)


def test_memory_is_reported_by_what_it_grows_with() -> None:
    config = small("data.lanes=64")
    one, many = (make(config, 3000, asked(nodes=nodes), False).memory for nodes in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert one.held[part] == pytest.approx(8 * many.held[part], rel=0.001)
    assert one.activations == many.activations  # a micro-batch is a micro-batch
    assert one.states == 8 * many.states
    # Before and after the step, 8 lanes, 4 layers, 4 heads: M and z in float32.
    assert one.states == 2 * 8 * 4 * 4 * (64 * 64 + 64) * 4
    assert make(small("model.memory.kind=none"), 3000, asked(), False).memory.states == 0


def test_time_is_flops_over_the_assumed_peak_and_days_are_steps_of_it() -> None:
    plan = make(small("data.lanes=16", "train.steps=86400"), 3000, asked(), False)
    tokens = 2 * 256
    useful = flops.training_flops_per_token(plan.config.model, 3000, 256) * tokens
    assert plan.useful_flops == pytest.approx(useful)
    assert plan.compute_seconds == pytest.approx(plan.computed_flops / (989e12 * 0.4))
    assert plan.micro_batches == 2
    slow = replace(plan, computed_flops=989e12 * 0.4 * 10, sent=450e9 * 0.7)
    assert "10.0 to 11.0 s/step, 370 to 410 tokens/s, 10.0 to 11.0 days for 86,400" in summary(slow)


def test_a_preface_is_one_more_forward_and_memory_of_its_own() -> None:
    words = ("data.lanes=16", "parallel.sequence=2")
    without, beside = (
        make(small(*words, *more), 3000, asked(), False) for more in ((), ("data.preface=d",))
    )
    shape, window = without.config.model, without.config.window
    head = 2 * 256 * 3000 * window  # a preface has no logits
    forward = (sum(flops.forward_flops(shape, 3000, window).values()) - head) * 4 / 2
    assert beside.useful_flops - without.useful_flops == pytest.approx(forward)
    assert beside.computed_flops - without.computed_flops == pytest.approx(forward)
    assert beside.memory.states == 2 * without.memory.states
    # One gather of the weights and one of the states, beside forward and backward.
    assert beside.passed == pytest.approx(without.passed * 3 / 2, rel=1e-3)
    large = 2 * (3000 * 256 + 4 * 3 * 256 * 688)
    sent = beside.sent - beside.passed - (without.sent - without.passed)
    assert sent == pytest.approx(beside.micro_batches * large * 7 / 8, rel=0.01)
    assert "of each; as many tokens of prefaces, forward alone" in "\n".join(lines(beside))


def test_a_recurrence_says_how_often_it_gathers_the_weights() -> None:
    words = ("data.lanes=16", "model.memory.kind=rmt", "model.memory.rmt.vectors=5")
    room, scarce = (
        make(small(*words, *more), 3000, asked(), False)
        for more in ((), ("zero.live_parameters=1",))
    )
    assert (room.gathers, scarce.gathers) == (1, 4)
    text = "a window is 4 forwards of all blocks in order; a pass gathers each block's weights"
    assert f"{text} once" in "\n".join(lines(room))
    assert f"{text} up to 4 times" in "\n".join(lines(scarce))
    blocks = 2 * 4 * 3 * 256 * 688  # bytes of those weights that do not stay gathered
    once = make(small("data.lanes=16", "model.memory.kind=none", "zero.live_parameters=1"),
                3000, asked(), False)  # fmt: skip
    more = scarce.sent - once.sent
    assert more == pytest.approx(scarce.micro_batches * 2 * 3 * blocks * 7 / 8, rel=0.001)
    assert once.gathers == 1 and "forwards of all blocks" not in "\n".join(lines(once))
    # 2 lanes, 5 vectors, before and after the step, in bf16, and a flag.
    assert room.memory.states == 2 * 2 * (5 * 256 * 2 + 1)


def test_the_tokens_of_each_data_set_are_counted_over_the_phases_of_a_mix() -> None:
    schedule = "data.mix=[{data: y/a, weights: [[0, 1], [40, 0]]}, {data: y/b, weight: 3}]"
    words = ("data.train=''", "data.lanes=8", "train.steps=160", "optim.warmup_steps=1")
    shown = lines(make(small(*words, schedule), 3000, asked(), False))
    # A quarter of 40 of 160 steps of 8 windows of 256 tokens.
    assert "tokens of 160 steps in 2 phases: a 6.2% (20,000), b 93.8% (310,000)" in shown
    constant = "data.mix=[{data: y/a}, {data: y/b, weight: 3}]"
    shown = lines(make(small(*words, constant), 3000, asked(), False))
    assert "tokens of 160 steps: a 25.0% (82,000), b 75.0% (250,000)" in shown


def test_a_run_of_less_than_a_tenth_of_a_day_is_given_in_minutes() -> None:
    plan = make(small("data.lanes=16", "train.steps=400"), 3000, asked(), False)
    short = replace(plan, computed_flops=989e12 * 0.4 * 5, sent=450e9 * 0.7)
    assert "33 to 40 minutes for 400 steps" in summary(short)


def test_between_nodes_the_slower_of_link_and_network_counts() -> None:
    assert asked(nodes=1).bandwidth == 450e9
    assert asked(nodes=2).bandwidth == 400e9
    assert asked(nodes=2, gpu=GPUS["b200"]).bandwidth == 400e9


def test_sending_is_per_micro_batch_and_gathers_twice_where_weights_cannot_stay() -> None:
    path = ROOT / "configs/8b.yaml"
    plan = planned(path)
    assert plan.sent == pytest.approx(3 * plan.parameters * 2 * 127 / 128, rel=0.001)
    twice = planned(path, "data.lanes=256")
    assert twice.sent == pytest.approx(2 * plan.sent, rel=0.001)
    fits = make(small(), 3000, asked(), False)  # all of it may stay
    large = 2 * (3000 * 256 + 4 * 3 * 256 * 688)
    assert fits.sent == pytest.approx((large + 2 * 2 * fits.parameters - large) * 7 / 8, rel=0.01)


def test_what_a_simulated_rank_sends_is_counted_for_each_micro_batch_or_once() -> None:
    plan = make(small("data.lanes=24"), 3000, asked(), False)
    simulated = replace(plan, simulation=Simulation({}, 0, 300e6, 50e6))
    assert simulated.micro_batches == 3
    assert simulated.send_seconds == pytest.approx((3 * 300e6 + 50e6) / (450e9 * 0.7))


def test_ranks_that_share_longer_windows_need_as_much_and_pass_as_much() -> None:
    words = ("data.lanes=8", "model.segment=1024")
    one, four, more = (
        make(small(*words, f"parallel.sequence={sequence}", f"train.window_segments={segments}"),
             3000, asked(), False)
        for sequence, segments in ((1, 4), (4, 16), (4, 64))
    )  # fmt: skip
    # A part of four segments, as the whole window was, and the states of all parts beside it.
    assert four.memory.activations.peak == pytest.approx(one.memory.activations.peak, rel=0.05)
    assert (four.micro_batches, more.micro_batches) == (4, 4)
    assert four.memory.states == 4 * one.memory.states
    # To 3 others: 4 lanes, 4 layers, 4 heads, z and then A and B, there and back; and the flags.
    assert four.passed == more.passed == 3 * 4 * (2 * 4 * 4 * 64 * (2 * 64 + 1) * 4 + 1)
    assert more.useful_flops == pytest.approx(4 * four.useful_flops, rel=1e-6)
    told = "\n".join(lines(four))
    assert "a rank takes 4 x 1 of them, 4,096 tokens of each" in told
    assert "12.09 MiB between the 4 ranks that share a window, whatever its length" in told
    assert "share a window" not in "\n".join(lines(one))
    # The small weights are gathered once a step, the others in each of its four micro-batches.
    assert 3 * one.sent < four.sent - four.passed < 4 * one.sent


def test_what_does_not_fit_is_said_with_what_to_do() -> None:
    plan = planned(ROOT / "configs/1b.yaml")

    def said(*words: str, **more: int) -> str:
        """The only warning where a GPU also needs `more` bytes, under other settings."""
        config = configuration.load(ROOT / "configs/1b.yaml", words)
        needs = plan.memory
        if "held" in more:
            needs = replace(needs, held={"optimizer": more["held"]})
        if "block" in more:
            needs = replace(needs, activations=replace(needs.activations, block=more["block"]))
        (warning,) = warnings(replace(plan, config=config, memory=needs))
        return warning

    assert said(held=60 * 2**30).startswith("will hardly fit: 68.")
    assert said(held=70 * 2**30).startswith("does not fit: 78.")
    assert said(held=90 * 2**30).endswith("ask for more nodes")
    full, block = "train.activation_checkpointing=full", 80 * 2**30
    assert said("train.activation_checkpointing=none", block=block).endswith(full)
    assert said("train.micro_batch=8", block=block).endswith("train.micro_batch=1")
    assert said(block=block).endswith("lower train.window_segments")


def test_what_cannot_be_timed_or_counted_is_said() -> None:
    plan = make(small("train.precision=float32", "model.local_attention=sdpa"), 99, asked(), False)
    assert [warning.split(":")[0] for warning in warnings(plan)] == [
        "train.precision", "model.local_attention"
    ]  # fmt: skip
    assert plan.compute_seconds is None
    assert summary(plan).endswith("GiB per GPU")
    assert "TFLOP/s" not in "\n".join(lines(plan))


def test_a_run_that_sends_longer_than_it_computes_is_said() -> None:
    plan = make(small("train.window_segments=1", "data.lanes=8"), 200_000, asked(), False)
    assert any(warning.startswith("sending takes longer") for warning in warnings(plan))


def test_ranks_and_stages_that_cannot_work_are_refused_together() -> None:
    with pytest.raises(SettingsError) as caught:
        make(small("zero.stage=2"), 3000, asked(nodes=3), False)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "data.lanes", "zero.stage"
    ]  # fmt: skip


def command(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *shlex.split(words)])
    told = capsys.readouterr()
    return int(str(ended.value.code)), told.out, told.err


def test_the_vocabulary_is_the_data_sets_or_must_be_given(
    tmp_path: Path, write_data_set: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_data_set(tmp_path / "data", [np.arange(3, 10)] * 8, 8, 345)
    path = ROOT / "configs/demo.yaml"
    words = f"{path} launch.ranks=0 data.lanes=8 train.precision=bf16"
    code, told, _ = command(f"{words} data.train={tmp_path / 'data'}", capsys)
    assert code == 0 and "with a vocabulary of 345" in told
    code, told, _ = command(f"{words} data.train={tmp_path} --vocab-size 700", capsys)
    assert code == 0 and "with a vocabulary of 700" in told
    code, told, error = command(f"{words} data.train={tmp_path}", capsys)
    assert (code, told) == (2, "")
    assert "data.train:" in error and "or give --vocab-size" in error


def test_the_exit_code_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs/demo.yaml"
    words = f"{path} launch.ranks=0 data.lanes=8 train.precision=bf16 --vocab-size 300"
    code, told, error = command(f"{words} --gpu a100", capsys)
    assert (code, error) == (0, "") and "312 TFLOP/s" in told and "warnings" not in told
    code, told, _ = command(words.replace(" ", " model.d_ff=50000000 ", 1), capsys)
    assert code == 1 and "  - does not fit: " in told


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("1b", 8), ("8b", 128), ("paper_pg19", 64)])
def test_a_recipe_is_partitioned_and_stepped_as_one_rank_of_all(name: str, ranks: int) -> None:
    vocabulary = 32000 if name == "paper_pg19" else 128256
    command = [sys.executable, "-m", "pretrain.cli", "plan", f"configs/{name}.yaml", "--nodes",
               str(ranks // 8), "--vocab-size", str(vocabulary), "--simulate-ranks"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"rank 0 of {ranks} under real ZeRO-3" in done.stdout
    assert "; as planned" in done.stdout
    planned = re.search(r"in all +([\d.]+) GiB", done.stdout)
    simulated = re.search(r"at most ([\d.]+) GiB at a time", done.stdout)
    assert planned is not None and simulated is not None
    assert float(simulated[1]) <= float(planned[1]) <= 1.15 * float(simulated[1])
