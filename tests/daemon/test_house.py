"""The whole daemon in the test's own loop: real writer process, real sockets, real signals to itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from asapd.daemon import house as house_module
from asapd.daemon.boot import load, occupy
from asapd.daemon.house import House
from asapd.daemon.targets import SwappableFetcher
from asapd.edge.sockets import CannotListen
from asapd.wire.frames import FrameDecoder, encode

CONFIG = """
[http]
bind = ["127.0.0.1:0", "unix:http.sock"]
[store]
synchronous = "normal"
[ingest]
allow = [{ uid = UID, agents = ["urn:asap:agent:*"] }]
"""
EVENT = {"id": "e1", "task_id": "t", "agent": "urn:asap:agent:a", "consumer": "c", "metrics": {}}


class Running:
    """A house that runs, and ways in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "asapd.toml"
        self.config.write_text(CONFIG.replace("UID", str(os.getuid())))
        self.state = path / "state"
        self.run = path / "run"
        self.environ = {"RUNTIME_DIRECTORY": str(self.run)}
        self.ended = trio.Event()
        self.house: House

    async def until(self, condition: Any) -> None:
        with trio.fail_after(20):
            while not condition():  # noqa: ASYNC110 -- what is waited for happens inside the daemon
                await trio.sleep(0.005)

    async def start(self, *, task_status: trio.TaskStatus[None]) -> None:
        loaded = load(self.config)
        premises = occupy(loaded.config, self.state, self.environ)
        try:
            self.house = House(loaded, premises, self.config, self.environ)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.house.run)
                await self.until(self.house._is_ready)
                task_status.started()
        finally:
            premises.release()
            self.ended.set()

    async def admin(self, method: str, path: str, **options: Any) -> Any:
        transport = httpx2.AsyncHTTPTransport(uds=str(self.run / "admin.sock"))
        async with httpx2.AsyncClient(transport=transport, base_url="http://asapd") as client:
            response = await client.request(method, path, **options)
        assert response.status_code < 300, response.text
        return response.json() if response.headers["content-type"] == "application/json" else response.text


@asynccontextmanager
async def running(path: Path, **environ: str) -> AsyncIterator[Running]:
    daemon = Running(path)
    daemon.environ |= environ
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.start)
        yield daemon
        if not daemon.ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            with trio.fail_after(20):
                await daemon.ended.wait()


async def frame(path: Path, event: Any) -> Any:
    async with await trio.open_unix_socket(path) as stream:
        await stream.send_all(encode(json.dumps(event).encode()))
        decoder, answers = FrameDecoder(1 << 20), []
        while not answers:
            answers = decoder.feed(await stream.receive_some())
        return json.loads(answers[0])


async def test_a_first_start_serves_at_every_door_and_a_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        key = daemon.state / "admin.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        status = await daemon.admin("GET", "/status")
        assert status["ready"]
        assert {actor["state"] for actor in status["actors"].values()} == {"running"}
        assert status["audit"]["seq"] >= 1
        assert len(status["listening"]) == 4
        address = status["listening"][0]
        async with httpx2.AsyncClient() as client:
            headers = {"Authorization": f"Bearer {key.read_text().strip()}"}
            assert (await client.get(f"{address}/usage", headers=headers)).status_code == 200
            assert (await client.get(f"{address}/usage")).status_code == 401
            health = (await client.get(f"{address}/.well-known/asap/health")).json()
            assert health["status"] == "healthy"
            manifest = (await client.get(f"{address}/.well-known/asap/manifest.json")).json()
            assert manifest["endpoints"]["events"].startswith("ws://127.0.0.1:")
        event = {**EVENT, "timestamp": house_module.SystemClock().now_us() // 1_000_000}
        assert (await frame(daemon.run / "ingest.sock", event))["recorded"] == 1
        metrics = await daemon.admin("GET", "/metrics")
        assert 'asapd_actor_running{actor="meter"} 1.0' in metrics
        assert len((await daemon.admin("GET", "/usage"))["data"]) == 1
    assert list(daemon.run.iterdir()) == []
    assert not (daemon.state / "asapd.db-wal").exists()
    assert not (tmp_path / "http.sock").exists()


async def test_a_second_start_keeps_keys_and_identity(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        kept = (daemon.state / "admin.key").read_bytes(), (daemon.state / "identity.pem").read_bytes()
    (daemon.state / "admin.key").unlink()
    async with running(tmp_path) as daemon:
        assert not (daemon.state / "admin.key").exists()
        assert (daemon.state / "identity.pem").read_bytes() == kept[1]
        assert (await daemon.admin("GET", "/keys"))["count"] == 1


async def test_an_actor_is_restarted_on_request_and_the_writer_is_started_again(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        assert await daemon.admin("POST", "/actors/meter/restart") == {"restarted": "meter"}
        pid = (await daemon.admin("GET", "/status"))["store"]["writer_pid"]
        os.kill(pid, signal.SIGKILL)

        def replaced() -> bool:
            runner = daemon.house._runner
            return runner.pid != pid and runner._connected

        await daemon.until(replaced)
        event = {**EVENT, "timestamp": house_module.SystemClock().now_us() // 1_000_000}
        assert (await frame(daemon.run / "ingest.sock", event))["ok"]
        status = await daemon.admin("GET", "/status")
        assert status["actors"]["writer"]["restarts"] == 1


async def test_a_hangup_reloads_and_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.setblocking(False)
        heard: list[str] = []

        def hears(text: str) -> bool:
            while True:
                try:
                    heard.append(told.recv(4096).decode())
                except BlockingIOError:
                    return any(text in datagram for datagram in heard)

        environ = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "20000",
            "WATCHDOG_PID": str(os.getpid()),
        }
        async with running(tmp_path, **environ) as daemon:
            await daemon.until(lambda: hears("READY=1\nSTATUS=serving on http://127.0.0.1:"))
            await daemon.until(lambda: hears("WATCHDOG=1"))
            heard.clear()
            daemon.config.write_text(daemon.config.read_text() + "[sla]\nmin_samples = 7\n")
            os.kill(os.getpid(), signal.SIGHUP)
            await daemon.until(lambda: hears("RELOADING=1\nMONOTONIC_USEC="))
            await daemon.until(lambda: hears("READY=1"))
            assert daemon.house._settings.sla.min_samples == 7
            assert (await daemon.admin("GET", "/status"))["config"]["state"] == "ok"
        assert hears("STOPPING=1")


async def test_the_watchdog_is_not_fed_while_an_actor_gives_no_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(house_module, "STALE_S", -1.0)
    environ = {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}
    async with running(tmp_path, **environ) as daemon:
        await daemon.until(lambda: "no sign of life from " in caplog.text)


async def test_a_hangup_before_the_daemon_serves_is_ignored(tmp_path: Path) -> None:
    daemon = Running(tmp_path)
    loaded = load(daemon.config)
    premises = occupy(loaded.config, daemon.state, daemon.environ)
    try:
        house = House(loaded, premises, daemon.config, daemon.environ)
        await house._reload_on_signal()
        assert house._reloader.status()["state"] == "ok"
    finally:
        premises.release()


async def test_a_door_that_cannot_be_opened_ends_the_daemon_cleanly(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        daemon = Running(tmp_path)
        daemon.config.write_text(f'[http]\nbind = ["127.0.0.1:{taken.getsockname()[1]}"]\n')
        with trio.fail_after(20), pytest.raises(ExceptionGroup) as failed:
            await daemon.start(task_status=trio.TASK_STATUS_IGNORED)
    error: BaseException = failed.value
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, CannotListen)
    assert not (daemon.state / "asapd.db-wal").exists()


async def test_networks_that_a_reload_allows_are_allowed_at_once() -> None:
    loaded = load(None)
    fetcher = SwappableFetcher(64)
    fetcher.allow(loaded.config.prober.allow)
    before = fetcher._fetcher
    fetcher.allow(loaded.config.prober.allow)
    assert fetcher._fetcher is before
    fetcher.allow(())
    assert fetcher._fetcher is not before
    assert not isinstance(await fetcher.get("http://127.0.0.1:1", deadline_s=1, max_bytes=1), bytes)
