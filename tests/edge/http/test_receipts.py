"""Receipts of tasks: what they say is what is stored, and nothing of them can be changed."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from nacl.signing import SigningKey

from asapd.cli.verify_receipt import is_receipt, verify_receipt
from asapd.store import receipts
from asapd.wire.receipt import sign_document
from asapd.wire.strict_json import parse_strict_json
from tests.edge.house import IDENTITY, NOW, A, B, Edge

PUBLIC = bytes(IDENTITY.verify_key)
USD = 1_000_000
METRICS = {"tokens_in": 5, "tokens_out": 7, "duration_ms": 100, "api_calls": 1}


def event(task: str, number: int, **more: Any) -> dict[str, Any]:
    return {
        "task_id": task,
        "agent": A,
        "consumer": "urn:asap:agent:desk",
        "timestamp": NOW,
        "id": f"{task}{number}",
        "metrics": METRICS,
        "cost_usd": 0.25,
        **more,
    }


async def fill(edge: Edge) -> None:
    task = {"task_id": "t", "agent": A, "consumer": "c", "state": "started", "timestamp": NOW}
    assert (await edge.post("/tasks", task)).status == 201
    events = [*(event("t", number) for number in range(3)), event("other", 0), event("t", 9, agent=B)]
    assert (await edge.post("/usage", events)).status == 201
    assert (await edge.post("/usage", event("t", 4, cost_usd=None))).status == 201
    assert (await edge.post("/usage/t1/void", {"reason": "a test"})).status < 300


async def receipt(edge: Edge, task: str = "t", **options: Any) -> dict[str, Any]:
    answer = await edge.get(f"/tasks/{task}/receipt", **options)
    assert answer.status == 200, answer.body
    document: dict[str, Any] = parse_strict_json(answer.body)
    return document


async def test_a_task_that_is_called_as_if_it_were_a_receipt_can_be_read(edge: Edge) -> None:
    await edge.post("/usage", [event("a", 0), event("a/receipt", 0)])
    for path in ("/tasks/a%2Freceipt", "/tasks/a%2freceipt"):
        assert (await edge.get(path)).ok()["task_id"] == "a/receipt"
    assert (await receipt(edge, "a"))["task_id"] == "a"
    for path in ("a%2Freceipt", "a/receipt"):
        assert (await receipt(edge, path))["task_id"] == "a/receipt"
    assert (await edge.get("/tasks/b%2Freceipt")).refused(404)["code"] == "task_not_found"


@pytest.mark.parametrize("task", ["/t", "/", "//", "/receipt", "t/", "a//b", ".."])
async def test_a_task_can_be_read_and_has_a_receipt_whatever_slashes_its_id_has(edge: Edge, task: str) -> None:
    await edge.post("/usage", event("t", 0, task_id=task))
    quoted = quote(task, safe="")
    assert (await edge.get(f"/tasks/{quoted}")).ok()["task_id"] == task
    assert (await receipt(edge, quoted))["task_id"] == task
    assert (await edge.get("/tasks/")).ok()["data"] == []
    assert (await edge.get("/tasks/%2Fx%0Ay")).refused(404)["code"] == "task_not_found"


async def test_a_receipt_adds_up_to_what_is_stored_and_verifies(edge: Edge) -> None:
    await fill(edge)
    document = await receipt(edge)
    own = (await edge.get("/tasks/t")).ok()["own"]
    assert document["totals"] == {
        "events": own["total_events"],
        "tokens_in": own["total_tokens_in"],
        "tokens_out": own["total_tokens_out"],
        "duration_ms": own["total_duration_ms"],
        "api_calls": own["total_api_calls"],
        "cost_microusd": round(float(own["total_cost_usd"]) * 1_000_000),
        "unpriced": own["unpriced_events"],
        "erased": 0,
    }
    assert is_receipt(document)
    verified = verify_receipt(document, PUBLIC)
    assert verified.is_good, verified.verdict
    assert verified.verdict.startswith(
        "ok: task t: 4 events, 1 of them of unknown cost, 20 tokens in, 28 out, 0.750000"
    )
    assert verify_receipt(document, None).remarks[0].startswith("the key is the one in the receipt")
    kinds = [item["entry"]["event_type"] for item in document["entries"]]
    assert kinds == ["task.started", *["usage.recorded"] * 5, "usage.voided"]


async def test_a_caller_gets_a_receipt_of_what_it_may_see(edge: Edge) -> None:
    await fill(edge)
    await edge.new_key("narrow", "reader", B)
    assert (await receipt(edge, key="narrow"))["totals"]["events"] == 1
    await edge.new_key("stranger", "reader", "urn:asap:agent:none")
    assert (await edge.get("/tasks/t/receipt", key="stranger")).refused(404)["code"] == "task_not_found"
    assert (await edge.get("/tasks/none/receipt")).refused(404)["code"] == "task_not_found"


async def test_a_receipt_tells_of_a_delegation_that_was_debited_and_that_the_caller_may_see(edge: Edge) -> None:
    terms = {
        "delegator": A,
        "delegate": B,
        "scopes": ["task.*"],
        "constraints": {"expires_at": "2027-01-16T08:00:00Z"},
    }
    given = (await edge.post("/delegations", terms)).ok(201)["id"]
    named = [event("stranger", 1, delegation=given), event("own", 1, agent=B, delegation=given)]
    assert (await edge.post("/usage", named)).status == 201
    await edge.new_key("consumer", "reader", "urn:asap:agent:desk")
    await edge.new_key("holder", "reader", B)

    async def kinds(task: str, key: str) -> list[str]:
        return [item["entry"]["event_type"] for item in (await receipt(edge, task, key=key))["entries"]]

    assert await kinds("own", "holder") == ["delegation.created", "usage.recorded"]
    assert await kinds("own", "consumer") == ["usage.recorded"]
    assert await kinds("stranger", "admin") == ["usage.recorded"]


async def test_a_task_of_too_many_entries_is_refused(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(edge)
    for most in (3, 6):
        monkeypatch.setattr(receipts, "MOST", most)
        assert (await edge.get("/tasks/t/receipt")).refused(422)["code"] == "receipt_too_large"


async def test_no_receipt_is_given_of_a_log_that_was_altered(edge: Edge) -> None:
    await fill(edge)
    await edge.get("/audit/checkpoint")
    edge.connection.execute("DROP TRIGGER audit_no_update; UPDATE audit SET hash = zeroblob(32) WHERE seq = 3")
    assert (await edge.get("/tasks/t/receipt")).refused(503)["code"] == "log_broken"


@pytest.mark.parametrize("changed", ["'{'", "CAST(x'ff' AS TEXT)"])
async def test_no_receipt_is_made_of_entries_that_cannot_be_read(edge: Edge, changed: str) -> None:
    await fill(edge)
    connection = edge.connection
    connection.execute("DROP TRIGGER audit_no_update")
    connection.execute(f"UPDATE audit SET details = {changed} WHERE event_type = 'usage.recorded'")
    refused = (await edge.get("/tasks/t/receipt")).refused(503)
    assert (refused["code"], "audit verify" in refused["detail"]) == ("log_broken", True)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [place for key, inner in value.items() for place in places(inner, (*path, key))]
    if isinstance(value, list):
        return [place for number, inner in enumerate(value) for place in places(inner, (*path, number))]
    return [path]


async def test_every_change_of_a_receipt_is_found_even_by_one_who_signs_it_anew(edge: Edge) -> None:
    await fill(edge)
    document = await receipt(edge)
    for path in places(document):
        changed = json.loads(json.dumps(document))
        at = changed
        for step in path[:-1]:
            at = at[step]
        value = at[path[-1]]
        at[path[-1]] = value + 1 if isinstance(value, int) else f"{value}x"
        assert not verify_receipt(changed, PUBLIC).is_good, path
        # When it was issued is all that the daemon alone can vouch for.
        if path[0] in {"entries", "totals", "checkpoint", "task_id", "version", "issuer", "public_key"}:
            del changed["signature"]
            again = json.loads(sign_document(changed, IDENTITY))
            assert not verify_receipt(again, PUBLIC).is_good, path
    del document["signature"]
    assert not verify_receipt(json.loads(sign_document(document, SigningKey(bytes(32)))), PUBLIC).is_good


@pytest.mark.parametrize(
    "change",
    [
        {"entries": {}},
        {"entries": [5]},
        {"entries": [{"entry": 5, "hashes": []}]},
        {"entries": []},
        {"task_id": "other"},
        {"task_id": 5},
        {"public_key": "x"},
        {"version": 2},
        {"totals": {}},
    ],
)
async def test_what_is_no_sound_receipt_is_bad_whoever_signed_it(edge: Edge, change: dict[str, Any]) -> None:
    await fill(edge)
    document = {**await receipt(edge), **change}
    del document["signature"]
    assert not verify_receipt(json.loads(sign_document(document, IDENTITY)), PUBLIC).is_good
    document = await receipt(edge)
    document["entries"] = document["entries"][::-1]
    del document["signature"]
    found = verify_receipt(json.loads(sign_document(document, IDENTITY)), PUBLIC)
    assert found.verdict == "bad: its entries are not in their order, or twice the same"


async def test_a_receipt_counts_what_was_erased_of_a_task_and_adds_up_the_rest(edge: Edge) -> None:
    assert (await edge.post("/usage", [event("t", 0), event("other", 0), event("t", 1, consumer="mailto:max")])).ok
    erased = {"consumer": "mailto:max", "reason": "request 17"}
    assert (await edge.post("/audit/erase", erased)).status == 200
    assert (await edge.post("/usage", event("t", 2))).status == 201
    document = await receipt(edge)
    assert (document["totals"]["events"], document["totals"]["erased"]) == (2, 1)
    (gone,) = [item["entry"] for item in document["entries"] if item["entry"]["details"] is None]
    assert gone["seq"] == document["entries"][0]["entry"]["seq"] + 2
    assert verify_receipt(document, PUBLIC).is_good
    edge.connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM usage WHERE seq = 2")
    assert (await receipt(edge))["totals"]["erased"] == 0


async def test_a_receipt_of_more_than_json_keeps_exact_gives_such_sums_as_text(edge: Edge) -> None:
    most = 2**53 - 1
    metrics = {"tokens_in": most, "tokens_out": 1, "duration_ms": 1, "api_calls": 1}
    events = [event("t", number, metrics=metrics, cost_usd="9007199254") for number in range(2)]
    assert (await edge.post("/usage", events)).status == 201
    document = await receipt(edge)
    sums = document["totals"]
    assert (sums["tokens_in"], sums["tokens_out"]) == (str(2 * most), 2)
    assert sums["cost_microusd"] == str(18_014_398_508 * USD)
    verified = verify_receipt(document, PUBLIC)
    assert verified.is_good, verified.verdict
    assert f"{2 * most} tokens in, 2 out, 18014398508.000000 USD" in verified.verdict
    numbers = {**document, "totals": {name: int(value) for name, value in sums.items()}}
    del numbers["signature"]
    assert verify_receipt(parse_strict_json(sign_document(numbers, IDENTITY)), PUBLIC).is_good
