"""Credentials in texts: what no file that we write may show."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "[hidden]"

_NAMES = r"signature|sig|token|key|secret|credential|password|passwd"
_IN_URL = re.compile(rf"://[^/]*@|[?&][^=]*({_NAMES})[^=]*=", re.I)
_USER = re.compile(r"(://)[^/\s@]+@")
_QUERY = re.compile(rf"([?&][^=&\s]*(?:{_NAMES})[^=&\s]*=)[^&\s'\")\]]+", re.I)
# HF_TOKEN=..., api_key: ...; of our own words `tokens` and `eos_token` are counts and names.
_WORDS = (
    r"(?:api|access|private|secret)[_-]?key(?:[_-]?id)?|(?:auth|hf|api|access|bearer)[_-]?token"
)
_NAMED = re.compile(rf"((?:{_WORDS}|secret|password|passwd)\w*['\"]?\s*[=:]\s*)[^\s,;]+", re.I)
_KEY = re.compile(rf"^(?:.*[_-])?(?:{_WORDS}|token|secret|password|passwd|credentials?)$", re.I)
# As GitHub, Hugging Face, AWS, OpenAI and Slack begin them.
_ISSUED = re.compile(r"\b(?:gh[pousr]_|hf_|AKIA|ASIA|sk-|xox[abp]-)[A-Za-z0-9_-]{12,}")


def in_url(url: str) -> bool:
    """Whether a URL holds a user's name and password, or a signature."""
    return bool(_IN_URL.search(url))


def refusal(url: str) -> str:
    """Why this URL, which files and jobs repeat, cannot be given; empty: it holds no secret."""
    if not in_url(url):
        return ""
    return (
        "holds credentials, which would be stored with the configuration; give them in the "
        "environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ~/.netrc)"
    )


def redacted(value: Any) -> Any:
    """A text, or JSON-able value, with HIDDEN in place of credentials, also under their names."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if item and _KEY.match(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redacted(item) for item in value]
    if not isinstance(value, str):
        return value
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", value))
    return _ISSUED.sub(HIDDEN, _NAMED.sub(rf"\1{HIDDEN}", text))
