"""The table in force and pricing again, as a client sees them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from asapd.actors import repricer
from asapd.actors.messages import ReconfigureMeter
from asapd.core.price_table import parse_price_table
from asapd.runtime.ask import ask
from tests.edge.house import NOW, A, B, Edge

TABLE = """
version = "one"
[[price]]
model = "m*"
input_per_mtok = "1"
output_per_mtok = "2"
cache_write_1h_per_mtok = "0.5"
valid_from = 2026-01-01
[[price]]
model = "m"
provider = "p"
input_per_mtok = "3"
"""


async def put_in_force(edge: Edge, text: str) -> str:
    table = parse_price_table(text)
    await ask(
        edge.services.mailboxes.meter,
        lambda to: ReconfigureMeter(edge.settings.metering, table, to),
        deadline_s=5,
    )
    return table.version


async def record(edge: Edge, **fields: Any) -> None:
    metrics = {"tokens_in": 1_000_000, "tokens_out": 0, "cache_write_tokens": 20, "cache_write_1h_tokens": 10}
    event = {"task_id": "t1", "agent": A, "consumer": B, "metrics": metrics, "timestamp": NOW, "model": "m", **fields}
    assert (await edge.post("/usage", event)).status == 201


async def test_the_table_in_force_is_shown_most_specific_row_first(edge: Edge) -> None:
    nothing = (await edge.get("/prices")).ok()
    assert (nothing["version"], nothing["sha256"], nothing["file"], nothing["data"]) == ("none", None, None, [])
    version = await put_in_force(edge, TABLE)
    shown = (await edge.get("/prices", key="reader")).ok()
    assert (shown["version"], shown["prefer"], shown["count"]) == (version, "priced", 2)
    assert shown["sha256"].startswith(version.partition("+")[2])
    assert [(row["model"], row["provider"]) for row in shown["data"]] == [("m", "p"), ("m*", None)]
    assert shown["data"][1] == {
        "model": "m*",
        "provider": None,
        "input_per_mtok": Decimal("1.0"),
        "output_per_mtok": Decimal("2.0"),
        "cached_input_per_mtok": None,
        "cache_write_per_mtok": None,
        "cache_write_1h_per_mtok": Decimal("0.5"),
        "reasoning_per_mtok": None,
        "per_call": Decimal("0.0"),
        "valid_from": "2026-01-01T00:00:00.000000Z",
        "valid_until": None,
    }


async def test_a_long_table_is_shown_in_pages(edge: Edge) -> None:
    rows = '[[price]]\nmodel = "m-{0:03}"\ninput_per_mtok = "1"\noutput_per_mtok = "2"\n'
    version = await put_in_force(edge, 'version = "one"\n' + "".join(rows.format(number) for number in range(150)))
    first = (await edge.get("/prices")).ok()
    assert (first["count"], first["version"]) == (100, version)
    rest = (await edge.get(f"/prices?limit=60&cursor={first['next_cursor']}")).ok()
    assert (rest["count"], rest["version"], rest["next_cursor"]) == (50, version, None)
    assert {row["model"] for row in first["data"] + rest["data"]} == {f"m-{number:03}" for number in range(150)}
    for wrong in ("limit=0", "limit=1001", "cursor=x", "offset=1"):
        assert (await edge.get(f"/prices?{wrong}")).refused(400)["errors"][0]["field"] == wrong.partition("=")[0]


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("model=m", ["m"]),
        ("model=m&provider=q", ["m*"]),
        ("model=m-2", ["m*"]),
        ("model=m-2&at=2025-01-01T00:00:00Z", []),
        ("model=x", []),
    ],
)
async def test_the_row_that_would_price_a_model_is_told(edge: Edge, query: str, rows: list[str]) -> None:
    await put_in_force(edge, TABLE)
    assert [row["model"] for row in (await edge.get(f"/prices?{query}")).ok()["data"]] == rows


async def test_pricing_again_says_what_would_change_and_changes_it_once(edge: Edge) -> None:
    await record(edge, id="e1")
    await record(edge, id="e2", model="x")
    version = await put_in_force(edge, TABLE)
    path = "/prices/reprice"
    assert (await edge.post(f"{path}?dry_run=true", key="reader")).refused(403)["code"] == "forbidden"
    assert (await edge.post(path, key="operator")).refused(403)["code"] == "forbidden"
    would = (await edge.post(f"{path}?dry_run=true", key="operator")).ok()
    # 999 990 tokens and 10 that are kept for an hour, at half the price; two cache writes of each kind of ten.
    assert (would["dry_run"], would["price_version"], would["next_cursor"]) == (True, version, None)
    assert [(row["model"], row["changed"], row["difference_usd"]) for row in would["data"]] == [
        ("m", 1, Decimal("3.0")),
        ("x", 0, Decimal("0.0")),
    ]
    assert (await edge.get("/usage/summary")).ok()["total_cost_usd"] is None
    did = (await edge.post(path)).ok()
    assert did == {**would, "dry_run": False}
    total = (await edge.get("/usage/summary")).ok()
    assert (total["total_cost_usd"], total["unpriced_events"], total["total_events"]) == (Decimal("3.0"), 1, 2)
    assert total["total_cache_write_1h_tokens"] == 20
    assert [row["changed"] for row in (await edge.post(path)).ok()["data"]] == [0, 0]
    assert (await edge.post("/usage", {})).status == 422
    entry = (await edge.get("/audit/logs?event_type=usage.repriced")).ok()
    assert (entry["count"], entry["data"][0]["details"]["now_microusd"]) == (1, 3_000_000)


async def test_a_part_goes_on_where_the_one_before_ended(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repricer, "PAGE", 1)
    monkeypatch.setattr(repricer, "PART_S", 1e-9)
    for number in range(3):
        await record(edge, id=f"e{number}")
    await put_in_force(edge, TABLE)
    cursor, changed = "", 0
    for _ in range(4):
        part = (await edge.post(f"/prices/reprice{cursor}")).ok()
        changed += sum(row["changed"] for row in part["data"])
        if part["next_cursor"] is None:
            break
        cursor = f"?cursor={part['next_cursor']}"
    assert (changed, part["more"]) == (3, False)
    assert (await edge.post("/prices/reprice?cursor=bm9uc2Vuc2U")).refused(400)["errors"][0]["field"] == "cursor"
    first = (await edge.post("/prices/reprice?dry_run=1")).ok()["next_cursor"]
    for other in ("", "dry_run=1&model=m*&"):
        problem = (await edge.post(f"/prices/reprice?{other}cursor={first}")).refused(400)
        assert problem["errors"][0]["field"] == "cursor"
    await put_in_force(edge, TABLE + "# other")
    assert (await edge.post(f"/prices/reprice?dry_run=1&cursor={first}")).refused(409)["code"] == "prices_changed"
    assert (await edge.post("/prices/reprice?modell=m")).refused(400)["code"] == "bad_parameter"


async def test_only_what_is_selected_is_priced_again(edge: Edge) -> None:
    await record(edge, id="e1")
    await record(edge, id="e2", model="m-2", timestamp="2027-01-15T07:00:00Z")
    await put_in_force(edge, TABLE)
    for query in ("model=m-*", "end=2027-01-15T08:00:00Z", "start=2027-01-15T07:00:00Z&end=2027-01-15T07:30:00Z"):
        would = (await edge.post(f"/prices/reprice?dry_run=true&{query}")).ok()
        assert [(row["model"], row["events"]) for row in would["data"]] == [("m-2", 1)]


async def test_the_correction_of_a_cost_is_not_voided_by_itself(edge: Edge) -> None:
    await record(edge, id="e1")
    await put_in_force(edge, TABLE)
    (await edge.post("/prices/reprice")).ok()
    event, correction = (await edge.get("/usage")).ok()["data"]
    for which in (correction["id"], f"{correction['id']}?seq={correction['seq']}"):
        path, _, query = which.partition("?")
        problem = (await edge.post(f"/usage/{path}/void?{query}", {"reason": "r"})).refused(422)
        assert "corrects the cost of e1" in problem["detail"]
    assert (await edge.post("/usage/e1/void", {"reason": "r"})).ok(201)["voids"] == event["id"]
    assert (await edge.get("/usage/summary")).ok()["total_events"] == 0


async def test_a_body_that_nobody_reads_is_refused(edge: Edge) -> None:
    await record(edge, id="e1")
    await put_in_force(edge, TABLE)
    for path in ("/prices/reprice", "/retention"):
        assert "query" in (await edge.post(path, {"dry_run": True})).refused(422)["detail"]
        (await edge.post(path, {})).ok()
        (await edge.post(f"{path}?dry_run=true")).ok()


@pytest.mark.parametrize("metrics", [{"api_calls": 1}, {}, None, ...])
async def test_a_call_that_tells_no_tokens_costs_what_its_agent_says_or_nobody_knows(edge: Edge, metrics: Any) -> None:
    await put_in_force(edge, TABLE)
    event: dict[str, Any] = {"task_id": "t1", "agent": A, "consumer": B, "timestamp": NOW, "model": "m"}
    if metrics is not ...:
        event["metrics"] = metrics
    own, unknown = {**event, "id": "own", "cost_usd": "0.25"}, {**event, "id": "unknown"}
    zero = {**event, "id": "zero", "metrics": {"tokens_in": 0, "tokens_out": 0}, "cost_usd": "0.25"}
    failed = {**event, "id": "failed", "outcome": "failed"}
    assert (await edge.post("/usage", [own, unknown, zero, failed])).status == 201
    shown = {row["id"]: (row["cost_usd"], row["cost_source"]) for row in (await edge.get("/usage")).ok()["data"]}
    assert shown == {
        "own": (Decimal("0.25"), "reported"),
        "unknown": (None, None),
        "zero": (0, "priced"),
        "failed": (0, "priced"),
    }
    summary = (await edge.get("/usage/summary")).ok()
    assert (summary["total_cost_usd"], summary["unpriced_events"]) == (Decimal("0.25"), 1)
    told = {**unknown, "metrics": {**(event.get("metrics") or {}), "tokens_in": 0}}
    assert (await edge.post("/usage/validate", told)).ok()["duplicates"] == 1
    assert (await edge.post("/usage", told)).ok(201)["duplicates"] == 1
    would = (await edge.post("/prices/reprice?dry_run=true")).ok()["data"]
    assert [(row["changed"], row["not_in_table"], row["unpriced_events"]) for row in would] == [(0, 0, 1)]
