"""Credentials are hidden, and nothing else is."""

from __future__ import annotations

import pytest

from data_prep.dataset.credentials import HIDDEN, in_url, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:hunter2@host/x", f"s3://{HIDDEN}@host/x"),
        ("at https://h/x?a=1&X-Amz-Signature=f00&b=2", f"at https://h/x?a=1&X-Amz-Signature={HIDDEN}&b=2"),
        ("WANDB_API_KEY=abc123", f"WANDB_API_KEY={HIDDEN}"),
        ("'HF_TOKEN': 'hf_x'", f"'HF_TOKEN': {HIDDEN}"),
        ("aws_secret_access_key: abc/def+g", f"aws_secret_access_key: {HIDDEN}"),
        ("uses hf_0123456789abcdef now", f"uses {HIDDEN} now"),
        ("AKIAIOSFODNN7EXAMPLE", HIDDEN),
        ("password=x, next", f"password={HIDDEN}, next"),
    ],
)  # fmt: skip
def test_a_credential_in_a_text_is_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 20480, eos_token: </s>",
        "https://host/path@v1?shards=3",
        "4 lanes of 1024 tokens a step; key 17 of 20",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ],
)
def test_any_other_text_is_as_it_was(text: str) -> None:
    assert redacted(text) == text


def test_values_under_names_of_credentials_are_hidden_at_any_depth() -> None:
    given = {
        "model": {"tokens": 5, "eos_token_id": 2, "segment": 64},
        "remote": [{"api_key": "abc", "auth-token": 7, "secret": "", "url": "s3://a:b@h"}],
    }
    assert redacted(given) == {
        "model": {"tokens": 5, "eos_token_id": 2, "segment": 64},
        "remote": [
            {"api_key": HIDDEN, "auth-token": HIDDEN, "secret": "", "url": f"s3://{HIDDEN}@h"}
        ],
    }


def test_a_url_with_credentials_is_recognised() -> None:
    assert in_url("https://a:b@host/x") and in_url("https://host/x?sig=1")
    assert not in_url("https://host/x?part=1") and not in_url("s3://bucket/key/x")
