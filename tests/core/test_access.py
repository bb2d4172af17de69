"""Roles grant what they are for, patterns and tenants narrow it."""

import pytest

from asapd.core.access import Caller, Permission
from asapd.core.types import Role, may_match_an_agent

GRANTED = {
    Role.INGEST: {Permission.INGEST},
    Role.READER: {Permission.READ, Permission.READ_ALL},
    Role.OPERATOR: {Permission.READ, Permission.READ_ALL, Permission.OPERATE},
    Role.ADMIN: set(Permission),
}


@pytest.mark.parametrize("role", Role)
def test_a_role_grants_its_permissions_and_no_others(role: Role) -> None:
    caller = Caller("key:x", role)
    assert {permission for permission in Permission if caller.may(permission)} == GRANTED[role]


@pytest.mark.parametrize(
    ("agents", "names", "allowed"),
    [
        (("*",), ("x",), True),
        (("x.*",), ("x.a",), True),
        (("x.*",), ("x",), False),
        (("x",), ("x.a",), False),
        (("x", "y"), ("z", "y"), True),
        (("x",), (None, "x"), True),
        (("*",), (None,), False),
        ((), ("x",), False),
        (("*",), (), False),
    ],
)
def test_a_caller_may_touch_what_any_of_its_patterns_matches(
    agents: tuple[str, ...], names: tuple[str | None, ...], allowed: bool
) -> None:
    assert Caller("key:x", Role.READER, agents).may_touch(*names) is allowed


@pytest.mark.parametrize(
    ("role", "names", "allowed"),
    [(Role.READER, ("x",), True), (Role.READER, ("y",), False), (Role.INGEST, ("x",), False)],
)
def test_reading_a_row_needs_the_role_and_a_pattern(role: Role, names: tuple[str, ...], allowed: bool) -> None:
    assert Caller("key:x", role, ("x",)).may_read(*names) is allowed


@pytest.mark.parametrize(
    ("agents", "tenant", "everything"),
    [(("*",), None, True), (("x.*", "*"), None, True), (("*",), "t", False), (("x.*",), None, False)],
)
def test_only_a_caller_without_pattern_and_tenant_sees_everything(
    agents: tuple[str, ...], tenant: str | None, everything: bool
) -> None:
    assert Caller("key:x", Role.READER, agents, tenant).sees_everything is everything


@pytest.mark.parametrize(
    ("agents", "own"), [(("x",), "x"), (("x*",), None), (("*",), None), (("x", "y"), None), ((), None)]
)
def test_a_key_stands_for_an_agent_when_it_names_exactly_one(agents: tuple[str, ...], own: str | None) -> None:
    assert Caller("key:x", Role.INGEST, agents).own_agent == own


@pytest.mark.parametrize(
    ("pattern", "may"),
    [
        ("*", True),
        ("urn:*", True),
        ("urn:asap:agent:*", True),
        ("urn:asap:agent:team-*", True),
        ("urn:asap:agent:a", True),
        ("urn:asap:agent:", False),
        ("urn:asap:agents*", False),
        ("urn:asap:agent:-*", False),
        ("a", False),
        ("a*", False),
    ],
)
def test_a_pattern_is_known_to_match_no_agent(pattern: str, may: bool) -> None:
    assert may_match_an_agent(pattern) is may
