"""Roles grant what they are for, patterns and tenants narrow it."""

import pytest

from asapd.core.access import Caller, Permission, Tenants
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


def test_a_caller_of_a_tenant_keeps_off_agents_that_the_directory_gives_to_another() -> None:
    tenants = Tenants()
    tenants.replace({"x.own": "own", "x.other": "other"})
    bound, free = Caller("k", Role.ADMIN, ("x.*",), "own", tenants=tenants), Caller("k", Role.ADMIN, ("x.*",))
    names = ("x.own", "x.other", "x.nowhere", "y")
    assert [bound.may_touch(name) for name in names] == [True, False, True, False]
    assert [free.may_touch(name) for name in names] == [True, True, True, False]
    assert [bound.keeps_off(name) for name in names] == [False, True, False, False]
    assert not free.keeps_off("x.other")
    assert bound.may_touch("x.other", None, "x.own")
    tenants.put("x.other", None)
    assert bound.may_touch("x.other")
    tenants.put("x.other", "third")
    assert not bound.may_touch("x.other")
    assert Caller("k", Role.ADMIN, tenant="own").may_touch("x.other")


def test_a_row_is_seen_by_its_own_tenant_whatever_became_of_its_agents() -> None:
    tenants = Tenants()
    tenants.put("x", "other")
    caller = Caller("k", Role.READER, ("x",), "own", tenants=tenants)
    assert [caller.may_see("own", "x"), caller.may_see("other", "x"), caller.may_see("own", "y")] == [
        True,
        False,
        False,
    ]
    assert Caller("k", Role.READER).may_see("other", "x")


def test_a_listed_root_that_no_directory_holds_is_the_hosts() -> None:
    tenants = Tenants()
    tenants.take_own(["root"])
    bound, host = (Caller("k", Role.ADMIN, tenant=tenant, tenants=tenants) for tenant in ("own", "default"))
    assert [bound.may_touch("root"), host.may_touch("root")] == [False, True]
    tenants.put("root", "own")
    assert [bound.may_touch("root"), host.may_touch("root")] == [True, False]
    tenants.put("root", None)
    tenants.take_own([])
    assert bound.may_touch("root")


def test_a_delegation_is_known_to_the_tenants_of_both_its_sides() -> None:
    callers = [Caller("k", Role.READER, ("x", "y"), tenant) for tenant in ("giving", "taking", "third", None)]
    assert [one.may_see_given("giving", "taking", "x", "z") for one in callers] == [True, True, False, True]
    assert [one.may_see_given("giving", "taking", "a", "z") for one in callers] == [False] * 4
