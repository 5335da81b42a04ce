"""Pages in Chromium: what is drawn, and what the browser logs."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests import programs

CHROMIUM = programs.find("chromium", "chromium-browser")


def browse(path: Path, width: int) -> tuple[str, str]:
    """The file's DOM in a browser, and what the browser logged."""
    if CHROMIUM is None:
        programs.skip_without("chromium")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    done = subprocess.run(
        [
            *(
                CHROMIUM,
                *flags.split(),
                *more.split(),
                f"--user-data-dir={path.parent / 'profile'}",
            ),
            *(f"--window-size={width},1600", path.as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout, done.stderr


def probed(path: Path, script: str, width: int) -> tuple[dict[str, Any], str, str]:
    """What a function's body returns in the page when it is there; the DOM, and what was logged.

    The page forbids all scripts: this one is let in.
    """
    shown = path.read_text(encoding="utf-8")
    allowed = shown.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    probe = f"""<script>addEventListener("load", () => document.documentElement.setAttribute(
      "data-probe", JSON.stringify((() => {{ {script} }})())))</script>"""
    path.write_text(allowed.replace("</head>", f"{probe}</head>"), encoding="utf-8")
    dom, logged = browse(path, width)
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found
    return json.loads(html.unescape(found[1])), dom, logged
