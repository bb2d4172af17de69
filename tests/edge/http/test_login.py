"""Logging in to the page: an address opens one session, which reads what its maker may read, and nothing else."""

from __future__ import annotations

from http.cookies import Morsel, SimpleCookie
from typing import Any

import pytest

from asapd.core.types import SECOND_US
from asapd.edge.sessions import COOKIE, LOGIN_US, MOST, SESSION_US, comes_from_elsewhere, page_address
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


async def test_an_address_is_not_used_up_by_who_only_looks_nor_by_a_link_of_another_page(edge: Edge) -> None:
    """A page of another site could else let a person in as somebody else, who then sees what is shown."""
    path = await address(edge)
    looked = await edge.call("HEAD", path, key=None)
    assert (looked.status, looked.headers["allow"]) == (405, "GET")
    for site in ("cross-site", "same-site"):
        led = await edge.get(path, key=None, headers={"Sec-Fetch-Site": site})
        assert "address bar" in led.refused(403)["detail"]
        assert "set-cookie" not in led.headers
    assert (await edge.get(path, key=None, headers={"Sec-Fetch-Site": "none"})).status == 303


async def test_a_browser_that_comes_too_late_is_led_to_the_page_which_says_so(edge: Edge) -> None:
    late = await edge.get("/login?token=x", key=None, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (late.status, late.headers["location"]) == (303, "/#login-gone")


async def test_of_several_cookies_the_one_that_is_open_counts_and_of_several_open_ones_none(edge: Edge) -> None:
    first, second = [(await open_session(edge))["Cookie"] for _ in range(2)]
    for fields, status in (
        (f"{COOKIE}=planted; {first}", 200),
        (f"{first}; {COOKIE}=planted", 200),
        (f"{first}; {first}", 200),
        (f"{first}; {second}", 401),
    ):
        assert (await edge.get("/usage", key=None, headers={"Cookie": fields})).status == status
    both = {"Cookie": f"{COOKIE}=planted; {first}; {second}"}
    assert (await edge.delete("/login", key=None, headers=both)).ok() == {"ended": True}
    for one in (first, second):
        assert (await edge.get("/usage", key=None, headers={"Cookie": one})).refused(401)


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


@pytest.mark.parametrize(
    ("fields", "is_elsewhere"),
    [
        ({}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Sec-Fetch-Site": "same-site"}, True),
        ({"Origin": "http://127.0.0.1:8727"}, False),
        ({"Origin": "http://127.0.0.1:9000"}, True),
        ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, True),
    ],
)
def test_a_page_of_another_origin_is_from_elsewhere_even_where_it_may_call(
    fields: dict[str, str], is_elsewhere: bool
) -> None:
    """`http.allowed_origins` lets pages call with keys of their own; not all browsers tell the site of a WebSocket."""
    assert comes_from_elsewhere({"Host": "127.0.0.1:8727", **fields}) is is_elsewhere
