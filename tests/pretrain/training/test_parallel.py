"""Windows shared by ranks against windows of one rank: losses, states, gradients and bytes.

The ranks are real gloo processes of this file (`_rank`), as a sequence group each.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from data_prep.dataset.settings import SettingsError
from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.config.run import LaunchConfig
from pretrain.jobs.launch import Place, leave, place_in
from pretrain.model.loss import IGNORE
from pretrain.model.memories.infini import MemoryState
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer
from pretrain.planning.simulate import ByteCounter
from pretrain.training.parallel import SequenceGroup, Share, ranks_joined
from tests.ranks import work

VOCABULARY = 19
LANES = 2
SEGMENT, SEGMENTS = 5, 8
WINDOW = SEGMENT * SEGMENTS

RULES = {
    "none": MemoryConfig(kind="none"),
    "linear": MemoryConfig(kind="linear"),
    "delta, paper": MemoryConfig(kind="delta", normaliser="paper"),
    "delta, inclusive": MemoryConfig(kind="delta", normaliser="inclusive"),
}
# Where documents start, for each of two lanes. Parts begin at 20 (of two ranks), at 10, 20 and 30
# (of four).
DOCUMENTS: dict[str, tuple[list[int], list[int]]] = {
    "one document, carried in": ([], []),
    "first tokens of parts": ([0, 10], [20, 30]),
    "last tokens of parts": ([9, 39], [19, 29]),
    "in the first part alone": ([3], [9]),
    "in the second part alone": ([12], [17, 18]),
    "in the last part alone": ([33, 38], [30]),
    "in all parts": ([2, 4, 13, 28, 36], [0, 5, 11, 15, 21, 29, 34]),
    "every token": (list(range(40)), [25]),
}
Case = tuple[str, str, Literal["none", "full"], torch.dtype]
CASES: dict[str, Case] = {
    **{
        f"{rule}; {documents}": (rule, documents, "none", torch.float64)
        for rule in ("linear", "delta, inclusive")
        for documents in DOCUMENTS
    },
    **{
        f"{rule}; in all parts": (rule, "in all parts", "none", torch.float64)
        for rule in ("none", "delta, paper")
    },
    **{
        f"{rule}; computed again": (rule, "in all parts", "full", torch.float64)
        for rule in ("linear", "delta, inclusive")
    },
    **{
        f"{rule}; float32": (rule, "in the first part alone", "none", torch.float32)
        for rule in ("linear", "delta, inclusive")
    },
}
LENGTHS = (8 << 10, 256 << 10)
LAYERS, KV_HEADS, D_HEAD = 2, 2, 6


def build(rule: str, checkpointing: Literal["none", "full"], dtype: torch.dtype) -> Transformer:
    """A small model whose every weight is random and matters."""
    config = ModelConfig(
        d_model=10, n_layers=LAYERS, n_heads=4, n_kv_heads=KV_HEADS, d_head=D_HEAD, d_ff=14,
        segment=SEGMENT, memory=RULES[rule], local_attention="sdpa",
    )  # fmt: skip
    torch.manual_seed(7)
    model = Transformer(config, VOCABULARY, checkpointing).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.4)
            if "norm" in name:
                parameter.add_(1)
    return model


def window(documents: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets (none across a boundary) and starts of a whole window."""
    tokens = torch.randint(VOCABULARY, (LANES, WINDOW + 1), generator=torch.manual_seed(1))
    starts = torch.zeros(LANES, WINDOW, dtype=torch.bool)
    for lane, places in enumerate(DOCUMENTS[documents]):
        starts[lane, places] = True
    targets = tokens[:, 1:].clone()
    targets[:, :-1][starts[:, 1:]] = IGNORE
    return tokens[:, :-1], targets, starts


def carried(model: Transformer) -> ModelState:
    """What earlier segments of a document might have left: z is a sum of features, so positive."""
    generator = torch.manual_seed(5)
    return tuple(
        MemoryState(
            torch.randn(empty.matrix.shape, generator=generator).to(empty.matrix).requires_grad_(),
            (5 + 5 * torch.rand(empty.normaliser.shape, generator=generator))
            .to(empty.normaliser)
            .requires_grad_(),
        )
        if empty  # a model without memory has nothing
        else empty
        for empty in model.initial_state(LANES, "cpu")
    )


def computed(case: Case, parts: SequenceGroup | None = None) -> dict[str, torch.Tensor]:
    """Losses, the state after the window, and every gradient of the whole window's objective.

    With `parts` the losses are those of a part and gradients its share: to be summed over ranks.
    The objective has the final state in it, a share of it from each part.
    """
    rule, documents, checkpointing, dtype = case
    model = build(rule, checkpointing, dtype)
    tokens, targets, starts = window(documents)
    count, index = (parts.count, parts.index) if parts else (1, 0)
    own = slice(index * WINDOW // count, (index + 1) * WINDOW // count)
    state = carried(model)
    output = model(tokens[:, own], starts[:, own], state, targets[:, own], parts=parts)
    final = [tensor for layer in output.state for tensor in layer]
    weighted = [tensor.flatten() @ _weights(tensor) for tensor in final]
    (output.loss + sum(weighted) / count).backward()
    found = {"losses": output.losses}
    found |= {f"state {number}": tensor for number, tensor in enumerate(final)}
    before = [tensor for layer in state for tensor in layer]
    found |= {f"d carried {number}": tensor.grad for number, tensor in enumerate(before)}
    found |= {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in found.items()}


def _weights(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-0.1, 0.1, tensor.numel(), dtype=tensor.dtype)


# What runs on the ranks.


def _rank(path: Path) -> None:
    place = place_in(os.environ)
    assert place is not None
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=place.init_method, rank=place.rank, world_size=place.size
    )
    parts = SequenceGroup(place.size)
    measured: dict[str, Any] = {
        name: _of_all(computed(case, parts)) for name, case in CASES.items()
    }
    measured["bytes"] = {
        (kind, checkpointing, length): _moved(kind, checkpointing, length, parts)
        for kind in ("linear", "delta", "none")
        for checkpointing in ("none", "full")
        for length in (LENGTHS if checkpointing == "none" else LENGTHS[:1])
        if kind != "none" or length == LENGTHS[0]
    }
    if place.rank == 0:
        torch.save(measured, path)
    dist.destroy_process_group()
    leave(0)


def _of_all(found: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Losses of all parts in a row, gradients summed, and each rank's own final state."""
    whole: dict[str, Any] = {}
    for name, tensor in found.items():
        each = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(each, tensor.contiguous())
        if name == "losses":
            whole[name] = torch.cat(each, dim=1)
        else:
            whole[name] = each if name.startswith("state") else torch.stack(each).sum(0)
    return whole


def _moved(
    kind: Literal["linear", "delta", "none"],
    checkpointing: Literal["none", "full"],
    length: int,
    parts: SequenceGroup,
) -> dict[Any, int]:
    """Bytes of each kind of collective in a forward and backward over a window of one lane."""
    config = ModelConfig(
        d_model=4, n_layers=LAYERS, n_heads=2, n_kv_heads=KV_HEADS, d_head=D_HEAD, d_ff=4,
        segment=512, memory=MemoryConfig(kind=kind), local_attention="sdpa",
    )  # fmt: skip
    model = Transformer(config, VOCABULARY, checkpointing)
    tokens = torch.zeros(1, length // parts.count, dtype=torch.int64)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    state = model.initial_state(1, "cpu")
    with ByteCounter(fake=False) as counter:
        model(tokens, starts, state, tokens, parts=parts).loss.backward()
    return counter.moved


# What is started and compared here.


alone = functools.cache(computed)


@pytest.fixture(scope="module", params=[2, 4])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of ranks, and what they found."""
    path = tmp_path_factory.mktemp("ranks") / "measured.pt"
    work(__file__, request.param, path)
    return request.param, torch.load(path)


def test_a_rank_without_a_gpu_of_its_own_says_how_many_there_are(tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    joined = dist.is_initialized()  # by another test of this process
    place = Place(5, 8, gpus, f"file://{tmp_path / 'store'}")
    expected = rf"rank 5 would have GPU {gpus} of its machine, where torch finds {gpus} GPU"
    with (
        pytest.raises(SettingsError, match=expected),
        ranks_joined(LaunchConfig(device="cuda"), place),
    ):
        pass
    assert dist.is_initialized() == joined


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_share_a_window_find_what_one_rank_finds(measured: Any, name: str) -> None:
    _, found = measured
    tolerance = 1e-12 if CASES[name][3] == torch.float64 else 1e-5
    for part, expected in alone(CASES[name]).items():
        scale = expected.abs().max()
        for value in found[name][part] if part.startswith("state") else [found[name][part]]:
            assert (value - expected).abs().max() <= tolerance * scale, part


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_carry_the_same_state_on_to_the_bit(measured: Any, name: str) -> None:
    for part, values in measured[1][name].items():
        if part.startswith("state"):
            assert all(torch.equal(value, values[0]) for value in values), part


@pytest.mark.parametrize(
    ("kind", "numbers"), [("linear", D_HEAD * (D_HEAD + 1)), ("delta", D_HEAD * (2 * D_HEAD + 1))]
)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_layer_exchanges_its_states_alone_however_long_the_window(
    measured: Any, kind: str, numbers: int, length: int
) -> None:
    ranks, found = measured
    exchanged = ranks * LAYERS * KV_HEADS * numbers * 4  # of all ranks together, float32
    flags = ranks  # once a window, whether a document starts in the part: a byte
    assert found["bytes"][kind, "none", length] == {
        ("allgather_base", ranks): exchanged + flags,
        ("reduce_scatter_base", ranks): exchanged,
    }


def test_of_the_ranks_that_share_lanes_the_first_one_owns_them() -> None:
    shares = [Share(rank, range(2, 4), part, None, torch.device("cpu"))
              for rank, part in enumerate((slice(0, 20), slice(20, 40)))]  # fmt: skip
    assert [share.owned for share in shares] == [range(2, 4), range(0)]


def test_without_memory_nothing_is_exchanged(measured: Any) -> None:
    assert measured[1]["bytes"]["none", "none", LENGTHS[0]] == {}


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_a_block_computed_again_exchanges_once_more(measured: Any, kind: str) -> None:
    ranks, found = measured
    gathered = ("allgather_base", ranks)
    once = found["bytes"][kind, "none", LENGTHS[0]]
    again = found["bytes"][kind, "full", LENGTHS[0]]
    assert again[gathered] - ranks == 2 * (once[gathered] - ranks)


if __name__ == "__main__":
    _rank(Path(sys.argv[1]))
