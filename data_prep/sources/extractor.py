"""trafilatura in a process of its own: a page on which it hangs or crashes costs that page alone.

A signal would not do, since libxml2 may be at work for minutes without returning to Python.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from data_prep.dataset import children
from data_prep.sources.documents import BadRecordError

SECONDS = 60.0
"""The time that one page may take; the usual is some hundredths."""

_NO_TEXT = "no text in the page"


class Extractor:
    """The main text of pages, one after the other. Its process ends with the `with` block."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def __call__(self, page: str | bytes) -> str:
        """The page's main text, empty if it has none. Raises BadRecordError."""
        pipe = self._pipe or self._begin()
        try:
            pipe.send(page)
            if not pipe.poll(SECONDS):
                self._end()
                raise BadRecordError(_NO_TEXT, f"the extractor did not end within {SECONDS:g} s")
            text, failed = pipe.recv()
        except (EOFError, ConnectionError):
            self._end()
            raise BadRecordError(_NO_TEXT, "the extractor's process ended") from None
        if failed:
            raise BadRecordError(_NO_TEXT, failed)
        return str(text)

    def _begin(self) -> Connection:
        # Here, for all processes: it takes a second.
        import trafilatura  # noqa: F401

        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        arguments = (os.getpid(), theirs, self._pipe)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        return self._pipe

    def _end(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process.close()
        self._process = self._pipe = None


def _serve(parent: int, pipe: Connection, theirs: Connection) -> None:
    """In the process: answer each page with (text, why there is none)."""
    children.end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    theirs.close()
    # Its messages about a page are in the reject.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    while True:
        try:
            page = pipe.recv()
        except EOFError:
            return
        pipe.send(_extracted(page))


def _extracted(page: str | bytes) -> tuple[str, str]:
    import trafilatura

    try:
        text = trafilatura.extract(
            _tree(page), favor_precision=True, include_comments=False, deduplicate=False
        )
    except BadRecordError as bad:
        return "", bad.detail
    except Exception as error:  # a page that cannot be parsed is no reason to lose more
        return "", type(error).__name__
    return text or "", ""


def _tree(page: str | bytes) -> Any:
    """The whole page as trafilatura parses it; None if it is none. Raises BadRecordError.

    libxml2 ends a page, without an error, at an element that lies in 256 others, as in those whose
    <font> or <div> are never closed. Such a page is parsed anew, with libxml2's largest depth.
    """
    import trafilatura
    from lxml import html
    from trafilatura import utils

    tree = trafilatura.load_html(page)
    if not _is_cut(utils.HTML_PARSER):
        return tree
    text = utils.decode_file(page)
    whole = utils.repair_faulty_html(text, text[:50].lower())
    parser = html.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True
    )
    tree = html.document_fromstring(whole.encode(errors="surrogatepass"), parser=parser)
    if _is_cut(parser):
        raise BadRecordError(_NO_TEXT, "its elements lie in each other more than 2,048 deep")
    return tree


def _is_cut(parser: Any) -> bool:
    """Whether the last page that was parsed reached a limit, so that its rest is not there."""
    return any(one.type_name == "ERR_RESOURCE_LIMIT" for one in parser.error_log)
