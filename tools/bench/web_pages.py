"""Generated pages as the web has them: menus, prose, lists, code, addresses, broken encodings."""

from __future__ import annotations

import random

_COMMON = "the of and to a in that is was he for it with as his on be at by i this had not are but"
_RARE = (
    "harbour winter letter engine garden river council painting bridge market doctor summer train "
    "island window history question village company teacher mountain station evening paper. "
    "number, weather; children's don't o'clock self-made U.S. e.g. Mr. 1,234 3.5% £20 café naïve"
)
_LINES = [
    "Home | About | Contact",
    "Accept our cookie policy to go on.",
    "This site uses cookies and JavaScript to work.",
    "Read more...",
    "Lorem ipsum dolor sit amet, consectetur.",
    "• first of all",
    "- an item of a list",
    "### heading ###",
    "function f(x) { return x; }",
    "if (a[0] <= b): print('so:) )')",
    "Write to ann@home.org or to the server at 8.8.8.8, not 10.0.0.1.",
    "https://www.example.org/a/path/that/is/long?with=a&query=of&many=fields#and-a-fragment-too",
    "It doesnâ€™t work &amp; nobody knows why [1][citation needed].",
    "great :) ) thanks!!! <3 (-: >.<",
    "Es war ein klarer, kalter Tag im April, und die Uhren schlugen dreizehn.",
    "これは日本語の文章です。とても短いです。",
    "“Curly,” she said… \u2018and so on\u2019 — at 10a.m.",
    "1 2 3 4 5 6 7 8 9 10",
    "a  b\tc\xa0d",
    "",
]


def page(number: int) -> str:
    """The text of a page; the same number gives the same page."""
    source = random.Random(number)
    kinds = source.choices(["prose", "line", "again", "blank"], source.choice(_KINDS), k=40)
    lines: list[str] = []
    for kind in kinds[: source.randint(1, 40)]:
        if kind == "prose":
            lines.append(" ".join(_sentence(source) for _ in range(source.randint(1, 6))))
        elif kind == "line":
            lines.append(source.choice(_LINES))
        elif kind == "again" and lines:
            lines.append(" ".join([source.choice(lines)] * source.randint(1, 3)))
        else:
            lines.append("")
    return source.choice(["\n", "\n\n", " ", "\r\n"]).join(lines)


# Weights of prose, single lines, repeated lines and blank ones.
_KINDS = [(9, 1, 0, 1), (4, 2, 1, 1), (1, 6, 1, 1), (4, 1, 4, 0), (6, 0, 1, 0)]


def _sentence(source: random.Random) -> str:
    words = [
        source.choice(_COMMON.split() if source.random() < 0.5 else _RARE.split())
        for _ in range(source.randint(3, 25))
    ]
    return " ".join(words).capitalize() + source.choice([".", ".", ".", "!", "?", '."', "...", ""])
