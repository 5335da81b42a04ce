"""The seam of the local attention: which kernel, and the cuts that each of them makes."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.model import local_attention
from pretrain.model.local_attention import KernelError, Past, flash, varlen

needs_no_flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed"
)
needs_flash = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs a GPU and flash_attn",
)

STARTS = {
    "none": [],
    "a segment's first token": [0, 14],
    "a segment's last token": [6, 13],
    "several": [1, 2, 5, 9, 24],
    "in every segment": [3, 8, 19, 27],
    "every token": list(range(28)),
}


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    local_attention.choose.cache_clear()
    yield
    local_attention.choose.cache_clear()


def segments(starts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Starts [4, 7], queries [4, 7, 4, 6], keys and values [4, 7, 2, 6], float64."""
    generator = torch.manual_seed(1)
    marks = torch.zeros(28, dtype=torch.bool)
    marks[starts] = True
    queries, keys, values = (
        torch.randn(4, 7, heads, 6, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    return marks.view(4, 7), queries, keys, values


def piece_by_piece(offsets: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What flash-attn's documentation says of `cu_seqlens`: each sequence by itself, causal."""
    pieces = []
    for first, end in itertools.pairwise(offsets):
        one = (x.flatten(0, 1)[first:end].transpose(0, 1) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        pieces.append(attended.transpose(0, 1))
    return torch.cat(pieces).view(q.shape)


@pytest.mark.parametrize("places", STARTS.values(), ids=STARTS)
def test_the_pieces_of_flash_attn_are_those_of_the_mask(places: list[int]) -> None:
    starts, *inputs = segments(places)
    offsets = local_attention.sequence_offsets(starts)
    assert offsets.dtype == torch.int32
    masked = local_attention.sdpa(starts)(*inputs)
    pieces = piece_by_piece(offsets.tolist(), *inputs)
    torch.testing.assert_close(masked, pieces, rtol=1e-12, atol=1e-12)
    weights = torch.randn(masked.shape, generator=torch.manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad(masked, inputs, weights)
    theirs = torch.autograd.grad(pieces, inputs, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_offsets_are_segment_ends_and_document_starts() -> None:
    starts, *_ = segments([0, 3, 13])
    assert local_attention.sequence_offsets(starts).tolist() == [0, 3, 7, 13, 14, 21, 28]


SLOTS = {
    "all": [[True] * 3] * 4,
    "none": [[False] * 3] * 4,
    "some": [[True] * 3, [False, True, True], [False] * 3, [True, False, True]],
}


def with_past(places: list[int], slots: list[list[bool]]) -> tuple[Tensor, Past, list[Tensor]]:
    """Starts [4, 7]; 3 slots, which the tokens before a segment's first start see, but those of the
    third segment; queries [4, 7, 4, 6], keys and values [4, 3 + 7, 2, 6], float64."""
    starts, queries, keys, values = segments(places)
    generator = torch.manual_seed(3)
    older = torch.randn(2, 4, 3, 2, 6, generator=generator, dtype=torch.float64)
    readers = starts.cumsum(dim=1) == 0
    readers[2] = False
    inputs = [
        queries,
        *(torch.cat(pair, dim=1) for pair in zip(older, (keys, values), strict=True)),
    ]
    past = Past(torch.tensor(slots), readers)
    return starts, past, [x.detach().requires_grad_() for x in inputs]


def one_by_one(starts: Tensor, past: Past, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query over what it sees."""
    rows = []
    for p, t, head in itertools.product(range(4), range(7), range(4)):
        own = [u for u in range(t + 1) if not starts[p, u + 1 : t + 1].any()]
        seen = [slot for slot in range(3) if past.slots[p, slot] and past.readers[p, t]]
        seen += [3 + u for u in own]
        weights = (k[p, seen, head // 2] @ q[p, t, head] / 6**0.5).softmax(dim=0)
        rows.append(weights @ v[p, seen, head // 2])
    return torch.stack(rows).view(q.shape)


def sequence_by_sequence(starts: Tensor, past: Past, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What flash-attn's documentation says of a sequence with more keys than queries: the causal
    mask is that of the last queries."""
    rows, key_offsets = local_attention.sequence_offsets_of_past(starts, past)
    assert key_offsets.dtype == torch.int32
    offsets = local_attention.sequence_offsets(starts)
    assert len(rows) == key_offsets[-1] and len(offsets) == len(key_offsets)
    pieces = []
    for of_queries, of_keys in zip(
        itertools.pairwise(offsets.tolist()), itertools.pairwise(key_offsets.tolist()), strict=True
    ):
        one = [q.flatten(0, 1)[slice(*of_queries)]]
        one += [x.flatten(0, 1)[rows][slice(*of_keys)] for x in (k, v)]
        shape = len(one[0]), len(one[1])
        mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
        attended = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in one), attn_mask=mask, enable_gqa=True
        )
        pieces.append(attended.transpose(0, 1))
    return torch.cat(pieces).view(q.shape)


@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("places", STARTS.values(), ids=STARTS)
def test_slots_of_the_past_are_seen_where_they_hold_something_by_those_who_may(
    places: list[int], slots: list[list[bool]]
) -> None:
    starts, past, inputs = with_past(places, slots)
    masked = local_attention.sdpa(starts, past)(*inputs)
    weights = torch.randn(masked.shape, generator=torch.manual_seed(2), dtype=torch.float64)
    ours = torch.autograd.grad(masked, inputs, weights)
    for other in (one_by_one, sequence_by_sequence):
        expected = other(starts, past, *inputs)
        torch.testing.assert_close(masked, expected, rtol=1e-12, atol=1e-12)
        theirs = torch.autograd.grad(expected, inputs, weights)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_slots_that_every_token_sees_need_one_mask_for_all_segments() -> None:
    starts, past, inputs = with_past([], SLOTS["all"])
    past = past._replace(readers=torch.ones_like(past.readers))
    masks = []

    def attend(*given: Tensor, attn_mask: Tensor, **_: object) -> Tensor:
        masks.append(attn_mask)
        return given[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        local_attention.sdpa(starts, past)(*inputs)
    assert [mask.shape for mask in masks] == [(1, 1, 7, 10)]


def test_the_mask_lets_a_token_see_its_own_document_before_it() -> None:
    starts = torch.tensor([[False, False, True, False]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert local_attention.same_document_mask(starts)[0, 0].int().tolist() == expected


@pytest.mark.parametrize("new", [1, 2, 7])
def test_the_newest_tokens_attend_as_in_the_whole_segment(new: int) -> None:
    starts, queries, keys, values = segments([])
    whole = local_attention.sdpa(starts)(queries, keys, values)
    # Of a buffer for 10 tokens whose last 3 are not there yet.
    buffers = [F.pad(x, (0, 0, 0, 0, 0, 3), value=9.0) for x in (keys, values)]
    visible = torch.arange(10) <= torch.arange(7 - new, 7)[:, None]
    last = local_attention.attend_to_visible(queries[:, -new:], *buffers, visible)
    torch.testing.assert_close(last, whole[:, -new:], rtol=1e-12, atol=1e-12)


def test_heads_are_not_shared_where_a_gpu_would_hold_all_scores() -> None:
    takes = local_attention.takes_shared_heads
    assert takes("cuda", torch.bfloat16, masked=False)
    assert not takes("cuda", torch.bfloat16, masked=True)
    assert not takes("cuda", torch.float32, masked=False)
    assert takes("cpu", torch.float32, masked=True)


def test_shared_heads_given_to_each_of_their_group_attend_the_same() -> None:
    starts, *shared = segments([3, 9])
    queries, *others = (x.detach().clone().requires_grad_() for x in shared)
    repeated = [local_attention.for_each_head(x, 4) for x in others]
    assert [x.shape for x in repeated] == [queries.shape] * 2
    assert local_attention.for_each_head(queries, 4) is queries
    mask = local_attention.same_document_mask(starts)
    # PyTorch's own, whose query heads each have keys and values.
    turned = (x.transpose(1, 2) for x in (queries, *repeated))
    found = F.scaled_dot_product_attention(*turned, attn_mask=mask).transpose(1, 2)
    expected = local_attention.sdpa(starts)(*shared)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip((queries, *others), shared, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_a_fused_kernel_on_cpu_is_refused_with_what_to_do(name: Any) -> None:
    expected = rf"{name} was requested.*needs a CUDA GPU and the model is on cpu.*sdpa.*auto"
    with pytest.raises(KernelError, match=expected):
        local_attention.choose(name, "cpu", torch.bfloat16, 64)


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_a_fused_kernel_in_float32_is_refused(name: Any) -> None:
    with pytest.raises(KernelError, match=r"bf16 or fp16 and the model is in torch\.float32"):
        local_attention.choose(name, "cuda", torch.float32, 64)


def test_a_size_of_heads_that_torch_s_kernel_does_not_take_is_refused() -> None:
    with pytest.raises(KernelError, match="at most 256, in multiples of 8, found d_head=60"):
        local_attention.choose("varlen", "cuda", torch.bfloat16, 60)


@needs_no_flash
def test_a_kernel_that_is_not_installed_is_an_obstacle() -> None:
    reason = local_attention.tried(flash, torch.device("cpu"), torch.bfloat16, 64)
    assert reason is not None and reason.startswith(
        "cannot be imported (No module named 'flash_attn'"
    )


def test_a_kernel_that_fails_on_one_token_is_an_obstacle_and_one_that_does_not_is_none() -> None:
    # torch's own cannot run on a CPU, as one built for other GPUs cannot run on this one.
    device = torch.device("cpu")
    reason = local_attention.tried(varlen, device, torch.bfloat16, 64)
    assert reason is not None and "fails on one token with heads of 64" in reason
    assert "\n" not in reason
    with torch.no_grad():
        assert local_attention.tried(local_attention.sdpa, device, torch.bfloat16, 64) is None


def test_auto_logs_once_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        taken = [local_attention.choose("auto", "cpu", torch.float32, 64) for _ in range(3)]
    assert taken == [local_attention.sdpa] * 3
    (record,) = caplog.records
    assert "SDPA" in record.getMessage() and "cpu" in record.getMessage()


ABLE = {"flash": ["flash", "varlen"], "varlen": ["varlen"], "sdpa": []}


@pytest.mark.parametrize("able", ABLE.values(), ids=ABLE)
def test_auto_takes_the_first_that_can_run_and_says_why_not_an_earlier_one(
    able: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        local_attention, "_obstacle", lambda name, *_: None if name in able else f"lacks {name}"
    )
    with caplog.at_level(logging.INFO):
        taken = local_attention.choose("auto", "cuda", torch.bfloat16, 64)
    assert taken is getattr(local_attention, [*able, "sdpa"][0])
    message = caplog.records[0].getMessage()
    assert ("lacks flash" in message) == ("flash" not in able)
    assert ("lacks varlen" in message) == (able == [])


def test_sdpa_asked_for_is_taken_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert local_attention.choose("sdpa", "cuda", torch.bfloat16, 64) is local_attention.sdpa
    assert not caplog.records


# What torch's varlen_attn is given, here in place of the kernel, which needs a GPU.


def stand_in(given: list[dict[str, Any]]) -> Callable[..., Tensor]:
    """What the documentation of torch's varlen_attn says, each sequence by itself; its arguments,
    bound to the real signature, are added to `given`."""
    signature = inspect.signature(torch_varlen.varlen_attn)

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given.append(bound.arguments)
        q, k, v = (bound.arguments[name] for name in ("query", "key", "value"))
        pieces = []
        for of_queries, of_keys in zip(
            *(itertools.pairwise(bound.arguments[n].tolist()) for n in ("cu_seq_q", "cu_seq_k")),
            strict=True,
        ):
            one = [q[slice(*of_queries)], k[slice(*of_keys)], v[slice(*of_keys)]]
            shape = len(one[0]), len(one[1])
            mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
            heads = (x.transpose(0, 1) for x in one)
            attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
            pieces.append(attended.transpose(0, 1))
        return torch.cat(pieces)

    attend.__kwdefaults__ = torch_varlen.varlen_attn.__kwdefaults__
    return attend


@pytest.mark.parametrize("slots", [None, *SLOTS.values()], ids=["no past", *SLOTS])
@pytest.mark.parametrize("places", STARTS.values(), ids=STARTS)
def test_what_torch_s_varlen_attn_is_given_is_causal_attention_inside_documents(
    places: list[int], slots: list[list[bool]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in(given))
    past: Past | None = None
    if slots is None:
        starts, *inputs = segments(places)
    else:
        starts, past, inputs = with_past(places, slots)
    ours = varlen(starts, past)(*inputs)
    theirs = local_attention.sdpa(starts, past)(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (one,) = given
    assert one["cu_seq_q"].dtype == one["cu_seq_k"].dtype == torch.int32
    assert one["window_size"] == (-1, 0)
    assert one.get("enable_gqa", True)  # torch 2.11's has no such argument
    for name, longest in (("cu_seq_q", one["max_q"]), ("cu_seq_k", one["max_k"])):
        assert int(one[name].diff().max()) <= longest
    assert (one["max_q"], one["max_k"]) == ((7, 7) if slots is None else (7, 10))
    assert one["scale"] is None and one["return_aux"] is None


def test_keys_and_values_are_not_copied_where_every_slot_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in(given))
    starts, past, inputs = with_past([], SLOTS["all"])
    for readers, copied in ((torch.ones_like(past.readers), False), (past.readers, True)):
        seen = past._replace(readers=readers)
        ours, theirs = (kernel(starts, seen)(*inputs) for kernel in (varlen, local_attention.sdpa))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for name, x in zip(("key", "value"), inputs[1:], strict=True):
            assert (given[-1][name].data_ptr() != x.data_ptr()) == copied


def test_torch_s_varlen_attn_itself_takes_these_arguments_forward_and_backward() -> None:
    starts, *_ = segments([3, 9])
    attend = varlen(starts)
    with FakeTensorMode(allow_non_fake_inputs=True):  # its shapes, without the kernel
        inputs = [
            torch.empty(4, 7, heads, 64, dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        attended = attend(*inputs)
        attended.sum().backward()
    assert attended.shape == (4, 7, 4, 64)
    assert [x.grad.shape for x in inputs if x.grad is not None] == [x.shape for x in inputs]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("slots", [None, *SLOTS.values()], ids=["no past", *SLOTS])
@pytest.mark.parametrize("places", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("name", [pytest.param("flash", marks=needs_flash),
                                  pytest.param("varlen", marks=needs_gpu)])  # fmt: skip
def test_flash_attention_on_a_gpu_equals_sdpa(
    name: str, places: list[int], slots: list[list[bool]] | None
) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    past: Past | None = None
    if slots is None:
        starts, *_ = segments(places)
    else:
        starts, past, _ = with_past(places, slots)
        past = Past(*(x.cuda() for x in past))
    starts = starts.cuda()
    keys = 7 if slots is None else 10
    inputs = [
        torch.randn(4, length, heads, 64, generator=generator, device="cuda").bfloat16()
        for length, heads in ((7, 4), (keys, 2), (keys, 2))
    ]
    for x in inputs:
        x.requires_grad_()
    ours = getattr(local_attention, name)(starts, past)(*inputs)
    theirs = local_attention.sdpa(starts, past)(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    gradients = (torch.autograd.grad(out.float().square().sum(), inputs) for out in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=5e-2, atol=5e-2)


@needs_gpu
def test_auto_on_a_gpu_takes_flash_attention() -> None:
    taken = local_attention.choose("auto", "cuda", torch.bfloat16, 64)
    assert taken in (flash, varlen)
