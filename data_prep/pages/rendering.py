"""Pages from templates: every value is escaped, and no control character reaches the page.

A report's own templates/ extend this package's, which have the frame, the style and the charts.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from data_prep.dataset.wording import counted

# Controls and overrides of the writing direction: they change how a page shows what follows them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def render(package: str, template: str, values: dict[str, Any]) -> str:
    """The page of a file in `package`'s templates/. Control characters in it become U+FFFD."""
    return _CONTROLS.sub("\ufffd", _environment(package).get_template(template).render(values))


def share(part: float, whole: float) -> str:
    """A percentage; a dash where there is no whole."""
    return f"{part / whole:.1%}" if whole else "\u2013"


def short(count: int) -> str:
    """A count in at most six characters, rounded from 10,000 on."""
    return f"{count:,}" if count < 10_000 else scaled(count)


def scaled(value: float, unit: str = "", form: str = ".1f") -> str:
    """A value >= 0 with the prefix of a power of 1,000 before its unit: 1.5k, 20.0 MB."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    # 999.95 is the first that one decimal would round to 1000.0.
    while value >= 999.95 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:{form}}{' ' * bool(unit)}{prefixes[0]}{unit}"


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("data_prep.pages")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = "{:,}".format
    environment.filters["counted"] = counted
    environment.filters["bytes"] = lambda value: scaled(value, "B")
    return environment
