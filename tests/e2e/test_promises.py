"""Agents that are real HTTP servers, the promises they make, and who hears when one is broken."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx2
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.e2e.agent import Agent
from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, every_page, running, until

AGENTS = '[[agents]]\nid = "{urn}"\nurl = "{url}"\n'
DETECTED_WITHIN_S = 2.0
INTERVAL_S = 0.2  # between the probes of QUICK
_numbers = itertools.count(1)


def held_s(times: list[datetime]) -> float:
    """How long probes at all times but the last held: each until the next, for three intervals at most."""
    return sum(min((after - at).total_seconds(), 3 * INTERVAL_S) for at, after in itertools.pairwise(times))


def with_agents(*agents: Agent, more: str = "") -> str:
    return QUICK + more + "".join(AGENTS.format(urn=agent.urn, url=agent.url) for agent in agents)


class Subscriber:
    """One WebSocket that has subscribed."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self.socket = socket

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        await self.socket.send_message(
            json.dumps({"jsonrpc": "2.0", "id": next(_numbers), "method": method, "params": params})
        )
        return await self.receive()

    async def receive(self, within_s: float = PATIENCE_S) -> dict[str, Any]:
        with trio.fail_after(within_s):
            found: dict[str, Any] = json.loads(await self.socket.get_message())
        return found

    async def breach(self, within_s: float = PATIENCE_S) -> dict[str, Any]:
        message = await self.receive(within_s)
        assert message["method"] == "sla.breach"
        params: dict[str, Any] = message["params"]
        assert params["seq"] == params["breach"]["seq"]
        return params

    async def hears_nothing(self, for_s: float = 0.25) -> None:
        with trio.move_on_after(for_s):
            raise AssertionError(f"heard {await self.socket.get_message()!r}")


@asynccontextmanager
async def subscribed(daemon: Daemon, **params: Any) -> AsyncIterator[Subscriber]:
    headers = [("Authorization", f"Bearer {daemon.admin_key}")]
    async with daemon.websocket(extra_headers=headers) as socket:
        subscriber = Subscriber(socket)
        answer = await subscriber.call("sla.subscribe", **params)
        assert answer["result"]["subscribed"] is True
        yield subscriber


async def work(client: httpx2.AsyncClient, agent: Agent, duration_ms: int, count: int = 1, **more: Any) -> None:
    now = datetime.now().astimezone().isoformat()
    events = [
        {
            "id": f"work-{next(_numbers)}",
            "task_id": f"task-{next(_numbers)}",
            "agent": agent.urn,
            "consumer": "urn:asap:agent:desk",
            "timestamp": now,
            "metrics": {"duration_ms": duration_ms},
            **more,
        }
        for _ in range(count)
    ]
    answer = await client.post("/usage", json=events)
    assert answer.status_code == 201, answer.text


async def check_detected_in_time(
    client: httpx2.AsyncClient, params: dict[str, Any], since: datetime | None = None
) -> None:
    """A transition was seen soon after the newest event, or another cause, was told to the daemon.

    By the daemon's own times: how long the machine let this test wait to hear of it does not count.
    """
    breach = params["breach"]
    at = datetime.fromisoformat(breach["resolved_at"] if params["event"] == "resolved" else breach["detected_at"])
    if since is None:
        rows = await every_page(client, "/usage", agent=breach["agent_id"], limit=1000)
        since = max(datetime.fromisoformat(row["recorded_at"]) for row in rows)
    assert 0 <= (at - since).total_seconds() <= DETECTED_WITHIN_S, (since, breach)


async def promise_known(client: httpx2.AsyncClient, agent: Agent) -> None:
    async def known() -> bool:
        row = (await client.get(f"/agents/{agent.urn}")).json()
        return bool(row.get("sla")) and row["state"] == "healthy"

    await until(known)


async def test_one_breach_is_heard_once_and_resolved_once_and_replayed_across_a_restart() -> None:
    with (
        Agent("slow", {"max_latency_p95_ms": 500}) as agent,
        Agent("other", {"max_latency_p95_ms": 500}) as other,
        running(with_agents(agent, other)) as daemon,
    ):
        async with daemon.client() as client, subscribed(daemon) as live:
            await promise_known(client, agent)
            await work(client, agent, 100, 38)
            await work(client, agent, 900, 2)
            await live.hears_nothing()  # 2 of 40 are 5 %, which is allowed
            await work(client, agent, 900)
            opened = await live.breach()
            assert (opened["event"], opened["seq"]) == ("opened", 1)
            await check_detected_in_time(client, opened)
            breach = opened["breach"]
            assert breach["agent_id"] == agent.urn
            assert breach["breach_type"] == "latency"
            assert (breach["threshold"], breach["threshold_value"]) == ("500ms", 500)
            assert breach["actual_value"] > 500
            assert (breach["severity"], breach["state"], breach["window"]) == ("warning", "open", "1m")
            assert breach["resolved_at"] is None
            assert breach["samples"] == 41
            await work(client, agent, 900, 10)
            await live.hears_nothing()
            shown = (await client.get("/sla/breaches")).json()
            assert [row["id"] for row in shown["data"]] == [breach["id"]]
            report = (await client.get(f"/agents/{agent.urn}/sla", params={"window": "1h"})).json()
            assert [row["id"] for row in report["open_breaches"]] == [breach["id"]]
            assert report["compliance"]["latency"]["met"] is False

            await work(client, agent, 100, 300)
            resolved = await live.breach()
            assert (resolved["event"], resolved["seq"]) == ("resolved", 2)
            await check_detected_in_time(client, resolved)
            assert resolved["breach"]["id"] == breach["id"]
            assert resolved["breach"]["resolve_reason"] == "recovered"
            assert resolved["breach"]["duration_seconds"] > 0
            await live.hears_nothing()
            for path in ("/sla/breaches", f"/agents/{agent.urn}/sla/breaches"):
                rows = (await client.get(path)).json()["data"]
                assert [(row["id"], row["state"]) for row in rows] == [(breach["id"], "resolved")]
            assert (await client.get("/sla/breaches", params={"agent_id": other.urn})).json()["data"] == []
            evidence = (await client.get(f"/breaches/{breach['id']}/evidence")).json()
            assert evidence["breach"]["id"] == breach["id"]

            async with subscribed(daemon, resume_after=0) as late:
                assert [(await late.breach())["event"] for _ in range(2)] == ["opened", "resolved"]
            async with subscribed(daemon, resume_after=1) as late:
                assert (await late.breach())["seq"] == 2
                await late.hears_nothing()
            async with subscribed(daemon, resume_after=0, agent_id=other.urn) as late:
                await late.hears_nothing()

            await trio.to_thread.run_sync(daemon.stop)
            with pytest.raises(ConnectionClosed) as closed:
                await live.receive()
            assert closed.value.reason is not None
            assert closed.value.reason.code == 1001
        await trio.to_thread.run_sync(daemon.start)
        async with daemon.client() as client, subscribed(daemon, resume_after=1) as back:
            assert [(await back.breach())[name] for name in ("seq",)] == [2]
            await promise_known(client, agent)
            await work(client, agent, 900, 30)
            again = await back.breach()
            assert (again["event"], again["seq"]) == ("opened", 3)
            await check_detected_in_time(client, again)
            await back.hears_nothing()
            assert len((await client.get("/sla/breaches")).json()["data"]) == 2
            assert (await client.get("/audit/verify")).json()["valid"] is True
            log = (await client.get("/audit/logs", params={"event_type": "sla.breach"})).json()["data"]
            assert [entry["details"]["event"] for entry in log] == ["opened", "resolved", "opened"]


async def test_a_breach_stays_one_breach_through_kill_9() -> None:
    with Agent("slow", {"max_error_rate": "1%"}) as agent, running(with_agents(agent)) as daemon:
        async with daemon.client() as client, subscribed(daemon) as live:
            await promise_known(client, agent)
            await work(client, agent, 10, 40)
            await work(client, agent, 10, outcome="failed")
            opened = await live.breach()
            assert opened["event"] == "opened"
            await check_detected_in_time(client, opened)
            before = (await client.get("/sla/breaches")).json()
            await trio.to_thread.run_sync(daemon.kill)
        await trio.to_thread.run_sync(daemon.start)
        async with daemon.client() as client, subscribed(daemon, resume_after=0) as live:
            assert (await live.breach())["event"] == "opened"
            await live.hears_nothing()
            after = (await client.get("/sla/breaches")).json()
            assert after == before
            assert [row["state"] for row in after["data"]] == ["open"]
            await work(client, agent, 10, 200)
            resolved = await live.breach()
            assert (resolved["event"], resolved["seq"], resolved["breach"]["id"]) == (
                "resolved",
                2,
                before["data"][0]["id"],
            )
            await check_detected_in_time(client, resolved)


async def test_a_typo_in_a_manifest_ends_no_breach_and_its_evidence_verifies() -> None:
    """Nor does kill -9; the past is judged by what was promised then."""
    with Agent("typo", {"max_error_rate": "1%"}) as agent, running(with_agents(agent)) as daemon:
        async with daemon.client() as client, subscribed(daemon) as live:
            await promise_known(client, agent)
            await work(client, agent, 10, 40)
            await work(client, agent, 10, outcome="failed")
            assert (await live.breach())["event"] == "opened"
            agent.manifest["sla"] = {"max_error_rate": "99.5.5%"}

            async def told() -> bool:
                report = (await client.get(f"/agents/{agent.urn}/sla", params={"window": "1m"})).json()
                return bool(report["sla_error"])

            await until(told)
            await live.hears_nothing()
            await trio.to_thread.run_sync(daemon.kill)
        await trio.to_thread.run_sync(daemon.start)
        async with daemon.client() as client, subscribed(daemon, resume_after=1) as live:
            report = (await client.get(f"/agents/{agent.urn}/sla", params={"window": "1m"})).json()
            assert (report["sla"]["max_error_rate"], report["sla_source"]) == ("1.0%", "manifest")
            assert [one["breach_type"] for one in report["open_breaches"]] == ["error_rate"]
            assert agent.urn in {one["agent"] for one in daemon.status()["agents"]["sla_errors"]}
            agent.manifest["sla"] = {"max_error_rate": "50%"}
            resolved = await live.breach()
            assert (resolved["event"], resolved["breach"]["resolve_reason"]) == ("resolved", "sla_changed")
            rows = (await client.get(f"/agents/{agent.urn}/sla/history", params={"resolution": "minute"})).json()[
                "data"
            ]
            assert (rows[0]["sla"]["max_error_rate"], rows[0]["sla_since"]) == ("1.0%", None)
            assert (rows[-1]["sla"]["max_error_rate"], rows[-1]["sla_source"]) == ("50.0%", "manifest")
            statement = await client.get(f"/breaches/{resolved['breach']['id']}/evidence")
        file = daemon.home / "breach.json"
        file.write_bytes(statement.content)
        done = await trio.run_process([sys.executable, "-m", "asapd", "verify", str(file)], capture_stdout=True)
        assert done.stdout.startswith(b"ok: error_rate breach ")


async def test_a_killed_agent_is_unhealthy_after_so_many_probes_and_loses_just_that_time() -> None:
    more = "unhealthy_after = 3\n"
    config = QUICK.replace("[sla]", more + "[sla]\nmin_samples = 5")
    with Agent("mortal", {"availability": "99%"}) as agent, running(config) as daemon:
        async with daemon.client() as client, subscribed(daemon) as live:
            added = await client.post("/agents", json={"id": agent.urn, "url": agent.url})
            assert added.status_code == 201, added.text
            await promise_known(client, agent)

            async def seen_ten_times() -> bool:
                return bool((await client.get(f"/agents/{agent.urn}/health")).json()["count"] >= 10)

            await until(seen_ten_times)
            agent.kill()

            async def unhealthy() -> bool:
                return bool((await client.get(f"/agents/{agent.urn}")).json()["state"] == "unhealthy")

            await until(unhealthy, within_s=PATIENCE_S)
            opened = await live.breach()
            assert (opened["event"], opened["breach"]["breach_type"]) == ("opened", "availability")
            await trio.sleep(0.6)
            metrics = (await client.get(f"/agents/{agent.urn}/sla", params={"window": "1h"})).json()["metrics"]
            health = (await client.get(f"/agents/{agent.urn}/health", params={"limit": 1000})).json()
            transition = health["transitions"][0]
            assert (transition["from"], transition["to"]) == ("healthy", "unhealthy")
            probes = sorted((datetime.fromisoformat(probe["at"]), probe["up"]) for probe in health["data"])
            failed = [at for at, up in probes if not up]
            assert failed[2] == datetime.fromisoformat(transition["at"])
            await check_detected_in_time(client, opened, failed[0])
            assert health["data"][0]["reason"] == "refused"
            # Up from the first probe to the first that failed, down from there on.
            ended = datetime.fromisoformat(metrics["period_end"])
            up_s = held_s([*(at for at, up in probes if up), failed[0]])
            assert metrics["up_seconds"] == pytest.approx(up_s, abs=1e-5)
            down_s = held_s([*(at for at in failed if at < ended), ended])
            assert metrics["down_seconds"] == pytest.approx(down_s, abs=1e-5)
            known_s = metrics["up_seconds"] + metrics["down_seconds"]
            assert metrics["uptime_percent"] == pytest.approx(100 * metrics["up_seconds"] / known_s, abs=1e-5)
            row = (await client.get(f"/agents/{agent.urn}", params={"window": "1h"})).json()
            assert row["uptime_percent"] < 100


async def test_figures_after_a_restart_equal_those_before_it() -> None:
    """All that a window holds was read back from the store; only its edges have moved."""
    sla = {"max_latency_p95_ms": 500, "max_error_rate": "5%"}
    with Agent("steady", sla) as agent, running(with_agents(agent)) as daemon:

        async def figures() -> dict[str, Any]:
            async with daemon.client() as client:
                report = (await client.get(f"/agents/{agent.urn}/sla", params={"window": "24h"})).json()
                return {
                    **{name: report["metrics"][name] for name in ("latency_p95_ms", "error_rate_percent")},
                    **{name: report["metrics"][name] for name in ("tasks_completed", "tasks_failed")},
                    "sla": report["sla"],
                    "compliance": report["compliance"],
                    "score": report["sla_score"],
                }

        async with daemon.client() as client:
            await promise_known(client, agent)
            for duration_ms in range(100, 700, 10):
                await work(client, agent, duration_ms)
            await work(client, agent, 50, 7, outcome="failed")
        before = await figures()
        assert before["tasks_completed"] == 60
        assert before["tasks_failed"] == 7
        await trio.to_thread.run_sync(daemon.kill)
        await trio.to_thread.run_sync(daemon.start)
        assert await figures() == before


async def test_the_window_that_breaches_are_judged_on_can_be_asked_for() -> None:
    with Agent("any") as agent, running(with_agents(agent)) as daemon:
        async with daemon.client() as client:
            for path in (f"/agents/{agent.urn}/sla", f"/agents/{agent.urn}", "/sla", "/agents"):
                answer = await client.get(path, params={"window": "1m"})
                assert answer.status_code == 200, answer.text


async def test_requests_on_the_websocket_are_answered_in_json_rpc() -> None:
    with running() as daemon:
        async with subscribed(daemon) as live:
            assert (await live.call("ping"))["result"] == {"pong": True}
            assert (await live.call("no.such"))["error"]["code"] == -32601
            assert (await live.call("sla.subscribe", resume_after=-1))["error"]["code"] == -32602
            assert (await live.call("sla.subscribe", surprise=1))["error"]["code"] == -32602
            assert (await live.call("sla.unsubscribe"))["result"]["unsubscribed"] is True
            await live.socket.send_message("{")
            assert (await live.receive())["error"]["code"] == -32700
            await live.socket.send_message('{"method": 1}')
            assert (await live.receive())["error"]["code"] == -32600
            assert (await live.call("ping"))["result"] == {"pong": True}


async def test_a_browser_may_bring_its_key_as_a_subprotocol() -> None:
    with running() as daemon:
        protocols = ["asapd.v1", f"asapd.bearer.{daemon.admin_key}"]
        async with daemon.websocket(subprotocols=protocols) as socket:
            assert socket.subprotocol == "asapd.v1"
            assert (await Subscriber(socket).call("sla.subscribe"))["result"]["seq"] == 0
