"""What a stored response gives: its page's main text, or the reason why there is none."""

from __future__ import annotations

import gzip
import zlib

import pytest

from data_prep.sources import html
from data_prep.sources.documents import BadRecordError

TEXT = "The main text of a page, which has caf\u00e9 in it, goes on for some sentences. " * 6
PAGE = (
    f"<html><head><title>T</title></head><body><nav><a href='/'>Home</a></nav><article><p>{TEXT}"
    "</p></article><footer>All rights reserved</footer></body></html>"
)


def response(page: bytes, *fields: str, status: str = "200 OK", kind: str = "text/html") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *fields])
    return head.encode() + b"\r\n\r\n" + page


def chunked(page: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (page[:99], page[99:], b""))


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
    ],
)
def test_the_main_text_of_a_page_comes_out(stored: bytes) -> None:
    assert html.text_of(stored) == TEXT.strip()


@pytest.mark.parametrize(
    ("stored", "reason", "detail"),
    [
        (b"", "not a page", "RemoteDisconnected"),
        (b"junk\r\n\r\n" + PAGE.encode(), "not a page", "BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 999 + b"\r\n", "not a page", "HTTPException"),
        (response(PAGE.encode(), status="404 Not Found"), "not a page", "its HTTP status is 404"),
        (response(b"{}", kind="application/json"), "not plain text", "of type application/json"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + PAGE.encode(), "not plain text", "of type unknown"),
        (response(b"x", "Content-Encoding: br"), "not a page", "its Content-Encoding is br"),
        (response(b"junk", "Content-Encoding: gzip"), "not a page", "damaged"),
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
def test_what_is_no_page_says_why(stored: bytes, reason: str, detail: str) -> None:
    with pytest.raises(BadRecordError) as caught:
        html.text_of(stored)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_the_type_that_the_archive_states_goes_first() -> None:
    stored = response(PAGE.encode(), kind="text/plain")
    assert html.text_of(stored, "text/html") == TEXT.strip()


def test_a_page_gives_the_same_text_whatever_was_read_before() -> None:
    for _ in range(9):  # trafilatura's own counts of repeated passages would drop it by now
        assert html.text_of(response(PAGE.encode())) == TEXT.strip()


def test_a_lone_surrogate_in_a_page_does_not_reach_the_text() -> None:
    page = PAGE.replace("caf\u00e9", "caf&#xD800;e")
    html.text_of(response(page.encode())).encode()
