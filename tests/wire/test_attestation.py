"""What excuses that something is gone: whatever is changed of it, or wherever it is put, the signature tells."""

from __future__ import annotations

from typing import Any

import pytest
from nacl.signing import SigningKey

from asapd.wire.attestation import MEMBER, attested, is_attested

KEY = SigningKey(bytes(range(32)))
PUBLIC = bytes(KEY.verify_key)
SAID: dict[str, Any] = {"count": 2, "entries": [[3, 4]], "reason": "request 17", "before_us": 2**60}
PLACE = ("erasure.applied", "key:o", "ers_1", SAID, bytes(32))


def test_what_was_attested_is_so_for_its_place_alone() -> None:
    details = attested(*PLACE, KEY)
    assert {name: value for name, value in details.items() if name != MEMBER} == SAID
    assert is_attested(*PLACE[:3], details, PLACE[4], PUBLIC)
    assert not is_attested(*PLACE[:3], details, bytes(31) + b"1", PUBLIC)
    assert not is_attested(*PLACE[:3], details, PLACE[4], bytes(SigningKey(bytes(32)).verify_key))
    for at, other in enumerate(("retention.applied", "key:x", "ers_2")):
        place = [*PLACE[:3]]
        place[at] = other
        assert not is_attested(*place, details, PLACE[4], PUBLIC)  # type: ignore[call-arg]  # three names are three


@pytest.mark.parametrize(
    "change", [{"count": 3}, {"entries": [[3, 5]]}, {"more": 1}, {MEMBER: None}, {MEMBER: "AAAA"}, {MEMBER: 5}]
)
def test_any_change_of_what_was_said_is_told(change: dict[str, Any]) -> None:
    assert not is_attested(*PLACE[:3], {**attested(*PLACE, KEY), **change}, PLACE[4], PUBLIC)
    assert not is_attested(*PLACE[:3], SAID, PLACE[4], PUBLIC)
