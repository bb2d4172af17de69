"""Parts of the daemon die under load; nobody outside sees more than a 503."""

from __future__ import annotations

import itertools
import os
import signal
import time
from contextlib import suppress
from http.client import HTTPException
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.daemon import Daemon, check_problem, running, until

pytestmark = pytest.mark.load

_numbers = itertools.count(1)


def batch(size: int = 50) -> list[dict[str, Any]]:
    return [
        {
            "id": f"event-{next(_numbers)}",
            "task_id": "task",
            "agent": "urn:asap:agent:worker",
            "consumer": "urn:asap:agent:desk",
            "timestamp": time.time(),
        }
        for _ in range(size)
    ]


class Load:
    """Clients that report without a pause, and send again what was answered 503."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.done = trio.Event()
        self.sent = 0
        self.counted = 0
        self.answered = 0
        self.refused: list[httpx2.Response] = []

    async def client(self) -> None:
        async with self.daemon.client() as client:
            while not self.done.is_set():
                events = batch()
                self.sent += len(events)
                while True:
                    answer = await client.post("/usage", json=events)
                    if answer.status_code != 503:
                        break
                    self.refused.append(answer)
                    await trio.sleep(0.05)
                assert answer.status_code == 201, answer.text
                body = answer.json()
                assert body["recorded"] + body["duplicates"] == len(events)
                self.counted += body["recorded"]
                self.answered += 1

    async def goes_on(self) -> None:
        """Wait for ten more answers."""
        wanted = self.answered + 10

        async def more() -> bool:
            return self.answered >= wanted

        await until(more)

    async def check(self) -> None:
        async with self.daemon.client() as client:
            assert (await client.get("/usage/summary")).json()["total_events"] == self.sent
            assert (await client.get("/audit/verify")).json()["valid"] is True
        for answer in self.refused:
            assert int(answer.headers["retry-after"]) >= 1
            check_problem(answer, 503, answer.json()["code"])


async def test_a_killed_writer_comes_back_by_itself_and_nothing_is_lost() -> None:
    with running() as daemon:
        load = Load(daemon)
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(load.client)
            for _ in range(3):
                await load.goes_on()
                killed = await trio.to_thread.run_sync(daemon.kill_writer)

                async def is_back(killed: int = killed) -> bool:
                    store = (await trio.to_thread.run_sync(daemon.status))["store"]
                    return store["writer_pid"] not in {None, killed}

                await until(is_back)
            await load.goes_on()
            load.done.set()
        assert load.refused
        await load.check()
        status = daemon.status()
        assert status["actors"]["writer"]["restarts"] == 3
        assert status["actors"]["meter"]["restarts"] == 0
        assert status["actors"]["writer"]["state"] == "running"


async def test_a_writer_that_hangs_holds_up_nobody_who_only_reads() -> None:
    with running() as daemon:
        writer = daemon.status()["store"]["writer_pid"]
        os.kill(writer, signal.SIGSTOP)
        try:
            async with daemon.client() as client, trio.open_nursery() as nursery:
                answers: list[int] = []

                async def post() -> None:
                    answers.append((await client.post("/usage", json=batch())).status_code)

                nursery.start_soon(post)
                with trio.fail_after(20):
                    for path in ("/usage", "/status", "/agents", "/sla", "/audit/logs", "/metrics", "/readyz"):
                        assert (await client.get(path)).status_code == 200, path
                assert answers == []
                os.kill(writer, signal.SIGCONT)
            assert answers == [201]
        finally:
            os.kill(writer, signal.SIGCONT)


async def test_a_restarted_meter_loses_nothing_that_waits_for_it() -> None:
    with running() as daemon:
        load = Load(daemon)
        async with trio.open_nursery() as nursery, daemon.client() as client:
            for _ in range(8):
                nursery.start_soon(load.client)
            for _ in range(5):
                await load.goes_on()
                answer = await client.post("/actors/meter/restart")
                assert answer.status_code == 202, answer.text
            await load.goes_on()
            load.done.set()
        await load.check()
        actors = daemon.status()["actors"]
        assert actors["meter"]["state"] == "running"
        assert actors["writer"]["restarts"] == 0


async def test_every_actor_can_be_restarted_and_works_afterwards() -> None:
    with running() as daemon:
        async with daemon.client() as client:
            names = list(daemon.status()["actors"])
            assert {"meter", "registry", "prober", "watcher", "notifier", "auditor", "gatekeeper"} <= set(names)
            for name in names:
                assert (await client.post(f"/actors/{name}/restart")).status_code == 202, name

                async def runs(name: str = name) -> bool:
                    status = await trio.to_thread.run_sync(daemon.status)
                    return bool(status["actors"][name]["state"] == "running")

                await until(runs)
            check_problem(await client.post("/actors/nobody/restart"), 404, "actor_not_found")

            async def counts() -> bool:
                return (await client.post("/usage", json=batch())).status_code == 201

            await until(counts)
            assert daemon.create_key("reader")
            assert (await client.get("/audit/verify")).json()["valid"] is True
            assert (await client.post("/delegations/validate", json={"token": "x"})).json()["code"] == "malformed"
            added = {"id": "urn:asap:agent:a", "url": "http://127.0.0.1:9"}
            assert (await client.post("/agents", json=added)).status_code == 201
            assert (await client.get("/agents/urn:asap:agent:a/sla")).status_code == 200


async def test_a_writer_that_dies_again_and_again_ends_the_daemon_for_systemd_to_restart() -> None:
    with running() as daemon:
        process = daemon.process
        assert process is not None
        with trio.fail_after(30):
            while process.poll() is None:
                with suppress(OSError, HTTPException):
                    pid = (await trio.to_thread.run_sync(daemon.status))["store"]["writer_pid"]
                    if pid is not None:
                        os.kill(pid, signal.SIGKILL)
                await trio.sleep(0.02)
        assert process.returncode not in {0, 2}
        assert any(line["level"] == "critical" for line in daemon.log())
        daemon.process = None
        await trio.to_thread.run_sync(daemon.start)
        assert daemon.admin_get("/audit/verify").json()["valid"] is True
