"""The one module that knows DeepSpeed: ZeRO stages 0 to 3 behind a forward, a step and pieces.

A *piece* is a slice of a flattened tensor, named by its parameter and kind: the float32 master
(`param`) and the optimizer's states (AdamW's `exp_avg` and `exp_avg_sq`). Every rank writes the
pieces it owns and can read any others, so checkpoints do not depend on the number of ranks or the
ZeRO stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib.util
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_prep.dataset import durable
from pretrain.checkpoint.load import Checkpoint
from pretrain.checkpoint.pieces import Piece
from pretrain.config.root import Config
from pretrain.model.memories.kinds import is_of_memory
from pretrain.model.state import ModelState
from pretrain.model.transformer import Output, Transformer
from pretrain.training import optim, uncompiled
from pretrain.training.partitions import Partition
from pretrain.training.run_state import TrainingError
from pretrain.training.states import Place, States

_BUILD_LOCK = "build.lock"
# At most this many elements per reduction; DeepSpeed allocates a buffer of this size.
BUCKET_ELEMENTS = 200_000_000
# ZeRO-3: parameters of at most this many elements stay gathered after their first use.
PERSISTENT_ELEMENTS = 100_000
# ZeRO-3: prefetch up to this many elements, rounded up to whole parameters, so that the next
# matrix, however large, is gathered while the current one is multiplied.
PREFETCH_ELEMENTS = 50_000_000


def cache_directory() -> Path:
    """Directory of compiled operators: in `.cache` of the source tree, else in the user's cache.

    An installation that another user owns is only read. Raises TrainingError where neither can be
    written.
    """
    root = Path(__file__).resolve().parents[2]
    # Else two environments, or one that is reached by two paths (a link), would rebuild each
    # other's operators in turn: the compiler's command has the paths of headers.
    packages = "-".join(f"{name}{metadata.version(name)}" for name in ("torch", "deepspeed"))
    name = f"torch_extensions/{sys.implementation.cache_tag}-{packages}-{_digest_of_headers()}"
    inside = [root / ".cache"] if (root / "pyproject.toml").exists() else []
    tried = [base / name for base in (*inside, Path.home() / ".cache" / "infini-pretrain")]
    for directory in tried:
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / _BUILD_LOCK).open("a").close()
            return directory
    raise TrainingError(
        f"DeepSpeed's operator for CPU ranks cannot be compiled: {' and '.join(map(str, tried))} "
        "cannot be written; set TORCH_EXTENSIONS_DIR to a directory of yours"
    )


def _digest_of_headers() -> str:
    found = importlib.util.find_spec("deepspeed")
    places = [*torch.__path__, *((found and found.submodule_search_locations) or ())]
    return hashlib.sha256("\0".join(places).encode()).hexdigest()[:8]


def build_ops(report: Callable[[str], None] = print) -> None:
    """Compile (once) and load DeepSpeed's shared-memory operator for CPU ranks.

    All processes load it under a lock that the kernel releases when the holder dies. A lock file of
    torch found while holding it was therefore left by a killed build and would make every later
    launch wait forever, so it is reported and removed.
    """
    if not os.environ.get("TORCH_EXTENSIONS_DIR"):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(cache_directory())
    # torch looks for ninja on the PATH, which need not name this interpreter's environment.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    directory = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    directory.mkdir(parents=True, exist_ok=True)
    path, elsewhere = directory / _BUILD_LOCK, "set TORCH_EXTENSIONS_DIR to one elsewhere"
    with path.open("w") as guard:
        durable.lock(guard, path, fcntl.LOCK_EX, elsewhere)
        for stale in directory.rglob("lock"):
            report(f"removed {stale}: this lock was left by a build that was killed")
            stale.unlink()
        if next(directory.rglob("*.so"), None) is None:
            report("compiling DeepSpeed's operator for CPU ranks, once: about a minute")
        _import_deepspeed("cpu")
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        ShareMemCommBuilder().load(verbose=False)


def _import_deepspeed(device_type: str) -> Any:
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Else ZeRO-3 starts `numactl --hardware` for each bucket and step, to count NUMA nodes.
        os.environ.setdefault("LOCAL_SIZE", "1")
    for renamed in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{renamed}.*", category=FutureWarning)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # Importing DeepSpeed makes a CUDA build of torch look for nvcc, even without a GPU.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_says_more_than_no_gpu)
    first = "deepspeed" not in sys.modules
    with uncompiled.without_compiler(triton=device_type != "cpu"):
        import deepspeed
        from deepspeed.runtime import compiler

    # Else ZeRO imports its Muon, which no run uses, and with it torch's compiler: 1 s per rank.
    compiler.compile = lambda: compiler.dummy_decorator
    uncompiled.call_optimizers_as_they_are()
    if first:
        gc.freeze()  # ZeRO-3 collects garbage, which need not be looked for among modules
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _says_more_than_no_gpu(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")


class OptimizerStep(NamedTuple):
    """The result of one optimizer step, the same on all ranks."""

    applied: bool
    grad_norm: float
    """Global L2 norm before clipping; inf if a gradient was not finite."""


def deepspeed_settings(config: Config, ranks: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours; there is no second file."""
    lanes = config.lanes_a_rank(ranks)
    micro_batch = config.train.micro_batch or lanes
    bucket = min(BUCKET_ELEMENTS, max(parameters, 1))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": lanes // micro_batch,
        # Without ZeRO, DeepSpeed neither reports the norm nor skips a bad step: see Engine.step.
        "gradient_clipping": config.train.clip_norm if config.zero.stage else 0.0,
        "zero_optimization": {
            "stage": config.zero.stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
            "stage3_max_live_parameters": config.zero.live_parameters,
            "stage3_max_reuse_distance": config.zero.live_parameters,
        },
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,  # ours are tested with it
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


class Engine:
    """A model under ZeRO: forward, backward, step, and its state as pieces.

    `build` makes the model and initialises each parameter in the module that owns it. Under ZeRO-3
    every parameter is partitioned as soon as its module is made, so no rank ever holds the whole
    model; all ranks use rank 0's initial values.
    """

    def __init__(
        self,
        build: Callable[[], Transformer],
        parameters: int,
        config: Config,
        device: torch.device,
    ) -> None:
        if device.type == "cpu":
            build_ops(logging.getLogger("pretrain").warning)
        # DeepSpeed requires it, and srun does not set it.
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        deepspeed = _import_deepspeed(device.type)
        self._config = config
        self._stage = config.zero.stage
        self._device = device
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it loaded the operator
            deepspeed.init_distributed(dist_init_required=False)
        settings = deepspeed_settings(config, dist.get_world_size(), parameters)
        torch.manual_seed(config.run.seed)
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=self._stage == 3):
            model = build()
        shapes = {name: _shape(parameter) for name, parameter in model.named_parameters()}
        self._gates = model.gates()
        groups = optim.parameter_groups(
            ((name, p, len(shapes[name])) for name, p in model.named_parameters()),
            self._gates,
            config.optim,
        )
        names = {parameter: name for name, parameter in model.named_parameters()}
        in_group = {names[p]: i for i, group in enumerate(groups) for p in group["params"]}
        kept = {n: optim.kept(groups[i], tuple(shapes[n])) for n, i in in_group.items()}
        on_gpu = device.type == "cuda"
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self._optimizer = optim.make(groups, config.optim, dtype, fused=on_gpu)
        with uncompiled.without_compiler(triton=on_gpu):
            self._deepspeed, self._zero, _, _ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=settings
            )
        self._shapes = shapes
        self.module: Transformer = self._deepspeed.module
        self._parameters = dict(self.module.named_parameters())
        places = {
            name: Place(self._partition(name, parameter, in_group[name]), kept[name])
            for name, parameter in self._parameters.items()
        }
        self._states = States(self._optimizer, places, device if on_gpu else None)
        self._states.average(0.0)
        self._norm = _BoundedNorm(self._zero, self._stage)

    def empty_memory(self, lanes: int) -> ModelState:
        """The empty memory of `lanes` lanes, on the engine's device."""
        return self.module.initial_state(lanes, self._device)

    def forward(self, *arguments: Any, **keywords: Any) -> Output:
        """`Transformer.forward`; all ranks must call it the same number of times."""
        output: Output = self._deepspeed(*arguments, **keywords)
        return output

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[Transformer]:
        """The model in evaluation mode and without gradients, in this block; all ranks must call
        it the same number of times."""
        self._deepspeed.train(False)
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self._deepspeed.train(True)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's scalar loss, averaged over the ranks.

        A non-finite loss is turned into non-finite gradients, so that `step` detects it on every
        rank.
        """
        loss = loss * torch.where(torch.isfinite(loss), 1.0, torch.nan).detach()
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self, rate_fraction: float, largest_norm: float = math.inf) -> OptimizerStep:
        """Clip and apply the gradients; if any is not finite, or their norm is larger than
        `largest_norm`, nothing changes.

        `rate_fraction` multiplies each group's peak learning rate. Call it once, after the
        backward of the last micro-batch. Either all ranks apply the step or none does.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate_fraction
        self._norm.expect(largest_norm)
        if self._stage == 0:
            norm = self._norm.clip(list(self._parameters.values()), self._config.train.clip_norm)
            applied = norm < math.inf
            self._deepspeed.step()
        else:
            self._deepspeed.step()
            norm = float(self._deepspeed.get_global_grad_norm())
            applied = self._deepspeed.was_step_applied()
        if applied:
            self._states.average(optim.ema_decay(self._config.optim, self._states.steps))
        return OptimizerStep(applied, norm if self._norm.exceeded is None else self._norm.exceeded)

    @property
    def optimizer_steps(self) -> int:
        """The number of steps that the optimizer has applied."""
        return self._states.steps

    def held(self) -> dict[str, int]:
        """Bytes of ZeRO-3's state on this rank, by part.

        Small parameters, which stay gathered, are counted from their first gather on.
        """
        assert self._stage == 3
        masters = self._zero.fp32_partitioned_groups_flat
        parameters = self._parameters.values()
        return {
            "weights": sum(p.ds_tensor.nbytes for p in parameters),
            "persistent": sum(p.nbytes for p in parameters),  # empty while they are not gathered
            "gradients": self._zero.grad_partitions_flat_buffer.nbytes,
            "bucket": sum(bucket.buffer.nbytes for bucket in self._zero.ipg_buckets.values()),
            "optimizer": sum(flat.nbytes for flat in masters) + self._states.nbytes,
        }

    def gates(self) -> list[Tensor]:
        """The gates' float32 masters, [heads] or [0] for each layer; call it on all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = [torch.zeros(0)] * len(self.module.layers) if self._gates else []
        for name, layer in self._gates.items():
            parameter = self._parameters[name]
            whole = safe_get_full_fp32_param(parameter) if self._stage else parameter
            found[layer] = whole.detach().float().cpu()
        return found

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of every parameter's master and optimizer states, without copying.

        The pieces of all ranks cover each tensor exactly once. They are views, which the next
        step overwrites.
        """
        return self._states.pieces(dist.get_rank(), dist.get_world_size())

    def restore(self, checkpoint: Checkpoint, optimizer_steps: int) -> None:
        """Load this rank's part of everything from a checkpoint of any number of ranks and stage.

        An average of the weights that the checkpoint lacks begins with its weights; one that is no
        longer kept is dropped. Raises CheckpointError if another tensor is missing from the
        checkpoint or has another shape.
        """
        kinds = self._states.expected(checkpoint)
        self._set(list(self._parameters), checkpoint.read, kinds)
        if optim.EMA not in kinds:
            self._states.average(0.0)
        for name, whole in self._states.factors.items():
            whole.copy_(checkpoint.read(name, 0, whole.numel()).view(whole.shape))
        self._states.steps = optimizer_steps

    def take_weights(self, checkpoint: Checkpoint, same_memory: bool, eos_id: int | None) -> None:
        """Load this rank's part of the weights only; a memory's may be missing on either side.

        Without `same_memory` a memory's are not taken: kinds share names, but not their meaning.
        Those not taken keep their initial values; learned vectors may begin as the embedding of the
        token `eos_id` instead. Raises CheckpointError if the others do not match this model's.
        """
        taken = _shared_weights(self._shapes, checkpoint, same_memory)
        self._set(taken, checkpoint.read)
        begun = [name for name in self.module.begins_as_eos() if name not in taken]
        if eos_id is not None and begun:
            width = self._config.model.d_model
            row = checkpoint.read("embedding.weight/param", eos_id * width, width)
            self._set(begun, functools.partial(_repeated, row))
        self._states.average(0.0)

    def _set(
        self,
        names: Sequence[str],
        read: Callable[[str, int, int], Tensor],
        kinds: Collection[str] = (),
    ) -> None:
        """Set this rank's part of parameters, in the masters and the weights of the forward.

        And of `kinds` of their moments. `read` returns the elements of NAME/KIND from an
        offset on, a number of them.
        """
        with _released(self._zero, self._stage):
            for name in names:
                parameter = self._parameters[name]
                offset, views = self._states.own(name)
                for kind, view in views.items():
                    if kind == "param" or kind in kinds:
                        view.copy_(read(f"{name}/{kind}", offset, view.numel()))
                if self._stage == 3:
                    _fill(parameter, views["param"])
                else:
                    shape = self._shapes[name]
                    parameter.data.copy_(read(f"{name}/param", 0, shape.numel()).view(shape))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the forward computes with the average of the weights; call it on all ranks."""
        self._show(optim.EMA)
        yield  # no finally: an error ends this rank, and the others would wait for it
        self._show("param")

    def _show(self, kind: str) -> None:
        """Let the forward compute with the masters, or with their average."""
        if self._stage == 0:
            # The masters are the forward's weights.
            self._states.exchange()
            return
        with _released(self._zero, self._stage):
            for name, parameter in self._parameters.items():
                offset, views = self._states.own(name)
                own = views[kind]
                if self._stage == 3:
                    _fill(parameter, own)
                    continue
                parameter.data.copy_(_whole(own, offset, self._shapes[name]))

    def _partition(self, name: str, parameter: nn.Parameter, group: int) -> Partition:
        """Where the parameter, of this group of the optimizer, lies.

        Without ZeRO every rank has all of it; from stage 1 on the parts are disjoint.
        """
        total, ranks = self._shapes[name].numel(), dist.get_world_size()
        flat: Tensor = parameter
        start, parts = 0, [range(total)] * ranks
        if self._stage == 3:
            flats, start, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[flats]
            ends = [min(rank * padded, total) for rank in range(ranks + 1)]
            parts = [range(*ends[rank : rank + 2]) for rank in range(ranks)]
        elif self._stage:
            (flat,) = self._optimizer.param_groups[group]["params"]
            fragment = parameter._hp_mapping  # type: ignore[attr-defined]
            own = range(0)
            if fragment is not None:
                place, first = fragment.hp_fragment_address, fragment.lp_fragment_address.start
                start, own = place.start, range(first, first + place.numel)
            parts = _of_all_ranks(own, self._device)
        shape, rank = tuple(self._shapes[name]), dist.get_rank()
        return Partition(name, shape, flat, start, tuple(parts), rank)


def _whole(own: Tensor, offset: int, shape: torch.Size) -> Tensor:
    """The tensor of this shape whose parts lie on all ranks, this rank's from an offset on."""
    whole = own.new_zeros(shape.numel())
    whole[offset : offset + own.numel()] = own
    dist.all_reduce(whole)
    return whole.view(shape)


class _BoundedNorm:
    """Has DeepSpeed skip a step whose gradients' norm is too large, as if it were not finite.

    ZeRO computes the norm within its step, between the last backward and the update, and asks only
    whether it is finite. `exceeded` is the norm where the last step's was too large.
    """

    def __init__(self, zero: Any, stage: int) -> None:
        self._largest = math.inf
        self.exceeded: float | None = None
        if stage == 3:
            groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: self._bounded_groups(groups())
        elif stage and hasattr(zero, "scaled_global_norm"):
            norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda: self._bounded(norm())
        elif stage:  # the optimizer of stage 1 in bf16
            found = zero.get_grads_for_norm
            zero.get_grads_for_norm = lambda for_clipping=False: (
                found(True) if for_clipping else self._bounded_gradients(*found())
            )

    def expect(self, largest: float) -> None:
        """Say, before a step, what its norm may be at most."""
        self._largest, self.exceeded = largest, None

    def clip(self, parameters: list[nn.Parameter], clip_norm: float) -> float:
        """Stage 0: clip gradients to their global norm; drop them if the step is to be skipped.

        Returns the norm before clipping, inf if they were dropped. At stage 0 gradients are equal
        on all ranks.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(self._bounded(torch.stack([one.norm() for one in gradients]).norm()))
        if not norm < math.inf:
            for parameter in parameters:
                parameter.grad = None
            return math.inf
        if 0 < clip_norm < norm:
            for gradient in gradients:
                gradient.mul_(clip_norm / norm)
        return norm

    def _bounded(self, norm: Tensor) -> Tensor:
        """`norm`, or inf if it is too large."""
        if self._largest == math.inf:
            return norm
        # Ranks of different machines may round their norms differently.
        dist.all_reduce(norm, dist.ReduceOp.MAX)
        if not self._largest < norm < math.inf:
            return norm
        self.exceeded = float(norm)
        return torch.full_like(norm, math.inf)

    def _bounded_groups(self, norms: list[Tensor]) -> list[Tensor]:
        """The norms of groups of parameters; of one, inf, if that of all is too large."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        whole = self._bounded(combine_grad_norm_groups(norms))
        return norms if self.exceeded is None else [whole]

    def _bounded_gradients(self, gradients: list[Tensor], experts: Any) -> tuple[list[Tensor], Any]:
        """All gradients, as every rank has them; of one number, inf, if their norm is too large."""
        whole = self._bounded(torch.stack([one.float().norm() for one in gradients]).norm())
        return gradients if self.exceeded is None else [whole], experts


@contextlib.contextmanager
def _released(zero: Any, stage: int) -> Iterator[None]:
    """ZeRO-3: no parameter is gathered within; small ones stay gathered after a step."""
    if stage == 3:
        zero.checkpoint_event_prologue()
    yield
    if stage == 3:
        zero.checkpoint_event_epilogue()


def _fill(parameter: nn.Parameter, values: Tensor) -> None:
    """ZeRO-3: set what the forward gathers, a tensor beside the master, laid out as it is."""
    parameter.ds_tensor.data.view(-1)[: values.numel()].copy_(values)  # type: ignore[attr-defined]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's full shape, even if ZeRO-3 has partitioned it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _of_all_ranks(own: range, device: torch.device) -> list[range]:
    """Every rank's `own`, by rank."""
    bounds = torch.tensor([own.start, own.stop], device=device)
    found = [torch.empty_like(bounds) for _ in range(dist.get_world_size())]
    dist.all_gather(found, bounds)
    return [range(*pair.tolist()) for pair in found]


def _shared_weights(
    shapes: Mapping[str, torch.Size], checkpoint: Checkpoint, same_memory: bool
) -> list[str]:
    """The parameters of `shapes` to take from the checkpoint, see `Engine.take_weights`.

    Raises CheckpointError if they do not match.
    """
    stored = checkpoint.names()
    taken = [
        name
        for name in shapes
        if not is_of_memory(name) or (same_memory and f"{name}/param" in stored)
    ]
    own = {f"{name}/param": tuple(shapes[name]) for name in taken}
    others = {
        name: shape
        for name, shape in stored.items()
        if not name.endswith("/param") or is_of_memory(name.split("/")[0])
    }
    checkpoint.expect(others | own)
    return taken


def _repeated(row: Tensor, _: str, offset: int, length: int) -> Tensor:
    """Elements from `offset` on of a matrix whose rows are all `row`; see `Engine._set`."""
    return row[torch.arange(offset, offset + length) % len(row)]


if __name__ == "__main__":
    build_ops()
