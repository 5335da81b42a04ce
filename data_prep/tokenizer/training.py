"""Training of a SentencePiece model."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from data_prep.dataset import durable
from data_prep.tokenizer.contract import TokenizerError

# SentencePiece silently skips training sentences that are longer than its limit or contain its own
# sign for unknown pieces, so none of ours is or does.
_SENTENCE_BYTES = 4096
_RESERVED = "\u2585"


def train(
    texts: Iterable[str], path: Path, vocab_size: int, character_coverage: float = 0.9995
) -> None:
    """Train a lossless BPE model on `texts` and write it durably; equal texts, equal bytes.

    Raises TokenizerError where the texts are too few for that vocabulary.
    """
    sentences = _sentences(texts)
    first = next(sentences, None)
    if first is None:
        raise TokenizerError("the tokenizer has no text to train on: it is given line ends at most")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Sentences end at a newline, so it would never be learnt as a piece.
            user_defined_symbols=["\n"],
            max_sentence_length=_SENTENCE_BYTES + 1,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(_too_small(vocab_size, str(error))) from None
    durable.write_bytes(path, model.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.replace(_RESERVED, "\n").split("\n"):
            # At most four bytes per character.
            for start in range(0, len(line), _SENTENCE_BYTES // 4):
                yield line[start : start + _SENTENCE_BYTES // 4]


def _too_small(vocab_size: int, reason: str) -> str:
    most = re.search(r"value <= (\d+)", reason)
    least = re.search(r"required_chars\. \d+ vs (\d+)", reason)
    if most:
        remedy = f"the text allows at most {most[1]}: lower it, or give more text"
    elif least:
        remedy = f"bytes and characters alone need at least {least[1]}: raise it"
    else:
        remedy = reason
    return f"tokenizer.vocab_size: {vocab_size} does not fit the training text; {remedy}"
