"""Packing documents into windows, as the lanes of training and of evaluation do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

IGNORE = -100  # the target that torch's cross-entropy leaves out


class LaidOut(NamedTuple):
    """A document as a model sees it: `tokens` int64 [n], n > 0.

    `weights`, float32 [n], are those of its tokens in the loss; None: 1 for every token.
    """

    id: str
    tokens: np.ndarray
    weights: np.ndarray | None = None


class Window(NamedTuple):
    """Tokens int64, targets int64, starts bool, weights float32 or None: arrays [length].

    The target of a token is the token after it in its document, also where that lies beyond the
    window; of a document's last token and of padding it is IGNORE. `starts` marks the first token
    of each document. The weights are the targets' in the loss, 0 where there is no target; None: 1
    for every target.
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    weights: np.ndarray | None


class Span(NamedTuple):
    """`tokens` tokens of a document from its `offset` on, which lie in a window from `at` on."""

    id: str
    at: int
    offset: int
    tokens: int

    @property
    def end(self) -> int:
        """The place in the window after the last of the tokens."""
        return self.at + self.tokens


class Packer(ABC):
    """Documents one behind another, cut into windows; each begins at a multiple of `align` tokens.

    What is left up to that multiple is padding, of token 0. `offset` is that of the open document's
    next token; 0 where no document is open. With `weighted` windows have weights.
    """

    def __init__(self, *, offset: int = 0, align: int = 1, weighted: bool = False) -> None:
        self.offset = offset
        self._align = align
        self._weighted = weighted
        self._document: LaidOut | None = None

    @abstractmethod
    def open_document(self) -> LaidOut | None:
        """The document that `offset` lies in, or the next one where it is 0; None at the end."""

    def pass_document(self) -> None:  # noqa: B027 - most sources move on as they open
        """Called when the open document has been read to its end."""

    def pack(self, length: int) -> tuple[Window, list[Span]]:
        """The next window, a multiple of `align`, and what lies in it; no spans: nothing is left.

        Raises what `open_document` raises.
        """
        window = Window(
            np.zeros(length, np.int64),
            np.full(length, IGNORE, np.int64),
            np.zeros(length, np.bool_),
            np.zeros(length, np.float32) if self._weighted else None,
        )
        spans: list[Span] = []
        at = 0
        while at < length:
            document = self._document = self._document or self.open_document()
            if document is None:
                break
            spans.append(self._lay(document, window, at))
            at = -(-spans[-1].end // self._align) * self._align
        return window, spans

    def _lay(self, document: LaidOut, window: Window, at: int) -> Span:
        offset = self.offset
        tokens = document.tokens[offset : offset + len(window.tokens) - at]
        span = Span(document.id, at, offset, len(tokens))
        window.tokens[at : span.end] = tokens
        window.starts[at] = offset == 0
        # The weight is that of the token to be predicted, as the target is.
        following = slice(offset + 1, offset + 1 + span.tokens)
        targets = document.tokens[following]
        window.targets[at : at + len(targets)] = targets
        if window.weights is not None:
            assert document.weights is not None
            window.weights[at : at + len(targets)] = document.weights[following]
        self.offset += span.tokens
        if self.offset == len(document.tokens):
            self._document, self.offset = None, 0
            self.pass_document()
        return span
