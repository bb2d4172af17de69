"""What looks like a secret is masked, wherever it stands in free text, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.masking import MASK, masked, masked_details

SECRETS = [
    "asapd_0123456789_" + "ab" * 32,
    "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\n-----END PRIVATE KEY-----",
    "-----BEGIN EC PRIVATE KEY-----",
    "eyJhbGciOiJFZERTQSJ9.eyJpc3MiOiJ4In0.c2lnbmF0dXJl",
    "Bearer abcdefghijklmnop0123",
    "sk-proj-abcdefghijklmnopqrstuvwxyz",
    "ghp_" + "a1" * 18,
    "AKIA" + "A1" * 8,
    "AIza" + "x" * 35,
    "xoxb-1234567890-abcdef",
]


@pytest.mark.parametrize("secret", SECRETS)
@given(before=st.sampled_from(["", "failed with ", "é:"]), after=st.sampled_from(["", " twice", "\n", ", sorry"]))
def test_a_secret_is_masked_and_what_is_around_it_stays(secret: str, before: str, after: str) -> None:
    assert masked(f"{before}{secret}{after}") == f"{before}{MASK}{after}"


def test_a_password_in_a_url_is_masked() -> None:
    assert masked("GET https://me:hunter2@example.com/x") == f"GET https://{MASK}@example.com/x"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "urn:asap:agent:worker",
        "aud_01JD8Z4M7Q0000000000000000",
        "ab" * 32,
        "task-sk-1",
        "asked the bearer of this",
        "http://127.0.0.1:9000/x",
        "2026-11-20T09:00:01.123456Z",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_details_are_masked_however_deep_and_keep_their_shape() -> None:
    details = {"a": SECRETS[0], "b": [SECRETS[1], {"c": SECRETS[3], "n": 1}], "d": None, "e": True, "f": ("x",)}
    assert masked_details(details) == {"a": MASK, "b": [MASK, {"c": MASK, "n": 1}], "d": None, "e": True, "f": ["x"]}
