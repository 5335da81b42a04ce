"""The text of a web page, out of the HTTP response that a crawler stored.

The archive says how long the response is; what its HTTP header says of length and encoding is
hearsay, since many crawlers store the decoded body beside the original header. So what the body is
is read from the body, and the header decides only where that says nothing.

trafilatura takes the main text out of HTML, as it did for FineWeb: menus, comments and footers are
left out. It remembers nothing from page to page, so a text depends on its page alone.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import zlib
from collections.abc import Callable, Iterator

import webencodings
import zstandard

from data_prep.sources import contents
from data_prep.sources.documents import BadRecordError

LARGEST = 4 << 20
"""Bytes of a response, and of its page after decompression: larger ones take minutes."""

Extract = Callable[[str | bytes], str]
"""Gives a page's main text, empty if it has none. Raises BadRecordError."""

_PAGES = ("text/html", "application/xhtml+xml")
_HEAD_END = re.compile(rb"\n[ \t\r]*\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_STATUS = re.compile(rb"\s*(?:HTTP|ICY)\S*[ \t]+(\d{3})", re.IGNORECASE)
_CHUNK = re.compile(rb"\s*([0-9a-fA-F]{1,8})[ \t]*(?:;[^\n]*)?\r?\n")
_CUT_CHUNK = re.compile(rb"\s*[0-9a-fA-F]{0,8}[ \t]*(?:;[^\n]*)?\r?")
_MARKUP = re.compile(rb"<\0{0,3}[a-zA-Z!?/]")
# mimesniff.spec.whatwg.org, "identifying a resource with an unknown MIME type".
_START = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*<(?:(?:!doctype html|html|head|script|iframe|h1|div|font|table|a|style"
    rb"|title|b|body|br|p)[\s>]|!--)",
    re.IGNORECASE,
)
# Text has none of these; UTF-16 has NULs.
_CONTROLS = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
_LOOKED_AT = 1024
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# zlib's window sizes: with a header, without.
_ZLIB, _RAW = 15, -15
_MOST_LAYERS = 3
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)
# What the encoding is looked for in (html.spec.whatwg.org, "prescan a byte stream").
_META_BYTES = 1 << 14
_XML = re.compile(r"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([^\"']+)", re.IGNORECASE)
_TAG = re.compile(r"<(?:(!--)|(meta)(?=[\s/])|/?[a-z][^\s/>]*)", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"[\s/]*([^\s/>=]+)(?:\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"']*)))?")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What pages mean by a name is often more than it says (encoding.spec.whatwg.org).
_MEANT = {
    **dict.fromkeys(("ascii", "iso8859-1"), "cp1252"),
    **{"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949"},
    **{"big5": "big5hkscs", "iso8859-9": "cp1254", "tis-620": "cp874", "iso8859-11": "cp874"},
    "iso2022_jp": "iso2022_jp_ext",
}
# In these, Python lacks characters that NEC and IBM added to JIS X 0208, and pages use.
_JAPANESE = ("euc_jp", "iso2022_jp_ext")
# Their errors are handled here: Python would read on at the second byte of a pair.
_PAIRED = (*_JAPANESE, "cp932", "cp949", "big5hkscs", "gb18030")
_TRIPLE = re.compile(rb"\x8f[\xa1-\xfe]{2}")
_PAIR = re.compile(rb"[\x81-\xfe][\x80-\xff]")
# What the standard has in place of codecs: an error for old encodings, some of which Python reads,
# and bytes.
_NO_CODECS = ("replacement", "x-user-defined")
# Names of codecs of Python that are no encodings of pages.
_NO_CHARSETS = ("idna", "punycode", "utf-7", "unicode_escape", "raw_unicode_escape", "undefined")
# Continuation bytes from which on valid UTF-8 is no accident: of pairs of GBK 8 in 100 are valid.
_SURE_UTF8 = 8
# Characters of several bytes to one wrong byte from which on a page is UTF-8 with faults.
_WIDE_A_FAULT = 20


def text_of(response: bytes, extract: Extract, kind: str = "") -> str:
    """The page's main text. `kind` is its media type, if that is known better than from HTTP.

    Raises BadRecordError, saying why there is none.
    """
    status, fields, body = _divided(response)
    said = fields.get("content-type", "")
    is_known = _is_page(kind or said, "response")
    if status != 200:
        raise BadRecordError("not a page", f"its HTTP status is {status}")
    page = _decoded(_dechunked(body, fields), fields.get("content-encoding", ""))
    if not is_known:
        _check_start(page, "response")
    return _main_text(page, said, extract)


def text_of_resource(page: bytes, said: str, extract: Extract) -> str:
    """The main text of a page that was stored without a response, with its Content-Type.

    Raises BadRecordError, saying why there is none.
    """
    if not _is_page(said, "resource"):
        _check_start(page, "resource")
    return _main_text(page, said, extract)


def _is_page(said: str, what: str) -> bool:
    """Whether a Content-Type is that of a page; if there is none, the page itself has to tell.

    Of several the last one holds, as in browsers. Raises BadRecordError where it is another one.
    """
    kinds = [re.split(";", one)[0].strip().lower() for one in said.split(",")]
    kind = next((one for one in reversed(kinds) if "/" in one), "")
    if kind and kind not in _PAGES:
        raise BadRecordError("not HTML", f"a {what} of type {kind}")
    return bool(kind)


def _check_start(page: bytes, what: str) -> None:
    """Raise BadRecordError where what has no Content-Type does not begin as browsers take a page
    for one."""
    if not (_START.match(page) or contents.is_page(page[: contents.HEAD_BYTES])):
        raise BadRecordError("not HTML", f"a {what} of type unknown, which begins as no page")


def _main_text(page: bytes, said: str, extract: Extract) -> str:
    text = extract(in_charset(page, said))
    if not text:
        raise BadRecordError("no text in the page")
    # HTML can write lone surrogates by their number.
    return text.encode(errors="replace").decode()


def _divided(response: bytes) -> tuple[int, dict[str, str], bytes]:
    """(HTTP status, fields by their names in lower case, body) of a response."""
    status = 100
    while 100 <= status < 200:
        match = _STATUS.match(response)
        if match is None:
            found = f"begins with {response[:20]!r}" if response.strip() else "is empty"
            raise BadRecordError("not a page", f"its HTTP response {found}, which is no status")
        status = int(match[1])
        end = _HEAD_END.search(response)
        head, response = (
            (response[: end.start()], response[end.end() :]) if end else (response, b"")
        )
    fields: dict[str, list[str]] = {}
    # A value may go on in the next line, behind white space.
    for line in _FOLD.sub(b" ", head).split(b"\n")[1:]:
        name, _, value = line.decode("latin-1").partition(":")
        fields.setdefault(name.strip().lower(), []).append(value.strip())
    return status, {name: ", ".join(values) for name, values in fields.items()}, response


def _dechunked(body: bytes, fields: dict[str, str]) -> bytes:
    """The body without the chunk sizes of HTTP, if it has them; it may end early."""
    is_said = "chunked" in fields.get("transfer-encoding", "").lower()
    first = _CHUNK.match(body)
    if first is None:
        return body
    size, end = int(first[1], 16), first.end() + int(first[1], 16)
    is_cut = end >= len(body) and is_said
    if not (body[end : end + 1] in (b"\r", b"\n") or is_cut) or not (size or is_said):
        return body
    return b"".join(_chunks(body))


def _chunks(body: bytes) -> Iterator[bytes]:
    at = 0
    while match := _CHUNK.match(body, at):
        at = match.end() + int(match[1], 16)
        if at == match.end():
            return
        yield body[match.end() : at]
    if not _CUT_CHUNK.fullmatch(body, min(at, len(body))):
        raise BadRecordError("not a page", f"no chunk of HTTP begins at byte {at + 1} of its body")


def _decoded(page: bytes, said: str) -> bytes:
    """The page after decompression. `said`: the Content-Encoding."""
    for _ in range(_MOST_LAYERS):
        if page.startswith(_GZIP):
            page = b"".join(_inflated(page, 31))
        elif page.startswith(_ZSTD):
            page = _unzstd(page)
        else:
            break
    if not _is_plain(page) and "deflate" in said.lower():
        page = _undeflated(page)
    if len(page) > LARGEST:
        raise BadRecordError("record too large", f"a page of more than {LARGEST} bytes")
    names = [name for name in re.split(r"[\s,]+", said.lower()) if name not in ("", "identity")]
    if names and page and not _is_plain(page):
        _refuse(names)
    return page


def _refuse(names: list[str]) -> None:
    if not {"gzip", "x-gzip", "deflate", "zstd"} & set(names):
        detail = f"its Content-Encoding is {', '.join(names)}, which is not read"
        raise BadRecordError("not a page", detail)
    # After deflate anything could be meant to be a page.
    if "deflate" not in names:
        detail = f"its body is damaged: neither {', '.join(names)} data nor a page"
        raise BadRecordError("not a page", detail)


def _is_plain(page: bytes) -> bool:
    """Whether it begins as a page does, and not as compressed data."""
    head = page[:_LOOKED_AT]
    return bool(_MARKUP.search(head)) and not _CONTROLS.search(head)


def _inflated(page: bytes, window: int) -> Iterator[bytes]:
    """What all members hold, up to LARGEST bytes and one more."""
    size = 0
    while size <= LARGEST:
        decoder = zlib.decompressobj(window)
        try:
            block = decoder.decompress(page, LARGEST + 1 - size)
        except zlib.error:
            raise BadRecordError("not a page", "its compressed data are damaged") from None
        size += len(block)
        yield block
        if not decoder.eof and size <= LARGEST:
            raise BadRecordError("not a page", "its compressed data end early")
        # NULs are padding.
        page = decoder.unused_data.lstrip(b"\0")
        if not page.startswith(_GZIP):
            if page.strip() and size <= LARGEST:
                detail = f"{len(page)} bytes of something else follow its compressed data"
                raise BadRecordError("not a page", detail)
            return


def _undeflated(page: bytes) -> bytes:
    # The standard says zlib's format; many servers sent bare deflate data.
    with contextlib.suppress(zlib.error):
        zlib.decompressobj(_ZLIB).decompress(page, 1)
        return b"".join(_inflated(page, _ZLIB))
    return b"".join(_inflated(page, _RAW))


def _unzstd(page: bytes) -> bytes:
    found = bytearray()  # bytes would be copied for each block
    while page.startswith(_ZSTD) and len(found) <= LARGEST:
        decoder = zstandard.ZstdDecompressor(max_window_size=LARGEST * 2)
        reader = decoder.decompressobj()
        try:
            # Bounded by blocks: each small part gives 128 KiB at most.
            for first in range(0, len(page), 512):
                found += reader.decompress(page[first : first + 512])
                if reader.eof or len(found) > LARGEST:
                    break
        except zstandard.ZstdError:
            raise BadRecordError("not a page", "its compressed data are damaged") from None
        if not reader.eof and len(found) <= LARGEST:
            raise BadRecordError("not a page", "its compressed data end early")
        page = (reader.unused_data + page[first + 512 :]).lstrip(b"\0")
    if page.strip() and len(found) <= LARGEST:
        detail = f"{len(page)} bytes of something else follow its compressed data"
        raise BadRecordError("not a page", detail)
    return bytes(found)


def in_charset(page: bytes, said: str) -> str | bytes:
    """The page as text: by its byte order mark, by what HTTP's Content-Type or the page says.

    Else it is in UTF-8, or of unknown encoding: then its bytes. Many pages in UTF-8 are called
    something else, so valid UTF-8 goes before what was said, unless there is little of it.
    """
    for mark, name in _MARKS:
        if page.startswith(mark):
            return page.decode(name, errors="replace")
    # Of several Content-Types browsers take the last.
    names = [*reversed(_CHARSET.findall(said)), *_of_page(page)]
    text = _as_utf8(page, any(_codec(name) == "utf-8" for name in names))
    if text is None:
        text = next(filter(None, (_in(page, name) for name in names)), None)
    if text is None:
        with contextlib.suppress(UnicodeDecodeError):
            return page.decode()
    return page if text is None else text


def _as_utf8(page: bytes, is_said: bool) -> str | None:
    """The page if it is plainly UTF-8, but for a cut at its end and a few wrong bytes."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(page)
    wrong = text.count("\ufffd") - page.count("\ufffd".encode())
    wide = len(text) - len(text.encode("ascii", errors="ignore")) - wrong
    if wrong * _WIDE_A_FAULT > wide:
        return None
    # U+FFFD has two continuation bytes.
    continued = len(text.encode()) - len(text) - 2 * wrong
    return text if continued >= (1 if is_said else _SURE_UTF8) else None


def said_text(data: bytes, said: str) -> str | None:
    """The text in the encoding that a Content-Type names; None where it names none, or UTF-8.

    Raises BadRecordError where the text is not in it.
    """
    name = next(iter(_CHARSET.findall(said)), "")
    codec = _codec(name)
    if not name or codec == "utf-8":
        return None
    if codec is None:
        raise BadRecordError("unknown encoding", f"its Content-Type says charset={name}")
    try:
        return data.decode(codec, errors=_ADDED)
    except (LookupError, ValueError):
        raise BadRecordError("not in its encoding", f"its Content-Type says {name}") from None


def _of_page(page: bytes) -> Iterator[str]:
    """The encodings that the page itself shows, most reliable first."""
    head = page[:_META_BYTES].decode("latin-1")
    of_xml = _XML.match(head)
    for name in (of_xml and of_xml[1], next(_of_metas(head), None)):
        if name:
            # It could not be read if it were.
            yield "utf-8" if name.lower().startswith("utf-16") else name
    if b"\x1b$" in page:
        yield "iso-2022-jp"


def _of_metas(head: str) -> Iterator[str]:
    """The known encodings that elements of `meta` state, outside of comments."""
    at = 0
    while tag := _TAG.search(head, at):
        at = tag.end()
        if tag[1]:
            # The dashes that open a comment can close it, too.
            at = head.find("-->", at - 2) + 3
            if at < 3:
                return
            continue
        fields: dict[str, str] = {}
        while found := _ATTRIBUTE.match(head, at):
            at = found.end()
            fields.setdefault(found[1].lower(), found[2] or found[3] or found[4] or "")
        name = _of_meta(fields) if tag[2] else ""
        if _codec(name):
            yield name


def _of_meta(fields: dict[str, str]) -> str:
    """The encoding that a `meta` with these attributes states, or ""."""
    content = fields.get("content", "")
    # A media type is one, whatever the attribute beside it is called.
    is_type = content.lstrip().lower().startswith(_PAGES)
    is_type = is_type or fields.get("http-equiv", "").lower() == "content-type"
    of_type = _CHARSET.findall(content) if is_type else []
    return next(filter(None, (fields.get("charset"), *of_type)), "")


def _codec(name: str) -> str | None:
    # The standard's labels, and what else Python knows.
    known = webencodings.lookup(name)
    label = name.strip().lower().removeprefix("x-")
    try:
        found = known.codec_info.name if known and known.name not in _NO_CODECS else label
        found = codecs.lookup(found).name
    except (LookupError, ValueError):
        return None
    return None if found in _NO_CHARSETS else _MEANT.get(found, found)


def _in(page: bytes, name: str) -> str | None:
    """The page in this encoding; None where it is unknown, or the page is plainly in another."""
    codec = _codec(name)
    if codec is None or (codec.startswith(("utf-16", "utf-32")) and b"\0" not in page):
        return None
    try:
        text = page.decode(codec, errors=_REPLACED if codec in _PAIRED else "replace")
    except (LookupError, ValueError):
        return None
    wrong = text.count("\ufffd")
    others = len(text) - len(text.encode("ascii", errors="ignore"))
    return None if wrong * 4 > others else text


def _added(error: UnicodeError) -> tuple[str, int]:
    """(a character, where to read on): one that NEC or IBM added to JIS X 0208, as cp932 has it.

    Raises the error where it is none of these.
    """
    assert isinstance(error, UnicodeDecodeError)
    pair = error.object[error.start : error.start + 2]
    places = [(byte & 0x7F) - 0x20 for byte in pair]
    if error.encoding not in _JAPANESE or len(pair) < 2 or not all(0 < n < 95 for n in places):
        raise error
    row, cell = places
    first = (row + 1) // 2 + (0x80 if row < 63 else 0xC0)
    second = cell + (0x9E if row % 2 == 0 else 0x3F if cell < 64 else 0x40)
    return bytes((first, second)).decode("cp932"), error.start + 2


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """(what stands for wrong bytes, where to read on), so that the pairs behind them stay pairs."""
    with contextlib.suppress(UnicodeDecodeError):
        return _added(error)
    assert isinstance(error, UnicodeDecodeError)
    # Crawlers cut pages anywhere.
    if error.reason.startswith("incomplete"):
        return "", error.end
    wrong = _PAIR.match(error.object, error.start)
    if error.encoding == "euc_jp":
        wrong = _TRIPLE.match(error.object, error.start) or wrong
    return "\ufffd", wrong.end() if wrong else error.end


_ADDED, _REPLACED = "characters of NEC and IBM", "whole pairs"
codecs.register_error(_ADDED, _added)
codecs.register_error(_REPLACED, _replaced)
