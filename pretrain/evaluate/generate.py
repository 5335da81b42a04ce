"""Continuing a text of any length in constant space: memories, and the open segment's keys, values.

Sampling runs on the CPU with a generator of its own, so that a seed means the same on any device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.tokenizer.contract import StreamDecoder
from pretrain.evaluate import sampling
from pretrain.evaluate.progress import Progress
from pretrain.model.decoding import Decoder
from pretrain.model.stream import StreamState
from pretrain.trained import Trained, default_device, load

# Logits that stand in memory at once while a prompt is taken in, unless a segment has more.
_CHUNK_LOGITS = 2**24


class GenerationError(ValueError):
    """A prompt or a way of sampling that cannot work."""


def run(
    path: Path,
    *,
    prompt: str = "",
    prompt_file: str | None = None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> int:
    """Continue `prompt`, or the text of `prompt_file` ("-": stdin), on stdout; the exit code, 0.

    Raises GenerationError and what `load` raises.
    """
    text = _text(prompt, prompt_file)
    trained = load(path, default_device())
    generate(
        trained,
        trained.tokenizer.encode(text),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_text=lambda piece: print(piece, end="", flush=True),
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print()
    return 0


def generate(
    trained: Trained,
    prompt_ids: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    on_text: Callable[[str], None],
    report: Callable[[str], None],
) -> list[int]:
    """At most `max_tokens` tokens after the prompt, ending before EOS.

    `prompt_ids` hold no BOS: it is laid before them, as the lanes do. Temperature 0 takes the
    likeliest token; otherwise one is drawn from `distribution` with `seed`. `on_text` is given text
    as soon as it is whole UTF-8, `report` progress lines of a long prompt.
    Raises GenerationError.
    """
    if found := sampling.problems(max_tokens, temperature, top_p):
        raise GenerationError("; ".join(found))
    text_decoder = StreamDecoder(trained.tokenizer)
    for id in prompt_ids:
        text_decoder.push(int(id))
    logits, stream = take_in(trained, prompt_ids, report)
    generated: list[int] = []
    for token in drawn(
        trained,
        logits,
        stream,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        generated.append(token)
        if text := text_decoder.push(token):
            on_text(text)
    if text := text_decoder.finish():
        on_text(text)
    return generated


def drawn(
    trained: Trained,
    logits: Tensor,
    stream: StreamState,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """The tokens, one by one, after a stream and its `logits` [V], as `generate` draws them.

    The stream is used up. Raises GenerationError where a logit is not finite.
    """
    decoder = Decoder(trained.model, stream)
    generator = torch.Generator().manual_seed(seed)
    for left in reversed(range(max_tokens)):
        token = _choose(logits, temperature, top_p, generator)
        if token == trained.tokenizer.eos_id:
            return
        yield token
        if left:
            logits = decoder.step(torch.tensor([token], device=trained.device))[0]


def take_in(
    trained: Trained, prompt_ids: Sequence[int] | np.ndarray, report: Callable[[str], None]
) -> tuple[Tensor, StreamState]:
    """The logits [V] after BOS and the prompt, and the stream there.

    The prompt goes through in chunks of whole segments, at most a window of the run, so the space
    does not grow with it. Raises GenerationError where there is nothing to continue.
    """
    bos = trained.tokenizer.bos_id
    laid_out = np.concatenate([[] if bos is None else [bos], prompt_ids]).astype(np.int64)
    if not len(laid_out):
        raise GenerationError(
            "the prompt is empty, and this run's tokenizer has no BOS to start a text with; "
            "give a prompt"
        )
    progress = Progress("prompt", len(laid_out), report)
    stream = trained.model.open_stream(1, trained.device)
    for chunk in torch.split(torch.from_numpy(laid_out), chunk_tokens(trained)):
        logits, stream = trained.model.extend(chunk[None].to(trained.device), stream)
        progress.add(len(chunk))
    return logits[0, -1], stream


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


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise GenerationError(
            "the model's logits are not finite: its weights or memory have overflowed; take an "
            "earlier checkpoint"
        )
    if temperature == 0:
        return int(logits.argmax())
    probabilities = distribution(logits, temperature, top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def chunk_tokens(trained: Trained) -> int:
    """Tokens that are taken in at once: whole segments, at most a window of the run."""
    segment = trained.config.model.segment
    affordable = _CHUNK_LOGITS // trained.tokenizer.vocab_size // segment
    return segment * max(1, min(affordable, trained.config.train.window_segments))


def _text(prompt: str, prompt_file: str | None) -> str:
    """The prompt's text. Raises GenerationError where it cannot be read or is not UTF-8."""
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
        raise GenerationError(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"{source}: is not UTF-8 text (byte {error.start}: {error.reason})"
        ) from None
