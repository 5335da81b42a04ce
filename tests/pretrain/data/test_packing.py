"""Documents in windows, by hand and against a plain concatenation."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from pretrain.data.packing import IGNORE, LaidOut, Packer, Span


class _Listed(Packer):
    """The documents of a list; `passed` are those laid to their end."""

    def __init__(self, documents: Iterable[LaidOut], **settings: int | bool) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self._remaining = iter(documents)
        self._open: LaidOut | None = None
        self.passed: list[str] = []

    def open_document(self) -> LaidOut | None:
        self._open = next(self._remaining, None)
        return self._open

    def pass_document(self) -> None:
        assert self._open is not None
        self.passed.append(self._open.id)


def _document(id: str, *tokens: int, weights: list[float] | None = None) -> LaidOut:
    own = None if weights is None else np.array(weights, np.float32)
    return LaidOut(id, np.array(tokens, np.int64), own)


def test_documents_lie_end_to_end_and_targets_reach_beyond_the_window() -> None:
    packer = _Listed([_document("a", 10, 11, 12), _document("b", 20), _document("c", 30, 31, 32)])
    window, spans = packer.pack(5)
    assert window.tokens.tolist() == [10, 11, 12, 20, 30]
    assert window.targets.tolist() == [11, 12, IGNORE, IGNORE, 31]
    assert window.starts.tolist() == [True, False, False, True, True]
    assert window.weights is None
    assert spans == [Span("a", 0, 0, 3), Span("b", 3, 0, 1), Span("c", 4, 0, 1)]
    assert (packer.offset, packer.passed) == (1, ["a", "b"])
    window, spans = packer.pack(2)
    assert window.tokens.tolist() == [31, 32] and window.targets.tolist() == [32, IGNORE]
    assert window.starts.tolist() == [False, False]
    assert spans == [Span("c", 0, 1, 2)] and spans[0].end == 2
    # Passed as soon as it is laid, so that a place saved here lies behind it.
    assert (packer.offset, packer.passed) == (0, ["a", "b", "c"])


def test_aligned_documents_begin_at_multiples_and_padding_has_no_target() -> None:
    packer = _Listed([_document("a", 10, 11, 12, 13, 14), _document("b", 20, 21)], align=4)
    window, spans = packer.pack(12)
    assert window.tokens.tolist() == [10, 11, 12, 13, 14, 0, 0, 0, 20, 21, 0, 0]
    x = IGNORE
    assert window.targets.tolist() == [11, 12, 13, 14, x, x, x, x, 21, x, x, x]
    assert np.flatnonzero(window.starts).tolist() == [0, 8]
    assert spans == [Span("a", 0, 0, 5), Span("b", 8, 0, 2)]
    assert packer.pack(12)[1] == [], "nothing is left"


def test_a_weight_is_that_of_the_token_to_be_predicted() -> None:
    documents = [_document("a", 1, 2, 3, weights=[9, 0.5, 1]), _document("b", 4, weights=[9])]
    packer = _Listed(documents, weighted=True)
    first, _ = packer.pack(1)
    rest, _ = packer.pack(3)
    assert first.weights is not None and rest.weights is not None
    assert [*first.weights, *rest.weights] == [0.5, 1, 0, 0]
    assert rest.weights.dtype == np.float32


def test_a_packer_continues_inside_of_a_document() -> None:
    window, spans = _Listed([_document("a", 1, 2, 3)], offset=1).pack(4)
    assert window.tokens.tolist() == [2, 3, 0, 0] and not window.starts.any()
    assert spans == [Span("a", 0, 1, 2)]


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("length", [4, 12, 64])
def test_windows_equal_a_plain_concatenation(align: int, length: int) -> None:
    random = np.random.default_rng(length)
    sizes = random.integers(1, 30, 40)
    documents = [
        _document(str(n), *random.integers(1, 99, size).tolist()) for n, size in enumerate(sizes)
    ]
    tokens: list[int] = []
    targets: list[int] = []
    for one in documents:
        padding = -len(one.tokens) % align
        tokens += [*one.tokens.tolist(), *[0] * padding]
        targets += [*one.tokens[1:].tolist(), *[IGNORE] * (1 + padding)]
    packer = _Listed(documents, align=align)
    for begin in range(0, len(tokens), length):
        window, spans = packer.pack(length)
        rest = max(0, begin + length - len(tokens))
        assert window.tokens.tolist() == tokens[begin : begin + length] + [0] * rest
        assert window.targets.tolist() == targets[begin : begin + length] + [IGNORE] * rest
        for span in spans:
            own = documents[int(span.id)].tokens[span.offset : span.offset + span.tokens]
            assert window.tokens[span.at : span.end].tolist() == own.tolist()
    assert packer.pack(length)[1] == []
