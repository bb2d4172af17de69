"""The rules of keys: what rules out what, what an overlap covers, and what a manifest's signature means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.agent_keys import AgentKey, KeyState, Sighting, Source, sighting, signers, verifying

A = "urn:asap:agent:a"
K1, K2, K3 = (bytes([number]) * 32 for number in (1, 2, 3))
FIXED: set[Source] = {"held", "configuration"}


def key(raw: bytes, source: Source, state: KeyState = "active", retired_us: int = 50, until_us: int = 100) -> AgentKey:
    gone = state == "retired"
    return AgentKey(A, raw, source, state, 0, retired_us if gone else None, until_us if gone else None)


def verifies(
    *keys: AgentKey, issued_at_us: int | None = 10, now_us: int = 60, strict: bool = False
) -> frozenset[bytes]:
    return verifying(keys, issued_at_us=issued_at_us, now_us=now_us, believe_manifests=not strict)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], set()),
        ([key(K1, "held"), key(K2, "configuration"), key(K3, "import")], {K1, K2}),
        ([key(K1, "api"), key(K2, "import"), key(K3, "manifest")], {K1, K2}),
        ([key(K1, "manifest")], {K1}),
        ([key(K1, "manifest", "claimed")], set()),
        ([key(K1, "identity")], set()),
        # What was replaced still counts for what is older ...
        ([key(K1, "configuration", "retired"), key(K2, "configuration")], {K1, K2}),
        ([key(K1, "manifest", "retired"), key(K2, "import")], {K1, K2}),
        ([key(K1, "import", "retired")], {K1}),
        # ... but not beside a pin, which an import must not be able to weaken.
        ([key(K1, "import", "retired"), key(K2, "configuration")], {K2}),
        ([key(K1, "manifest", "retired"), key(K2, "held")], {K2}),
    ],
)
def test_what_stands_higher_rules_out_what_stands_lower(keys: list[AgentKey], expected: set[bytes]) -> None:
    assert verifies(*keys) == expected


def test_strict_leaves_out_what_manifests_said_and_said_before() -> None:
    assert verifies(key(K1, "manifest"), key(K2, "manifest", "retired"), strict=True) == set()
    assert verifies(key(K1, "import"), key(K2, "manifest"), strict=True) == {K1}


@pytest.mark.parametrize(
    ("issued_at_us", "now_us", "expected"), [(49, 99, {K1}), (50, 99, set()), (49, 100, set()), (0, 50, {K1})]
)
def test_an_overlap_covers_what_was_issued_before_until_it_ends(
    issued_at_us: int, now_us: int, expected: set[bytes]
) -> None:
    assert verifies(key(K1, "import", "retired"), issued_at_us=issued_at_us, now_us=now_us) == expected


def test_a_token_that_does_not_say_when_it_was_issued_is_not_older_than_a_key() -> None:
    assert verifies(key(K1, "api", "retired"), key(K2, "api"), issued_at_us=None) == {K2}


@pytest.mark.parametrize(
    ("keys", "raw", "expected"),
    [
        ([], K1, Sighting.FIRST),
        ([key(K2, "held"), key(K3, "identity")], K1, Sighting.FIRST),
        ([key(K1, "manifest")], K1, Sighting.KNOWN),
        ([key(K1, "manifest")], K2, Sighting.CHANGED),
        ([key(K1, "manifest"), key(K2, "import")], K2, Sighting.KNOWN),
        ([key(K1, "manifest"), key(K2, "import")], K1, Sighting.CHANGED),
        ([key(K1, "manifest", "retired"), key(K2, "import")], K1, Sighting.CHANGED),
        ([key(K1, "manifest", "retired")], K1, Sighting.KNOWN),
        ([key(K1, "manifest", "retired", until_us=60)], K1, Sighting.CHANGED),
        ([key(K1, "api", "retired"), key(K2, "api")], K1, Sighting.KNOWN),
        ([key(K1, "manifest", "claimed"), key(K2, "configuration")], K1, Sighting.CHANGED),
        ([key(K1, "former", "retired")], K1, Sighting.CHANGED),
        ([key(K1, "former", "retired")], K2, Sighting.FIRST),
    ],
)
def test_only_the_first_key_of_an_unknown_agent_is_taken(keys: list[AgentKey], raw: bytes, expected: Sighting) -> None:
    assert sighting(keys, raw, 60) is expected


def test_whose_signature_on_a_manifest_counts() -> None:
    known = signers([key(K1, "import"), key(K2, "manifest", "retired"), key(K3, "held")], 60)
    assert (known.given, known.seen, known.is_new) == ({K1}, {K2}, False)
    nothing = signers([key(K3, "held")], 60)
    assert (nothing.given, nothing.seen, nothing.is_new) == (frozenset(), frozenset(), True)
    assert not signers([key(K1, "api", "retired", until_us=50)], 60).is_new


_keys = st.lists(
    st.builds(
        key,
        st.sampled_from([K1, K2, K3]),
        st.sampled_from(["held", "configuration", "api", "import", "tenant", "manifest", "identity", "former"]),
        st.sampled_from(["active", "claimed", "retired"]),
        st.integers(0, 60),
        st.integers(0, 120),
    ),
    max_size=6,
)


@given(_keys, st.integers(0, 120), st.integers(0, 120), st.booleans())
def test_no_manifest_and_no_import_adds_a_key_to_an_agent_that_is_pinned(
    keys: list[AgentKey], issued_at_us: int, now_us: int, strict: bool
) -> None:
    pinned = [*keys, key(K1, "configuration")]
    fixed = [one for one in pinned if one.source in FIXED]
    found = verifies(*pinned, issued_at_us=issued_at_us, now_us=now_us, strict=strict)
    assert found == verifies(*fixed, issued_at_us=issued_at_us, now_us=now_us, strict=strict)


@given(_keys, st.integers(0, 120), st.integers(0, 120))
def test_what_a_manifest_only_claimed_verifies_nothing(keys: list[AgentKey], issued_at_us: int, now_us: int) -> None:
    claims = [key(K3, "manifest", "claimed")]
    without = [one for one in keys if one.public_key != K3]
    assert K3 not in verifies(*without, *claims, issued_at_us=issued_at_us, now_us=now_us)


@given(_keys, st.integers(0, 120), st.integers(0, 120))
def test_time_alone_only_takes_keys_away(keys: list[AgentKey], one_us: int, other_us: int) -> None:
    sooner, later = sorted((one_us, other_us))
    assert verifies(*keys, issued_at_us=0, now_us=later) <= verifies(*keys, issued_at_us=0, now_us=sooner)
