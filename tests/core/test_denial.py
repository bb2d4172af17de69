"""Denials: one sentence and its parts, which say the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.denial import Denied, Explanation, Reason, deeper, deny, explanation, legible, revoked


def test_the_sentence_names_the_token_and_ends_in_the_remedy() -> None:
    denied = deny(Reason.CYCLE, "rule", "it is wrong", "mend it", token="t1", position=2, granted=5, asked=("a", "b"))
    assert denied.detail == "token t1: it is wrong; mend it"
    assert denied.explain == Explanation("rule", "mend it", "t1", 2, 5, ("a", "b"))
    assert deny(Reason.MALFORMED, "form", "it is wrong", "mend it").detail == "it is wrong; mend it"


def test_a_denial_without_parts_gets_those_of_its_sentence() -> None:
    bare = Denied(Reason.REVOKED, "token t1: revoked; ask for a new one", "t1")
    assert explanation(bare) == Explanation("revoked", "ask for a new one", "t1")
    assert explanation(revoked("t1", "a")).remedy == "ask a for a new one"


def test_ancestors_judged_by_themselves_stand_deeper() -> None:
    assert explanation(deeper(revoked("t1", "a", position=1), 2)).position == 3
    assert explanation(deeper(revoked("t1", "a"), 2)).position is None


@given(st.text(max_size=300))
def test_what_a_caller_sent_can_be_printed(text: str) -> None:
    shown = legible(text)
    assert shown.isprintable()
    assert len(shown) <= 128 * 10
    if text.isprintable() and len(text) <= 128:
        assert shown == text
