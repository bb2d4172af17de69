"""Whose a key of idempotency is."""

from __future__ import annotations

from asapd.actors.messages import Idempotency
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import Role
from asapd.edge.idempotency import bind


def bound(actor: str, body: bytes = b"{}") -> Idempotency:
    found = bind("once", Caller(actor, Role.INGEST), "POST", "/usage", b"", body, 1)
    assert isinstance(found, Idempotency)
    return found


def test_a_request_that_another_process_of_the_user_sends_again_is_the_same() -> None:
    assert bound("uid:1000 pid:7") == bound("uid:1000 pid:8")
    assert bound("uid:1000 pid:7") != bound("uid:1001 pid:7")
    assert bound("uid:1000 pid:7").key != bound("key:a").key
    assert bound("key:a").key != bound("key:b").key


def test_a_key_that_is_none_is_refused_and_says_what_is_wrong_with_it() -> None:
    for key, why in (("", "is empty: send one"), ("x" * 256, "has 256 characters, at most 255")):
        refused = bind(key, Caller("key:a", Role.INGEST), "POST", "/usage", b"", b"{}", 1)
        assert isinstance(refused, Refusal)
        assert why in refused.detail
        assert refused.errors[0].field == "Idempotency-Key"


def test_another_body_under_the_same_key_is_told_apart() -> None:
    first, second = bound("key:a"), bound("key:a", b"[]")
    assert first.key == second.key
    assert first.request != second.request
