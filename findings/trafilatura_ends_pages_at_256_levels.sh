#!/bin/sh
# trafilatura 2.3.1 with lxml 6.1.3 (libxml2 2.14.6): the main text of a page of 400 paragraphs, each
# behind a <font> that is never closed, as old editors wrote them.
#
# Browsers show all of it, and HTML has no limit of depth, so one would expect 400 paragraphs, or an
# error. libxml2 ends the page at the 256th level unless it is asked for more (lxml: huge_tree=True),
# which trafilatura does not; lxml recovers from that, so that only its parser's log tells.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
    trafilatura==2.3.1 lxml==6.1.3 lxml_html_clean==0.4.6
cat > "$place/extract.py" <<'PYTHON'
import trafilatura
from lxml import html
from trafilatura.utils import HTML_PARSER

texts = [f"Sentence {n} of the page, in which some words are said." for n in range(400)]
body = "".join(f"<font><p>{text}</p>" for text in texts)
page = f"<html><head><title>x</title></head><body>{body}</body></html>"
found = trafilatura.extract(page).split("\n")
print(f"{len(found)} of {len(texts)} paragraphs")
trafilatura.load_html(page)
print({one.type_name for one in HTML_PARSER.error_log})
whole = trafilatura.extract(html.fromstring(page, parser=html.HTMLParser(huge_tree=True)))
print(f"with huge_tree {len(whole.splitlines())} paragraphs")
assert len(found) < 260 and whole.split("\n") == texts
PYTHON
"$place/venv/bin/python" "$place/extract.py"
