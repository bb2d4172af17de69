"""Who is at the door, and which hosts and pages may call."""

from __future__ import annotations

from typing import Any

import pytest
from werkzeug.datastructures import Headers

from asapd import config
from asapd.actors.gatekeeper import KeyRing, digest_of
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import Role
from asapd.edge.auth import UNAUTHORIZED, admin_socket_caller, check_host, ingest_socket_caller, tcp_caller
from asapd.edge.sockets import Peer
from asapd.store.units.house import ApiKey

PEER = Peer(pid=7, uid=1000, gid=100)


def test_root_and_the_daemons_own_user_are_admin_and_the_sockets_group_operates() -> None:
    admin = Caller("uid:1000 pid:7", Role.ADMIN, may_sign=True)
    operator = Caller("uid:1000 pid:7", Role.OPERATOR)
    assert admin_socket_caller(PEER, 5, 1000) == admin
    assert admin_socket_caller(Peer(7, 0, 0), None, 1000) == Caller("uid:0 pid:7", Role.ADMIN, may_sign=True)
    assert admin_socket_caller(PEER, 100, 999) == operator
    assert admin_socket_caller(Peer(7, 1000, 3, (4, 100)), 100, 999) == operator


@pytest.mark.parametrize("group", [5, None])
def test_who_is_of_another_group_is_refused_at_the_admin_socket(group: int | None) -> None:
    refused = admin_socket_caller(PEER, group, 999)
    assert isinstance(refused, Refusal)
    assert refused.code == "forbidden"
    assert "join that group" in refused.detail


def ingest(*rules: dict[str, Any]) -> config.Ingest:
    return config.Ingest(allow=tuple(config.IngestAllow(**rule) for rule in rules))


@pytest.mark.parametrize(
    "rule", [{"uid": 1000}, {"gid": 100}, {"user": "me"}, {"group": "mine"}], ids=lambda rule: next(iter(rule))
)
def test_a_rule_admits_by_user_or_group_for_its_agents(rule: dict[str, Any]) -> None:
    own = ingest({**rule, "agents": ["urn:asap:agent:a"]}, {"uid": 5, "agents": ["*"]})
    caller = ingest_socket_caller(PEER, own, frozenset({"mine", "yours"}), "me")
    assert caller == Caller("uid:1000 pid:7", Role.INGEST, ("urn:asap:agent:a",))
    assert ingest_socket_caller(Peer(7, 1, 1), own, frozenset({"yours"}), "you") is None


def test_a_rule_for_a_group_admits_processes_that_have_it_besides_their_own() -> None:
    own = ingest({"gid": 100, "agents": ["urn:asap:agent:a"]})
    caller = ingest_socket_caller(Peer(7, 1, 1, (3, 100)), own, frozenset(), None)
    assert caller == Caller("uid:1 pid:7", Role.INGEST, ("urn:asap:agent:a",))
    assert ingest_socket_caller(Peer(7, 1, 1, (3,)), own, frozenset(), None) is None


def test_the_rules_that_match_add_up_and_without_rules_the_socket_is_the_gate() -> None:
    both = ingest({"uid": 1000, "agents": ["urn:asap:agent:a"]}, {"gid": 100, "agents": ["urn:asap:agent:b*"]})
    caller = ingest_socket_caller(PEER, both, frozenset(), None)
    assert caller is not None
    assert caller.agents == ("urn:asap:agent:a", "urn:asap:agent:b*")
    assert ingest_socket_caller(PEER, ingest(), frozenset(), None) == Caller("uid:1000 pid:7", Role.INGEST)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("Bearer asapd_k_s", True),
        ("bearer asapd_k_s", True),
        ("Bearer  asapd_k_s ", True),
        ("Bearer asapd_k_x", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("Basic asapd_k_s", False),
        ("asapd_k_s", False),
        ("", False),
    ],
)
def test_a_key_is_taken_from_the_bearer_scheme_only(header: str, found: bool) -> None:
    ring = KeyRing()
    ring.replace([ApiKey("k", "n", "reader", ["*"], None, False, digest_of("s"), 0)])
    caller = tcp_caller(Headers({"Authorization": header}), ring, config.Http())
    assert (caller == Caller("key:k", Role.READER)) is found
    assert found or caller is UNAUTHORIZED
    assert tcp_caller(Headers(), ring, config.Http()) is UNAUTHORIZED


def test_without_authentication_everybody_is_admin() -> None:
    caller = tcp_caller(Headers(), KeyRing(), config.Http(auth="none"))
    assert caller == Caller("anonymous", Role.ADMIN, may_sign=True)


HTTP = config.Http(bind=["10.0.0.1:80"], allowed_hosts=["asapd.example"], allowed_origins=["https://page.example"])


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("localhost:8727", None, True),
        ("LOCALHOST", None, True),
        ("127.0.0.1:8727", None, True),
        ("10.9.9.9", None, True),
        ("[::1]:8727", None, True),
        ("[fe80::1]", None, True),
        ("asapd.example:443", None, True),
        ("", None, True),
        ("evil.example", None, False),
        ("localhost.evil.example", None, False),
        ("[evil.example]", None, False),
        ("localhost:8727", "http://localhost:8727", True),
        ("localhost:8727", "https://page.example", True),
        ("localhost:8727", "null", False),
        ("localhost:8727", "http://localhost:9000", False),
        ("localhost:8727", "http://evil.example", False),
        ("localhost:8727", "evil", False),
        ("localhost:8727", "", False),
    ],
)
def test_foreign_hosts_and_pages_are_refused(host: str, origin: str | None, allowed: bool) -> None:
    headers = Headers({"Host": host} if host else {})
    if origin is not None:
        headers["Origin"] = origin
    refusal = check_host(headers, HTTP)
    assert (refusal is None) is allowed
    assert refusal is None or refusal.code == "host_not_allowed"


def test_the_refusal_says_which_setting_would_allow_it() -> None:
    host = check_host(Headers({"Host": "evil.example"}), HTTP)
    page = check_host(Headers({"Host": "localhost", "Origin": "http://evil.example"}), HTTP)
    assert isinstance(host, Refusal)
    assert isinstance(page, Refusal)
    assert "http.allowed_hosts" in host.detail
    assert "http.allowed_origins" in page.detail
