"""What a stored response gives: its page's main text, or the reason why there is none."""

from __future__ import annotations

import gzip
import random
import time
import zlib
from collections.abc import Callable, Iterator

import pytest
import zstandard

from data_prep.sources import html
from data_prep.sources.documents import BadRecordError
from data_prep.sources.extractor import Extractor

TEXT = "The main text of a page, which has caf\u00e9 in it, goes on for some sentences. " * 6
PAGE = (
    f"<html><head><title>T</title></head><body><nav><a href='/'>Home</a></nav><article><p>{TEXT}"
    "</p></article><footer>All rights reserved</footer></body></html>"
)


@pytest.fixture(scope="module")
def extract() -> Iterator[html.Extract]:
    with Extractor() as found:
        yield found


def response(page: bytes, *fields: str, status: str = "200 OK", kind: str = "text/html") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *fields])
    return head.encode() + b"\r\n\r\n" + page


def chunked(page: bytes, *, closed: bool = True) -> bytes:
    parts = [page[at : at + 99] for at in range(0, len(page), 99)] + [b""] * closed
    return b"".join(b"%x;name=value\r\n%s\r\n" % (len(part), part) for part in parts)


def halves(page: bytes, pack: Callable[[bytes], bytes]) -> bytes:
    return pack(page[:300]) + pack(page[300:])


def deflated(page: bytes) -> bytes:
    raw = zlib.compressobj(wbits=-15)
    return raw.compress(page) + raw.flush()


@pytest.mark.parametrize(
    "stored",
    [
        response(PAGE.encode()),
        response(PAGE.encode(), kind="application/xhtml+xml; charset=utf-8"),
        response(PAGE.encode("latin-1"), kind="text/html; charset=iso-8859-1"),
        response(chunked(PAGE.encode()), "Transfer-Encoding: chunked"),
        response(gzip.compress(PAGE.encode()), "Content-Encoding: gzip"),
        response(zlib.compress(PAGE.encode()), "Content-Encoding: deflate"),
        response(deflated(PAGE.encode()), "Content-Encoding: deflate"),
        # What crawlers stored decoded, or cut, beside the header that it came with.
        response(PAGE.encode(), "Transfer-Encoding: chunked"),
        response(PAGE.encode(), "Content-Encoding: gzip"),
        response(PAGE.encode(), "Content-Length: 9999"),
        response(b" \n" + PAGE.encode(), "Content-Encoding: gzip"),
        response(PAGE.encode("utf-16"), "Content-Encoding: gzip"),
        response(PAGE.encode(), "Content-Encoding: br"),
        response(PAGE.encode(), "Content-Encoding: utf-8"),
        response(PAGE.encode(), "Content-Length: 99"),
        response(PAGE.encode(), "Content-Length: 99", "Content-Length: 7"),
        # What says nothing of how it is packed, and what is packed in several ways.
        response(gzip.compress(PAGE.encode())),
        response(chunked(gzip.compress(PAGE.encode())), "Transfer-Encoding: gzip, chunked"),
        response(gzip.compress(gzip.compress(PAGE.encode())), "Content-Encoding: gzip, gzip"),
        response(chunked(PAGE.encode())),
        response(zstandard.compress(PAGE.encode()), "Content-Encoding: zstd"),
        # Members, and their padding.
        response(halves(PAGE.encode(), gzip.compress), "Content-Encoding: gzip"),
        response(halves(PAGE.encode(), gzip.compress) + bytes(9), "Content-Encoding: gzip"),
        response(halves(PAGE.encode(), zstandard.compress), "Content-Encoding: zstd"),
        # Chunks whose end is not there.
        response(chunked(PAGE.encode(), closed=False), "Transfer-Encoding: chunked"),
        response(chunked(PAGE.encode(), closed=False) + b"6", "Transfer-Encoding: chunked"),
        # Heads that are odd.
        response(PAGE.encode()).replace(b"HTTP/1.1 200 OK", b"HTTP/2 200"),
        response(PAGE.encode()).replace(b"HTTP/1.1 200 OK", b"HTTP/1.x  200"),
        response(PAGE.encode()).replace(b"HTTP/1.1 200 OK", b"\r\nhttp/1.0 200 \xff"),
        response(PAGE.encode(), *(f"X-{n}: {n}" for n in range(200))),
        response(PAGE.encode(), "X: " + "y" * 70_000),
        response(PAGE.encode(), "no colon", " folded", ": no name", "caf\u00e9: \u00e9"),
        response(PAGE.encode()).replace(b"\r\n", b"\n"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + response(PAGE.encode()),
    ],
)
def test_the_main_text_of_a_page_comes_out(stored: bytes, extract: html.Extract) -> None:
    assert html.text_of(stored, extract) == TEXT.strip()


POLISH = (
    "Prom dwa razy dziennie przep\u0142ywa\u0142 zatok\u0119, \u017c\u00f3\u0142ta "
    "\u0142\u00f3d\u017a \u015bpi. "
)
JAPANESE = "\u65e5\u672c\u8a9e\u306e\u30da\u30fc\u30b8\u3067\u3059\u3002" * 9
CHINESE = (
    "\u8fd9\u662f\u4e00\u4e2a\u4e2d\u6587\u7f51\u9875\uff0c\u5199\u4e86\u5f88\u591a\u5b57\u3002" * 9
)


@pytest.mark.parametrize("place", ["HTTP", "meta", "XML"])
@pytest.mark.parametrize(
    ("text", "name", "codec"),
    [
        (POLISH * 3, "iso-8859-2", "iso8859-2"),
        (POLISH * 3, "windows-1250", "cp1250"),
        ("caf\u00e9 \u2014 \u201cnow\u201d. " * 9, "iso-8859-1", "cp1252"),
        (JAPANESE, "iso-2022-jp", "iso2022_jp"),
        (JAPANESE, "x-sjis", "cp932"),
        (JAPANESE, "EUC-JP", "euc_jp"),
        (CHINESE, "gb2312", "gb18030"),
        (CHINESE, "hz-gb-2312", "hz"),
        (CHINESE, "big5", "big5"),
        ("\uc548\ub155\ud558\uc138\uc694 \ub611\ubc29. " * 9, "ks_c_5601-1987", "cp949"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440. " * 9, "koi8-r", "koi8_r"),
    ],
)
def test_a_page_is_read_in_the_encoding_that_is_said(
    place: str, text: str, name: str, codec: str, extract: html.Extract
) -> None:
    text = "".join(text if codec != "big5" else "\u9019\u662f\u7db2\u9801\u3002" * 20)
    page = f"<html><head><meta name='a' content='b'></head><body><p>{text}</p></body></html>"
    if place == "meta":
        page = page.replace(
            "<head>", f'<head><meta http-equiv=x content="text/html; charset={name}">'
        )
    elif place == "XML":
        page = f'<?xml version="1.0" encoding="{name}"?>\n{page}'
    kind = f'text/html; charset="{name}"' if place == "HTTP" else "text/html"
    assert html.text_of(response(page.encode(codec), kind=kind), extract) == text.strip()


# Python's codec, and every name that encoding.spec.whatwg.org gives it: what pages mean by it.
LABELS = {
    "utf-8": "unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8",
    "cp866": "866 cp866 csibm866 ibm866",
    "iso8859-2": (
        "csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2"
    ),
    "iso8859-3": (
        "csisolatin3 iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3"
    ),
    "iso8859-4": (
        "csisolatin4 iso-8859-4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4"
    ),
    "iso8859-5": (
        "csisolatincyrillic cyrillic iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 "
        "iso_8859-5:1988"
    ),
    "iso8859-6": (
        "arabic asmo-708 csiso88596e csiso88596i csisolatinarabic ecma-114 iso-8859-6 "
        "iso-8859-6-e iso-8859-6-i iso-ir-127 iso8859-6 iso88596 iso_8859-6 iso_8859-6:1987"
    ),
    "iso8859-7": (
        "csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7 iso-ir-126 iso8859-7 "
        "iso88597 iso_8859-7 iso_8859-7:1987 sun_eu_greek"
    ),
    "iso8859-8": (
        "csiso88598e csisolatinhebrew hebrew iso-8859-8 iso-8859-8-e iso-ir-138 iso8859-8 "
        "iso88598 iso_8859-8 iso_8859-8:1988 visual csiso88598i iso-8859-8-i logical"
    ),
    "iso8859-10": "csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6",
    "iso8859-13": "iso-8859-13 iso8859-13 iso885913",
    "iso8859-14": "iso-8859-14 iso8859-14 iso885914",
    "iso8859-15": "csisolatin9 iso-8859-15 iso8859-15 iso885915 iso_8859-15 l9",
    "iso8859-16": "iso-8859-16",
    "koi8-r": "cskoi8r koi koi8 koi8-r koi8_r",
    "koi8-u": "koi8-ru koi8-u",
    "mac-roman": "csmacintosh mac macintosh x-mac-roman",
    "cp874": "dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874",
    "cp1250": "cp1250 windows-1250 x-cp1250",
    "cp1251": "cp1251 windows-1251 x-cp1251",
    "cp1252": (
        "ansi_x3.4-1968 ascii cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100 iso8859-1 "
        "iso88591 iso_8859-1 iso_8859-1:1987 l1 latin1 us-ascii windows-1252 x-cp1252"
    ),
    "cp1253": "cp1253 windows-1253 x-cp1253",
    "cp1254": (
        "cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9 iso_8859-9:1989 "
        "l5 latin5 windows-1254 x-cp1254"
    ),
    "cp1255": "cp1255 windows-1255 x-cp1255",
    "cp1256": "cp1256 windows-1256 x-cp1256",
    "cp1257": "cp1257 windows-1257 x-cp1257",
    "cp1258": "cp1258 windows-1258 x-cp1258",
    "mac-cyrillic": "x-mac-cyrillic x-mac-ukrainian",
    "gb18030": (
        "chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk gb18030"
    ),
    "big5hkscs": "big5 big5-hkscs cn-big5 csbig5 x-x-big5",
    "euc_jp": "cseucpkdfmtjapanese euc-jp x-euc-jp",
    "iso2022_jp_ext": "csiso2022jp iso-2022-jp",
    "cp932": "csshiftjis ms932 ms_kanji shift-jis shift_jis sjis windows-31j x-sjis",
    "cp949": (
        "cseuckr csksc56011987 euc-kr iso-ir-149 korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 "
        "ksc_5601 windows-949"
    ),
}


@pytest.mark.parametrize("codec", LABELS)
def test_an_encoding_is_known_by_every_name_that_browsers_know(codec: str) -> None:
    letters = "".join(map(chr, (*range(0xA1, 0x250), *range(0x391, 0x6FF), *range(0xE01, 0xE30))))
    letters += POLISH + JAPANESE + CHINESE + "\uc548\ub155"
    text = letters.encode(codec, errors="ignore").decode(codec)
    assert len(text) > 20
    page = f"<p>{text}</p>".encode(codec)
    for label in LABELS[codec].split():
        assert html.in_charset(page, f"text/html; charset={label}") == f"<p>{text}</p>", label


def test_what_is_said_of_an_encoding_yields_to_what_the_bytes_are() -> None:
    for said, page, text in (
        # UTF-8 that a server calls something else, and the other way round.
        ("charset=iso-8859-1", POLISH.encode(), POLISH),
        ("charset=utf-8", b"<meta charset=iso-8859-2>" + POLISH.encode("iso8859-2"), POLISH),
        ("charset=utf-16", PAGE.encode(), PAGE),
        ("charset=iso-8859-1", POLISH.encode("utf-16"), POLISH),
        ("charset=utf-7", b"\xef\xbb\xbf" + POLISH.encode(), POLISH),
        ("charset=utf-8", (POLISH * 3).encode() + b"\xff", POLISH * 3 + "\ufffd"),
        # Two characters of GBK that are also valid UTF-8.
        ("charset=gbk", "<p>\u4e00\u8bf4".encode("gbk"), "<p>\u4e00\u8bf4"),
        ("", b"<p>\x1b$B%F%9%H\x1b(B", "<p>\u30c6\u30b9\u30c8"),
        ("charset=base64", b"<p>YWJj", "<p>YWJj"),
        ("charset=unknown-8bit", b"<p>abc", "<p>abc"),
    ):
        found = html.in_charset(page, said)
        assert isinstance(found, str) and found.endswith(text), said
    # Nothing fits: it is left to trafilatura's guess.
    latin = b"<p>caf\xe9"
    assert html.in_charset(latin, "charset=utf-8") == latin


RUSSIAN = "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "


@pytest.mark.parametrize(
    "head",
    [
        "<!-- <meta charset=iso-8859-1> --><meta charset=windows-1251>",
        "<!--><!-- a > b <meta charset=iso-8859-1>--><meta charset=windows-1251>",
        '<meta name="keywords" content="charset=iso-8859-1, text"><meta charset=windows-1251>',
        "<meta name=description content='The charset=iso-8859-1'/><META CharSet = 'Windows-1251'/>",
        '<a title="<meta charset=iso-8859-1>"><meta charset="windows-1251">',
        '<script charset="iso-8859-1" src=a.js></script><meta charset=cp1251>',
        '<metadata charset="iso-8859-1"><meta charset=cp1251>',
        "<meta charset=klingon><meta charset=windows-1251>",
        '<meta content="text/html; charset=windows-1251" http-equiv="content-type">',
        '<meta http-equiv=content-type content="charset=windows-1251">',
        # A mistake for http-equiv that many pages make.
        '<meta name="content-type" content="text/html; charset=windows-1251">',
        '<meta charset=windows-1251 http-equiv=content-type content="text/html; charset=koi8-r">',
        "<meta x='a>b' charset=windows-1251>",
    ],
)
def test_the_encoding_is_taken_from_what_states_it_not_from_comments_and_texts(head: str) -> None:
    page = f"<html><head>{head}</head><body>{RUSSIAN * 9}"
    assert html.in_charset(page.encode("cp1251"), "text/html") == page
    xml = '<?xml version="1.0" encoding="utf-8"?>' + page
    assert html.in_charset(xml.encode("cp1251"), "text/html") == xml


def test_what_only_looks_like_a_stated_encoding_is_none() -> None:
    for head in (
        "<!-- <meta charset=iso-8859-1> -->",
        "<!-- <meta charset=iso-8859-1>",
        '<meta name="keywords" content="charset=iso-8859-1">',
        '<link charset="iso-8859-1">',
    ):
        page = f"<html>{head}{RUSSIAN}".encode("cp1251")
        assert html.in_charset(page, "text/html") == page


# Row 13 of NEC, the rows of IBM (encoding.spec.whatwg.org/index-jis0208.txt), and a pair that is
# no character, each before what would be shifted if one byte of it were skipped.
@pytest.mark.parametrize(
    ("pair", "char"),
    [
        (b"\x2d\x21", "\u2460"),
        (b"\x2d\x6a", "\u3231"),
        (b"\x2d\x7c", "\u222a"),
        (b"\x79\x21", "\u7e8a"),
        (b"\x7c\x6e", "\u9ed1"),
        (b"\x7e\x7e", "\ufffd"),
    ],
)
def test_japanese_pages_have_the_characters_of_nec_and_ibm(pair: bytes, char: str) -> None:
    before, after = "<p>" + JAPANESE, JAPANESE + "</p>"
    euc = bytes(byte | 0x80 for byte in pair)
    page = before.encode("euc_jp") + euc * 3 + after.encode("euc_jp")
    assert html.in_charset(page, "charset=euc-jp") == before + char * 3 + after
    page = (
        before.encode("iso2022_jp") + b"\x1b$B" + pair * 3 + b"\x1b(B" + after.encode("iso2022_jp")
    )
    for said in ("charset=iso-2022-jp", "text/html"):
        assert html.in_charset(page, said) == before + char * 3 + after


def test_a_pair_that_is_no_character_shifts_nothing() -> None:
    korean = "\uc548\ub155\ud558\uc138\uc694 " * 9
    for text, name, wrong in (
        (korean, "cp949", b"\xc9\xa1"),
        (JAPANESE, "cp932", b"\x85\x9f"),
        (JAPANESE, "euc_jp", b"\x8f\xf3\xf3"),
        (CHINESE, "gb18030", b"\x81\xff"),
        ("\u9019\u662f\u7db2\u9801" * 9, "big5", b"\x81\xa1"),
    ):
        page = text.encode(name) + wrong + text.encode(name)
        assert html.in_charset(page, f"charset={name}") == f"{text}\ufffd{text}", name
    assert html.in_charset(b"\x1b(I\x31\x32\x1b(B!", "charset=iso-2022-jp") == "\uff71\uff72!"


def test_a_page_that_is_cut_inside_of_a_character_keeps_its_encoding() -> None:
    for said in ("charset=iso-8859-1", "charset=utf-8", "charset=gbk", "text/html"):
        for text in (RUSSIAN * 9, CHINESE, "\U0001f600" * 9):
            whole = f"<p>{text}{text[-3]}".encode()
            for cut in range(1, len(text[-3].encode())):
                assert html.in_charset(whole[:-cut], said) == f"<p>{text}"
    for text, name in ((CHINESE, "gbk"), (JAPANESE, "shift_jis"), (JAPANESE, "euc-jp")):
        assert html.in_charset(text.encode(name)[:-1], f"charset={name}") == text[:-1]
    # As many bytes of another encoding are no UTF-8 that is cut.
    for text, name in (("caf\u00e9", "cp1252"), (RUSSIAN * 9, "cp1251"), (CHINESE, "gbk")):
        assert html.in_charset(text.encode(name), f"charset={name}") == text


def test_a_few_wrong_bytes_make_no_other_encoding_of_utf8() -> None:
    page = (RUSSIAN * 9).encode()
    for wrong in (b"\xff", b"\xe9t\xe9", page[1:2]):
        found = html.in_charset(page + wrong + page, "charset=iso-8859-1")
        assert isinstance(found, str) and found.count(RUSSIAN) == 18
    # A U+FFFD that the page has itself is none of them.
    assert html.in_charset(page + "\ufffd".encode() * 99, "charset=iso-8859-1") == (
        RUSSIAN * 9 + "\ufffd" * 99
    )
    # A few characters of UTF-8 among many of another encoding make no UTF-8.
    mixed = (RUSSIAN * 9).encode("cp1251") + (RUSSIAN * 9).encode()
    assert html.in_charset(mixed, "charset=windows-1251") == mixed.decode("cp1251", "replace")


@pytest.mark.parametrize(
    "type_of_it", ["", "Content-Type:\r\n", "Content-Type: ; charset=utf-8\r\n"]
)
def test_a_page_whose_type_nobody_states_is_known_by_its_start(
    type_of_it: str, extract: html.Extract
) -> None:
    head = f"HTTP/1.0 200 OK\r\n{type_of_it}\r\n".encode()
    page = PAGE.encode()
    expected = html.text_of(response(page), extract)
    assert expected and html.text_of_resource(page, "", extract) == expected
    xhtml = b"<?xml version='1.0' encoding='utf-8'?>\n<!-- a -->\n"
    for stored in (page, gzip.compress(page), b"\xef\xbb\xbf\r\n" + page, xhtml + page):
        assert html.text_of(head + stored, extract) == expected


@pytest.mark.parametrize(
    ("stored", "reason", "detail"),
    [
        (b"", "not a page", "its HTTP response is empty"),
        (b"junk\r\n\r\n" + PAGE.encode(), "not a page", "begins with b'junk"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 999 + b"\r\n", "not HTML", "unknown"),
        (response(PAGE.encode(), status="404 Not Found"), "not a page", "its HTTP status is 404"),
        (response(b"{}", kind="application/json"), "not HTML", "of type application/json"),
        (b"HTTP/1.1 200 OK\r\n\r\na <p>" + PAGE.encode(), "not HTML", "begins as no page"),
        (b"HTTP/1.1 200 OK\r\n\r\n<?xml version='1.0'?><rss>", "not HTML", "begins as no page"),
        (
            response(b"\x0b\x05\x80<html>\x03", "Content-Encoding: br"),
            "not a page",
            "its Content-Encoding is br, which is not read",
        ),
        (response(b"junk", "Content-Encoding: gzip"), "not a page", "neither gzip data nor a page"),
        (
            response(gzip.compress(PAGE.encode())[:-9], "Content-Encoding: gzip"),
            "not a page",
            "its compressed data end early",
        ),
        (
            response(gzip.compress(PAGE.encode()) + b"junk", "Content-Encoding: gzip"),
            "not a page",
            "4 bytes of something else follow",
        ),
        (
            response(zstandard.compress(PAGE.encode())[:-3], "Content-Encoding: zstd"),
            "not a page",
            "its compressed data end early",
        ),
        (
            response(deflated(PAGE.encode())[:-9], "Content-Encoding: deflate"),
            "not a page",
            "its compressed data end early",
        ),
        (
            response(
                chunked(PAGE.encode(), closed=False) + b"junk\r\n", "Transfer-Encoding: chunked"
            ),
            "not a page",
            "no chunk of HTTP begins at byte",
        ),
        (
            response(gzip.compress(b"<p>" + bytes(html.LARGEST)), "Content-Encoding: gzip"),
            "record too large",
            "4194304",
        ),
        (response(b""), "no text in the page", ""),
        (response(b"\xff\0\xfe" * 1000), "no text in the page", ""),
        (response(b"<div>" * 50_000 + b"x" * 500), "no text in the page", ""),
    ],
)
def test_what_is_no_page_says_why(
    stored: bytes, reason: str, detail: str, extract: html.Extract
) -> None:
    with pytest.raises(BadRecordError) as caught:
        html.text_of(stored, extract)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_the_type_that_the_archive_states_goes_first(extract: html.Extract) -> None:
    stored = response(PAGE.encode(), kind="text/plain")
    assert html.text_of(stored, extract, "text/html") == TEXT.strip()


@pytest.mark.parametrize(
    "fields",
    [
        "Content-Type: text/html;\r\n\tcharset=iso-8859-2",
        "Content-Type:\r\n text/html; charset=iso-8859-2",
        "Content-Type: text/html;\n charset=iso-8859-2\nServer: a",
        "Content-Type: \r\nContent-Type: text/html; charset=iso-8859-2",
        "Content-Type: text/html; charset=none\r\nContent-Type: text/html; charset=iso-8859-2",
        "Content-Type: text/html; charset=utf-8\r\nContent-Type: text/html; charset=iso-8859-2",
        "Content-Type: text/plain, text/html; charset=iso-8859-2, a",
    ],
)
def test_a_type_is_read_from_folded_lines_and_the_last_of_several_holds(
    fields: str, extract: html.Extract
) -> None:
    page = f"<html><body><p>{POLISH * 3}</p></body></html>".encode("iso8859-2")
    stored = f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode() + page
    assert html.text_of(stored, extract) == (POLISH * 3).strip()


def test_a_page_gives_the_same_text_whatever_was_read_before(extract: html.Extract) -> None:
    for _ in range(9):  # trafilatura's own counts of repeated passages would drop it by now
        assert html.text_of(response(PAGE.encode()), extract) == TEXT.strip()


def test_a_lone_surrogate_in_a_page_does_not_reach_the_text(extract: html.Extract) -> None:
    page = PAGE.replace("caf\u00e9", "caf&#xD800;e")
    html.text_of(response(page.encode()), extract).encode()


def test_the_largest_zstd_body_is_decompressed_in_a_moment() -> None:
    page = random.Random(1).randbytes(html.LARGEST)
    started = time.process_time()
    assert html._unzstd(zstandard.compress(page)) == page
    assert time.process_time() - started < 2


def test_a_response_that_is_all_header_is_read_in_a_moment() -> None:
    started = time.process_time()
    response = b"HTTP/1.1 200 OK\r\n" + b"a: b\n" * 800_000
    with pytest.raises(BadRecordError, match="not HTML"):
        html.text_of(response, lambda page: "")
    assert time.process_time() - started < 10
