"""Evidence packs: what they hold is what was recorded, for those who may see it, and nothing of them can be changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import trio
from nacl.signing import SigningKey

from asapd.actors import packs as packing
from asapd.cli.verified import Verified
from asapd.cli.verify import verify_file
from asapd.cli.verify_pack import is_pack, verify_pack
from asapd.core.types import DAY_US, HOUR_US, SECOND_US, format_us
from asapd.store import packs
from asapd.wire.evidence_pack import PARTS, sign_pack
from asapd.wire.keys import public_base64
from asapd.wire.strict_json import parse_strict_json
from tests.edge.house import IDENTITY, NOW, T0, A, B, C, Edge
from tests.edge.http.test_delegations import issue
from tests.edge.http.test_sla_history import prepare

PUBLIC = bytes(IDENTITY.verify_key)
START = T0 - 2 * DAY_US


async def fill(edge: Edge) -> None:
    """A day of an agent that broke its promise, gave a delegation, and gave one up."""
    await edge.get("/audit/checkpoint")
    await prepare(edge, every=3)
    rows: list[Any] = []
    with trio.fail_after(30):
        while not rows:
            await trio.sleep(0.01)
            rows = (await edge.get(f"/agents/{A}/sla/breaches")).ok()["data"]
    given = await issue(edge)
    await issue(edge, delegator=A, delegate=C)
    assert (await edge.delete(f"/delegations/{given['id']}?reason=done")).ok()
    task = {"task_id": "t", "agent": A, "consumer": "c", "state": "started", "timestamp": NOW}
    assert (await edge.post("/tasks", task)).status == 201
    edge.clock.us += SECOND_US


def query(agent: str = A, start_us: int = START) -> str:
    return f"/audit/pack?agent={agent}&start={format_us(start_us)}"


async def packed(edge: Edge, **options: Any) -> dict[str, Any]:
    answer = await edge.get(query(), **options)
    assert answer.status == 200, answer.body
    document: dict[str, Any] = parse_strict_json(answer.body)
    return document


def resigned(document: dict[str, Any], key: SigningKey = IDENTITY) -> dict[str, Any]:
    """The document with all digests and the signature made anew, as one who has the daemon's key would."""
    plain = json.loads(json.dumps(document, default=float))
    head = {name: value for name, value in plain.items() if name not in (*PARTS, "parts", "signature")}
    signed: dict[str, Any] = parse_strict_json(sign_pack(head, {name: plain[name] for name in PARTS}, key))
    return signed


async def test_a_pack_holds_what_was_recorded_and_verifies_with_the_key_alone(edge: Edge, tmp_path: Path) -> None:
    await fill(edge)
    answer = await edge.get(query())
    document = parse_strict_json(answer.body)
    assert is_pack(document)
    kinds = {item["entry"]["event_type"] for item in document["entries"]}
    assert kinds - {"agent.key_added"} == {
        *("agent.added", "agent.promise", "usage.recorded", "sla.breach"),
        *("delegation.created", "delegation.revoked", "task.started"),
    }
    shown = (await edge.get(f"/agents/{A}/sla/breaches")).ok()["data"]
    assert {one["breach"]["id"] for one in document["breaches"]} == {row["id"] for row in shown}
    assert [(one["delegate"], one["revoked_at"] is None) for one in document["delegations"]] == [(B, False), (C, True)]
    assert len(document["sla"]) == 3
    assert document["checkpoints"]["opening"] is None
    file = tmp_path / "pack.json"
    file.write_bytes(answer.body)
    found = verify_file(file, PUBLIC)
    assert (found.is_good, found.remarks) == (True, ()), found.verdict
    assert found.verdict.startswith(f"ok: {A} from {format_us(START)} to {format_us(T0 + SECOND_US)}: ")
    assert verify_file(file, None).remarks[0].startswith("the key is the one in the pack")
    assert not verify_file(file, bytes(SigningKey(bytes(32)).verify_key)).is_good


async def test_a_pack_of_a_later_period_is_anchored_in_the_checkpoint_before_it(edge: Edge) -> None:
    await fill(edge)
    await edge.get("/audit/checkpoint")
    edge.clock.us += HOUR_US
    await edge.post("/usage", [{"task_id": "n", "agent": A, "consumer": "c", "timestamp": NOW, "cost_usd": 1}])
    edge.clock.us += SECOND_US
    document = parse_strict_json((await edge.get(query(start_us=T0 + HOUR_US))).body)
    assert document["checkpoints"]["opening"]["note"] != document["checkpoints"]["closing"]
    # The delegation that is still in force has its entry, though it is older than the period.
    assert [one["delegate"] for one in document["delegations"]] == [C]
    assert verify_pack(document, PUBLIC).is_good
    changed = copy.deepcopy(document)
    changed["checkpoints"]["opening"]["hashes"] = []
    verdict = verify_pack(resigned(changed), PUBLIC).verdict
    assert verdict.startswith("bad: checkpoints: the log of")
    changed["checkpoints"]["opening"]["note"] += "x"
    assert verify_pack(resigned(changed), PUBLIC).verdict.startswith("bad: checkpoints: the opening one ")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a document, of a list the first item and the last."""
    if isinstance(value, dict) and value:
        return [place for key, inner in value.items() for place in places(inner, (*path, key))]
    if isinstance(value, list) and value:
        ends = {0: value[0], len(value) - 1: value[-1]}
        return [place for number, inner in ends.items() for place in places(inner, (*path, number))]
    return [path]


def altered(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    changed = at = copy.copy(document)
    for step in path[:-1]:
        at[step] = copy.copy(at[step])
        at = at[step]
    value = at[path[-1]]
    at[path[-1]] = value + 1 if isinstance(value, int) else f"{value}x"
    return changed


VOUCHED = ("configuration", "sla", "verification", "issuer", "issued_at", "public_key", "statement")
"""What the daemon alone can vouch for: who has its key may say otherwise."""


async def test_every_change_of_a_pack_is_found_even_by_one_who_signs_it_anew(edge: Edge) -> None:
    await fill(edge)
    document = await packed(edge)
    assert verify_pack(resigned(document), PUBLIC).is_good
    for path in places(document):
        found = verify_pack(altered(document, path), PUBLIC)
        assert not found.is_good, path
        assert path[0] not in PARTS or found.verdict == f"bad: {path[0]}: was changed since it was signed", path
        if path[0] not in (*VOUCHED, "parts", "signature", "version"):
            again = verify_pack(resigned(altered(document, path)), PUBLIC)
            assert not again.is_good, path
    assert not verify_pack(resigned(document, SigningKey(bytes(32))), PUBLIC).is_good
    for name in PARTS:
        assert verify_pack({key: value for key, value in document.items() if key != name}, PUBLIC) == Verified(
            False, f"bad: {name}: is missing"
        )


async def test_what_is_left_out_or_put_in_is_found_by_the_part_it_belongs_to(edge: Edge) -> None:
    await fill(edge)
    document = await packed(edge)
    other = parse_strict_json((await edge.get(query(C))).body)

    def verdict(**changes: Any) -> str:
        return verify_pack(resigned({**document, **changes}), PUBLIC).verdict

    entries = document["entries"]
    of_breach = [item for item in entries if item["entry"]["event_type"] == "sla.breach"]
    assert "is not both here and among the entries" in verdict(entries=[one for one in entries if one not in of_breach])
    assert verdict(breaches=document["breaches"][1:]).startswith("bad: breaches: ")
    assert verdict(breaches=document["breaches"][:1] * 2).startswith("bad: breaches: ")
    assert verdict(delegations=[]) == "bad: delegations: is not the tree that the entries make"
    assert "is not in its place" in verdict(entries=entries[::-1])
    assert "is not in its place" in verdict(entries=[entries[0], *entries])
    foreign = [item for item in other["entries"] if item not in entries]
    assert verdict(entries=sorted([*entries, *foreign], key=lambda one: one["entry"]["seq"])).endswith(f"not about {A}")
    assert verdict(sla=document["sla"][1:]).startswith("bad: sla: a period begins at")
    assert verdict(sla=document["sla"][:-1]).startswith("bad: sla: the periods end at")
    assert verdict(end=document["end"][:4] + "-02-01T00:00:00.000000Z").startswith("bad: sla: the periods end")
    assert "is not of the period" in verdict(start=format_us(T0 + 1))
    assert verdict(agent_id=B).startswith("bad: entries: entry ")
    for part, form in (("entries", [5]), ("sla", 5), ("checkpoints", None), ("breaches", [{}]), ("entries", [{}])):
        assert verdict(**{part: form}).startswith(f"bad: {part}: "), part
    for said in (
        {"issuer": "asapd/0000000000000000"},
        {"public_key": public_base64(bytes(SigningKey(bytes(32)).verify_key))},
    ):
        verdict_on_signer = verify_pack(resigned({**document, **said}), PUBLIC).verdict
        assert verdict_on_signer.startswith("bad: public_key or issuer is another than the key"), said
    assert verify_pack({**document, "version": 2}, PUBLIC).verdict == "bad: it is a pack of version 2, not 1"
    assert verify_pack(resigned({**document, "start": 5}), PUBLIC).verdict.startswith("bad: its head has not")


async def test_a_caller_gets_a_pack_of_what_it_may_see(edge: Edge) -> None:
    await fill(edge)
    await edge.new_key("narrow", "reader", A)
    assert verify_pack(await packed(edge, key="narrow"), PUBLIC).is_good
    await edge.new_key("stranger", "reader", C)
    assert (await edge.get(query(), key="stranger")).refused(404)["code"] == "agent_not_found"
    await edge.new_key("tenant", "reader", tenant="elsewhere")
    assert (await edge.get(query(), key="tenant")).refused(404)["code"] == "agent_not_found"
    await edge.new_key("own", "reader", tenant="default")
    whole, own = await packed(edge), await packed(edge, key="own")
    assert whole["entries"] == own["entries"]
    assert verify_pack(own, PUBLIC).is_good


async def test_what_another_tenant_reported_of_an_agent_is_not_its_tenants_to_see(edge: Edge) -> None:
    event = {"task_id": "x", "agent": B, "consumer": "c", "timestamp": NOW, "cost_usd": 1}
    await edge.new_key("tb", "admin", tenant="tb")
    assert (await edge.post("/usage", [event], key="tb")).ok(201)
    await edge.post("/agents", {"id": B, "url": "http://127.0.0.1:1", "tenant": "ta"})
    assert (await edge.post("/usage", [{**event, "task_id": "y"}])).ok(201)
    edge.clock.us += SECOND_US
    await edge.new_key("ta", "reader", tenant="ta")
    document = parse_strict_json((await edge.get(query(B), key="ta")).body)
    tasks = [item["entry"]["details"].get("task_id") for item in document["entries"]]
    assert tasks == [None, "y"]


async def test_a_pack_is_bounded_and_says_so(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(edge)
    monkeypatch.setattr(packing, "MOST", 20)
    refused = (await edge.get(query())).refused(422)
    assert (refused["code"], "more than 20 entries" in refused["detail"]) == ("pack_too_large", True)
    monkeypatch.setattr(packing, "MOST_SEEN", 20)
    assert "the period has more than 20 entries" in (await edge.get(query())).refused(422)["detail"]


async def test_a_pack_is_made_window_by_window(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(edge)
    whole = await packed(edge)
    monkeypatch.setattr(packing, "WINDOW", 7)
    assert (await packed(edge))["entries"] == whole["entries"]
    monkeypatch.setattr(packs, "MOST", 3)
    assert verify_pack(await packed(edge), PUBLIC).is_good


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ("start=2027-01-01T00:00:00Z", "agent"),
        (f"agent={A}", "start"),
        (f"agent={A}&start=2028-01-01T00:00:00Z", "start"),
        (f"agent={A}&start=2025-01-01T00:00:00Z", "start"),
    ],
)
async def test_a_wrong_parameter_is_named(edge: Edge, asked: str, field: str) -> None:
    assert (await edge.get(f"/audit/pack?{asked}")).refused(400)["errors"][0]["field"] == field


async def test_no_pack_is_given_of_a_log_that_was_altered(edge: Edge) -> None:
    await fill(edge)
    await edge.get("/audit/checkpoint")
    edge.connection.execute("DROP TRIGGER audit_no_update; UPDATE audit SET hash = zeroblob(32) WHERE seq = 3")
    assert (await edge.get(query())).refused(503)["code"] == "log_broken"


@pytest.mark.parametrize(
    "change", ["details = '{'", "details = CAST(x'ff' AS TEXT)", "subject = CAST(x'ff41' AS TEXT)"]
)
async def test_no_pack_is_made_of_entries_that_cannot_be_read(edge: Edge, change: str) -> None:
    await fill(edge)
    edge.connection.execute("DROP TRIGGER audit_no_update")
    edge.connection.execute(f"UPDATE audit SET {change} WHERE event_type = 'usage.recorded'")
    assert (await edge.get(query())).refused(503)["code"] == "log_broken"


async def test_a_stored_checkpoint_that_is_no_text_any_more_stops_no_pack(edge: Edge) -> None:
    await edge.get("/audit/checkpoint")
    await fill(edge)
    edge.connection.execute("DROP TRIGGER audit_checkpoint_no_update")
    edge.connection.execute("UPDATE audit_checkpoint SET note = CAST(CAST(note AS BLOB) || x'ff' AS TEXT)")
    assert (await edge.get(query())).status in {200, 503}
