"""What looks like a secret is masked, wherever it stands in free text, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.masking import MASK, MOST_STEPS, compiled, is_masked_form, masked, masked_details, why_not

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
@given(
    before=st.sampled_from(["", "failed with ", "é:", "key="]), after=st.sampled_from(["", " twice", "\n", ", sorry"])
)
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
        "helpdesk-assistant-production-01",
        "urn:asap:agent:helpdesk-assistant-production-01",
        "task-550e8400-e29b-41d4-a716-446655440000",
        "xeyJhbGciOiJF.eyJpc3MiOiJ4In0.c2lnbmF0dXJl",
        "asked the bearer of this",
        "http://127.0.0.1:9000/x",
        "2026-11-20T09:00:01.123456Z",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_free_texts_of_details_are_masked_however_deep_and_keep_their_shape() -> None:
    details = {"error": SECRETS[0], "b": [1, {"comment": [SECRETS[3]], "n": 1}], "d": None, "reason": {"x": SECRETS[1]}}
    assert masked_details(details) == {
        "error": MASK,
        "b": [1, {"comment": [MASK], "n": 1}],
        "d": None,
        "reason": {"x": MASK},
    }


@pytest.mark.parametrize("secret", SECRETS)
def test_what_names_something_stays_whatever_it_looks_like(secret: str) -> None:
    details = {"agent": secret, "task_id": secret, "scopes": [secret], "changed": {"id": secret}, "list": (secret,)}
    assert masked_details(details) == {**details, "list": [secret]}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        ("x?", "matches where there is nothing"),
        ("a+", "repeats without an end"),
        ("ba*", "repeats without an end"),
        ("a{3,}", "repeats without an end"),
        ("(ab){1,2}", "repeats a group"),
        ("x(a|a){1,9}", "repeats a group"),
        ("x(?:a)?", "repeats a group"),
        ("(?x)a b", "is of the verbose form"),
        ("a{1,64}b{1,64}", "has more than"),
        ("|".join("abcdefghijklmno"), "has more than"),
    ],
)
def test_a_pattern_whose_cost_is_not_bounded_is_refused(pattern: str, reason: str) -> None:
    assert (why_not(pattern) or "").startswith(reason)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[\w.+-]{1,30}@[\w-]{1,30}\.\w",
        "ticket [0-9]{4,9}",
        r"\+49",
        "[]+*]x",
        "[^]]{2}",
        "(?i:secret)",
        "a|b",
        "xa{,9}",
    ],
)
def test_a_bounded_pattern_is_taken(pattern: str) -> None:
    assert why_not(pattern) is None


@given(st.text(alphabet="ab()[]{}?*+|,12^\\\\.", max_size=14), st.text(alphabet="ab", max_size=300))
def test_whatever_pattern_is_taken_searches_any_text(pattern: str, text: str) -> None:
    if not any(nested in pattern for nested in ("[[", "&&", "||")) and why_not(pattern) is None:
        masked_details({"reason": text}, compiled([pattern]))


def test_the_worst_pattern_that_is_taken_ends_soon() -> None:
    worst = "a{0,15}a{0,15}a{0,15}b"
    assert why_not(worst) is None
    assert MOST_STEPS == 16**3
    text = "a" * 2_000
    assert masked_details({"reason": text}, compiled([worst])) == {"reason": text}


def test_patterns_are_looked_for_in_free_text_alone() -> None:
    patterns = compiled(["[a-z]{1,30}@corp", "4711"])
    details = {"reason": "ann@corp said 4711", "consumer": "ann@corp", "error": None, "comment": 5, "rows": ["4711"]}
    assert masked_details(details, patterns) == {**details, "reason": f"{MASK} said {MASK}"}


@given(st.text(alphabet="ab", max_size=8), st.lists(st.sampled_from(["a", "b", "ab", "aa"]), max_size=3))
def test_what_was_masked_is_told_from_any_other_text(text: str, patterns: list[str]) -> None:
    said = masked_details({"reason": text}, compiled(patterns))["reason"]
    assert is_masked_form(said, text)
    if MASK not in said:
        assert not is_masked_form(said, f"{text}a")


@pytest.mark.parametrize(
    ("said", "text", "is_form"),
    [
        (None, None, True),
        (None, "", False),
        ("", None, False),
        ("a", "b", False),
        (f"x {MASK} y", "x secret y", True),
        (f"x {MASK} y", "x secret z", False),
        (f"x {MASK} y", "u secret y", False),
        (f"ab{MASK}ba", "aba", False),
        (f"a{MASK}-{MASK}c", "a1-2c", True),
        (f"a{MASK}-{MASK}c", "a12c", False),
        (f"{MASK}{MASK}", "", True),
    ],
)
def test_a_masked_form_is_told_from_another(said: str | None, text: str | None, is_form: bool) -> None:
    assert is_masked_form(said, text) is is_form
