"""The text of a web page, out of the HTTP response that a crawler stored.

trafilatura takes the main text out of HTML, as it did for FineWeb: menus, comments and footers are
left out. It remembers nothing from page to page, so a text depends on its page alone.
"""

from __future__ import annotations

import io
import logging
import zlib
from http.client import HTTPException, HTTPResponse
from types import SimpleNamespace
from typing import Any

from data_prep.sources.documents import BadRecordError

LARGEST = 4 << 20
"""Bytes of a response, and of its page after decompression: larger ones take minutes."""

_PAGES = ("text/html", "application/xhtml+xml")
# zlib's window sizes for gzip or zlib headers, and for none.
_WINDOWS = {"gzip": (47,), "x-gzip": (47,), "deflate": (47, -15)}


def text_of(response: bytes, kind: str = "") -> str:
    """The page's main text. `kind` is its media type, if that is known better than from HTTP.

    Raises BadRecordError, saying why there is none.
    """
    try:
        # In place of the socket that it would read from.
        socket: Any = SimpleNamespace(makefile=lambda mode: io.BytesIO(response))
        head = HTTPResponse(socket)
        head.begin()
    except (HTTPException, OSError, ValueError) as error:
        raise BadRecordError("not a page", f"its HTTP header: {type(error).__name__}") from None
    kind = kind or (head.headers.get_content_type() if "Content-Type" in head.headers else "")
    if kind.lower() not in _PAGES:
        raise BadRecordError("not plain text", f"a response of type {kind or 'unknown'}")
    if head.status != 200:
        raise BadRecordError("not a page", f"its HTTP status is {head.status}")
    page = _decoded(_body(head, response), head.headers.get("Content-Encoding", "identity"))
    text = _extracted(page)
    if not text:
        raise BadRecordError("no text in the page")
    # HTML can write lone surrogates by their number.
    return text.encode(errors="replace").decode()


def _body(head: HTTPResponse, response: bytes) -> bytes:
    try:
        return head.read()
    except (HTTPException, ValueError):
        # Many crawlers store the decoded or cut body beside the original header.
        first, _, rest = response.partition(b"\r\n\r\n")
        return rest or first.partition(b"\n\n")[2]


def _decoded(page: bytes, encoding: str) -> bytes:
    encoding = encoding.strip().lower()
    if encoding in _WINDOWS and page[:1] != b"<":
        page = _inflated(page, _WINDOWS[encoding])
    elif encoding not in (*_WINDOWS, "identity", "utf-8", ""):
        raise BadRecordError("not a page", f"its Content-Encoding is {encoding}")
    if len(page) > LARGEST:
        raise BadRecordError("record too large", f"a page of more than {LARGEST} bytes")
    return page


def _inflated(page: bytes, windows: tuple[int, ...]) -> bytes:
    for window in windows:
        try:
            return zlib.decompressobj(window).decompress(page, LARGEST + 1)
        except zlib.error:
            continue
    raise BadRecordError("not a page", "its compressed data are damaged")


def _extracted(page: bytes) -> str:
    import trafilatura

    # Its messages about a page are in the reject.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    try:
        text = trafilatura.extract(
            page, favor_precision=True, include_comments=False, deduplicate=False
        )
    except Exception as error:  # a page that cannot be parsed is no reason to lose more
        raise BadRecordError("no text in the page", type(error).__name__) from None
    return text or ""
