"""Logging in to the page: an address opens one session, which reads what its maker may read, and nothing else."""

from __future__ import annotations

from http.cookies import Morsel, SimpleCookie
from typing import Any

import pytest

from asapd.core.types import SECOND_US
from asapd.edge.sessions import COOKIE, LOGIN_US, MOST, SESSION_US, page_address
from tests.edge.house import ME, A, B, Edge, Reply

ADMIN_DOOR = {"door": "admin", "peer": ME}


async def address(edge: Edge, key: str | None = "admin", **options: Any) -> str:
    made = (await edge.post("/login", key=key, **options)).ok(201)
    assert made["url"] == f"http://127.0.0.1:8727{made['path']}"
    path: str = made["path"]
    return path


def cookie_of(reply: Reply) -> Morsel[str]:
    return SimpleCookie(reply.headers["set-cookie"])[COOKIE]


async def open_session(edge: Edge, key: str | None = "admin", **options: Any) -> dict[str, str]:
    """Header fields of a browser that was let in."""
    opened = await edge.get(await address(edge, key, **options), key=None)
    assert opened.status == 303
    return {"Cookie": f"{COOKIE}={cookie_of(opened).value}"}


async def test_an_address_opens_once_and_leads_to_the_page(edge: Edge) -> None:
    path = await address(edge)
    opened = await edge.get(path, key=None)
    assert opened.status == 303
    assert opened.headers["location"] == "/#session"
    assert (opened.headers["referrer-policy"], opened.headers["cache-control"]) == ("no-referrer", "no-store")
    cookie = cookie_of(opened)
    assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Strict", "/")
    assert (cookie["max-age"], cookie["domain"], cookie["secure"]) == (str(SESSION_US // SECOND_US), "", "")
    assert cookie.value not in path
    again = await edge.get(path, key=None)
    assert again.refused(410)["code"] == "login_gone"
    assert "set-cookie" not in again.headers
    for wrong in ("/login?token=nonsense", "/login", "/login?token="):
        assert (await edge.get(wrong, key=None)).refused(410)["code"] == "login_gone"
    entries = (await edge.get("/audit/logs?event_type=session.opened")).ok()["data"]
    assert [entry["details"] for entry in entries] == [{"agents": ["*"], "tenant": None}]


async def test_an_address_and_a_session_come_to_their_end(edge: Edge) -> None:
    path = await address(edge)
    edge.clock.us += LOGIN_US
    assert (await edge.get(path, key=None)).refused(410)["code"] == "login_gone"
    session = await open_session(edge)
    edge.clock.us += SESSION_US - 1
    (await edge.get("/usage/summary", key=None, headers=session)).ok()
    edge.clock.us += 1
    assert (await edge.get("/usage/summary", key=None, headers=session)).refused(401)["code"] == "unauthorized"


async def test_a_session_reads_and_changes_nothing(edge: Edge) -> None:
    session = await open_session(edge, None, door=ADMIN_DOOR)
    for path in ("/usage", "/agents", "/sla/breaches?state=open", "/delegations", "/status", "/audit/verify"):
        (await edge.get(path, key=None, headers=session)).ok()
    assert (await edge.get("/keys", key=None, headers=session)).refused(403)["code"] == "forbidden"
    # Those that would do nothing, too: another login would make a session that never ends.
    for path in ("/login", "/reload", "/usage", "/usage/validate", "/keys", "/retention?dry_run=true"):
        refused = (await edge.post(path, {}, key=None, headers=session)).refused(403)
        assert "may only read" in refused["detail"]
    assert (await edge.delete(f"/agents/{A}", key=None, headers=session)).refused(403)
    assert edge.calls == []


async def test_a_session_sees_what_its_maker_sees_and_ends_with_the_key(edge: Edge) -> None:
    await edge.new_key("narrow", "operator", A, tenant="t")
    session = await open_session(edge, "narrow")
    assert (await edge.get("/status", key=None, headers=session)).refused(403)
    event = {"task_id": "t", "consumer": "urn:asap:agent:x", "timestamp": "2027-01-15T08:00:00Z"}
    (await edge.post("/usage", {**event, "agent": A}, key="admin")).ok(201)
    (await edge.post("/usage", {**event, "agent": B})).ok(201)
    shown = (await edge.get("/usage", key=None, headers=session)).ok()["data"]
    assert [row["agent_id"] for row in shown if row["agent_id"] != A] == []
    path = await address(edge, "narrow")
    (await edge.delete("/keys/narrow")).ok()
    assert (await edge.get("/usage", key=None, headers=session)).refused(401)
    assert (await edge.get(path, key=None)).refused(410)


async def test_who_may_not_read_gets_no_address(edge: Edge) -> None:
    assert (await edge.post("/login", key="ingest")).refused(403)["code"] == "forbidden"
    assert (await edge.post("/login", key=None)).refused(401)["code"] == "unauthorized"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_pages_from_elsewhere_cannot_use_a_session(edge: Edge, site: str) -> None:
    """`same-site` is what a page of another port of this host is."""
    session = {**await open_session(edge), "Sec-Fetch-Site": site}
    assert (await edge.get("/usage", key=None, headers=session)).refused(401)
    assert (await edge.delete("/login", key=None, headers=session)).ok() == {"ended": False}
    foreign = {**session, "Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:9000"}
    assert (await edge.get("/usage", key=None, headers=foreign)).refused(403)["code"] == "host_not_allowed"
    (await edge.get("/usage", key=None, headers={**session, "Sec-Fetch-Site": "same-origin"})).ok()


async def test_logging_out_ends_the_session_and_takes_the_cookie_back(edge: Edge) -> None:
    session = await open_session(edge)
    ended = await edge.delete("/login", key=None, headers=session)
    assert ended.ok() == {"ended": True}
    assert cookie_of(ended)["max-age"] == "0"
    assert (await edge.get("/usage", key=None, headers=session)).refused(401)
    assert (await edge.delete("/login", key=None, headers=session)).ok() == {"ended": False}
    assert (await edge.delete("/login", key=None)).ok() == {"ended": False}


async def test_a_key_goes_before_a_session_and_a_wrong_one_is_not_helped_by_it(edge: Edge) -> None:
    session = await open_session(edge)
    (await edge.post("/usage/validate", {}, headers=session)).ok()
    assert (await edge.get("/usage", key="nonsense", headers=session)).refused(401)


async def test_so_many_of_one_holder_are_kept_and_those_of_others_stand(edge: Edge) -> None:
    first, other = await open_session(edge, "reader"), await open_session(edge, None, door=ADMIN_DOOR)
    path, others_path = await address(edge, "reader"), await address(edge)
    for _ in range(MOST - 1):
        await open_session(edge, "reader")
    (await edge.get("/usage", key=None, headers=first)).ok()
    await open_session(edge, "reader")
    assert (await edge.get("/usage", key=None, headers=first)).refused(401)
    (await edge.get("/usage", key=None, headers=other)).ok()
    for _ in range(MOST):
        await address(edge, "reader")
    assert (await edge.get(path, key=None)).refused(410)
    assert (await edge.get(others_path, key=None)).status == 303


@pytest.mark.parametrize(
    ("addresses", "names", "url"),
    [
        (["http://127.0.0.1:8727"], ["asapd.example.org"], "http://127.0.0.1:8727"),
        (["https://0.0.0.0:443"], ["asapd.example.org", "other"], "https://asapd.example.org:443"),
        (["https://[::]:443"], [], "https://[::1]:443"),
        (["unix:run/x.sock", "http://[::1]:1"], [], "http://[::1]:1"),
        (["unix:run/x.sock"], ["asapd.example.org"], None),
    ],
)
def test_the_address_is_one_that_a_browser_opens(addresses: list[str], names: list[str], url: str | None) -> None:
    assert page_address(addresses, names) == url
