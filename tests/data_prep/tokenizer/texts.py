"""Texts that normalisers, SentencePiece's own signs and careless readers change."""

from __future__ import annotations

import random

TEXT = "".join(
    f"def method_{n}(self, value={n}):\n    return value * {n}  # the {n}th of them, it's\n\n"
    for n in range(300)
)
SIZE = 340
"""Pieces of the model that is trained on it."""
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
"""Special tokens of the tokenizer.json files."""
NASTY = [
    *("a", "b ", " ", "  ", "\n", "\r\n", "\t", "\0", "\x85", "\u2028", "\u200b", "\ufeff"),
    *("\u2585", "\u2047", "\ufffd", "\uffff", "\u00e9", "e\u0301", "\u65e5\u672c", "\u0130"),
    *("\U0001f600", "<s>", "</s>", "<unk>", "<0x0A>", "self.", "12", "\u00bd", "\ufb01"),
]


def nasty_texts(count: int, *more: str) -> list[str]:
    """Texts of those and of `more`: an empty one, `count` short ones and a long one."""
    random_source = random.Random(3)
    lengths = [random_source.randrange(40) for _ in range(count)] + [5000]
    signs = [*NASTY, *more]
    return ["", *("".join(random_source.choices(signs, k=length)) for length in lengths)]
