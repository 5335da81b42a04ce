"""The rotary embedding of Hugging Face's configurations, and ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from data_prep.dataset import settings
from data_prep.dataset.settings import SettingsError
from pretrain.config.model import ModelConfig, RopeScalingConfig

# Keys of each type, and what ours calls them.
_LENGTH = {"original_max_position_embeddings": "original_length"}
_KINDS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_turns",
        "high_freq_factor": "high_turns",
        **_LENGTH,
    },
    "yarn": {
        "factor": "factor",
        "beta_slow": "low_turns",
        "beta_fast": "high_turns",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
        **_LENGTH,
    },
}
_COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_MSCALES = {"mscale", "mscale_all_dim"}
"""Keys of yarn from which its attention factor may follow."""


def imported(plain: Mapping[str, Any], longest: int | None) -> tuple[dict[str, Any], list[str]]:
    """`rope_theta` and `rope_scaling` of our settings, and what is wrong with a config.json's.

    `longest` is the family's own `max_position_embeddings`. As transformers read it: `rope_scaling`
    takes the place of all `rope_parameters`; what neither says of the base is beside them.
    """
    found: list[str] = []
    given = plain.get("rope_scaling") or plain.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        return {}, [f"rope_scaling, rope_parameters: expected an object, found {given!r}"]
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        expected = ", ".join(_KINDS)
        return {}, [f"rope_type: {kind!r} is not computed here; expected one of {expected}"]
    if given.get("partial_rotary_factor") not in (None, 1):
        found.append("partial_rotary_factor: our rotary embedding turns whole heads")
    if kind == "yarn" and given.get("attention_factor") == 0:
        found.append("attention_factor: 0 leaves nothing of queries and keys; remove it")
    if kind == "yarn":
        found += [
            f"{key}: expected a number, found {given[key]!r}"
            for key in sorted(_MSCALES & given.keys())
            if given[key] is not None and not _is_number(given[key])
        ]
    known = _COMMON | _KINDS[kind].keys() | (_MSCALES if kind == "yarn" else set())
    found += [
        f"rope_parameters: {key} is no key of the type {kind}; remove it if it changes nothing"
        for key in sorted(given.keys() - known - (_LENGTH.keys() if kind == "linear" else set()))
    ]
    scaling, wrong = _scaling(kind, given, plain, longest) if kind != "default" else ({}, [])
    theta = given.get("rope_theta", plain.get("rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_scaling": {} if wrong else scaling}, found + wrong


def _scaling(
    kind: str, given: Mapping[str, Any], plain: Mapping[str, Any], longest: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Our settings of scaled frequencies, and what is wrong with them."""
    values = {ours: given[theirs] for theirs, ours in _KINDS[kind].items() if theirs in given}
    if kind != "linear":
        length = "original_max_position_embeddings"
        most = plain.get("max_position_embeddings", longest)
        values["original_length"] = plain.get(length, given.get(length, most))
    if kind == "yarn":
        values |= _yarn(given)
    required = [ours for ours in _KINDS[kind].values() if ours in _REQUIRED]
    names = {ours: theirs for theirs, ours in _KINDS[kind].items()}
    lacking = [names[ours] for ours in required if values.get(ours) is None]
    if lacking:
        return {}, [f"rope scaling {kind}: its {key} is missing" for key in lacking]
    try:
        built: RopeScalingConfig = settings.from_plain(RopeScalingConfig, {"kind": kind, **values})
        wrong = built.problems()
    except SettingsError as error:
        wrong = error.problems
    return {"kind": kind, **values}, [f"rope scaling {kind}: {text}" for text in wrong]


_REQUIRED = ("factor", "low_turns", "high_turns", "original_length")


def _yarn(given: Mapping[str, Any]) -> dict[str, Any]:
    """What yarn has where a key is left out, as in transformers."""
    factor, attention = given.get("factor"), given.get("attention_factor")
    scales = [given.get(key) for key in ("mscale", "mscale_all_dim")]
    numbers = [scale for scale in scales if _is_number(scale) and scale]
    if attention is None and len(numbers) == 2 and _is_number(factor) and factor > 1:
        one, all_dim = (0.1 * scale * math.log(factor) + 1 for scale in numbers)
        attention = one / all_dim
    return {
        "low_turns": given.get("beta_slow") or 1,
        "high_turns": given.get("beta_fast") or 32,
        "attention_factor": 0.0 if attention is None else attention,
        "truncate": bool(given.get("truncate", True)),
    }


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def exported(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of scaled frequencies; nothing where they are not."""
    scaling = model.rope_scaling
    if scaling.kind == "none":
        return {}
    values = {theirs: getattr(scaling, ours) for theirs, ours in _KINDS[scaling.kind].items()}
    if scaling.kind == "yarn" and not scaling.attention_factor:
        del values["attention_factor"]
    return {"rope_type": scaling.kind, **values}
