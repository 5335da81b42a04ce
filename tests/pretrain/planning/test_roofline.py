"""The roofline of a step: its operations against torch's counter, its bytes against hand counts."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.cli.main import main
from pretrain.config import root as configuration
from pretrain.config.root import Config
from pretrain.model.transformer import Transformer
from pretrain.planning import plan as planning
from pretrain.planning import roofline
from pretrain.planning.plan import GPUS, Cluster
from pretrain.planning.roofline import MEASURED, Ceilings, Part, Roofline
from pretrain.planning.simulate import Activations

ROOT = Path(__file__).parents[3]
VOCABULARY = 304
ONE = Cluster(GPUS["h100"], 1, 1, 0.4)
CHECKPOINTING = ("none", "selective", "full")


@pytest.fixture(scope="module", autouse=True)
def activations_are_not_found() -> Iterator[None]:
    """They take most of a plan's time, and no part of the roofline depends on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "activations", lambda *_: Activations(1, 1, 1))
        yield


def small(*words: str) -> Config:
    return configuration.load(
        None,
        ["run.directory=x", "data.train=y", "train.precision=bf16", "train.micro_batch=1",
         "data.lanes=1", "model.d_model=48", "model.n_layers=3", "model.n_heads=4",
         "model.n_kv_heads=2", "model.d_head=16", "model.d_ff=80", "model.segment=32",
         "model.local_attention=sdpa", "train.window_segments=4", *words],
    )  # fmt: skip


def of(config: Config, cluster: Cluster = ONE) -> Roofline:
    plan = planning.make(config, VOCABULARY, cluster, False)
    return roofline.make(plan, MEASURED["h100"])


def parts(found: Roofline) -> dict[str, Part]:
    return {part.name: part for part in found.parts}


SETTINGS = {
    "linear": (), "delta": ("model.memory.kind=delta",), "none": ("model.memory.kind=none",),
    "transformer_xl": ("model.memory.kind=transformer_xl",), "rmt": ("model.memory.kind=rmt",),
    "memorizing": ("model.memory.kind=memorizing", "model.memory.memorizing.capacity=64"),
    "preface": ("data.preface=z",),
    "compressive": ("data.preface=z", "model.memory.kind=compressive"),
    "shared windows": ("data.lanes=2", "parallel.sequence=2"),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("words", SETTINGS.values(), ids=SETTINGS)
def test_the_parts_are_together_what_the_plan_says_is_computed(
    words: tuple[str, ...], checkpointing: str
) -> None:
    cluster = Cluster(GPUS["h100"], 1, 2, 0.4) if "data.lanes=2" in words else ONE
    found = of(small(*words, f"train.activation_checkpointing={checkpointing}"), cluster)
    together = sum(part.flops for part in found.parts)
    assert together == pytest.approx(found.plan.computed_flops, rel=1e-12)


def counted(config: Config, learning: bool) -> dict[str, int]:
    """Of one window, a step or a forward, by torch's counter, by module; "Global": all of it."""
    model = Transformer(config.model, VOCABULARY, config.train.activation_checkpointing)
    tokens = torch.randint(VOCABULARY, (1, config.window))
    starts = torch.zeros(1, config.window, dtype=torch.bool)
    state = model.initial_state(1, "cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, depth=None) as counter:
        if learning:
            loss = model(tokens, starts, state, tokens).loss
            assert loss is not None
            loss.backward()
        else:
            with torch.no_grad():
                model(tokens, starts, state)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["none", "linear", "delta"])
def test_operations_of_a_step_are_torch_s_to_one_percent(kind: str, checkpointing: str) -> None:
    words = f"model.memory.kind={kind}", f"train.activation_checkpointing={checkpointing}"
    config = small(*words)
    ours = sum(part.flops for part in of(config).parts)
    assert ours == pytest.approx(counted(config, learning=True)["Global"], rel=0.01)


def test_each_part_has_the_operations_of_its_modules() -> None:
    config = small("model.memory.kind=linear")
    found, expected = parts(of(config)), counted(config, learning=False)

    def of_modules(pattern: str) -> int:
        return sum(count for name, count in expected.items() if re.search(pattern, name))

    projections = of_modules(r"\.[qkvo]_proj$")
    assert found["projections"].flops == 3 * projections
    assert found["feed forward"].flops == 3 * of_modules(r"\.feed_forward$")
    assert found["output head"].flops == 3 * of_modules(r"\.lm_head$")
    inside = of_modules(r"\.attention$") - projections
    # Of the memory also what the backward computes again: the read.
    read = 3 * 128 * 2 * 4 * 16 * 17
    ours = found["local attention"].flops + found["memory"].flops - read
    assert ours == pytest.approx(3 * inside, rel=0.03)


def test_flash_attention_skips_what_causality_hides_and_computes_scores_once_more() -> None:
    squares = {"none": 3, "full": 4}  # a forward, again, and a backward that counts as two
    for checkpointing, count in squares.items():
        found = of(small(f"train.activation_checkpointing={checkpointing}"))
        local = parts(found)["local attention"]
        # Per head and layer: 4 segments of 32 tokens, two products of 16 numbers.
        assert local.flops == 3 * 4 * 4 * 2 * 2 * 32 * 32 * 16 * count
        visible = sum(1 for i, j in itertools.product(range(32), range(32)) if j <= i)
        products = 2 * (count - 2) + 5
        assert local.executed == pytest.approx(3 * 4 * 4 * products * 2 * visible * 16)


def test_bytes_are_those_counted_by_hand() -> None:
    found = parts(of(small("model.memory.kind=linear")))
    tokens, states = 128, 4 * 4 * 2 * 16 * 17  # 4 segments, 2 heads, M and z in float32
    x, q, k, hidden, logits = (2 * tokens * width for width in (48, 64, 32, 80, VOCABULARY))
    weights = {"qkv": 2 * 48 * 128, "o": 2 * 64 * 48, "up": 2 * 48 * 160, "down": 2 * 80 * 48}
    forward = x + q + 2 * k + weights["qkv"] + q + x + weights["o"]
    assert found["projections"].moved == 3 * 3 * forward
    rotary, sums = 2 * (q + k), 4 * tokens * 4
    flash = (2 * q + 2 * k + sums) + (4 * q + 4 * k + 2 * sums)
    assert found["local attention"].moved == 3 * (flash + 2 * rotary)
    read, write = (3 + 5) * q, (2 + 4) * k
    assert found["memory"].moved == 3 * (read + write + 10 * states)
    once = x + 2 * hidden + weights["up"] + hidden + x + weights["down"]
    assert found["feed forward"].moved == 3 * (3 * once + (3 + 5) * hidden)
    head = 2 * 48 * VOCABULARY
    assert found["output head"].moved == 3 * (x + head + logits) + 2 * logits
    assert found["norms, residuals, embedding"].moved == (2 * 3 * 2 * 4 + 4) * x
    delta = parts(of(small("model.memory.kind=delta")))["memory"].moved
    assert delta - found["memory"].moved == 3 * (3 * k + 6 * states)


def test_the_optimizer_moves_thirty_bytes_a_weight_and_zero_a_gather_twice() -> None:
    found = of(small("data.lanes=2"), Cluster(GPUS["h100"], 1, 2, 0.4))
    weights = found.plan.parameters
    # AdamW: master and two moments read and written, the gradient read, bf16 written.
    assert parts(found)["optimizer"].moved == pytest.approx(30 * weights / 2, rel=0.001)
    zero = parts(found)["ZeRO's weights and gradients"].moved
    assert zero == pytest.approx((3 * 2 + 8 / 2) * weights, rel=0.001)


def test_what_is_computed_again_is_read_and_written_again() -> None:
    plain, part, full = (
        parts(of(small(f"train.activation_checkpointing={name}"))) for name in CHECKPOINTING
    )
    tokens = 128
    hidden, x = 2 * tokens * 80, 2 * tokens * 48
    opened = x + 2 * hidden + 2 * 48 * 160 + 3 * hidden
    for again in (part, full):
        assert again["feed forward"].moved - plain["feed forward"].moved == 3 * opened
    forward = x + 2 * tokens * (64 + 2 * 32) + 2 * 48 * 128 + 2 * tokens * 64 + x + 2 * 64 * 48
    assert full["projections"].moved - plain["projections"].moved == 3 * forward
    assert full["output head"] == plain["output head"]


def test_the_larger_of_products_and_bytes_binds_a_part() -> None:
    ceilings = Ceilings(products=10.0, copies=5.0)
    assert Part("a", 99.0, 40.0, 10.0).seconds(ceilings) == (4.0, 2.0)
    found = of(small())
    slow = Roofline(found.plan, ceilings, [Part("a", 99, 40, 10), Part("b", 0, 0, 15)])
    assert slow.computing == 4.0 + 3.0
    assert slow.floor == 7.0  # what one rank sends is nothing
    used = slow.utilisation(7.0)
    assert used == pytest.approx(found.plan.useful_flops / 7 / 989e12)


def told(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *shlex.split(words)])
    shown = capsys.readouterr()
    return int(str(ended.value.code)), shown.out, shown.err


DEMO = (
    f"{ROOT / 'configs/demo.yaml'} launch.ranks=0 data.lanes=8 train.precision=bf16 "
    "--vocab-size 300"
)


def test_the_command_prints_the_roofline_behind_the_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, shown, _ = told(f"{DEMO} --gpu h200 --roofline --products 500", capsys)
    assert code == 0
    plan, _, roof = shown.partition("roofline of a step")
    assert "tokens/s" in plan and "nothing was measured" in roof
    assert "500 TFLOP/s of bf16 products, 4.3 TB/s of its memory" in roof
    for name in ("local attention", "memory", "feed forward", "output head", "optimizer"):
        assert re.search(rf"^  {name} .*(products|memory)$", roof, re.MULTILINE), name
    assert "overlap must hide" in roof and roof.count("(MFU)") == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gpu b200 --roofline", ["--products: no rate is known of --gpu b200", "--copies: no"]),
        ("--copies 2", ["--copies: only --roofline uses it"]),
        (
            "--roofline train.precision=float32",
            ["train.precision: --roofline has ceilings for bf16"],
        ),
    ],
)
def test_what_the_roofline_lacks_is_said(
    words: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, error = told(f"{DEMO} {words}", capsys)
    assert (code, shown) == (2, "")
    assert all(text in error for text in expected)


def test_the_papers_window_leaves_room_for_half_of_the_peak_on_an_h100() -> None:
    config = configuration.load(ROOT / "configs/1b.yaml", [])
    plan = planning.make(config, 128_256, Cluster(GPUS["h100"], 1, 8, 0.4), False)
    for name in ("h100", "h200"):
        found = roofline.make(plan, MEASURED[name])
        used = found.utilisation(found.computing + found.sending)
        assert used is not None and 0.5 < used < 790 / 989
