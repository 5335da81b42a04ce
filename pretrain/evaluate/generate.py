"""Continuing a text of any length in constant space: memories, and the open segment's KV cache.

Tokens are sampled on the CPU with a separate generator, so that a seed gives the same tokens on any
device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.tokenizer.contract import StreamDecoder, Tokenizer
from pretrain.config.run import Weights
from pretrain.evaluate.progress import TokenProgress, to_stderr
from pretrain.evaluate.questions import EvaluationError, ResultError, Sampling
from pretrain.model.decoding import Decoder
from pretrain.model.stream import StreamState
from pretrain.trained import Trained, default_device, load

# Tokens that are read at once, and logits that are in memory at once, unless a span has more.
_CHUNK_TOKENS = 2**13
_CHUNK_LOGITS = 2**24


def run(
    path: Path,
    *,
    prompt: str = "",
    prompt_file: str | None = None,
    sampling: Sampling,
    weights: Weights = "last",
) -> int:
    """Continue `prompt`, or the text of `prompt_file` ("-": stdin), on stdout; the exit code, 0.

    Raises EvaluationError and what `load` raises.
    """
    text = _text(prompt, prompt_file)
    trained = load(path, default_device(), weights)
    if names := _special_in(text, trained.tokenizer):
        to_stderr(
            f"in the prompt {', '.join(names)} is text, as in training, and no special token; to "
            "ask a model of chats as its template does, export it and use transformers"
        )
    if change := trained.tokenizer.changed(text):
        to_stderr(
            f"the tokenizer does not give the prompt back, and the model reads it so: {change}"
        )
    for piece in generate(trained, trained.tokenizer.encode(text), sampling, to_stderr):
        print(piece, end="", flush=True)
    print()
    return 0


def generate(
    trained: Trained,
    prompt_ids: Sequence[int] | np.ndarray,
    sampling: Sampling,
    report: Callable[[str], None],
) -> Iterator[str]:
    """The text after the prompt, in parts as soon as each is whole UTF-8, ending before EOS.

    `prompt_ids` hold no BOS: it is put before them, as in training. `report` is given progress
    lines of a long prompt. Raises EvaluationError and ResultError.
    """
    text_decoder = StreamDecoder(trained.tokenizer)
    for id in prompt_ids:
        text_decoder.push(int(id))
    logits, stream = prefill(trained, prompt_ids, report)
    for token in sampled(trained, logits, stream, sampling):
        if text := text_decoder.push(token):
            yield text
    if text := text_decoder.finish():
        yield text


def sampled(
    trained: Trained, logits: Tensor, stream: StreamState, sampling: Sampling
) -> Iterator[int]:
    """The tokens, one by one, after a stream and its `logits` [V], ending before EOS.

    The stream is used up. Raises ResultError where a logit is not finite.
    """
    decoder = Decoder(trained.model, stream)
    generator = torch.Generator().manual_seed(sampling.seed)
    for left in reversed(range(sampling.max_tokens)):
        token = _choose(logits, sampling, generator)
        if token in trained.ends:
            return
        yield token
        if left:
            logits = decoder.step(torch.tensor([token], device=trained.device))[0]


def prefill(
    trained: Trained, prompt_ids: Sequence[int] | np.ndarray, report: Callable[[str], None]
) -> tuple[Tensor, StreamState]:
    """The logits [V] after BOS and the prompt, and the stream there.

    Raises EvaluationError where there is nothing to continue.
    """
    bos = trained.tokenizer.bos_id
    laid_out = np.concatenate([[] if bos is None else [bos], prompt_ids]).astype(np.int64)
    if not len(laid_out):
        raise EvaluationError(
            "the prompt is empty, and this run's tokenizer has no BOS to begin a text with; "
            "give a prompt"
        )
    progress = TokenProgress("prompt", len(laid_out), report)
    return read(trained, laid_out, trained.model.open_stream(1, trained.device), progress)


def read(
    trained: Trained, tokens: np.ndarray, stream: StreamState, progress: TokenProgress
) -> tuple[Tensor, StreamState]:
    """The logits [V] after a stream and `tokens` [n], n > 0, and the stream behind them.

    There are no logits of the tokens before the last one: with a small model those of all would
    take half of the time.
    """
    span = trained.config.model.span
    size = span * max(1, min(_CHUNK_TOKENS, trained.config.window) // span)
    *earlier, final = _chunks(trained, tokens, size)
    for chunk in earlier:
        stream = trained.model.read(chunk, stream)
        progress.add(chunk.shape[1])
    logits, stream = trained.model.extend(final, stream, last=True)
    progress.add(final.shape[1])
    return logits[0, -1], stream


def extended(
    trained: Trained, tokens: np.ndarray, stream: StreamState
) -> Iterator[tuple[Tensor, StreamState]]:
    """The logits [t, V] of each chunk of `tokens` [n] after a stream, and the stream behind it.

    A chunk is of whole spans, at most a window of the run, so that the space does not grow with
    the number of tokens.
    """
    for chunk in _chunks(trained, tokens, chunk_tokens(trained)):
        logits, stream = trained.model.extend(chunk, stream)
        yield logits[0], stream


def _chunks(trained: Trained, tokens: np.ndarray, size: int) -> Iterator[Tensor]:
    """`tokens` [n] in chunks [1, size] on the model's device, of which the last may be shorter."""
    for chunk in torch.split(torch.from_numpy(tokens.astype(np.int64)), size):
        yield chunk[None].to(trained.device)


def distribution(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities [V] of the nucleus: the fewest likeliest tokens that together reach `top_p`.

    logits: [V]; temperature > 0 divides them before the softmax (Holtzman et al. 2020, "The
    Curious Case of Neural Text Degeneration").
    """
    precise = logits.double()
    # From the highest, so that a tiny temperature gives 0 and -inf, and no inf - inf.
    probabilities = torch.softmax((precise - precise.max()) / temperature, dim=0)
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    nucleus = torch.zeros_like(probabilities)
    nucleus[order] = ordered.masked_fill(before >= top_p, 0)
    return nucleus / nucleus.sum()


def finite(logits: Tensor) -> Tensor:
    """The same logits. Raises ResultError where one is not finite."""
    if not logits.isfinite().all():
        raise ResultError(
            "the model's logits are not finite: its weights or memory have overflowed; use an "
            "earlier checkpoint"
        )
    return logits


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    logits = finite(logits).float().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = distribution(logits, sampling.temperature, sampling.top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def chunk_tokens(trained: Trained) -> int:
    """Tokens of a chunk with logits: whole spans of local attention, at most a run's window."""
    span = trained.config.model.span
    affordable = _CHUNK_LOGITS // trained.tokenizer.vocab_size // span
    return span * max(1, min(affordable, trained.config.window // span))


def _special_in(text: str, tokenizer: Tokenizer) -> list[str]:
    """The special tokens that a text spells."""
    names = (tokenizer.name(id) for id, piece in enumerate(tokenizer.pieces) if not piece)
    return [name for name in names if name and name in text]


def _text(prompt: str, prompt_file: str | None) -> str:
    """The prompt's text. Raises EvaluationError where it cannot be read or is not UTF-8."""
    source = "--prompt" if prompt_file is None else prompt_file
    try:
        if prompt_file is None:
            data = os.fsencode(prompt)
        elif prompt_file == "-":
            data = sys.stdin.buffer.read()
        else:
            data = Path(prompt_file).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise EvaluationError(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{source}: is not UTF-8 text (byte {error.start}: {error.reason})"
        ) from None
