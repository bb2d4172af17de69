"""Who may spend what on whose behalf, asked over HTTP by many at once, and refused for every reason there is."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, check_problem, exact, running, until
from tests.e2e.tokens import Party, jti_of

ROOT, WORKER, HELPER, KNOWN, STRANGER = (Party(name) for name in ("root", "worker", "helper", "known", "stranger"))
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    pinned = "".join(
        f'[[agents]]\nid = "{party.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{party.public_key}"\n'
        for party in (ROOT, WORKER, HELPER)
    )
    with running(QUICK + f'[delegation]\nmax_depth = 4\nroots = ["{ROOT.urn}"]\n' + pinned) as started:
        known = {"id": KNOWN.urn, "url": "http://127.0.0.1:9", "public_key": KNOWN.public_key}
        assert started.admin_request("POST", "/agents", json=known).status_code == 201
        yield started


def asking(token: str, **more: Any) -> dict[str, Any]:
    return {"token": token, "task_id": f"task-{next(_numbers)}", "estimate": {"cost_usd": 1}, **more}


async def authorize(client: httpx2.AsyncClient, token: str, **more: Any) -> httpx2.Response:
    return await client.post("/delegations/authorize", json=asking(token, **more))


def check_denial(answer: httpx2.Response, code: str) -> dict[str, Any]:
    document = check_problem(answer, 403, code)
    assert document["decision"] == "deny"
    assert document["reason"] == document["detail"]
    assert "remaining" in document
    return document


async def register(client: httpx2.AsyncClient, token: str) -> str:
    answer = await client.post("/delegations", json={"token": token})
    assert answer.status_code == 201, answer.text
    assert answer.json()["token"] == token
    found: str = answer.json()["id"]
    return found


# --- budgets


async def spend_at_once(daemon: Daemon, tokens: list[str]) -> Counter[str]:
    outcomes: Counter[str] = Counter()

    async def one(token: str) -> None:
        async with daemon.client() as client:
            answer = await authorize(client, token)
            if answer.status_code == 200:
                assert answer.json()["decision"] == "allow"
                outcomes["allow"] += 1
            else:
                outcomes[check_denial(answer, answer.json()["code"])["code"]] += 1

    async with trio.open_nursery() as nursery:
        for token in tokens:
            nursery.start_soon(one, token)
    return outcomes


async def test_twenty_at_once_get_exactly_what_there_is(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER, usd=10)
    assert await spend_at_once(daemon, [token] * 20) == {"allow": 10, "budget_exhausted": 10}
    async with daemon.client() as client:
        shown = exact(await client.get(f"/delegations/{jti_of(token)}"))
        assert shown["reserved_usd"] == Decimal(10)
        assert shown["remaining"]["cost_usd"] == 0


@pytest.mark.parametrize("usd", [None, 10, 7])
async def test_twenty_at_once_through_a_child_get_exactly_what_both_have(daemon: Daemon, usd: float | None) -> None:
    parent = ROOT.grant(WORKER, usd=10)
    child = WORKER.grant(HELPER, usd=usd, parent=parent)
    outcomes = await spend_at_once(daemon, [child] * 20)
    assert outcomes == {"allow": usd or 10, "budget_exhausted": 20 - (usd or 10)}
    async with daemon.client() as client:
        assert exact(await client.get(f"/delegations/{jti_of(parent)}"))["reserved_usd"] == usd or 10


async def test_parent_and_children_share_one_limit(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER, usd=10)
    children = [WORKER.grant(HELPER, usd=10, parent=parent) for _ in range(2)]
    assert (await spend_at_once(daemon, [parent, *children] * 7))["allow"] == 10


async def test_tasks_are_limited_by_their_distinct_ids(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER, tasks=2)
    async with daemon.client() as client:
        for task in ("one", "two", "one"):
            assert (await authorize(client, token, task_id=task)).status_code == 200
        assert check_denial(await authorize(client, token, task_id="three"), "task_limit")["remaining"]["tasks"] == 0


async def test_usage_settles_what_a_reservation_holds_on_the_whole_path(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER, usd=10)
    child = WORKER.grant(HELPER, usd=5, parent=parent)
    async with daemon.client() as client:

        async def spent(token: str) -> tuple[Any, Any]:
            shown = exact(await client.get(f"/delegations/{jti_of(token)}"))
            return shown["spent_usd"], shown["reserved_usd"]

        allowed = exact(await authorize(client, child, estimate={"cost_usd": "2.5"}))
        assert allowed["remaining"] == {"cost_usd": Decimal("2.5"), "tasks": None}
        reservation = allowed["reservation"]["id"]
        event = {
            "id": f"spend-{next(_numbers)}",
            "task_id": "task",
            "agent": HELPER.urn,
            "consumer": "desk",
            "timestamp": datetime.now().astimezone().isoformat(),
            "cost_usd": 0.75,
            "reservation": reservation,
        }
        for _ in range(2):  # a resend spends nothing
            assert (await client.post("/usage", json=event)).status_code == 201
        for token in (child, parent):
            assert await spent(token) == (Decimal("0.75"), Decimal("1.75"))
        settled = exact(await client.post(f"/reservations/{reservation}/settle", json={"cost_usd": 0.25}))
        assert (settled["state"], settled["used_usd"]) == ("settled", 1)
        for token in (child, parent):
            assert await spent(token) == (1, 0)
        check_problem(await client.post(f"/reservations/{reservation}/settle"), 409, "reservation_closed")
        assert (await client.get(f"/reservations/{reservation}")).json()["state"] == "settled"
        refund = {"cost_usd": 0.5, "reason": "mistake"}
        assert (await client.post(f"/reservations/{reservation}/refund", json=refund)).status_code == 200
        assert await spent(parent) == (Decimal("0.5"), 0)
        over = {"cost_usd": 0.6, "reason": "mistake"}
        check_problem(await client.post(f"/reservations/{reservation}/refund", json=over), 422, "invalid")


async def test_a_released_reservation_gives_everything_back(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER, usd=1)
    async with daemon.client() as client:
        reservation = (await authorize(client, token)).json()["reservation"]["id"]
        check_denial(await authorize(client, token), "budget_exhausted")
        for _ in range(2):
            assert (await client.delete(f"/reservations/{reservation}")).json()["state"] == "released"
        assert (await authorize(client, token)).status_code == 200


async def test_an_expired_reservation_gives_everything_back_and_an_extended_one_does_not(daemon: Daemon) -> None:
    short, long = ROOT.grant(WORKER, usd=1), ROOT.grant(WORKER, usd=1)
    async with daemon.client() as client:
        expiring = (await authorize(client, short, ttl_seconds=1)).json()["reservation"]["id"]
        extended = (await authorize(client, long, ttl_seconds=1)).json()["reservation"]["id"]
        answer = await client.post(f"/reservations/{extended}/extend", json={"ttl_seconds": 60})
        assert answer.status_code == 200

        async def is_free() -> bool:
            return (await authorize(client, short)).status_code == 200

        await until(is_free, within_s=PATIENCE_S)
        assert (await client.get(f"/reservations/{expiring}")).json()["state"] == "expired"
        check_problem(await client.post(f"/reservations/{expiring}/settle"), 409, "reservation_closed")
        check_denial(await authorize(client, long), "budget_exhausted")


async def test_an_estimate_is_needed_where_cost_is_limited(daemon: Daemon) -> None:
    async with daemon.client() as client:
        answer = await authorize(client, ROOT.grant(WORKER, usd=1), estimate={})
        document = check_problem(answer, 422, "missing_estimate")
        assert document["errors"][0]["field"] == "estimate.cost_usd"
        assert (await authorize(client, ROOT.grant(WORKER), estimate={})).status_code == 200


async def test_an_authorisation_with_an_idempotency_key_holds_once(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER, usd=10)
    body = asking(token)
    async with daemon.client() as client:
        headers = {"Idempotency-Key": "once"}
        answers = [await client.post("/delegations/authorize", json=body, headers=headers) for _ in range(3)]
        assert len({answer.json()["reservation"]["id"] for answer in answers}) == 1
        assert exact(await client.get(f"/delegations/{jti_of(token)}"))["reserved_usd"] == 1


# --- revocation


async def test_revoking_takes_every_descendant_with_it_in_one_commit(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER, usd=10)
    child = WORKER.grant(HELPER, usd=5, parent=parent)
    grandchild = HELPER.grant(KNOWN, usd=2, parent=child)
    async with daemon.client() as client:
        ids = [await register(client, token) for token in (parent, child, grandchild)]
        tree = (await client.get(f"/delegations/{ids[0]}")).json()
        assert (tree["children"], tree["state"], tree["parent"]) == ([ids[1]], "active", None)
        held = (await authorize(client, grandchild)).json()["reservation"]["id"]
        first = (await client.delete(f"/delegations/{ids[0]}")).json()
        assert (first["revoked"], first["newly"]) == (ids, 3)
        second = (await client.delete(f"/delegations/{ids[0]}")).json()
        assert (second["revoked"], second["newly"]) == (ids, 0)
        for token in (parent, child, grandchild, HELPER.grant(KNOWN, parent=child, expires_in_s=1800)):
            check_denial(await authorize(client, token), "revoked")
            validity = (await client.post("/delegations/validate", json={"token": token})).json()
            assert (validity["valid"], validity["code"]) == (False, "revoked")
        check_problem(await client.post("/delegations", json={"token": child}), 422, "revoked")
        assert (await client.get(f"/delegations/{ids[2]}")).json()["state"] == "revoked"
        # What was reserved before may still be settled.
        settled = await client.post(f"/reservations/{held}/settle", json={"cost_usd": 0.5})
        assert settled.status_code == 200
        extend = await client.post(f"/reservations/{held}/extend", json={"ttl_seconds": 9})
        check_problem(extend, 409, "reservation_closed")
        entries = (await client.get("/audit/logs", params={"event_type": "delegation.revoked"})).json()["data"]
        assert {entry["subject"] for entry in entries} >= set(ids)
        check_problem(await client.delete("/delegations/no-such"), 404, "delegation_not_found")


async def test_a_revocation_survives_kill_9(daemon: Daemon) -> None:
    token = ROOT.grant(WORKER, usd=10)
    async with daemon.client() as client:
        assert (await authorize(client, token)).status_code == 200
        await client.delete(f"/delegations/{jti_of(token)}")
    await trio.to_thread.run_sync(daemon.kill)
    await trio.to_thread.run_sync(daemon.start)
    async with daemon.client() as client:
        check_denial(await authorize(client, token), "revoked")


# --- every denial


def tampered() -> str:
    head, _, tail = ROOT.grant(WORKER).rpartition(".")
    return f"{head}.{'B' if tail[0] != 'B' else 'C'}{tail[1:]}"


def deep() -> str:
    token = ROOT.grant(WORKER)
    for giver, taker in [(WORKER, HELPER), (HELPER, WORKER)] * 2:
        token = giver.grant(taker, parent=token)
    return token


def doubled() -> str:
    token = WORKER.grant(HELPER, jti="twice", parent=ROOT.grant(WORKER))
    return WORKER.grant(HELPER, jti="twice", parent=HELPER.grant(WORKER, parent=token))


DENIALS: list[tuple[str, Callable[[], str], dict[str, Any]]] = [
    ("malformed", lambda: "not.a.token", {}),
    ("malformed", lambda: ROOT.sign('{"iss":"a","iss":"b"}'), {}),
    ("malformed", lambda: ROOT.grant(WORKER, exp="2030"), {}),
    ("malformed", lambda: ROOT.grant(WORKER, usd=-1), {}),
    ("bad_signature", tampered, {}),
    ("bad_signature", lambda: STRANGER.grant(WORKER, iss=ROOT.urn), {}),
    ("unknown_key", lambda: STRANGER.grant(WORKER), {}),
    ("untrusted_root", lambda: KNOWN.grant(WORKER), {}),
    ("untrusted_root", lambda: WORKER.grant(HELPER), {}),
    ("expired", lambda: ROOT.grant(WORKER, expires_in_s=-5), {}),
    ("not_yet_valid", lambda: ROOT.grant(WORKER, nbf=int(time.time()) + 600), {}),
    ("wrong_delegate", lambda: ROOT.grant(WORKER), {"delegate": HELPER.urn}),
    ("action_not_allowed", lambda: ROOT.grant(WORKER), {"action": "data.delete"}),
    ("scope_exceeded", lambda: WORKER.grant(HELPER, scopes=("*",), parent=ROOT.grant(WORKER)), {}),
    ("constraint_exceeded", lambda: WORKER.grant(HELPER, usd=11, parent=ROOT.grant(WORKER, usd=10)), {}),
    ("constraint_exceeded", lambda: WORKER.grant(HELPER, tasks=11, parent=ROOT.grant(WORKER, tasks=10)), {}),
    ("constraint_exceeded", lambda: WORKER.grant(HELPER, expires_in_s=7200, parent=ROOT.grant(WORKER)), {}),
    ("chain_broken", lambda: HELPER.grant(WORKER, parent=ROOT.grant(WORKER)), {}),
    ("chain_too_deep", deep, {}),
    ("cycle", doubled, {}),
    ("insufficient_budget", lambda: ROOT.grant(WORKER, usd=0.5), {}),
    ("budget_exhausted", lambda: ROOT.grant(WORKER, usd=0), {}),
    ("task_limit", lambda: ROOT.grant(WORKER, tasks=0), {}),
]
LEDGER_CODES = {"insufficient_budget", "budget_exhausted", "task_limit"}
LEAF_CODES = {"wrong_delegate", "action_not_allowed"}


@pytest.mark.parametrize(("code", "make", "more"), DENIALS, ids=[f"{row[0]}-{i}" for i, row in enumerate(DENIALS)])
async def test_a_denial_says_its_code(daemon: Daemon, code: str, make: Callable[[], str], more: dict[str, Any]) -> None:
    token = make()
    async with daemon.client() as client:
        check_denial(await authorize(client, token, **more), code)
        if code in LEDGER_CODES:
            return
        body = {"token": token, "action": more.get("action", "task.execute"), "delegate": more.get("delegate")}
        validity = await client.post("/delegations/validate", json=body)
        assert validity.status_code == 200
        assert (validity.json()["valid"], validity.json()["code"]) == (False, code)
        assert validity.json()["reason"]
        if code not in LEAF_CODES:
            status = 400 if code == "malformed" else 422
            check_problem(await client.post("/delegations", json={"token": token}), status, code)


async def test_a_token_id_cannot_be_used_for_another_token(daemon: Daemon) -> None:
    first = ROOT.grant(WORKER, usd=1, jti="same")
    second = ROOT.grant(WORKER, usd=1000, jti="same")
    async with daemon.client() as client:
        assert await register(client, first) == "same"
        again = await client.post("/delegations", json={"token": first})
        assert (again.status_code, again.json()["id"]) == (200, "same")
        check_denial(await authorize(client, second), "jti_reused")
        check_problem(await client.post("/delegations", json={"token": second}), 409, "jti_reused")


async def test_validation_shows_the_chain_and_what_is_left_and_reserves_nothing(daemon: Daemon) -> None:
    parent = ROOT.grant(WORKER, usd=10)
    child = WORKER.grant(HELPER, usd=5, parent=parent)
    async with daemon.client() as client:
        await authorize(client, parent, estimate={"cost_usd": 7})
        for _ in range(2):
            validity = exact(await client.post("/delegations/validate", json={"token": child, "action": "task.run"}))
            assert (validity["valid"], validity["code"], validity["reason"]) == (True, None, None)
            assert (validity["delegator"], validity["delegate"]) == (WORKER.urn, HELPER.urn)
            assert [link["id"] for link in validity["chain"]] == [jti_of(parent), jti_of(child)]
            assert validity["remaining"]["cost_usd"] == 3


async def test_a_signature_by_a_small_order_key_or_of_wrong_length_is_no_signature(daemon: Daemon) -> None:
    head, _, _ = ROOT.grant(WORKER).rpartition(".")
    async with daemon.client() as client:
        for signature in ("", "AAAA", "A" * 86, "A" * 2000):
            answer = await authorize(client, f"{head}.{signature}")
            assert answer.status_code == 403
            assert answer.json()["code"] in {"malformed", "bad_signature"}


async def test_delegations_are_listed_in_pages(daemon: Daemon) -> None:
    async with daemon.client() as client:
        made = [await register(client, ROOT.grant(KNOWN, usd=1)) for _ in range(7)]
        found: list[str] = []
        cursor: dict[str, Any] = {}
        while True:
            page = (await client.get("/delegations", params={"delegate": KNOWN.urn, "limit": 3, **cursor})).json()
            found += [row["id"] for row in page["data"] if row["delegator"] == ROOT.urn]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert found == made


async def test_the_daemon_signs_for_those_whose_keys_it_holds() -> None:
    from asapd.wire.keys import private_pem

    holder = Party("holder")
    with running() as daemon:
        keys = daemon.state_dir / "keys"
        keys.mkdir(mode=0o700)
        (keys / "holder.pem").write_bytes(private_pem(holder.key))
        (keys / "holder.pem").chmod(0o600)
        assert daemon.admin_request("POST", "/reload").status_code == 200
        wanted = {
            "delegator": holder.urn,
            "delegate": WORKER.urn,
            "scopes": ["task.execute"],
            "constraints": {"max_cost_usd": "2.50", "max_tasks": 3, "expires_at": time.time() + 600},
        }
        async with daemon.client() as client:
            answer = await client.post("/delegations", json=wanted, headers={"Idempotency-Key": "issue"})
            assert answer.status_code == 201, answer.text
            body = exact(answer)
            assert body["delegation"]["constraints"]["max_cost_usd"] == Decimal("2.5")
            again = await client.post("/delegations", json=wanted, headers={"Idempotency-Key": "issue"})
            assert again.json() == answer.json()
            assert (await authorize(client, body["token"])).status_code == 200
            missing = {**wanted, "constraints": {}}
            check_problem(await client.post("/delegations", json=missing), 422, "invalid")
            check_problem(
                await client.post("/delegations", json={**wanted, "delegator": STRANGER.urn}), 422, "no_signing_key"
            )
        async with daemon.client(daemon.create_key("operator")) as unsigned:
            check_problem(await unsigned.post("/delegations", json=wanted), 403, "forbidden")
