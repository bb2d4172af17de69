"""Real answers are held to the description of the API that the daemon itself gives."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, running, until
from tests.e2e.tokens import Party

ROOT, WORKER = Party("root"), Party("worker")
SLOW = "urn:asap:agent:slow"
KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}

# What is got, with everything there is to be shown.
METERING = """
usage usage/aggregate?group_by=model,day usage/agents usage/consumers usage/summary usage/stats
usage/sources usage/export?format=json usage/export tasks tasks/t1 tasks/t1/receipt budgets
prices
"""
AUDIT = """
audit/logs audit/logs/1 audit/verify audit/verify?format=ndjson audit/export
audit/export?format=syslog audit/export?format=csv audit/export?format=json audit/checkpoint
audit/checkpoint?format=json audit/proof/inclusion?id=1
audit/proof/inclusion?id=1&format=tlog-proof audit/proof/consistency?from=1
audit/pack?agent=urn:asap:agent:slow&start=2026-01-01T00:00:00Z
"""
HOST = """
healthz readyz .well-known/asap/health .well-known/asap/manifest.json .well-known/jwks.json
openapi.json asyncapi.json docs web/docs.js web/docs.css status metrics keys
"""
REFERENCE = """
delegations usage usage/aggregate?group_by=day usage/agents usage/consumers usage/summary
usage/stats usage/export usage/export?export_format=csv sla sla/breaches
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    agents = f"""min_samples = 1
[[agents]]
id = "{ROOT.urn}"
url = "http://127.0.0.1:9"
public_key = "{ROOT.public_key}"
[[agents]]
id = "{SLOW}"
url = "http://127.0.0.1:9"
sla = {{max_latency_p95_ms = 1}}
"""
    with running(QUICK + agents) as started:
        yield started


class Description:
    """A description of either kind, and what it has against what came."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def faults(self, answer: httpx2.Response) -> list[str]:
        """What differs between an answer and its description."""
        method, path = answer.request.method, answer.request.url.path
        (found,) = [
            operations[method.lower()]
            for template, operations in self._document["paths"].items()
            if method.lower() in operations and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)
        ][-1:]
        described = found["responses"].get(str(answer.status_code), found["responses"]["default"])
        if "content" not in described:
            return [] if answer.content == b"" else ["there is a body"]
        media = answer.headers["content-type"].partition(";")[0]
        if media not in described["content"]:
            return [f"{media} is not described"]
        schema = described["content"][media]["schema"]
        return list(self._against(answer.json(), schema, "body")) if media.endswith(("/json", "+json")) else []

    def faults_of_message(self, channel: str, name: str, value: Any) -> list[str]:
        """What differs between a message of a channel and its description."""
        return list(self._against(value, self._document["channels"][channel]["messages"][name]["payload"], name))

    def _against(self, value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
        if "$ref" in schema:
            schema = self._document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        if "const" in schema and value != schema["const"]:
            yield f"{where} is {value}, not {schema['const']}"
        for part in schema.get("allOf", []):
            yield from self._against(value, part, where)
        if "anyOf" in schema and all(list(self._against(value, part, where)) for part in schema["anyOf"]):
            yield f"{where} is none of what it may be"
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(isinstance(value, KINDS[kind]) for kind in kinds):
            yield f"{where} is a {type(value).__name__}, not {kinds}"
        if "enum" in schema and value not in schema["enum"]:
            yield f"{where} is {value}, not one of {schema['enum']}"
        if isinstance(value, dict):
            yield from (f"{where} has no {name}" for name in schema.get("required", []) if name not in value)
            for name, one in value.items():
                part = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
                yield from self._against(one, part, f"{where}.{name}")
        if isinstance(value, list) and "items" in schema:
            for number, one in enumerate(value):
                yield from self._against(one, schema["items"], f"{where}[{number}]")


async def test_answers_are_as_they_are_described(daemon: Daemon) -> None:
    async with daemon.client("") as client:
        description = Description((await client.get("/openapi.json")).json())
    async with daemon.client() as client:

        async def ask(method: str, path: str, body: Any = None, status: int = 200) -> Any:
            answer = await client.request(method, path, json=body)
            assert answer.status_code == status, (path, answer.text)
            assert description.faults(answer) == [], path
            return answer.json() if answer.headers["content-type"] == "application/json" else None

        now = time.time()
        event = {"id": "e1", "task_id": "t1", "agent": SLOW, "consumer": ROOT.urn, "timestamp": now, "cost_usd": "0.5"}
        slow = {**event, "metrics": {"duration_ms": 1000}}
        await ask("POST", "/usage", slow, 201)
        await ask("POST", "/usage/batch?partial=true", [slow, {**slow, "agent": "x"}], 201)
        await ask("POST", "/usage", {**slow, "outcome": "failed"}, 409)
        await ask("POST", "/usage", {}, 422)
        await ask("POST", "/usage/validate", slow)
        await ask("POST", "/usage/validate", {})
        await ask(
            "POST",
            "/tasks",
            {**dict.fromkeys(("task_id", "consumer"), "t1"), "agent": SLOW, "state": "started", "timestamp": now},
            201,
        )
        for path in METERING.split():
            await ask("GET", f"/{path}")

        token = ROOT.grant(WORKER, usd=1)
        issued = await ask("POST", "/delegations", {"token": token}, 201)
        await ask("POST", "/delegations", {"token": token})
        await ask("POST", "/delegations/validate", {"token": token, "action": "task.run"})
        await ask("POST", "/delegations/validate", {"token": "x"})
        wanted = {"delegation": issued["id"], "action": "task.run", "task_id": "t1", "estimate": {"cost_usd": 0.5}}
        held = (await ask("POST", "/delegations/authorize", wanted))["reservation"]["id"]
        await ask("POST", "/delegations/authorize", {**wanted, "estimate": {"cost_usd": 5}}, 403)
        await ask("GET", f"/reservations/{held}")
        await ask("POST", f"/reservations/{held}/extend", {"ttl_seconds": 60})
        await ask("POST", f"/reservations/{held}/settle", {"cost_usd": 0.25})
        await ask("POST", f"/reservations/{held}/refund", {"cost_usd": 0.25, "reason": "x"})
        for path in ("reservations", "delegations", f"delegations/{issued['id']}", "delegations/revocations"):
            await ask("GET", f"/{path}")
        await ask("DELETE", f"/delegations/{issued['id']}")

        await ask("POST", "/agents", {"id": WORKER.urn, "url": "http://127.0.0.1:9"}, 201)
        await ask("POST", "/agents", {"id": WORKER.urn, "url": "http://127.0.0.1:9"})

        async def breached() -> Any:
            return (await client.get("/sla/breaches")).json()["data"]

        breach = (await until(breached))[0]["id"]
        agent = f"agents/{SLOW}"
        for path in (
            "agents",
            agent,
            f"{agent}/health",
            f"{agent}/history",
            f"{agent}/keys",
            f"{agent}/manifests",
            f"{agent}/sla",
            f"{agent}/sla/history",
            f"{agent}/sla/breaches",
            f"{agent}/sla/penalty",
            "sla",
            "sla/history",
            "sla/breaches",
            f"breaches/{breach}/evidence",
            "silences",
            "maintenance",
            "alerts/targets",
            "alerts/dead-letters",
        ):
            await ask("GET", f"/{path}")
        await ask("POST", f"/breaches/{breach}/ack", {}, 201)
        await ask("POST", f"/breaches/{breach}/ack", {})
        await ask("POST", "/silences", {"agent": SLOW, "duration": "1m", "comment": "x"}, 201)
        await ask("POST", "/maintenance", {"agent_id": SLOW, "duration": "1m", "reason": "x"}, 201)
        await ask("DELETE", f"/agents/{WORKER.urn}")

        for path in AUDIT.split():
            await ask("GET", f"/{path}")
        for path in HOST.split():
            await ask("GET", f"/{path}")
        key = await ask("POST", "/keys", {"name": "described", "role": "operator", "agents": [SLOW], "sign": True}, 201)
        await ask("DELETE", f"/keys/{key['id']}")
        await ask("POST", "/reload")
        await ask("POST", "/retention?dry_run=true")
        await ask("POST", "/actors/meter/restart", None, 202)
        await ask("POST", "/actors/moon/restart", None, 404)

        for path in REFERENCE.split():
            await ask("GET", f"/asap/{path}")
        await ask("GET", "/asap/delegations/none", None, 404)
        await ask("POST", "/asap/usage", {**slow, "id": "e2"}, 201)
        await ask("POST", "/asap/usage/validate", slow)
        await ask("POST", "/v1/traces", {})


async def test_what_is_told_live_is_as_it_is_described(daemon: Daemon) -> None:
    async with daemon.client("") as client:
        description = Description((await client.get("/asyncapi.json")).json())
    headers = [("Authorization", f"Bearer {daemon.admin_key}".encode())]
    async with daemon.client() as client, daemon.websocket(extra_headers=headers) as socket:

        async def call(method: str, params: dict[str, Any], end: str = "result") -> None:
            sent = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            assert description.faults_of_message("live", method, sent) == []
            await socket.send_message(json.dumps(sent))
            assert (
                description.faults_of_message("live", f"{method}.{end}", json.loads(await socket.get_message())) == []
            )

        async def told(name: str) -> None:
            with trio.fail_after(20):
                assert description.faults_of_message("live", name, json.loads(await socket.get_message())) == []

        await call("ping", {})
        await call("sla.subscribe", {"cursor": "c", "resume_after": 2**40})
        await call("sla.ack", {"cursor": "c", "seq": 0})
        await call("sla.ack", {"cursor": "x" * 129, "seq": 0}, "error")
        await call("sla.unsubscribe", {})
        await call("delegation.subscribe", {})
        token = ROOT.grant(WORKER, usd=1)
        delegation = (await client.post("/delegations", json={"token": token})).json()["id"]
        assert (await client.delete(f"/delegations/{delegation}")).status_code == 200
        await told("delegation.revoked")
        event = {"task_id": "t", "agent": SLOW, "consumer": ROOT.urn, "timestamp": time.time()}
        sent = [{**event, "metrics": {"duration_ms": 1000}}, {**event, "delegation": delegation}]
        assert (await client.post("/usage", json=sent)).status_code == 201
        await told("delegation.unauthorised")
        await call("delegation.unsubscribe", {})
        await call("sla.subscribe", {"resume_after": 0})
        await told("sla.breach")
    for address, channel, name in (("/events", "events", "sla.breach"), ("/usage/stream", "usage.stream", "usage")):
        head = f"GET {address}?last_event_id=0 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {daemon.admin_key}"
        _, came = await daemon.raw(f"{head}\r\n\r\n".encode(), until=b"}\n\n")
        found = re.search(rb"event: ([\w.]+)\ndata: (.*)\n\n", came)
        assert found is not None
        assert found[1].decode() == name
        assert description.faults_of_message(channel, name, json.loads(found[2].partition(b"\n\n")[0])) == []
