"""The least time that a step can take on a GPU, by part: its operations and bytes, counted.

A part takes at least its matrix products over the rate of products, and at least its bytes over the
rate of copies; the larger binds it. Each operand is read and each result written once, as if all
that is elementwise were fused with what is before it: an implementation moves more. The parts run
one after another; what ranks send may run beside them. Nothing here was measured.

FLOPs are counted as torch's counter does, with what is computed again. The time of the local
attention is that of flash attention, which skips what causality hides and computes the scores once
more in the backward. The memory's products count at the rate of bf16; with float32 operands
(`memory.kernel=torch`) they are slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pretrain.model import flops
from pretrain.model.memories.infini import DeltaAttention, InfiniAttention
from pretrain.model.memories.kinds import attention_of
from pretrain.planning.plan import LINK_SHARE, Plan
from pretrain.trained import PRECISIONS

_PRECISE = 4
"""Bytes of a number of states, masters and gradients' sums."""


@dataclass(frozen=True)
class Ceilings:
    """Rates that a GPU reaches at most."""

    products: float
    """FLOP/s of large bf16 matrix products."""
    copies: float
    """Bytes/s of its memory, read and written both counted."""


# Of one card each: large bf16 products and copies of large tensors, by PyTorch.
MEASURED = {"h100": Ceilings(790e12, 3.0e12), "h200": Ceilings(790e12, 4.3e12)}


def ceilings(gpu: str, products: float | None, copies: float | None) -> Ceilings:
    """Those of a GPU by its name in `plan.GPUS`, in TFLOP/s and TB/s where they are given."""
    measured = MEASURED.get(gpu)
    return Ceilings(
        1e12 * products if products else _given(measured).products,
        1e12 * copies if copies else _given(measured).copies,
    )


def _given(measured: Ceilings | None) -> Ceilings:
    assert measured is not None, "checked with the command line"
    return measured


class _Bytes(NamedTuple):
    """That a part of all layers moves for a micro-batch."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Part:
    """A part of a GPU's step."""

    name: str
    flops: float
    """Of matrix products, as torch counts them."""
    executed: float
    """Of matrix products, as a kernel computes them."""
    moved: float
    """Bytes read from and written to the GPU's memory."""

    def seconds(self, ceilings: Ceilings) -> tuple[float, float]:
        """At least, for its products and for its bytes."""
        return self.executed / ceilings.products, self.moved / ceilings.copies


@dataclass(frozen=True)
class Roofline:
    """A step of a GPU at its ceilings."""

    plan: Plan
    ceilings: Ceilings
    parts: Sequence[Part]

    @property
    def computing(self) -> float:
        """Seconds of all parts, one after another."""
        return sum(max(part.seconds(self.ceilings)) for part in self.parts)

    @property
    def sending(self) -> float:
        """Seconds of what the rank sends, to be hidden behind computing."""
        return self.plan.send_seconds

    @property
    def floor(self) -> float:
        """Seconds of a step whose sending is hidden as far as it can be."""
        return max(self.computing, self.sending)

    def utilisation(self, seconds: float) -> float | None:
        """Useful FLOPs of a step of `seconds`, as a share of the dense peak (MFU)."""
        peak = self.plan.peak
        return None if peak is None else self.plan.useful_flops / seconds / peak


def make(plan: Plan, ceilings: Ceilings) -> Roofline:
    """The roofline of a plan's step."""
    counted, moved = _flops(plan), _moved(plan)
    parts = []
    for name, count in counted.items():
        executed = _flash(plan, count) if name == "local_attention" else count
        parts.append(Part(name.replace("_", " "), count, executed, moved.pop(name)))
    parts += [Part(name.replace("_", " "), 0.0, 0.0, size) for name, size in moved.items()]
    return Roofline(plan, ceilings, parts)


def _flops(plan: Plan) -> dict[str, float]:
    """FLOPs of a GPU's step by part: together the plan's `computed_flops`."""
    config = plan.config
    shape, full = config.model, config.train.activation_checkpointing == "full"
    kind = attention_of(shape.memory)
    forward = flops.forward_flops(shape, plan.vocab_size, config.window)
    of_memory = set(forward) - {"projections", "local_attention", "feed_forward", "output_head"}
    again = {name: float(full * count) for name, count in forward.items() if name != "output_head"}
    third = forward["feed_forward"] / 3  # the last product's result is not needed
    if full:
        again["feed_forward"] -= third
    if config.train.activation_checkpointing == "selective":
        again["feed_forward"] = 2 * third
    lanes = config.lanes_a_rank(plan.cluster.ranks)
    share = lanes * config.part / config.window
    found = dict.fromkeys((*(name for name in forward if name not in of_memory), "memory"), 0.0)
    for name, count in forward.items():
        part = "memory" if name in of_memory else name
        passes = 3 + (bool(config.data.preface) and name != "output_head")
        found[part] += share * (passes * count + again.get(name, 0.0))
    window = kind.recomputed_flops(shape, config.window) - kind.missing_flops(shape, config.window)
    if config.data.preface:
        window -= kind.auxiliary_flops(shape, config.window)
    found["memory"] += share * window
    if config.parallel.sequence > 1:
        segments = config.part // shape.segment
        shared = config.parallel.sequence, config.train.activation_checkpointing
        found["memory"] += lanes * flops.passing_flops(shape, segments, *shared)
    return found if found["memory"] else {k: v for k, v in found.items() if k != "memory"}


def _flash(plan: Plan, count: float) -> float:
    """FLOPs of the local attention's `count` that flash attention computes.

    Of each square of n tokens the n (n + 1) / 2 that causality shows, and in the backward five
    products of that size where four are counted.
    """
    config = plan.config
    tokens = min(config.part, config.model.span)
    forwards = 1 + bool(config.data.preface) + (config.train.activation_checkpointing == "full")
    return count * (tokens + 1) / (2 * tokens) * (forwards + 2.5) / (forwards + 2)


def _moved(plan: Plan) -> dict[str, float]:
    """Bytes of a GPU's step by part."""
    config = plan.config
    full = config.train.activation_checkpointing == "full"
    times = plan.micro_batches
    forwards = 1 + bool(config.data.preface) + full
    found: dict[str, float] = {}
    for name, one in (_of_attention(plan) | _of_the_rest(plan)).items():
        again = 1 if name == "output_head" else forwards
        found[name] = times * (again * one.forward + one.backward)
    if config.train.activation_checkpointing != "none":
        found["feed_forward"] += times * _less_or_more(plan, full)
    share = plan.memory.held["gradients"] / _PRECISE  # weights of a rank's part
    width = PRECISIONS[config.train.precision].itemsize
    # Masters and states read and written, gradients read, weights written.
    found["optimizer"] = 2 * plan.memory.held["optimizer"] + share * (_PRECISE + width)
    # Each gather is written and each gradient read whole; its sum is read and written.
    gathers = (2 + bool(config.data.preface)) * plan.gathers
    found["ZeRO's weights and gradients"] = times * (
        (gathers + 1) * plan.parameters * width + 2 * _PRECISE * share
    )
    return found


class _Sizes(NamedTuple):
    """Of a micro-batch on a GPU."""

    tokens: int
    segments: int
    width: int
    """Bytes of a number of the activations and weights."""

    def product(self, inputs: int, outputs: int) -> _Bytes:
        """A linear map of all tokens; the backward is two products of the same size."""
        once = self.width * (self.tokens * (inputs + outputs) + inputs * outputs)
        return _Bytes(once, 2 * once)

    def passes(self, numbers: int, forward: int, backward: int) -> _Bytes:
        """Reading or writing `numbers` of each token so many times."""
        once = self.width * self.tokens * numbers
        return _Bytes(forward * once, backward * once)


def _sizes(plan: Plan) -> _Sizes:
    config = plan.config
    lanes = config.lanes_a_rank(plan.cluster.ranks) // plan.micro_batches
    tokens = lanes * config.part
    width = PRECISIONS[config.train.precision].itemsize
    return _Sizes(tokens, -(-tokens // config.model.segment), width)


def _of_attention(plan: Plan) -> dict[str, _Bytes]:
    """A micro-batch's projections, local attention and memory."""
    config, size = plan.config.model, _sizes(plan)
    queries, keys = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    largest = _PRECISE * size.tokens * config.n_heads  # flash attention's log-sums
    local = _sum(
        size.passes(queries, 2, 4), size.passes(2 * keys, 1, 2), _Bytes(largest, 2 * largest),
        # Rotary embedding: both read and written.
        size.passes(queries + keys, 2, 2),
    )  # fmt: skip
    found = {
        "projections": _sum(
            size.product(config.d_model, queries + 2 * keys), size.product(queries, config.d_model)
        ),
        "local_attention": local,
    }
    kind = attention_of(config.memory)
    if issubclass(kind, InfiniAttention):
        found["memory"] = _of_memory(plan, issubclass(kind, DeltaAttention))
    elif set(flops.forward_flops(config, 1, config.segment)) - {*found, *_REST}:
        found["memory"] = _Bytes(0.0, 0.0)  # its bytes are not counted
    return {name: _Bytes(*(config.n_layers * x for x in one)) for name, one in found.items()}


def _of_memory(plan: Plan, delta: bool) -> _Bytes:
    """A layer's Infini-attention.

    The read takes queries and local attention and gives their mix; the write takes keys and values.
    States are written per segment as sums, read by the scan, written by it, and read.
    """
    config, size = plan.config.model, _sizes(plan)
    queries, keys = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    state = _PRECISE * size.segments * keys * (config.d_head + 1)
    found = _sum(
        size.passes(queries, 3, 5), size.passes(keys, 2, 4), _Bytes(4 * state, 6 * state)
    )  # fmt: skip
    if not delta:
        return found
    return _sum(found, size.passes(keys, 1, 2), _Bytes(2 * state, 4 * state))


_REST = ("feed_forward", "output_head")


def _of_the_rest(plan: Plan) -> dict[str, _Bytes]:
    """A micro-batch's other parts."""
    config, size = plan.config.model, _sizes(plan)
    wide, layers = config.d_ff, config.n_layers
    feed_forward = _sum(
        size.product(config.d_model, 2 * wide), size.product(wide, config.d_model),
        size.passes(wide, 3, 5),  # SwiGLU
    )  # fmt: skip
    # The softmax reads the logits and writes their gradient.
    head = _sum(size.product(config.d_model, plan.vocab_size), size.passes(plan.vocab_size, 2, 0))
    # Twice a layer: sum and norm of the residual stream, with its gradients; and the embedding.
    pointwise = size.passes(config.d_model, layers * 2 * 4 + 2, layers * 2 * 4 + 2)
    return {
        "feed_forward": _Bytes(layers * feed_forward.forward, layers * feed_forward.backward),
        "output_head": head,
        "norms, residuals, embedding": pointwise,
    }


def _less_or_more(plan: Plan, full: bool) -> float:
    """Bytes that a feed-forward computed again moves, from those of a whole forward if `full`."""
    config, size = plan.config.model, _sizes(plan)
    if full:
        return -config.n_layers * size.product(config.d_ff, config.d_model).forward
    opened = size.product(config.d_model, 2 * config.d_ff).forward
    return config.n_layers * (opened + size.passes(config.d_ff, 3, 0).forward)


def _sum(*parts: _Bytes) -> _Bytes:
    return _Bytes(*(sum(column) for column in zip(*parts, strict=True)))


def lines(roof: Roofline) -> list[str]:
    """The roofline for people."""
    ceilings, plan = roof.ceilings, roof.plan
    shown = [
        "roofline of a step of a GPU (counted; nothing was measured)",
        f"  ceilings: {ceilings.products / 1e12:.0f} TFLOP/s of bf16 products, "
        f"{ceilings.copies / 1e12:.1f} TB/s of its memory, "
        f"{plan.cluster.bandwidth * LINK_SHARE / 1e9:.0f} GB/s of links",
        f"  {'part':<30}{'TFLOP':>9}{'GB':>9}{'products s':>12}{'bytes s':>9}{'share':>7}  bound",
    ]
    for part in sorted(roof.parts, key=lambda one: -max(one.seconds(ceilings))):
        products, copies = part.seconds(ceilings)
        bound, share = max(products, copies), max(products, copies) / roof.computing
        shown.append(
            f"  {part.name:<30}{part.flops / 1e12:>9.1f}{part.moved / 1e9:>9.1f}"
            f"{products:>12.3f}{copies:>9.3f}{share:>7.1%}  "
            f"{'products' if bound == products else 'memory'}"
        )
    return [*shown, *_ends(roof)]


def _ends(roof: Roofline) -> list[str]:
    """What overlap has to hide, and what is left at the floor."""
    plan, times = roof.plan, roof.plan.micro_batches
    hidden = roof.sending / roof.computing
    steps = (
        ("all sending hidden", roof.floor),
        ("none of it", roof.computing + roof.sending),
    )
    shown = [
        f"  computing {roof.computing:.3f} s; sending {roof.sending:.3f} s, "
        f"{1e3 * roof.sending / times:.0f} ms per micro-batch beside "
        f"{1e3 * roof.computing / times:.0f} ms of computing: overlap must hide {hidden:.1%}"
    ]
    for what, seconds in steps:
        used = roof.utilisation(seconds)
        share = "" if used is None else f", {used:.1%} of the dense peak useful (MFU)"
        speed = plan.tokens / seconds
        shown.append(f"  {what}: {seconds:.3f} s/step, {speed:,.0f} tokens/s{share}")
    return shown
