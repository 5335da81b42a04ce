"""What a run will need and how long it will take, computed before any GPU is requested.

Memory and FLOPs are counted; speed follows from data sheets and two assumed shares, which are
printed beside it. Nothing here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from data_prep.dataset.settings import SettingsError
from data_prep.dataset.wording import counted
from pretrain.config.root import Config
from pretrain.model import flops
from pretrain.model.memories.kinds import attention_of
from pretrain.model.transformer import on_meta
from pretrain.planning import states
from pretrain.planning.simulate import Activations, Simulation, activations, simulate
from pretrain.trained import PRECISIONS
from pretrain.training.engine import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS, PREFETCH_ELEMENTS

# Not counted: CUDA's context, NCCL's buffers, what the allocator cannot use between tensors.
_FILLED = 0.9
LINK_SHARE = 0.7
"""Of the data sheet's rate of links, assumed."""
_KEPT = {
    "adamw": "AdamW's moments",
    "adafactor": "Adafactor's means of rows and columns",
    "muon": "Muon's momentum, AdamW's moments",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU from its maker's data sheet, in a node of eight as the maker sells it."""

    name: str
    """As torch names it, for its peak; see flops.peak_flops."""
    memory: float
    """Bytes."""
    link: float
    """Bytes/s, one way, between GPUs of a node."""
    network: float
    """Bytes/s, one way, from a node to others."""


GPUS = {
    "a100": Gpu("A100-SXM4-80GB", 80e9, 300e9, 200e9),
    "h100": Gpu("H100 80GB HBM3", 80e9, 450e9, 400e9),
    "h200": Gpu("H200", 141e9, 450e9, 400e9),
    "b200": Gpu("B200", 180e9, 900e9, 400e9),
}


@dataclass(frozen=True)
class Cluster:
    """The GPUs that are planned for, and the share of the GPUs' peak that is assumed."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    peak_share: float
    """Of the dense peak, with what is computed again counted as work."""

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        """Bytes/s at which a rank of a ring sends, by the data sheet.

        Between nodes a ring leaves each node once for every network card, all rings together.
        """
        return self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.gpu.network)


def cluster(gpu: str, nodes: int, gpus_per_node: int, peak_share: float) -> Cluster:
    """The cluster of GPUs by their name in `GPUS`."""
    return Cluster(GPUS[gpu], nodes, gpus_per_node, peak_share)


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a GPU, by part."""

    held: Mapping[str, int]
    """ZeRO-3's own between steps: the same parts as Engine.held."""
    gathered: int
    """Weights that are gathered at a time, at most, and the buffer they arrive in."""
    activations: Activations
    states: int
    """The lanes' memories, before the step and after it."""
    stored: int
    """What a rank writes of its masters and the optimizer's states into a checkpoint; no part of
    `total`."""

    @property
    def total(self) -> int:
        """The most at any time of a step."""
        return sum(self.held.values()) + self.gathered + self.activations.peak + self.states


@dataclass(frozen=True)
class Plan:
    """A run in figures. FLOPs and bytes are of one GPU and one optimizer step."""

    config: Config
    cluster: Cluster
    vocab_size: int
    parameters: int
    memory: GpuMemory
    useful_flops: float
    computed_flops: float
    sent: float
    """Bytes, at most."""
    passed: float
    """Bytes of these that are memory states, between the ranks that share a window."""
    gathers: int
    """Times that a forward of a window gathers a block's weights, at most, and a backward too."""
    simulation: Simulation | None

    @property
    def needed(self) -> int:
        """Bytes of a GPU: as simulated where that was done."""
        if self.simulation is None:
            return self.memory.total
        return self.simulation.peak + self.memory.states

    @property
    def host_copy(self) -> int:
        """Bytes of host memory from which a rank writes its part of a checkpoint."""
        return self.memory.stored + self.memory.states // 2

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint beside the lanes' memories."""
        return states.stored_bytes(self.config, on_meta(self.config.model, self.vocab_size), 1)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.data.lanes * self.config.window

    @property
    def peak(self) -> float | None:
        """FLOP/s of a GPU; None where the precision has no one peak."""
        return flops.peak_flops(self.cluster.gpu.name, PRECISIONS[self.config.train.precision])

    @property
    def compute_seconds(self) -> float | None:
        """Of a step."""
        peak = self.peak
        return None if peak is None else self.computed_flops / (peak * self.cluster.peak_share)

    @property
    def send_seconds(self) -> float:
        """Of a step."""
        sent, found = self.sent, self.simulation
        if found is not None:
            sent = found.sent * self.micro_batches + found.once
        return sent / (self.cluster.bandwidth * LINK_SHARE)

    @property
    def micro_batches(self) -> int:
        """Forwards and backwards of a rank in a step."""
        ranks = self.cluster.ranks
        return self.config.lanes_a_rank(ranks) // _micro_batch(self.config, ranks)


def make(config: Config, vocab_size: int, gpus: Cluster, simulated: bool) -> Plan:
    """The plan of a run. Raises SettingsError where it cannot start on so many ranks."""
    ranks = gpus.ranks
    product = f"; ranks are --nodes {gpus.nodes} times --gpus-per-node {gpus.gpus_per_node}"
    problems = [text + product for text in config.rank_problems(ranks)]
    if config.zero.stage != 3:
        problems.append(f"zero.stage: the plan counts ZeRO-3, found {config.zero.stage}; set it 3")
    if problems:
        raise SettingsError(problems)
    lanes = config.lanes_a_rank(ranks)
    tokens = lanes * config.part
    shape, checkpointing = config.model, config.train.activation_checkpointing
    micro_batch = _micro_batch(config, ranks)
    useful = tokens * flops.training_flops_per_token(shape, vocab_size, config.window)
    computed = tokens * flops.computed_flops_per_token(
        shape, vocab_size, config.window, checkpointing
    )
    if config.data.preface:
        alone = tokens * flops.reading_flops_per_token(shape, config.window)
        useful, computed = useful + alone, computed + alone
    if config.parallel.sequence > 1:
        segments = config.part // shape.segment
        computed += lanes * flops.passing_flops(
            shape, segments, config.parallel.sequence, checkpointing
        )
    passed = passed_bytes(config, ranks)
    return Plan(
        config,
        gpus,
        vocab_size,
        flops.parameters(shape, vocab_size),
        memory(config, vocab_size, ranks),
        useful,
        computed,
        sent_bytes(config, vocab_size, ranks) + passed,
        passed,
        block_gathers(config, vocab_size),
        simulate(config, vocab_size, ranks, micro_batch) if simulated else None,
    )


def memory(config: Config, vocab_size: int, ranks: int) -> GpuMemory:
    """Bytes that a rank of ZeRO-3 needs."""
    model = on_meta(config.model, vocab_size)
    sizes, of_blocks = _sizes(model), _large(_sizes(model.layers))
    width = PRECISIONS[config.train.precision].itemsize
    share = sum(-(-size // ranks) for size in sizes)
    whole = sum(sizes)
    gathered = min(sum(_large(sizes)), config.zero.live_parameters + max(sizes))
    # Weights that are gathered together arrive in one buffer. All of them are copied out of it when
    # the first is used, and it lives until the last is. Only the blocks' buffers count: other
    # weights are used where fewer activations are alive.
    copied = min(sum(of_blocks), PREFETCH_ELEMENTS + max(of_blocks, default=0))
    return GpuMemory(
        {
            "weights": share * width,
            "persistent": sum(size for size in sizes if size <= PERSISTENT_ELEMENTS) * width,
            "gradients": share * 4,
            "bucket": min(BUCKET_ELEMENTS, whole) * width,
            "optimizer": states.held_bytes(config, model, ranks),
        },
        (gathered + copied) * width,
        activations(config, vocab_size, _micro_batch(config, ranks)),
        (4 if config.data.preface else 2) * _state_bytes(config, ranks),
        states.stored_bytes(config, model, ranks),
    )


def sent_bytes(config: Config, vocab_size: int, ranks: int) -> float:
    """Bytes that a rank sends in a step for ZeRO-3, at most, if collectives go round a ring.

    A micro-batch gathers weights for the forward and again for the backward (once, if all of them
    may stay in between) and reduces every gradient; a step gathers the small parameters once, and
    sends what its optimizer does. A preface's forward gathers the weights once more. A recurrence
    over the whole stack gathers the blocks for each segment, see `block_gathers`.
    """
    model = on_meta(config.model, vocab_size)
    sizes = _sizes(model)
    padded = [(size, -(-size // ranks) * ranks) for size in sizes]
    large = sum(pad for size, pad in padded if size > PERSISTENT_ELEMENTS)
    small = sum(pad for size, pad in padded if size <= PERSISTENT_ELEMENTS)
    blocks = sum(-(-size // ranks) * ranks for size in _large(_sizes(model.layers)))
    uses = 3 if config.train.activation_checkpointing == "full" else 2
    gathers = 1 if uses * large <= config.zero.live_parameters else 2
    gathers += bool(config.data.preface)
    micro_batches = config.lanes_a_rank(ranks) // _micro_batch(config, ranks)
    more = (block_gathers(config, vocab_size) - 1) * blocks
    elements = micro_batches * (gathers * (large + more) + large + small) + small
    width = PRECISIONS[config.train.precision].itemsize
    own = states.sent_bytes(config, model, ranks)
    return elements * width * (ranks - 1) / ranks + own


def block_gathers(config: Config, vocab_size: int) -> int:
    """How often a forward of a window gathers a block's weights, at most, and a backward too.

    A recurrence over the whole stack runs every block once per segment; its weights stay gathered
    from one segment to the next if all of the model's may.
    """
    if not config.model.memory.traits.recurrent:
        return 1
    large = sum(_large(_sizes(on_meta(config.model, vocab_size))))
    return 1 if large <= config.zero.live_parameters else config.train.window_segments


def passed_bytes(config: Config, ranks: int) -> float:
    """Bytes that a rank sends in a step to the ranks that share its windows, round a ring.

    A layer's float32 states are gathered in the forward, again where a block is computed again, and
    in a preface's forward; their gradients are reduced. Free of the window's length.
    """
    memory = config.model.memory
    if not memory.traits.remembers:
        return 0.0
    passed = 4 * attention_of(memory).passed_numbers(config.model)
    others, lanes = config.parallel.sequence - 1, config.lanes_a_rank(ranks)
    times = 3 if config.train.activation_checkpointing == "full" else 2
    times += bool(config.data.preface)
    # And, once a window, whether a document starts in a rank's part: a byte.
    return float(others * lanes * (times * passed + 1))


def _micro_batch(config: Config, ranks: int) -> int:
    return config.train.micro_batch or config.lanes_a_rank(ranks)


def _sizes(module: nn.Module) -> list[int]:
    """Elements of each parameter."""
    return [parameter.numel() for parameter in module.parameters()]


def _large(sizes: list[int]) -> list[int]:
    """Of the parameters that are gathered for their use and released after it."""
    return [size for size in sizes if size > PERSISTENT_ELEMENTS]


def _state_bytes(config: Config, ranks: int) -> int:
    """Of the memories of a rank's lanes."""
    model = on_meta(config.model, 1).to(PRECISIONS[config.train.precision])
    state = model.initial_state(config.lanes_a_rank(ranks), "meta")
    return sum(tensor.nbytes for layer in state for tensor in layer)


def warnings(plan: Plan) -> list[str]:
    """What will not fit, or is slower than it need be, and what to do."""
    found = []
    capacity = plan.cluster.gpu.memory
    if plan.needed > _FILLED * capacity:
        fits = "does not fit" if plan.needed > capacity else "will hardly fit"
        found.append(
            f"{fits}: {_size(plan.needed)} of {_size(capacity)}, of which CUDA, NCCL and the "
            f"allocator take some 10 %; {_relief(plan)}"
        )
    if plan.config.train.precision == "float32":
        found.append(
            "train.precision: float32 has no one peak (TF32 or not), so no time is given; set bf16"
        )
    if plan.config.model.local_attention == "sdpa":
        found.append(
            "model.local_attention: the memory is that of flash-attn; SDPA on segments with a "
            "document's start may hold a score for every two tokens of the segment and head"
        )
    compute = plan.compute_seconds
    if compute is not None and plan.send_seconds > compute:
        found.append(
            f"sending takes longer than computing ({plan.send_seconds:.1f} and {compute:.1f} s); "
            "more lanes a rank or a larger train.micro_batch share a gather among more tokens"
        )
    return found


def _relief(plan: Plan) -> str:
    """The first thing to try where memory is short."""
    train, largest = plan.config.train, plan.memory.activations
    if sum(plan.memory.held.values()) > largest.peak:
        return "weights and optimizer are the larger part: ask for more nodes"
    if train.activation_checkpointing == "none":
        return "activations are the larger part: train.activation_checkpointing=full"
    if _micro_batch(plan.config, plan.cluster.ranks) > 1:
        return "activations are the larger part: train.micro_batch=1"
    return (
        "activations are the larger part: raise parallel.sequence, or lower train.window_segments"
    )


def lines(plan: Plan) -> list[str]:
    """The plan for people; the last line is `summary`."""
    shown = [*_shape_lines(plan), "", *_memory_lines(plan), "", *_time_lines(plan)]
    if plan.simulation is not None:
        shown += ["", *_simulation_lines(plan, plan.simulation)]
    warned = warnings(plan)
    if warned:
        shown += ["", "warnings", *(f"  - {warning}" for warning in warned)]
    return [*shown, "", summary(plan)]


def _shape_lines(plan: Plan) -> list[str]:
    config, ranks = plan.config, plan.cluster.ranks
    micro_batch, sequence = _micro_batch(config, ranks), config.parallel.sequence
    shared = f", {config.part:,} tokens of each" if sequence > 1 else ""
    beside = "; as many tokens of prefaces, forward alone" if config.data.preface else ""
    return [
        f"model: {plan.parameters:,} parameters with a vocabulary of {plan.vocab_size:,}",
        f"ranks: {ranks}, on {plan.cluster.nodes} x {plan.cluster.gpus_per_node} "
        f"{plan.cluster.gpu.name}",
        f"a step: {counted(config.data.lanes, 'lane')} of {config.window:,} tokens, "
        f"{plan.tokens:,} in all; a rank takes {plan.micro_batches} x {micro_batch} of "
        f"them{shared}{beside}",
        f"a checkpoint: {_size(plan.checkpoint)}, and the lanes' memories; it is written from "
        f"a copy, {_size(plan.host_copy)} of host memory a rank",
        *_mix_lines(plan),
    ]


def _mix_lines(plan: Plan) -> list[str]:
    """Tokens of each data set of a mix, over all steps, as its weights have them."""
    data, steps = plan.config.data, plan.config.train.steps
    if not data.mix:
        return []
    shares = ", ".join(
        f"{name} {share:.1%} ({_rounded(share * steps * plan.tokens)})"
        for name, share in data.shares(steps).items()
    )
    phases = f" in {counted(len(data.phases), 'phase')}" if len(data.phases) > 1 else ""
    return [f"tokens of {counted(steps, 'step')}{phases}: {shares}"]


def _memory_lines(plan: Plan) -> list[str]:
    held, running = plan.memory.held, plan.memory.activations
    again = plan.config.train.activation_checkpointing == "full"
    kept = _KEPT[plan.config.optim.name]
    if plan.config.optim.ema_decay:
        kept += ", the weights' average"
    rows = [
        ("weights", held["weights"], "a rank's share"),
        ("small weights", held["persistent"], "whole, they stay gathered"),
        (
            "gathered weights",
            plan.memory.gathered,
            "whole for a time, at most, with the buffer they arrive in",
        ),
        ("gradients", held["gradients"], "float32, a rank's share"),
        ("gradient bucket", held["bucket"], "being reduced"),
        ("optimizer", held["optimizer"], f"float32 masters and {kept}, a rank's share"),
        ("activations", running.kept, "each block's input" if again else "each block's"),
        ("one block", running.block, "at work" + (", computed again" if again else "")),
        ("loss", running.loss, "in chunks; not while a block is at work: the larger one counts"),
        ("memory states", plan.memory.states, "of the rank's lanes, before and after the step"),
        ("in all", plan.memory.total, f"of {_size(plan.cluster.gpu.memory)} (data sheet)"),
    ]
    return [
        "memory per GPU (counted)",
        *(f"  {name:<17}{_size(size):>12}   {note}" for name, size, note in rows),
    ]


def _time_lines(plan: Plan) -> list[str]:
    share, bandwidth = plan.cluster.peak_share, plan.cluster.bandwidth
    sequence = plan.config.parallel.sequence
    shown = [
        "a step of a GPU (computed; nothing was measured)",
        f"  {plan.useful_flops:.3g} useful FLOPs, {plan.computed_flops:.3g} with what is computed "
        "again",
        f"  {_size(plan.sent)} sent at most, {plan.send_seconds:.1f} s at {LINK_SHARE:.0%} "
        f"(assumed) of {bandwidth / 1e9:.0f} GB/s (data sheet)",
    ]
    if plan.config.model.memory.traits.recurrent:
        often = "once" if plan.gathers == 1 else f"up to {plan.gathers} times"
        shown.append(
            f"  a window is {plan.config.train.window_segments} forwards of all blocks in order; a "
            f"pass gathers each block's weights {often}"
        )
    if sequence > 1:
        shown.append(
            f"  of that {_size(plan.passed)} between the {sequence} ranks that share a window, "
            "whatever its length"
        )
    if plan.compute_seconds is None or plan.peak is None:
        return shown
    return [
        *shown,
        f"  {plan.compute_seconds:.1f} s at {share:.0%} (assumed) of {plan.peak / 1e12:.0f} "
        "TFLOP/s (data sheet), all that is computed counted",
        "  between: all sending hidden behind computing, and none of it; what is not a matrix "
        "product is in the assumed",
        "  share; validation and checkpoints come on top",
    ]


def _simulation_lines(plan: Plan, simulated: Simulation) -> list[str]:
    held = ", ".join(f"{part} {_size(size)}" for part, size in simulated.held.items())
    equal = dict(simulated.held) == dict(plan.memory.held)
    return [
        f"rank 0 of {plan.cluster.ranks} under real ZeRO-3, on tensors without storage",
        f"  holds {held}; {'as' if equal else 'NOT as'} planned",
        f"  at most {_size(simulated.peak)} at a time, and the memory states",
        f"  sends {_size(simulated.sent)} per micro-batch, {_size(simulated.once)} per step beside",
    ]


def summary(plan: Plan) -> str:
    """The run in one line."""
    memory = f"{_size(plan.needed)} of {_size(plan.cluster.gpu.memory)} per GPU"
    if plan.compute_seconds is None:
        return memory
    least = max(plan.compute_seconds, plan.send_seconds)
    most = plan.compute_seconds + plan.send_seconds
    times = _between(f"{least:.1f}", f"{most:.1f}")
    speeds = _between(_rounded(plan.tokens / most), _rounded(plan.tokens / least))
    steps = plan.config.train.steps
    span = _span(least * steps, most * steps)
    return f"{memory}; {times} s/step, {speeds} tokens/s, {span} for {counted(steps, 'step')}"


def _span(least: float, most: float) -> str:
    """Seconds in days, or in minutes where they are less than a tenth of a day."""
    seconds, unit, digits = (86400, "days", 1) if most >= 8640 else (60, "minutes", 0)
    return f"{_between(*(f'{end / seconds:.{digits}f}' for end in (least, most)))} {unit}"


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _size(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def _rounded(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.2g}'):,.0f}"
