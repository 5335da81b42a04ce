"""Small models whose every weight matters, and what tests do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.state import ModelState, mapped
from pretrain.model.transformer import Transformer

VOCABULARY = 19
SEGMENT = 5
# Of a window: four whole segments and a short one.
TOKENS = 23

# Where documents start, for each of two lanes of a window.
DOCUMENTS: dict[str, tuple[list[int], list[int]]] = {
    "one document, carried in": ([], []),
    "first tokens of a window and of segments": ([0], [5, 20]),
    "last tokens of segments and of the window": ([4, 14], [9, 22]),
    "several in a segment": ([6, 7, 9], [0, 1, 2, 3, 4, 21]),
    "every token": (list(range(23)), [12]),
    "random places": ([2, 11, 18], [7, 8, 16]),
    "other random places": ([13], [3, 10, 11, 19]),
}


def build(
    memory: MemoryConfig,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    checkpointing: Literal["none", "full"] = "none",
    std: float = 0.4,
    **changes: Any,
) -> Transformer:
    """A small model whose every weight, norms and gates included, is random and matters."""
    config = ModelConfig(
        **{
            "d_model": 10,
            "n_layers": 2,
            "n_heads": heads[0],
            "n_kv_heads": heads[1],
            "d_head": 6,
            "d_ff": 14,
            "segment": SEGMENT,
            "qkv_bias": True,
            "qk_norm": True,
            "memory": memory,
            "local_attention": "sdpa",
            **changes,
        }
    )
    torch.manual_seed(7)
    model = Transformer(config, VOCABULARY, checkpointing).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std)
            if "norm" in name:
                parameter.add_(1)
    return model


def random_tokens(lanes: int = 2, length: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (lanes, length), generator=torch.manual_seed(seed))


def starts_at(*places: list[int], length: int = TOKENS) -> Tensor:
    starts = torch.zeros(len(places), length, dtype=torch.bool)
    for lane, tokens in enumerate(places):
        starts[lane, tokens] = True
    return starts


def with_gradient(state: ModelState) -> ModelState:
    """A copy of the state whose numbers, though not its flags and counts, require gradients."""
    return tuple(
        mapped(lambda part: part.detach().clone().requires_grad_(part.is_floating_point()), memory)
        for memory in state
    )


def weighted_sum(*results: Tensor) -> Tensor:
    """A scalar to which every number contributes differently; flags and counts do not."""
    generator = torch.manual_seed(11)
    return torch.stack(
        [
            (torch.randn(result.shape, generator=generator, dtype=result.dtype) * result).sum()
            for result in results
            if result.is_floating_point()
        ]
    ).sum()


def assert_close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert actual is not None and expected is not None, what
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}"
    )


def calls_of(model: Transformer, run: Callable[[], Any]) -> list[str]:
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def empty_weights_outside_their_modules(model: Transformer) -> None:
    """As under ZeRO-3: from now on a weight is empty outside the forward of the module that owns
    it."""
    full = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
