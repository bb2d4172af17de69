"""Usage that comes with a token: under its delegation, or recorded, flagged, alerted and audited."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from asapd.client import Meter, Rules, WsgiMiddleware
from tests.client.test_middleware import wsgi
from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, check_problem, exact, running
from tests.e2e.tokens import Party, jti_of

ROOT, WORKER, HELPER, STRANGER = (Party(name) for name in ("root", "worker", "helper", "stranger"))
HEADER = "X-ASAP-Delegation-Token"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    pinned = "".join(
        f'[[agents]]\nid = "{party.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{party.public_key}"\n'
        for party in (ROOT, WORKER, HELPER)
    )
    config = QUICK + f'[ingest]\nbind = ["127.0.0.1:0"]\n[delegation]\nroots = ["{ROOT.urn}"]\n' + pinned
    with running(config) as started:
        yield started


@pytest.fixture(params=["http", "lane", "socket"])
def door(daemon: Daemon, request: pytest.FixtureRequest) -> httpx2.AsyncClient:
    """The application, the fast lane on TCP, and the fast lane on the ingest socket."""
    if request.param == "socket":
        return daemon.ingest_client()
    if request.param == "http":
        return daemon.client()
    lane = [one for one in daemon.status()["listening"] if one.startswith("http")][1]
    headers = {"Authorization": f"Bearer {daemon.admin_key}"}
    return httpx2.AsyncClient(base_url=lane, headers=headers, timeout=30, verify=False)


def event(agent: Party = WORKER, **more: Any) -> dict[str, Any]:
    number = next(_numbers)
    return {
        "id": f"under-{number}",
        "task_id": f"task-{number}",
        "agent": agent.urn,
        "consumer": ROOT.urn,
        "timestamp": time.time(),
        "cost_usd": 0.25,
        **more,
    }


async def row_of(client: httpx2.AsyncClient, sent: dict[str, Any]) -> dict[str, Any]:
    (found,) = (await client.get("/usage", params={"task": sent["task_id"]})).json()["data"]
    shown: dict[str, Any] = found
    return shown


async def test_a_valid_token_puts_usage_under_its_delegation_and_registers_it(
    daemon: Daemon, door: httpx2.AsyncClient
) -> None:
    parent = ROOT.grant(WORKER, usd=10)
    child = WORKER.grant(HELPER, usd=5, parent=parent)
    async with daemon.client() as client, door:
        sent = [event(HELPER), event(HELPER, delegation=jti_of(child))]
        answer = await door.post("/usage", json=sent, headers={HEADER: child})
        assert answer.status_code == 201, answer.text
        told = answer.json()
        assert (told["recorded"], told["delegation"], told["denied"]) == (2, jti_of(child), None)
        assert told["unauthorised"] == 0
        for one in sent:
            row = await row_of(client, one)
            assert (row["delegation"], row["flags"]) == (jti_of(child), ["unreserved"])
        for token in (parent, child):
            shown = exact(await client.get(f"/delegations/{jti_of(token)}"))
            assert (float(shown["spent_usd"]), shown["tasks_used"]) == (0.5, 2)
        # Sent again, with another token or none: still the same events.
        for headers in ({HEADER: child}, {HEADER: parent}, {}):
            again = (await door.post("/usage", json=sent[0], headers=headers)).json()
            assert (again["recorded"], again["duplicates"]) == (0, 1)


@pytest.mark.parametrize("case", ["action", "delegate", "expired", "revoked", "forged", "stranger", "garbage"])
async def test_usage_that_a_token_does_not_allow_is_recorded_flagged_alerted_and_audited(
    daemon: Daemon, case: str
) -> None:
    sent = event()
    token = ROOT.grant(WORKER, usd=10)
    expected: str | None = jti_of(token)
    async with daemon.client() as client:
        match case:
            case "action":
                sent["action"], code = "data.write", "action_not_allowed"
            case "delegate":
                sent, code = event(HELPER), "wrong_delegate"
            case "expired":
                token, code = ROOT.grant(WORKER, expires_in_s=-60), "expired"
                expected = None
            case "revoked":
                assert (await client.post("/delegations", json={"token": token})).status_code == 201
                await client.delete(f"/delegations/{jti_of(token)}")
                code = "revoked"
            case "forged":
                token, code = token[:-20] + ("A" if token[-20] != "A" else "B") + token[-19:], "bad_signature"
                expected = None
            case "stranger":
                token, code = STRANGER.grant(WORKER), "unknown_key"
                expected = None
            case _:
                token, code, expected = "garbage", "malformed", None
        async with daemon.websocket(extra_headers=[("Authorization", f"Bearer {daemon.admin_key}")]) as socket:
            subscribe = {"jsonrpc": "2.0", "id": 1, "method": "delegation.subscribe"}
            await socket.send_message(json.dumps(subscribe))
            await socket.get_message()
            answer = await client.post("/usage", json=sent, headers={HEADER: token})
            assert answer.status_code == 201, answer.text
            told = answer.json()
            assert (told["recorded"], told["unauthorised"], told["delegation"]) == (1, 1, expected)
            with trio.fail_after(PATIENCE_S):
                alert = json.loads(await socket.get_message())
        assert alert["method"] == "delegation.unauthorised"
        (named,) = alert["params"]["events"]
        assert (named["id"], named["agent"], named["code"]) == (sent["id"], sent["agent"], code)
        assert named["delegation"] == expected
        row = await row_of(client, sent)
        assert "unauthorised" in row["flags"]
        assert row["delegation"] == expected
        entries = (await client.get("/audit/logs", params={"event_type": "usage.unauthorised", "order": "desc"})).json()
        details = entries["data"][0]["details"]
        assert (details["events"], details["codes"], details["count"]) == ([sent["id"]], [code], 1)
        # A repeat neither counts nor tells again.
        again = (await client.post("/usage", json=sent, headers={HEADER: token})).json()
        assert (again["duplicates"], again["unauthorised"]) == (1, 0)


async def test_what_is_named_in_the_event_and_not_allowed_is_told_too(daemon: Daemon) -> None:
    async with daemon.client() as client:
        token = ROOT.grant(WORKER)
        assert (await client.post("/delegations", json={"token": token})).status_code == 201
        sent = [event(delegation="del_unknown"), event(delegation=jti_of(token), action="data.write"), event()]
        told = (await client.post("/usage", json=sent)).json()
        assert (told["recorded"], told["unauthorised"]) == (3, 2)
        assert "denied" not in told
        entries = (await client.get("/audit/logs", params={"event_type": "usage.unauthorised", "order": "desc"})).json()
        details = entries["data"][0]["details"]
        assert details["events"] == [sent[0]["id"], sent[1]["id"]]
        assert details["codes"] == ["action_not_allowed", "delegation_not_found"]
        plain = (await client.post("/usage", json=event())).json()
        assert not {"unauthorised", "delegation", "denied"} & set(plain)


async def test_a_reservation_does_not_make_good_what_the_token_of_a_report_forbids(
    daemon: Daemon, door: httpx2.AsyncClient
) -> None:
    pays, reads = ROOT.grant(WORKER, usd=10), ROOT.grant(WORKER, usd=10, scopes=("data.read",))
    async with daemon.client() as client, door:
        asked = {"token": pays, "task_id": "t", "estimate": {"cost_usd": 5}}
        reservation = (await client.post("/delegations/authorize", json=asked)).json()["reservation"]["id"]
        cases = [
            (event(reservation=reservation), {HEADER: reads}, "action_not_allowed", jti_of(reads)),
            (event(reservation=reservation, action="data.read"), {}, "action_not_allowed", jti_of(pays)),
            (event(reservation=reservation, delegation="del_unknown"), {}, "delegation_not_found", "del_unknown"),
        ]
        for sent, headers, code, delegation in cases:
            answer = await door.post("/usage", json=sent, headers=headers)
            assert (answer.status_code, answer.json()["unauthorised"]) == (201, 1), answer.text
            assert (await row_of(client, sent))["flags"] == ["unauthorised"]
            entries = await client.get("/audit/logs", params={"event_type": "usage.unauthorised", "order": "desc"})
            details = entries.json()["data"][0]["details"]
            assert (details["events"], details["codes"], details["delegations"]) == ([sent["id"]], [code], [delegation])
        allowed = event(reservation=reservation)
        assert "unauthorised" not in (await door.post("/usage", json=allowed)).json()
        held = exact(await client.get(f"/reservations/{reservation}"))
        assert (float(held["used_usd"]), float(held["held_usd"])) == (1.0, 4.0)


async def test_an_event_that_names_another_delegation_is_refused_by_name(
    daemon: Daemon, door: httpx2.AsyncClient
) -> None:
    token, other = ROOT.grant(WORKER), ROOT.grant(WORKER)
    async with daemon.client() as client, door:
        sent = [event(), event(delegation=jti_of(other))]
        document = check_problem(await door.post("/usage", json=sent, headers={HEADER: token}), 422, "invalid")
        (error,) = document["errors"]
        assert (error["field"], error["index"]) == ("delegation", 1)
        assert jti_of(other) in error["reason"]
        assert jti_of(token) in error["reason"]
        one = check_problem(await door.post("/usage", json=sent[1], headers={HEADER: token}), 422, "invalid")
        assert "index" not in one["errors"][0]
        partly = (await door.post("/usage?partial=true", json=sent, headers={HEADER: token})).json()
        assert (partly["recorded"], partly["refused"]) == (1, 1)
        assert (await row_of(client, sent[0]))["delegation"] == jti_of(token)


async def test_a_key_registers_only_tokens_that_were_given_to_its_agents(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER)
    async with daemon.client(daemon.create_key("ingest", HELPER.urn)) as client:
        told = (await client.post("/usage", json=event(HELPER), headers={HEADER: token})).json()
        assert (told["delegation"], told["unauthorised"], told["denied"]["code"]) == (None, 1, "wrong_delegate")
    async with daemon.client() as client:
        check_problem(await client.get(f"/delegations/{jti_of(token)}"), 404, "delegation_not_found")


async def test_two_tokens_are_ambiguous_and_an_empty_one_is_none(daemon: Daemon, door: httpx2.AsyncClient) -> None:
    token = ROOT.grant(WORKER)
    async with door:
        answer = await door.post("/usage", json=event(), headers=[(HEADER, token), (HEADER, "x")])
        check_problem(answer, 400, "malformed")
        assert "delegation" not in (await door.post("/usage", json=event(), headers={HEADER: ""})).json()


async def test_usage_under_a_token_keeps_its_delegation_when_the_daemon_is_killed(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER, usd=10)
    sent = event()
    async with daemon.client() as client:
        assert (await client.post("/usage", json=sent, headers={HEADER: token})).json()["recorded"] == 1
    await trio.to_thread.run_sync(daemon.kill)
    await trio.to_thread.run_sync(daemon.start)
    async with daemon.client() as client:
        assert (await client.post("/usage", json=sent, headers={HEADER: token})).json()["duplicates"] == 1
        shown = exact(await client.get(f"/delegations/{jti_of(token)}"))
        assert float(shown["spent_usd"]) == 0.25


# --- the client


def test_the_middleware_hands_on_the_token_of_each_request(daemon: Daemon, tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"done"]

    good, wide = ROOT.grant(WORKER, usd=1), ROOT.grant(WORKER, scopes=("data.read",))
    with Meter(daemon.runtime_dir / "ingest.sock", agent=WORKER.urn, spool=tmp_path / "spool") as meter:
        service = WsgiMiddleware(app, meter, Rules())
        tasks = [
            wsgi(service, headers={} if token is None else {HEADER.lower(): token})[1]["x-asap-task-id"]
            for token in (good, None, wide, "nön-sense\n", good)
        ]
        meter.record(task_id="recorded", consumer=ROOT.urn, delegation_token=good, labels={"delegation_token": "x"})
        assert meter.flush()
        assert (meter.stats().sent, meter.stats().refused) == (6, 0)
    rows = {row["task_id"]: row for row in daemon.admin_get("/usage?order=desc&limit=10").json()["data"]}
    found = [(rows[task]["delegation"], "unauthorised" in rows[task]["flags"]) for task in [*tasks, "recorded"]]
    assert found == [
        (jti_of(good), False),
        (None, False),
        (jti_of(wide), True),
        (None, True),
        (jti_of(good), False),
        (jti_of(good), False),
    ]
    assert rows["recorded"]["labels"] == {"delegation_token": "x"}
