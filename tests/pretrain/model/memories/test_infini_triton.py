"""Triton's kernels against PyTorch's memory: outputs, states and all gradients.

On a GPU where there is one, else in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pretrain.config.memory import MemoryConfig
from pretrain.config.model import ModelConfig
from pretrain.model.local_attention import sdpa
from pretrain.model.memories.contract import Carried
from pretrain.model.memories.infini import InfiniAttention, MemoryState
from pretrain.model.memories.kinds import attention_of
from pretrain.model.window import Window

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    # The interpreter computes both sides of a `where`.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU the kernels compute in bf16 alone.
EXACT = torch.float32 if DEVICE == "cpu" else torch.bfloat16

LINEAR = MemoryConfig(kind="linear")
PAPER = MemoryConfig(kind="delta", normaliser="paper")
INCLUSIVE = MemoryConfig(kind="delta", normaliser="inclusive")
# A block of the kernels has 32 tokens: some segments are shorter than that, none is whole blocks.
SHARED_HEADS = {"segment": 37, "d_head": 16, "n_heads": 4, "n_kv_heads": 2}
USUAL_HEAD = {"segment": 33, "d_head": 64, "n_heads": 1, "n_kv_heads": 1}
ODD_SIZE = {"segment": 20, "d_head": 6, "n_heads": 3, "n_kv_heads": 1}
LARGEST_HEAD = {"segment": 20, "d_head": 128, "n_heads": 2, "n_kv_heads": 1}
CASES = {
    "linear, shared heads": (LINEAR, SHARED_HEADS),
    "delta by the paper, shared heads": (PAPER, SHARED_HEADS),
    "inclusive delta, shared heads": (INCLUSIVE, SHARED_HEADS),
    "inclusive delta, usual head": (INCLUSIVE, USUAL_HEAD),
    "inclusive delta, a size that is no power of two": (INCLUSIVE, ODD_SIZE),
    "inclusive delta, largest head": (INCLUSIVE, LARGEST_HEAD),
}


def attention(rule: MemoryConfig, shape: dict[str, int], dtype: torch.dtype) -> InfiniAttention:
    torch.manual_seed(1)
    layer = attention_of(rule)(
        ModelConfig(d_model=24, memory=replace(rule, kernel="torch"), **shape)
    )
    assert isinstance(layer, InfiniAttention)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            nn.init.normal_(weight, std=1.0 if name == "gate" else 0.4)
    return layer.to(DEVICE, dtype)


def by_triton(layer: InfiniAttention) -> InfiniAttention:
    """The same layer, from here on by our kernels."""
    memory = replace(layer.config.memory, kernel="triton")
    layer.config = replace(layer.config, memory=memory)
    return layer


def window(layer: InfiniAttention, read_memory: bool = True) -> Window:
    """A segment and a half of two lanes: several documents, and one that is carried in whole."""
    tokens = layer.config.segment * 3 // 2
    starts = torch.zeros(2, tokens, dtype=torch.bool)
    starts[0, [tokens // 3, tokens // 3 + 1, tokens - 2]] = True
    dtype = layer.q_proj.weight.dtype
    return Window.of(starts.to(DEVICE), layer.config, sdpa, dtype, read_memory)


def random_state(layer: InfiniAttention) -> MemoryState:
    heads, size = layer.config.n_kv_heads, layer.config.d_head
    generator = torch.manual_seed(5)
    matrix = torch.randn(2, heads, size, size, generator=generator)
    normaliser = 5 + 5 * torch.rand(2, heads, size, generator=generator)
    return MemoryState(matrix.to(DEVICE), normaliser.to(DEVICE))


def results(layer: InfiniAttention, layout: Window) -> dict[str, Tensor]:
    """Output and state after it, and the gradients of a weighted sum of both by all inputs."""
    layer.zero_grad()
    generator = torch.manual_seed(3)
    x = torch.randn(2, layout.tokens, 24, generator=generator)
    x = x.to(DEVICE, layer.q_proj.weight.dtype).requires_grad_()
    state = MemoryState(*(part.requires_grad_() for part in random_state(layer)))
    out, after, _ = layer(x, Carried(state), layout)
    found = {"out": out, **after._asdict()}
    weighted = (
        part.float() * torch.randn(part.shape, generator=generator).to(DEVICE)
        for part in found.values()
    )
    torch.stack([part.mean() for part in weighted]).sum().backward()
    inputs = {"x": x, **dict(layer.named_parameters()), **state._asdict()}
    gradients = {f"gradient of {name}": part.grad for name, part in inputs.items()}
    return {**{name: part.detach() for name, part in found.items()}, **gradients}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of its largest number."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        largest = float(expected.float().abs().max())
        assert largest > 0, name
        off = float((ours[name].float() - expected.float()).abs().max()) / largest
        assert off <= tolerance, f"{name}: off by {off:.1e} of its largest number"


@pytest.mark.parametrize(("rule", "shape"), CASES.values(), ids=CASES)
def test_outputs_states_and_gradients_are_those_of_pytorch(
    rule: MemoryConfig, shape: dict[str, int]
) -> None:
    layer = attention(rule, shape, EXACT)
    layout = window(layer)
    theirs = results(layer, layout)
    tolerance = 3e-2 if DEVICE == "cuda" else 1e-5
    assert_near(results(by_triton(layer), layout), theirs, tolerance)


def test_bf16_activations_give_the_float32_numbers_to_bf16_s_rounding() -> None:
    layer = attention(INCLUSIVE, SHARED_HEADS, torch.bfloat16)
    layout = window(layer)
    theirs = results(layer, layout)
    ours = results(by_triton(layer), layout)
    assert ours["matrix"].dtype == ours["normaliser"].dtype == torch.float32
    assert_near(ours, theirs, 3e-2)


def test_a_masked_read_is_the_local_attention_alone() -> None:
    layer = attention(LINEAR, SHARED_HEADS, EXACT)
    layout = window(layer, read_memory=False)
    state = random_state(layer)
    poisoned = MemoryState(state.matrix.fill_(float("inf")), state.normaliser)
    x = torch.randn(2, layout.tokens, 24, generator=torch.manual_seed(3))
    x = x.to(DEVICE, EXACT)
    expected = layer(x, Carried(random_state(layer)), layout).output
    masked = by_triton(layer)(x, Carried(poisoned), layout).output
    torch.testing.assert_close(masked, expected)


def test_an_empty_memory_reads_as_zero_with_gradients_that_are_finite() -> None:
    layer = attention(INCLUSIVE, ODD_SIZE, EXACT)
    layout = window(layer)
    state = MemoryState(*(torch.zeros_like(part) for part in random_state(layer)))
    x = torch.randn(2, layout.tokens, 24, generator=torch.manual_seed(3)).to(DEVICE, EXACT)
    expected = layer(x, Carried(state), layout).output
    out, after, _ = by_triton(layer)(x, Carried(state), layout)
    torch.testing.assert_close(out, expected)
    (out.sum() + after.matrix.sum()).backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())


def test_no_float32_copy_of_an_activation_is_kept_for_the_backward() -> None:
    layer = by_triton(attention(INCLUSIVE, SHARED_HEADS, torch.bfloat16))
    layout = window(layer)
    x = torch.randn(2, layout.tokens, 24).to(DEVICE, torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, Carried(random_state(layer)), layout)
    length, size = layout.readable.shape[2], layer.config.d_head
    of_tokens = [t.dtype for t in kept if length in t.shape and t.shape[-1] == size]
    assert of_tokens and set(of_tokens) == {torch.bfloat16}


def test_every_kernel_compiles_for_gpus_within_their_shared_memory(tmp_path: Path) -> None:
    """Without one: the interpreter takes what the compiler refuses."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from {__name__} import compile_all; compile_all(80); compile_all(90)",
        ],
        cwd=Path(__file__).parents[4],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    shared = [int(line) for line in ran.stdout.split()]
    # The least of all GPUs from Ampere on, that of compute capability 8.6 and 8.9.
    assert len(shared) == 2 * 6 and max(shared) <= 99 * 1024


def compile_all(capability: int) -> None:
    """Compile every kernel for heads of 128 in bf16; print its bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pretrain.model.memories import infini_triton

    activations = torch.empty(1, 64, 1, 128, dtype=torch.bfloat16)
    constants = infini_triton._constants(activations)
    options = {"num_warps": constants.pop("num_warps")}
    del constants["N"]
    for name, kernel in vars(infini_triton).items():
        if name.endswith(("_forward", "_backward")):
            types = {
                p.name: "constexpr" if p.is_constexpr else argument_type(p.name)
                for p in kernel.params
            }
            source = triton.compiler.ASTSource(kernel, types, constants)
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
            print(compiled.metadata.shared)


def argument_type(name: str) -> str:
    """Triton's name for the type of a kernel's argument."""
    if name in ("N", "group") or name.endswith(("_p", "_n", "_h")):
        return "i32"
    if name in ("writable", "readable"):
        return "*u8"
    activations = ("keys", "values", "queries", "local", "out")
    return "*bf16" if name.removeprefix("d_") in activations else "*fp32"
