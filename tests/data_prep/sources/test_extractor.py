"""A page on which the extractor hangs or crashes costs that page, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import trafilatura

from data_prep.sources import extractor
from data_prep.sources.documents import BadRecordError
from data_prep.sources.extractor import Extractor

PAGE = "<html><body><p>" + "Some sentences of a page. " * 20 + "</p></body></html>"
TEXT = ("Some sentences of a page. " * 20).strip()
REAL = trafilatura.load_html


def stand_in(page: Any) -> Any:
    """Is slow in C and in Python, or ends the process, as the page says."""
    if "descriptor" in page:
        os.write(int(page.split()[-1]), b"begun")
    if "slow in C" in page:
        re.match("(a|a)*$", "a" * 60 + "b")
    while "slow in Python" in page:
        try:
            time.sleep(60)
        except BaseException:
            continue
    if "crash" in page:
        os.kill(os.getpid(), signal.SIGKILL)
    return REAL(page)


def children() -> set[str]:
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return set(path.read_text().split())


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("slow in C", "the extractor did not end within 0.3 s"),
        ("slow in Python", "the extractor did not end within 0.3 s"),
        ("crash", "the extractor's process ended"),
    ],
)
def test_a_page_that_takes_too_long_is_rejected_and_the_next_is_read(
    page: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trafilatura, "load_html", stand_in)
    before = children()
    with Extractor() as extract:
        assert extract(PAGE) == TEXT
        if page != "crash":
            monkeypatch.setattr(extractor, "SECONDS", 0.3)
        with pytest.raises(BadRecordError) as caught:
            extract(page)
        assert (caught.value.reason, caught.value.detail) == ("no text in the page", why)
        monkeypatch.setattr(extractor, "SECONDS", 60)
        assert children() == before
        assert extract(PAGE) == TEXT
    assert children() == before


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_the_process_ends_with_the_one_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trafilatura, "load_html", stand_in)
    reader, writer = os.pipe()
    worker = os.fork()
    if not worker:
        try:
            extract = Extractor()
            extract(PAGE)
            os.write(writer, " ".join(children()).encode())
            extract(f"slow in C, descriptor {writer}")
        finally:
            os._exit(0)
    told = b""
    while not told.endswith(b"begun"):
        told += os.read(reader, 99)
    served = int(told.removesuffix(b"begun"))
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    deadline = time.monotonic() + 20
    while (left := is_running(served)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        os.kill(served, signal.SIGKILL)  # it would keep the output of the tests open
    assert not left


SENTENCES = [f"Sentence {n} of the page, in which some words are said." for n in range(400)]


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_page_of_elements_that_are_never_closed_is_read_to_its_end(as_bytes: bool) -> None:
    body = "".join(f"<font><p>{text}</p>" for text in SENTENCES)
    page = f"<!doctype html><html><head><title>x</title></head><body>{body}</body></html>"
    with Extractor() as extract:
        assert extract(page.encode() if as_bytes else page).split("\n") == SENTENCES


def test_a_page_that_is_too_deep_is_rejected_and_not_cut() -> None:
    page = f"<html><body><p>{SENTENCES[0] * 9}</p>{'<div>' * 3000}<p>more</p></body></html>"
    with Extractor() as extract:
        with pytest.raises(BadRecordError) as caught:
            extract(page)
        assert extract(PAGE) == TEXT
    why = "its elements lie in each other more than 2,048 deep"
    assert (caught.value.reason, caught.value.detail) == ("no text in the page", why)
