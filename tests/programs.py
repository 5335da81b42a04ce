"""System programs that some tests run. No test installs them: without one it is skipped."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from typing import NoReturn

import pytest

INSTALLER = "tools/system_packages"
_REASON = re.compile(rf"needs (.+): run {INSTALLER}$")


def find(*names: str) -> str | None:
    """The path of the first of these programs that is here, where daemons lie included."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def skip_without(*names: str) -> NoReturn:
    """Skip the running test, because it needs these programs."""
    pytest.skip(f"needs {', '.join(names)}: run {INSTALLER}")


def lacking(reasons: Iterable[str]) -> dict[str, int]:
    """How many of these reasons of skipped tests are programs that were missing, by programs."""
    return dict(Counter(found[1] for reason in reasons if (found := _REASON.search(reason))))
