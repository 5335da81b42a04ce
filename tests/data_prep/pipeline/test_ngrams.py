"""Words and n-grams as datatrove's simplified texts and a naive loop give them."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
import regex
from datatrove.utils.hashes.xxhash import xxhash64
from datatrove.utils.text import PUNCTUATION, TextNormConfig, simplify_text

from data_prep.pipeline import ngrams
from data_prep.pipeline.ngrams import NGrams, words

TABLES = [
    "\n".join(f"{n * step % 997},{n * step % 991},{n * step % 983 / 7:.4f}" for n in range(60))
    for step in (7919, 104729)
]
SPACELESS = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ーｰﾞﾟ]--[\p{P}]]"
# datatrove leaves punctuation that is not in its list, or comes from decomposed characters.
NAIVE = regex.compile(
    rf"(?V1){SPACELESS}|[[\p{{L}}\p{{M}}\p{{N}}]--{SPACELESS}]+"
    rf"|[[\p{{S}}\p{{Co}}]--{SPACELESS}--[{regex.escape(PUNCTUATION)}\ufffc\ufffd]]+"
)
SHIPS = "在2023年的调查中。共有1200名受访者表示他们每天使用手机超过5小时以上的时间"


# Soft hyphen, joiners, marks of direction and what else Unicode lets nobody see.
UNSEEN = regex.compile(
    r"[\xad\u061c\u180e\u200d-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)


def naive(text: str) -> list[str]:
    text = UNSEEN.sub("", text)
    found: list[str] = NAIVE.findall(simplify_text(text, TextNormConfig(norm_numbers=False)))
    return found


def hashes(size: int, *passages: str) -> list[int]:
    grams = NGrams(size)
    return [gram for text in passages for found in grams(text) for gram in found.tolist()]


def naive_hashes(size: int, text: str) -> list[int]:
    found = naive(text)
    return [xxhash64(" ".join(found[n : n + size])) for n in range(len(found) - size + 1)]


def test_words_are_simple_and_of_any_script() -> None:
    assert words("Don't STOP, café 1,234!") == ["don", "t", "stop", "cafe", "1", "234"]
    assert words("春の海 abc") == ["春", "の", "海", "abc"]


def test_each_character_of_a_script_without_spaces_is_a_word_whatever_it_touches() -> None:
    assert words("在2023年的GPU上") == ["在", "2023", "年", "的", "gpu", "上"]
    assert words("コンピューターAPI") == [*"コンヒューター", "api"]  # without diacritics
    assert words("ราคา5บาท") == [*"ราคา", "5", *"บาท"]
    assert words("៥ km។១") == ["៥", "km", "១"]
    inside = hashes(13, f"新闻。{SHIPS}。以上就是全部内容。")
    assert set(hashes(13, SHIPS)) <= set(inside) and len(words(SHIPS)) > 30


def test_symbols_tell_texts_apart() -> None:
    assert words("⠓⠑⠇⠇⠕ ⠺⠕⠗⠇⠙") == ["⠓⠑⠇⠇⠕", "⠺⠕⠗⠇⠙"]
    assert words("P∧q → r≤5€") == ["p", "∧", "q", "→", "r", "≤", "5", "€"]
    assert words("♔♕ ☰ ⓐⓑ done🙂🙃 ├───┤") == ["♔♕", "☰", "ⓐⓑ", "done", "🙂🙃", "├───┤"]
    for one, other in (("∧", "\u2228"), ("⠓⠑", "⠑⠓"), ("→", "↔"), ("ⓐ", "ⓑ")):
        texts = [f"the premises are p {symbol} q and so" for symbol in (one, other)]
        assert set(hashes(5, texts[0])).isdisjoint(hashes(5, texts[1]))


def test_punctuation_that_datatrove_does_not_list_and_marks_of_loss_are_no_words() -> None:
    assert words("है। है \u06d4 a،b don\ufffdt • x\u200by") == [
        "ह",
        "ह",
        "a",
        "b",
        "don",
        "t",
        "x",
        "y",
    ]


def test_a_word_with_unseen_characters_inside_is_the_same_word() -> None:
    assert words("Die Bun\xaddes\xadre\xadgie\xadrung, das\u2060selbe") == words(
        "Die Bundesregierung, dasselbe"
    )
    assert words("\u0915\u094d\u200d\u0937") == words("\u0915\u094d\u0937")
    assert words("\u200fab\u200ec \ufeffd") == ["abc", "d"]
    # Others write a space in their place.
    assert words("a\u200bb \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645") == [
        *"ab",
        "\u0645\u06cc",
        "\u062e\u0648\u0627\u0647\u0645",
    ]


@pytest.mark.parametrize("at_once", [ngrams._FEW, 997])
def test_every_character_is_treated_as_in_datatroves_simplified_text(at_once: int) -> None:
    codes = [code for code in range(0x110000) if unicodedata.category(chr(code)) not in "Cs Cn Co"]
    if at_once < 100:  # letters of large scripts are many and alike
        codes = [
            code for code in codes if code % 20 == 0 or unicodedata.category(chr(code)) != "Lo"
        ]
    for first in range(0, len(codes), at_once):
        text = "".join(f"a{chr(code)}b {chr(code)}" for code in codes[first : first + at_once])
        assert words(text) == naive(text), hex(codes[first])


def test_any_mixture_of_characters_has_the_words_of_the_simplified_text() -> None:
    source = random.Random(5)
    some = "aZ9 \u00e9\u0301\u0338\u03a3\u03c3\u0130\u0131\u00df\uff21\uff11;\u037e_-\n\t\u2000\xa0"
    some += "\u6625\u0e44\u0e34\u302e\ud55c\u20dd\u00b2\u00bd\u2019\ufb01\u0903\u0930"
    some += "\u2192\u00b0\u20ac\u283d\U0001f642\ufffd\u0e2f\u30fc"
    for _ in range(500):
        text = "".join(source.choices(some, k=30))
        assert words(text) == naive(text), ascii(text)


def test_n_grams_go_across_passages_and_are_none_of_a_short_text() -> None:
    assert hashes(3, "A b,") == []
    assert hashes(3, "A b,", " c\n", "d e") == [xxhash64(g) for g in ("a b c", "b c d", "c d e")]
    assert hashes(1, "a b") == [xxhash64("a"), xxhash64("b")]


def test_n_grams_are_those_of_a_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Ça, the naïve café of 春の海 costs 12.50 \u2013 3 or “four” a day. " * 20
    for size in (1, 5, 13):
        assert hashes(size, text) == naive_hashes(size, text)
    monkeypatch.setattr(ngrams, "_SIMPLIFIED", 50)
    assert hashes(5, text) == naive_hashes(5, text)
    assert all(found.dtype == np.uint64 for found in NGrams(5)(text))


def test_numbers_tell_texts_apart() -> None:
    one, other = (set(hashes(5, table)) for table in TABLES)
    assert one and not one & other
    assert words("the 1st of 25 ships") == ["the", "1st", "of", "25", "ships"]
