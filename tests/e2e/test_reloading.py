"""The configuration changes under a running daemon, for better and for worse."""

from __future__ import annotations

import itertools
import os
import signal
from datetime import datetime
from decimal import Decimal
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.agent import Agent
from tests.e2e.daemon import PATIENCE_S, QUICK, Daemon, check_problem, exact, running, until

pytestmark = pytest.mark.load

_numbers = itertools.count(1)


def agents(*listed: Agent) -> str:
    return "".join(f'[[agents]]\nid = "{agent.urn}"\nurl = "{agent.url}"\n' for agent in listed)


def event(**more: Any) -> dict[str, Any]:
    number = next(_numbers)
    return {
        "id": f"event-{number}",
        "task_id": f"task-{number}",
        "agent": "urn:asap:agent:worker",
        "consumer": "urn:asap:agent:desk",
        "timestamp": datetime.now().astimezone().isoformat(),
        **more,
    }


async def hang_up(daemon: Daemon, state: str) -> dict[str, Any]:
    """SIGHUP, and what the status says of the configuration once it was looked at."""
    before = daemon.status()["config"]
    daemon.process.send_signal(signal.SIGHUP)  # type: ignore[union-attr]  # it runs

    async def looked_at() -> Any:
        now = (await trio.to_thread.run_sync(daemon.status))["config"]
        return now if now["tried_at"] != before["tried_at"] else None

    found: dict[str, Any] = await until(looked_at)
    assert found["state"] == state
    return found


async def test_a_broken_file_changes_nothing_and_the_mended_one_is_applied() -> None:
    with (
        Agent("stays") as stays,
        Agent("goes") as goes,
        Agent("comes") as comes,
        running(QUICK + agents(stays, goes)) as daemon,
    ):
        async with daemon.client() as client:

            async def listed() -> list[str]:
                return sorted(row["id"] for row in (await client.get("/agents")).json()["data"])

            daemon.config.write_text(QUICK.replace("200ms", "soon", 1) + agents(stays, comes))
            config = await hang_up(daemon, "error")
            assert len(config["errors"]) == 1
            assert config["errors"][0].startswith(f"{daemon.config}:5: prober.interval: ")
            assert await listed() == sorted([stays.urn, goes.urn])
            assert (await client.post("/usage", json=event())).status_code == 201
            refused = await client.post("/reload")
            document = check_problem(refused, 422, "config_refused")
            assert document["errors"][0]["field"] == "prober.interval"
            assert any(line["level"] == "error" and "prober.interval" in line["message"] for line in daemon.log())

            daemon.config.write_text("[http\n")
            assert "syntax" in (await hang_up(daemon, "error"))["errors"][0]
            daemon.config.unlink()
            assert (await hang_up(daemon, "error"))["errors"]

            daemon.config.write_text(QUICK + agents(stays, comes))
            config = await hang_up(daemon, "ok")
            assert config["errors"] == []
            assert await listed() == sorted([stays.urn, comes.urn])

            async def probed() -> bool:
                return bool((await client.get(f"/agents/{comes.urn}")).json()["state"] == "healthy")

            await until(probed)
            entries = (await client.get("/audit/logs", params={"event_type": "config.reloaded"})).json()["data"]
            assert len(entries) == 1


async def test_intervals_thresholds_and_prices_change_without_a_restart() -> None:
    prices = 'version = "{0}"\ncurrency = "USD"\n[[price]]\nmodel = "m"\ninput_per_mtok = "{0}"\n'
    slow = QUICK.replace('interval = "200ms"', 'interval = "1h"', 1)
    pricing = '[metering.pricing]\nfile = "prices.toml"\n'
    tiers = '[[sla.tier]]\nname = "any"\nmax_latency_p95_ms = {}\n'
    with Agent("worker") as agent, running(slow) as daemon:
        named = agents(agent) + 'tier = "any"\n'
        (daemon.home / "prices.toml").write_text(prices.format(1))
        daemon.config.write_text(slow + tiers.format(1000) + pricing + named)
        await hang_up(daemon, "ok")
        async with daemon.client() as client:

            async def cost() -> Decimal:
                made = event(model="m", metrics={"tokens_in": 1_000_000, "duration_ms": 600})
                assert (await client.post("/usage", json=made)).status_code == 201
                row = exact(await client.get("/usage", params={"task": made["task_id"]}))["data"][0]
                return Decimal(row["cost_usd"])

            async def compliant() -> Any:
                report = (await client.get(f"/agents/{agent.urn}/sla")).json()
                return report["compliance"].get("latency", {}).get("met")

            assert await cost() == 1
            assert await compliant() is True
            (daemon.home / "prices.toml").write_text(prices.format(2))
            daemon.config.write_text(QUICK + tiers.format(500) + pricing + named)
            await hang_up(daemon, "ok")
            assert await cost() == 2
            assert await compliant() is False

            async def probed() -> bool:
                health = await client.get(f"/agents/{agent.urn}/health")
                return bool(health.json().get("count", 0) >= 3)

            await until(probed, within_s=PATIENCE_S)

            (daemon.home / "prices.toml").write_text('version = "3"\ncurrency = "EUR"\n')
            config = await hang_up(daemon, "error")
            assert "currency" in config["errors"][0]
            assert await cost() == 2


async def test_what_only_a_restart_applies_is_named() -> None:
    with running() as daemon:
        daemon.config.write_text(QUICK.replace("[prober]", 'max_body = "1MiB"\n[prober]'))
        answer = await trio.to_thread.run_sync(daemon.admin_request, "POST", "/reload")
        assert answer.json()["restart_required"] == ["http.max_body"]


async def test_a_configured_pattern_is_masked_before_it_reaches_an_entry() -> None:
    """By the writer process, also by one that took the place of another."""
    with running(QUICK + '\n[audit]\nmask = ["[a-z]{1,30}@corp"]\n') as daemon:
        for number in range(2):
            told = {"task_id": f"t{number}", "agent": "urn:asap:agent:a", "consumer": "ann@corp", "state": "failed"}
            told |= {"error": "ann@corp hung up", "timestamp": "2026-11-20T09:00:00Z"}

            async def is_taken(sent: dict[str, str] = told) -> bool:
                return bool(daemon.admin_request("POST", "/tasks", json=sent).status_code == 201)

            await until(is_taken, within_s=PATIENCE_S)
            (entry,) = daemon.admin_get(f"/audit/logs?task=t{number}").json()["data"]
            assert (entry["details"]["error"], entry["details"]["consumer"]) == ("[masked] hung up", "ann@corp")
            if number == 0:
                os.kill(daemon.status()["store"]["writer_pid"], signal.SIGKILL)
        assert daemon.admin_get("/audit/verify").json()["valid"]


async def test_a_pattern_is_masked_from_the_reload_on_and_by_a_writer_that_comes_later() -> None:
    with running() as daemon:
        daemon.config.write_text(QUICK + '\n[audit]\nmask = ["[a-z]{1,30}@corp"]\n')
        answer = daemon.admin_request("POST", "/reload").json()
        assert (answer["applied"], answer["restart_required"]) == ({"audit": True}, [])
        for number in range(2):
            told = {"task_id": f"t{number}", "agent": "urn:asap:agent:a", "consumer": "ann@corp", "state": "failed"}
            told |= {"error": "ann@corp hung up", "timestamp": "2026-11-20T09:00:00Z"}

            async def is_taken(sent: dict[str, str] = told) -> bool:
                return bool(daemon.admin_request("POST", "/tasks", json=sent).status_code == 201)

            await until(is_taken, within_s=PATIENCE_S)
            (entry,) = daemon.admin_get(f"/audit/logs?task=t{number}").json()["data"]
            assert entry["details"]["error"] == "[masked] hung up"
            if number == 0:
                os.kill(daemon.status()["store"]["writer_pid"], signal.SIGKILL)
        assert daemon.admin_get("/audit/verify").json()["valid"]


async def test_reloads_under_load_lose_no_event() -> None:
    with Agent("one") as one, Agent("two") as two, running(QUICK + agents(one)) as daemon:
        sent = 0

        async def report(client: httpx2.AsyncClient) -> None:
            nonlocal sent
            while not done.is_set():
                batch = [event() for _ in range(20)]
                answer = await client.post("/usage", json=batch)
                assert answer.status_code == 201, answer.text
                assert answer.json()["recorded"] == 20
                sent += 20

        done = trio.Event()
        async with daemon.client() as client, trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(report, client)
            for listed in ((two,), (one, two), (one,), (), (one,)):
                daemon.config.write_text(QUICK + agents(*listed))
                await hang_up(daemon, "ok")
                daemon.config.write_text("nonsense")
                await hang_up(daemon, "error")
            done.set()
        async with daemon.client() as client:
            assert (await client.get("/usage/summary")).json()["total_events"] == sent > 0
            assert (await client.get("/audit/verify")).json()["valid"] is True


async def test_a_configured_agent_cannot_be_deleted_and_an_added_one_survives_a_reload() -> None:
    with Agent("written") as written, Agent("added") as added, running(QUICK + agents(written)) as daemon:
        async with daemon.client() as client:
            made = await client.post("/agents", json={"id": added.urn, "url": added.url})
            assert made.status_code == 201
            check_problem(await client.delete(f"/agents/{written.urn}"), 409, "agent_configured")
            daemon.config.write_text(QUICK)
            await hang_up(daemon, "ok")
            assert [row["id"] for row in (await client.get("/agents")).json()["data"]] == [added.urn]
            assert (await client.delete(f"/agents/{added.urn}")).status_code == 200
            check_problem(await client.get(f"/agents/{added.urn}"), 404, "agent_not_found")
            check_problem(await client.delete(f"/agents/{added.urn}"), 404, "agent_not_found")
