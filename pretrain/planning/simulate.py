"""What a rank of any number would hold and send, found without a GPU, without memory and alone.

The real model and the real ZeRO-3 engine run on tensors that have shapes and no storage, in a
process group whose other ranks are not there. `ByteCounter` counts each allocation while it lives,
and the bytes that collectives move; on ordinary tensors it counts just the same.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

# The first collective under a mode loads it, which fails while ZeRO-3 has replaced constructors.
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config.model import ModelConfig
from pretrain.config.root import Config
from pretrain.model import flops
from pretrain.model.loss import CHUNK_LOGITS
from pretrain.model.memories.nearest import SCORES
from pretrain.model.state import ModelState, mapped
from pretrain.model.transformer import Transformer
from pretrain.trained import PRECISIONS
from pretrain.training.engine import Engine
from pretrain.training.parallel import SequenceGroup

_READING = torch.ops.aten._local_scalar_dense.default
_GIVEN = (
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.scalar_tensor.default,
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
)

# How often a ring sends the whole tensor, but for a rank's share. By broadcasts ranks agree on the
# order of parameters, in their first steps alone.
_ROUNDS = {
    "allgather_base": 1,
    "reduce_scatter_base": 1,
    "alltoall_base": 1,
    "allreduce": 2,
    "broadcast": 0,
}


class ByteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that live, their peak, and what each collective moves.

    Entered on top of a FakeTensorMode (`fake`) it also decides what is real: a tensor made from
    numbers is, and so is what is computed of such tensors alone; it is how documents lie, and what
    ranks compare. Only tensors without storage are counted then. A number that is read from one is
    1, a truth value is False.
    """

    def __init__(self, fake: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = fake
        self.live = 0
        self.peak = 0
        self.moved: dict[tuple[str, int], int] = {}
        """By kind of collective and size of its group: bytes of the whole tensors that were made or
        taken, summed."""
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, None] = (
            weakref.WeakKeyDictionary()
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` and count what it made."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "c10d" and given:
            self._count_collective(func, args, max(tensor.nbytes for tensor in given))
        real = self.fake and (func in _GIVEN or bool(given))
        if real and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        try:
            made = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            assert func is _READING, func
            return 0 if given[0].dtype == torch.bool else 1
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def restart(self) -> None:
        """Forget peak and collectives: an interval begins."""
        self.peak = self.live
        self.moved.clear()

    def sent(self) -> float:
        """Bytes that a rank sent in the interval, if collectives go round rings of their groups."""
        return sum(
            _ROUNDS[kind] * moved * (ranks - 1) / ranks
            for (kind, ranks), moved in self.moved.items()
        )

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = None
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size

    def _count_collective(self, func: Any, args: Any, whole: int) -> None:
        names = [argument.name for argument in func._schema.arguments]
        group = dist.ProcessGroup.unbox(args[names.index("process_group")])
        kind = func.name().removeprefix("c10d::").strip("_"), group.size()
        self.moved[kind] = self.moved.get(kind, 0) + whole


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch's forward and backward beside the weights and the memories before and
    after the window; peaks, not sums.

    Of a part of the windows where ranks share them.
    """

    kept: int
    """What the forward keeps for the backward, when the loss begins."""
    block: int
    """The most beside it while blocks run, forward or backward, gradients on their way included."""
    loss: int
    """The most beside it while the output head runs."""

    @property
    def peak(self) -> int:
        """The most at any time: blocks and the output head run one after the other."""
        return self.kept + max(self.block, self.loss)


# Blocks are alike, so two models of few give any number of them.
_FEW = 2


def activations(config: Config, vocab_size: int, lanes: int) -> Activations:
    """Bytes that a micro-batch of a rank's part of `lanes` windows needs, found by running two
    shallow models.

    The local attention keeps its output and a number a query, as flash-attn and SDPA's own kernels
    do; no document starts in the window.
    """
    layers = config.model.n_layers
    shallow, deeper = (
        _trace(replace(config, model=_of_few_layers(config.model, count)), vocab_size, lanes)
        for count in (_FEW, _FEW + 1)
    )
    kept = shallow.kept + (layers - _FEW) * (deeper.kept - shallow.kept)
    block = shallow.block + (layers - _FEW) * (deeper.block - shallow.block)
    return Activations(kept, block, deeper.loss)


def _of_few_layers(model: ModelConfig, count: int) -> ModelConfig:
    """The model with `count` layers, of which one has the store if one of the model's has.

    It is the first in both, or the last of the few: there most is kept while it is computed again.
    """
    memory, own = model.memory, model.memory.memorizing
    if own.layer > 1:
        memory = replace(memory, memorizing=replace(own, layer=0))
    return replace(model, n_layers=count, memory=memory)


def _trace(config: Config, vocab_size: int, lanes: int) -> Activations:
    """The same of a whole model of few layers."""
    with _without_storage() as counter:
        model = _model_of(config, vocab_size)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        starts, batch = _window(lanes, config.part)
        state = in_use(model.initial_state(lanes, "cpu"))
        sequence = config.parallel.sequence
        parts = _Alike(sequence) if sequence > 1 else None
        weights = counter.live
        counter.restart()
        marks: list[tuple[int, int]] = []

        def mark(*_: object) -> None:
            """Note the peak since the last mark, and what lives now."""
            marks.append((counter.peak, counter.live))
            counter.restart()

        def watch_head(head: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            mark()
            given[0].register_hook(mark)  # type: ignore[no-untyped-call]

        model.lm_head.register_forward_pre_hook(watch_head)
        output = model(batch, starts, state, batch, parts=parts)
        output.loss.backward()  # the trainer, too, holds the memory after the window meanwhile
        mark()
        (forward, kept), (loss, _), (backward, _) = marks
        # `plan.GpuMemory.states` has it; flags are real, and not counted.
        tensors = [tensor for layer in output.state for tensor in layer]
        written = sum(tensor.nbytes for tensor in tensors if tensor.dtype != torch.bool)
    return Activations(kept - weights - written, max(forward, backward) - kept, loss - kept)


class _Alike:
    """The first of some parts of a window that are all alike."""

    def __init__(self, count: int) -> None:
        self.index = 0
        self.count = count

    def gather(self, own: Tensor) -> Tensor:
        return torch.stack([own] * self.count)


def _drop_gradient(parameter: torch.nn.Parameter) -> None:
    parameter.grad = None


def _model_of(config: Config, vocab_size: int) -> Transformer:
    before = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS[config.train.precision])
    try:
        return Transformer(_on_cpu(config.model), vocab_size, config.train.activation_checkpointing)
    finally:
        torch.set_default_dtype(before)


def _on_cpu(model: ModelConfig) -> ModelConfig:
    """The model with the kernels that run where there is no GPU.

    SDPA keeps what flash-attn keeps. PyTorch's memory keeps more than Triton's kernels do.
    """
    return replace(model, local_attention="sdpa", memory=replace(model.memory, kernel="torch"))


def _window(lanes: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Where documents start, real: nowhere; and tokens or targets; both [lanes, tokens]."""
    with unset_fake_temporarily():
        starts = torch.zeros(lanes, tokens, dtype=torch.bool)
    return starts, torch.zeros(lanes, tokens, dtype=torch.int64)


def _nowhere() -> tuple[Tensor, Tensor]:
    """The places of no logits, as a preface has them."""
    none = torch.zeros(0, dtype=torch.int64)
    return none, none


def in_use(state: ModelState) -> ModelState:
    """The state with flags that are real, like documents' starts: all of its slots hold something,
    as in the middle of a document."""

    def real(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.bool:
            return tensor
        with unset_fake_temporarily():
            return torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)

    return tuple(mapped(real, layer) for layer in state)


@contextlib.contextmanager
def _without_storage() -> Iterator[ByteCounter]:
    """A block in which new tensors have no storage, and the counter that counts them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _chunks_of_a_gpu(), mode, ByteCounter(fake=True) as counter:
        yield counter


@contextlib.contextmanager
def _chunks_of_a_gpu() -> Iterator[None]:
    """A block in which tensors of the CPU are worked through in chunks as large as a GPU's."""
    tables = CHUNK_LOGITS, SCORES
    before = [table["cpu"] for table in tables]
    for table in tables:
        table["cpu"] = table["cuda"]
    try:
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table["cpu"] = own


@dataclass(frozen=True)
class Simulation:
    """What rank 0 held and sent in one optimizer step of one micro-batch, under real ZeRO-3."""

    held: Mapping[str, int]
    """Bytes between steps, by part; see Engine.held."""
    peak: int
    """Bytes, the most at any time of the step."""
    sent: float
    """Bytes a micro-batch, forward and backward."""
    once: float
    """Bytes a step beside these: the optimizer's, however many micro-batches there are."""


def simulate(config: Config, vocab_size: int, ranks: int, lanes: int) -> Simulation:
    """Partition the model as rank 0 of `ranks` and take a micro-batch of `lanes` windows through.

    It is the second step that is counted: in the first, DeepSpeed learns the order in which
    parameters are needed. To be called once a process, which has no process group yet.
    """
    config = replace(
        config,
        data=replace(config.data, lanes=ranks // config.parallel.sequence * lanes),
        train=replace(config.train, micro_batch=lanes),
    )
    parameters = flops.parameters(config.model, vocab_size)
    model = _on_cpu(config.model)
    with _world_of_one(ranks), _without_storage() as counter:
        engine = Engine(
            lambda: Transformer(model, vocab_size, config.train.activation_checkpointing),
            parameters,
            config,
            torch.device("cpu"),
        )
        assert isinstance(engine.module, Transformer)
        sequence = config.parallel.sequence
        parts = SequenceGroup(sequence) if sequence > 1 else None
        for _ in range(2):
            state = in_use(engine.module.initial_state(lanes, "cpu"))
            starts, batch = _window(lanes, config.part)
            counter.restart()
            initial = state if config.data.preface else None
            given = {"parts": parts, "initial": initial}
            loss = engine.forward(batch, starts, state, batch, **given).loss
            assert loss is not None
            engine.backward(loss)
            before = counter.sent()
            engine.step(1.0)
            once = counter.sent() - before
            if config.data.preface:
                with engine.evaluating():
                    engine.forward(batch, starts, state, parts=parts, places=_nowhere())
        return Simulation(engine.held(), counter.peak, counter.sent() - once, once)


@contextlib.contextmanager
def _world_of_one(ranks: int) -> Iterator[None]:
    """A process group of `ranks` of which this process is rank 0 and the others are not there.

    Collectives end at once and leave their output as it is. Rank 0's part is the largest: what
    does not divide evenly is padding at the others' end.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
