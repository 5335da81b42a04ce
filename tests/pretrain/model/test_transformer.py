"""The model against the paper read aloud: a loop over lanes, segments, tokens and heads."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from pretrain.config import MemoryConfig, ModelConfig
from pretrain.model.loss import IGNORE
from pretrain.model.memories.infini import MemoryState
from pretrain.model.state import ModelState
from pretrain.model.transformer import Transformer

VOCABULARY = 19
SEGMENT = 5

RULES = {
    "linear": MemoryConfig(kind="linear"),
    "delta, paper": MemoryConfig(kind="delta", normaliser="paper"),
    "delta, inclusive": MemoryConfig(kind="delta", normaliser="inclusive"),
    "linear, local when empty": MemoryConfig(kind="linear", when_empty="local"),
    "none": MemoryConfig(kind="none"),
}
WITH_MEMORY = [rule for rule in RULES if rule != "none"]

# Where documents start, for each of two lanes of 23 tokens: four whole segments and a short one.
TOKENS = 23
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
    rule: str,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
    checkpointing: Literal["none", "full"] = "none",
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
            "memory": RULES[rule],
            "local_attention": "sdpa",
            **changes,
        }
    )
    torch.manual_seed(7)
    model = Transformer(config, VOCABULARY, checkpointing).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.4)
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


def random_state(model: Transformer, lanes: int = 2, seed: int = 5) -> ModelState:
    """What earlier segments of a document might have left: z is a sum of features, so positive."""
    generator = torch.manual_seed(seed)
    return tuple(
        MemoryState(
            torch.randn(empty.matrix.shape, generator=generator, dtype=empty.matrix.dtype),
            5 + 5 * torch.rand(empty.normaliser.shape, generator=generator, dtype=torch.float64),
        )
        for empty in model.initial_state(lanes, "cpu")
    )


class Naive:
    """The paper's equations, one token and one head at a time; shares no code with the model."""

    def __init__(
        self, model: Transformer, read_memory: bool = True, initial: ModelState | None = None
    ) -> None:
        self.config = model.config
        self.initial = initial
        self.first: list[Tensor] | None = None  # (M, z) that documents of a lane begin with
        self.weights = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        self.read_memory = read_memory
        self.embedded: list[Tensor] = []

    def __call__(
        self, tokens: Tensor, starts: Tensor, state: ModelState
    ) -> tuple[Tensor, list[list[tuple[Tensor, Tensor]]]]:
        """Logits [B, T, V], and M [K, D, D] and z [K, D] of each lane and layer."""
        logits, states = [], []
        for lane in range(len(tokens)):
            documents = [int(starts[lane, : t + 1].sum()) for t in range(tokens.shape[1])]
            x = self.weights["embedding.weight"][tokens[lane]]
            x.retain_grad()
            self.embedded.append(x)
            after = []
            for layer in range(self.config.n_layers):
                memory = [part[lane] for part in state[layer]] if state else None
                if self.initial:
                    self.first = [part[lane] for part in self.initial[layer]]
                x, memory = self.block(f"layers.{layer}", x, documents, memory)
                after.append(memory)
            head = self.weights.get("lm_head.weight", self.weights["embedding.weight"])
            logits.append(self.norm("norm", x) @ head.T)
            states.append(after)
        return torch.stack(logits), states

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        return x / scale * self.weights[f"{name}.weight"]

    def block(self, name: str, x: Tensor, documents: list[int], memory: Any) -> tuple[Tensor, Any]:
        attended, memory = self.attention(
            f"{name}.attention", self.norm(f"{name}.attention_norm", x), documents, memory
        )
        x = x + attended
        y = self.norm(f"{name}.feed_forward_norm", x)
        gate, up, down = (
            self.weights[f"{name}.feed_forward.{part}_proj"] for part in ("gate", "up", "down")
        )
        opened = y @ gate.T
        return x + (opened * opened.sigmoid() * (y @ up.T)) @ down.T, memory

    def attention(
        self, name: str, x: Tensor, documents: list[int], memory: Any
    ) -> tuple[Tensor, Any]:
        size, group = self.config.d_head, self.config.n_heads // self.config.n_kv_heads
        q, k, v = (x @ self.weights[f"{name}.{part}_proj.weight"].T for part in "qkv")
        outputs = []
        matrices, normalisers = [], []
        for kv_head in range(self.config.n_kv_heads):
            columns = slice(kv_head * size, (kv_head + 1) * size)
            one = None if memory is None else (memory[0][kv_head], memory[1][kv_head])
            reads, one = self.remember(
                [
                    q[:, h * size : (h + 1) * size]
                    for h in range(kv_head * group, (kv_head + 1) * group)
                ],
                k[:, columns],
                v[:, columns],
                documents,
                one,
                None if self.first is None else (self.first[0][kv_head], self.first[1][kv_head]),
            )
            if one is not None:
                matrices.append(one[0])
                normalisers.append(one[1])
            for member in range(group):
                head = kv_head * group + member
                queries = q[:, head * size : (head + 1) * size]
                local = self.local(queries, k[:, columns], v[:, columns], documents)
                if one is None:
                    outputs.append(local)
                    continue
                g = 1 / (1 + torch.exp(-self.weights[f"{name}.gate"][head]))
                pairs = zip(reads[member], local, strict=True)
                outputs.append(torch.stack([self.mixed(g, read, near) for read, near in pairs]))
        result = torch.cat(outputs, dim=-1) @ self.weights[f"{name}.o_proj.weight"].T
        after = (torch.stack(matrices), torch.stack(normalisers)) if matrices else None
        return result, after

    def mixed(self, g: Tensor, read: Tensor | None, near: Tensor) -> Tensor:
        """Of one token; `read` is None where there was nothing to read."""
        if read is None:
            return near if self.config.memory.when_empty == "local" else (1 - g) * near
        return g * read + (1 - g) * near

    def local(self, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
        rows = []
        turned_q, turned_k = ([self.turn(x[t], t % SEGMENT) for t in range(len(x))] for x in (q, k))
        for t in range(len(q)):
            first = t // SEGMENT * SEGMENT
            seen = [u for u in range(first, t + 1) if documents[u] == documents[t]]
            scores = torch.stack([turned_q[t] @ turned_k[u] for u in seen])
            weights = torch.exp(scores / math.sqrt(self.config.d_head))
            rows.append(sum(w * v[u] for w, u in zip(weights, seen, strict=True)) / weights.sum())
        return torch.stack(rows)

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Rotary embedding as complex numbers: component i is paired with i + D / 2."""
        half = len(x) // 2
        angles = [position * self.config.rope_theta ** (-2 * i / len(x)) for i in range(half)]
        turns = torch.tensor([cmath.exp(1j * angle) for angle in angles], dtype=torch.complex128)
        turned = torch.complex(x[:half], x[half:]) * turns
        return torch.cat((turned.real, turned.imag))

    def remember(
        self,
        queries: list[Tensor],
        k: Tensor,
        v: Tensor,
        documents: list[int],
        memory: Any,
        initial: Any,
    ) -> tuple[list[list[Tensor | None]], Any]:
        """What each query head reads at each token, and (M, z) after the last segment."""
        reads: list[list[Tensor | None]] = [[] for _ in queries]
        if memory is None:
            return reads, None
        matrix, z = memory
        held = 0  # documents are counted from 0, the one that was carried in
        for first in range(0, len(k), SEGMENT):
            segment = range(first, min(first + SEGMENT, len(k)))
            for t in segment:
                for head, q in enumerate(queries):
                    may = self.read_memory and documents[t] == held and bool((z != 0).any())
                    reads[head].append(self.recall(feature(q[t]), matrix, z) if may else None)
            if documents[segment[-1]] != held:
                matrix, z = initial or (0 * matrix, 0 * z)
                held = documents[segment[-1]]
            matrix, z = self.write(k, v, [t for t in segment if documents[t] == held], matrix, z)
        return reads, (matrix, z)

    def recall(self, feature_: Tensor, matrix: Tensor, z: Tensor) -> Tensor:
        if bool((z == 0).all()):
            return 0 * matrix[0]
        return (feature_ @ matrix) / (feature_ @ z)

    def write(
        self, k: Tensor, v: Tensor, tokens: list[int], matrix: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        z_after = z + sum(feature(k[t]) for t in tokens)
        after = matrix
        for t in tokens:
            value = v[t]
            if self.config.memory.kind == "delta":
                inclusive = self.config.memory.normaliser == "inclusive"
                value = value - self.recall(feature(k[t]), matrix, z_after if inclusive else z)
            after = after + torch.outer(feature(k[t]), value)
        return after, z_after


def feature(x: Tensor) -> Tensor:
    """ELU + 1."""
    return torch.where(x > 0, x + 1, torch.exp(x))


def with_gradient(state: ModelState) -> ModelState:
    return tuple(
        MemoryState(*(part.detach().clone().requires_grad_() for part in memory))
        for memory in state
    )


def weighted_sum(*results: Tensor) -> Tensor:
    """A scalar to which every number contributes differently."""
    generator = torch.manual_seed(11)
    return torch.stack(
        [
            (torch.randn(result.shape, generator=generator, dtype=result.dtype) * result).sum()
            for result in results
        ]
    ).sum()


def assert_close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert actual is not None and expected is not None, what
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}"
    )


def assert_equals_naive(
    model: Transformer,
    starts: Tensor,
    state: ModelState,
    read_memory: bool = True,
    initial: ModelState | None = None,
) -> None:
    """Logits, final state and every gradient, those of the carried state and embeddings too."""
    tokens = random_tokens()
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    hook = model.embedding.register_forward_hook(keep)
    carried = with_gradient(state)
    output = model(tokens, starts, carried, read_memory=read_memory, initial=initial)
    hook.remove()
    final = [part for memory in output.state for part in memory]
    assert output.logits is not None and output.losses is None
    weighted_sum(output.logits, *final).backward()

    naive = Naive(model, read_memory, initial)
    naive_carried = with_gradient(state)
    logits, states = naive(tokens, starts, naive_carried)
    naive_final = [
        torch.stack([lane[layer][part] for lane in states])
        for layer in range(len(state))
        for part in (0, 1)
    ]
    weighted_sum(logits, *naive_final).backward()

    assert_close(output.logits, logits, "logits")
    for ours, theirs in zip(final, naive_final, strict=True):
        assert_close(ours, theirs, "final state")
    for name, parameter in model.named_parameters():
        expected = naive.weights[name].grad
        # Where the naive loop never read a gate, ours multiplied it by 0.
        assert_close(
            parameter.grad, torch.zeros_like(parameter) if expected is None else expected, name
        )
    assert_close(
        embedded[0].grad, torch.stack([x.grad for x in naive.embedded]), "input embeddings"
    )
    for ours_in, theirs_in in zip(carried, naive_carried, strict=True):
        for a, b in zip(ours_in, theirs_in, strict=True):
            expected = torch.zeros_like(b) if b.grad is None else b.grad
            assert_close(a.grad, expected, "carried state")


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_parallel_window_equals_the_loop_over_segments(rule: str, documents: str) -> None:
    model = build(rule)
    assert_equals_naive(model, starts_at(*DOCUMENTS[documents]), random_state(model))


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("rule", WITH_MEMORY)
def test_documents_begin_with_the_initial_memory(rule: str, documents: str) -> None:
    model = build(rule)
    initial = random_state(model, seed=6)
    assert_equals_naive(model, starts_at(*DOCUMENTS[documents]), random_state(model), True, initial)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("rule", ["linear", "delta, inclusive"])
def test_query_heads_share_key_value_heads_in_order(rule: str, heads: tuple[int, int]) -> None:
    model = build(rule, heads)
    assert_equals_naive(model, starts_at(*DOCUMENTS["random places"]), random_state(model))


@pytest.mark.parametrize("rule", WITH_MEMORY)
def test_an_empty_memory_reads_as_zero_with_finite_gradients(rule: str) -> None:
    model = build(rule)
    starts = starts_at(*DOCUMENTS["one document, carried in"])
    assert_equals_naive(model, starts, model.initial_state(2, "cpu"))


@pytest.mark.parametrize("rule", ["linear", "delta, inclusive"])
def test_a_masked_read_equals_the_loop_that_reads_zero(rule: str) -> None:
    model = build(rule)
    starts = starts_at(*DOCUMENTS["random places"])
    assert_equals_naive(model, starts, random_state(model), read_memory=False)


def test_untied_embeddings_have_a_weight_of_their_own() -> None:
    model = build("linear", tied_embeddings=False)
    assert "lm_head.weight" in dict(model.named_parameters())
    assert_equals_naive(model, starts_at([3], []), random_state(model))


def logits_of(
    model: Transformer,
    tokens: Tensor,
    starts: Tensor,
    state: ModelState | None = None,
    read_memory: bool = True,
) -> Tensor:
    with torch.no_grad():
        carried = random_state(model, len(tokens)) if state is None else state
        output = model(tokens, starts, carried, read_memory=read_memory)
    return output.logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("rule", RULES)
def test_a_token_changes_nothing_before_it(rule: str) -> None:
    model, tokens = build(rule), random_tokens(1)
    starts = starts_at([8, 17])
    before = logits_of(model, tokens, starts)
    for t in range(TOKENS):
        changed = tokens.clone()
        changed[0, t] = (tokens[0, t] + 1) % VOCABULARY
        after = logits_of(model, changed, starts)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("rule", RULES)
def test_another_document_changes_nothing(rule: str) -> None:
    model, tokens = build(rule), random_tokens(1)
    first_tokens = [0, 3, 4, 10, 19, TOKENS]
    starts = starts_at(first_tokens[:-1])
    before = logits_of(model, tokens, starts)
    for first, end in itertools.pairwise(first_tokens):
        changed = tokens.clone()
        changed[0, first:end] = (tokens[0, first:end] + 1) % VOCABULARY
        differs = (logits_of(model, changed, starts) != before).any(dim=2)[0]
        assert differs[first:end].all()
        assert not differs[:first].any() and not differs[end:].any()


@pytest.mark.parametrize("rule", WITH_MEMORY)
def test_the_carried_memory_reaches_its_own_document_alone(rule: str) -> None:
    model, tokens = build(rule), random_tokens(1)
    starts = starts_at([12])
    other = tuple(MemoryState(m + 1, z + 1) for m, z in random_state(model, 1))
    differs = (logits_of(model, tokens, starts) != logits_of(model, tokens, starts, other)).any(2)
    assert differs[0, :12].all() and not differs[0, 12:].any()


@pytest.mark.parametrize("rule", RULES)
def test_an_earlier_segment_speaks_through_memory_alone(rule: str) -> None:
    model, tokens = build(rule), random_tokens(1)
    starts = starts_at([0])
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % VOCABULARY

    def reached(read_memory: bool) -> Tensor:
        old, new = (logits_of(model, x, starts, None, read_memory) for x in (tokens, changed))
        return (old != new).any(dim=2)[0, SEGMENT:]

    assert reached(True).all() == (rule != "none")
    assert not reached(False).any()


@pytest.mark.parametrize("rule", RULES)
def test_windows_fed_one_after_another_equal_one_long_window(rule: str) -> None:
    model, tokens = build(rule), random_tokens()
    starts = starts_at([6, 7, 15], [10])
    whole = model(tokens, starts, random_state(model))
    state, pieces = random_state(model), []
    for now, first in zip(tokens.split([10, 5, 8], 1), starts.split([10, 5, 8], 1), strict=True):
        output = model(now, first, state)
        state = output.state
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), whole.logits, "logits")
    for ours, theirs in zip(state, whole.state, strict=True):
        assert_close(ours.matrix, theirs.matrix, "matrix")
        assert_close(ours.normaliser, theirs.normaliser, "normaliser")


@pytest.mark.parametrize(
    "chunks",
    [
        [33],
        [1] * 33,
        [3, 20, 1, 1, 8],
        [5, 5, 5, 5, 5, 5, 3],
        [4, 1, 6, 19, 3],
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES)
def test_streamed_logits_equal_the_whole_document_s(rule: str, chunks: list[int]) -> None:
    model = build(rule, dtype=torch.float32)
    tokens = random_tokens(2, 33)
    whole = logits_of(model, tokens, starts_at([0], [0], length=33), model.initial_state(2, "cpu"))
    stream, pieces = model.open_stream(2, "cpu"), []
    for now in tokens.split(chunks, dim=1):
        logits, stream = model.extend(now, stream)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_a_stream_takes_the_same_space_at_any_length() -> None:
    model = build("delta, inclusive", dtype=torch.float32)

    def numbers(length: int) -> int:
        _, stream = model.extend(random_tokens(1, length), model.open_stream(1, "cpu"))
        kept = [x for layer in stream.layers for x in (*layer.memory, *layer[1:])]  # type: ignore[misc]
        return sum(x.untyped_storage().nbytes() for x in kept)

    assert numbers(SEGMENT * 40 + 3) == numbers(SEGMENT + 3)


@pytest.mark.parametrize("rule", RULES)
def test_checkpointed_activations_give_the_same_gradients_to_the_bit(rule: str) -> None:
    tokens, starts = random_tokens(), starts_at([6, 7, 15], [10])

    def gradients(checkpointing: Literal["none", "full"]) -> list[Tensor]:
        model = build(rule, checkpointing=checkpointing)
        carried = with_gradient(random_state(model))
        output = model(tokens, starts, carried, tokens)
        weighted_sum(output.loss, *(part for memory in output.state for part in memory)).backward()
        inputs = [*model.parameters(), *(part for memory in carried for part in memory)]
        return [x.grad for x in inputs if x.grad is not None]

    plain, again = gradients("none"), gradients("full")
    assert len(plain) >= 20
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_long_window_is_computed_again_in_chunks_with_the_same_gradients(rule: str) -> None:
    # Two lanes of 16,403 tokens: a chunk of 16,384, and 19 that a document begins with.
    length = 2**14 + 19
    tokens = random_tokens(length=length)
    starts = starts_at([6, 2**14], [10, 9_001, 2**14 + 5], length=length)

    def results(checkpointing: Literal["none", "full"]) -> list[Tensor]:
        model = build(rule, checkpointing=checkpointing)
        carried = with_gradient(random_state(model))
        output = model(tokens, starts, carried, tokens)
        after = [part for memory in output.state for part in memory]
        weighted_sum(output.loss, *after).backward()
        inputs = [*model.parameters(), *(part for memory in carried for part in memory)]
        return [output.losses, *after, *(x.grad for x in inputs if x.grad is not None)]

    torch.testing.assert_close(results("full"), results("none"), rtol=1e-9, atol=1e-9)
    model = build(rule, checkpointing="full")
    state = model.initial_state(2, "cpu")
    calls = calls_of(model, lambda: model(tokens, starts, state, tokens).loss.backward())
    assert calls.count("layers.1.attention.q_proj") == 2 * 2


def test_losses_are_those_of_the_logits() -> None:
    model, tokens = build("linear"), random_tokens()
    starts = starts_at([6], [10])
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE
    output = model(tokens, starts, model.initial_state(2, "cpu"), targets)
    logits = logits_of(model, tokens, starts, model.initial_state(2, "cpu"))
    expected = -logits.log_softmax(2).gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    expected[:, -1] = 0
    assert output.logits is None
    assert_close(output.losses, expected, "losses")


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


def test_every_module_runs_once_a_window_whatever_the_data() -> None:
    model, tokens = build("delta, inclusive"), random_tokens()
    state = random_state(model)
    expected = [name for name, module in model.named_modules() if name != "layers"]
    for places in DOCUMENTS.values():
        calls = calls_of(model, lambda p=places: model(tokens, starts_at(*p), state, tokens))
        assert sorted(calls) == sorted(expected)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_read_only_inside_the_module_that_owns_them(tied: bool) -> None:
    """As under ZeRO-3: outside the forward of its owner, a weight is empty."""
    model, tokens = build("delta, inclusive", tied_embeddings=tied), random_tokens()
    starts = starts_at([6], [10])
    state = model.initial_state(2, "cpu")
    expected = logits_of(model, tokens, starts, state)
    streamed, _ = model.extend(tokens, model.open_stream(2, "cpu"))

    full = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in full:
        parameter.data = torch.empty(0, dtype=parameter.dtype)

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    assert torch.equal(logits_of(model, tokens, starts, state), expected)
    assert torch.equal(model.extend(tokens, model.open_stream(2, "cpu"))[0], streamed)


def test_full_checkpointing_computes_each_block_again_in_the_backward() -> None:
    tokens, starts = random_tokens(), starts_at([6], [10])

    def runs(checkpointing: Literal["none", "full"]) -> int:
        model = build("linear", checkpointing=checkpointing)
        state = model.initial_state(2, "cpu")
        calls = calls_of(model, lambda: model(tokens, starts, state, tokens).loss.backward())
        return calls.count("layers.1.attention.q_proj")

    assert (runs("none"), runs("full")) == (1, 2)


def test_gates_start_where_the_configuration_says_and_only_where_there_is_memory() -> None:
    config = ModelConfig(memory=MemoryConfig(kind="linear", initial_gate=-1.5), n_layers=2)
    gates = {
        name: p for name, p in Transformer(config, 11).named_parameters() if name.endswith("gate")
    }
    assert len(gates) == 2
    for gate in gates.values():
        assert gate.dtype == torch.float32
        assert torch.equal(gate, torch.full((config.n_heads,), -1.5))
    without = Transformer(ModelConfig(memory=MemoryConfig(kind="none")), 11)
    assert not [name for name, _ in without.named_parameters() if name.endswith("gate")]
    assert without.initial_state(3, "cpu") == ()


def test_initial_weights_follow_the_seed_and_shrink_into_the_residual_stream() -> None:
    config = ModelConfig(d_model=128, n_layers=8, init_std=0.03, tied_embeddings=False)

    def initial(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return dict(Transformer(config, 500).named_parameters())

    first, again, other = initial(1), initial(1), initial(2)
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.dim() == 2:
            assert not torch.equal(weight, other[name])
            residual = "o_proj" in name or "down_proj" in name
            expected = 0.03 / 4 if residual else 0.03
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name


def test_a_bf16_model_keeps_its_memory_in_float32() -> None:
    model = build("delta, inclusive", dtype=torch.bfloat16)
    tokens = random_tokens()
    output = model(tokens, starts_at([6], []), model.initial_state(2, "cpu"), tokens)
    assert output.losses.dtype == torch.float32
    assert {part.dtype for memory in output.state for part in memory} == {torch.float32}
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    exact = build("delta, inclusive")
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    expected = exact(tokens, starts_at([6], []), exact.initial_state(2, "cpu"), tokens)
    assert output.losses.mean().item() == pytest.approx(expected.losses.mean().item(), rel=0.02)
