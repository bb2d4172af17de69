"""The dashboard in a real browser, against a real daemon."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, open_websocket_url

from asapd.cli.demo_agent import DemoAgent, Part
from asapd.cli.demo_daemon import DELEGATOR, Daemon, free_address, furnish, running_daemon
from asapd.core.types import format_us

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_S = 30.0

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


class Page:
    """One tab, driven by the DevTools protocol; whatever it logs as an error is in `errors`."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self.errors: list[str] = []

    async def listen(self) -> None:
        try:
            while True:
                self._hear(json.loads(await self._socket.get_message()))
        except ConnectionClosed:
            return

    def _hear(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers.pop(message["id"]).send_nowait(message)
            return
        params = message["params"]
        match message["method"]:
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in {"error", "assert"}:
                self.errors.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        send, receive = trio.open_memory_channel[dict[str, Any]](1)
        self._answers[number] = send
        await self._socket.send_message(json.dumps({"id": number, "method": method, "params": params}))
        with trio.fail_after(WAIT_S):
            answer = await receive.receive()
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def evaluate(self, script: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def text(self, selector: str) -> str:
        """What is to be seen of an element; nothing while it is hidden or the page is not there yet."""
        read = "(found) => found && found.checkVisibility() ? found.innerText : ''"
        found: str = await self.evaluate(f"({read})(document.querySelector({selector!r}))")
        return found

    async def wait_text(self, selector: str, wanted: str) -> str:
        """The text of an element, once it holds what is waited for."""
        shown = ""
        with trio.move_on_after(WAIT_S):
            while wanted not in (shown := await self.text(selector)):  # noqa: ASYNC110 -- the page cannot wake us
                await trio.sleep(0.05)
            return shown
        raise AssertionError(f"{wanted!r} did not appear in {selector}, which shows {shown!r}; errors: {self.errors}")

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)


@asynccontextmanager
async def chromium_page() -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="asapd-chromium-", ignore_cleanup_errors=True) as profile:
        process = await trio.lowlevel.open_process(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            with trio.fail_after(WAIT_S):
                while not (port_file.exists() and "\n" in port_file.read_text()):  # noqa: ASYNC110 -- nor can a file
                    await trio.sleep(0.05)
                port = port_file.read_text().splitlines()[0]
            async with httpx2.AsyncClient(trust_env=False) as client:
                tabs = (await client.get(f"http://127.0.0.1:{port}/json/list")).json()
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with open_websocket_url(url, max_message_size=1 << 26) as socket, trio.open_nursery() as nursery:
                page = Page(socket)
                nursery.start_soon(page.listen)
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
                nursery.cancel_scope.cancel()
            # The tab's connection is closed by now, from this side: from the other one, its socket would be left open.
            # Asked to end, the browser takes its helpers along, which would write into the profile after a kill.
            process.terminate()
            with trio.move_on_after(10):
                await process.wait()
        finally:
            process.kill()
            with trio.CancelScope(deadline=trio.current_time() + 10, shield=True):
                await process.wait()


@asynccontextmanager
async def daemon_with(*parts: Part) -> AsyncIterator[tuple[Daemon, list[DemoAgent]]]:
    log = logging.getLogger("tests.page")
    agents = [DemoAgent(part, Random(1), log) for part in parts]
    with tempfile.TemporaryDirectory(prefix="asapd-page-") as directory:
        async with trio.open_nursery() as nursery:
            for agent in agents:
                await agent.listen()
                await nursery.start(agent.serve)
            address = free_address(None)
            furnish(Path(directory), address, agents)
            async with running_daemon(Path(directory), address) as daemon:
                yield daemon, agents
            nursery.cancel_scope.cancel()


def part(name: str, **sla: Any) -> Part:
    return Part(name, "swift-1", usual_ms=1, tokens=(1, 2), sla=sla, workers=0)


def events(agent: DemoAgent, count: int, *, duration_ms: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"task-{index}",
            "agent": agent.part.urn,
            "consumer": "urn:asap:agent:<b>desk</b>",
            "timestamp": format_us(time.time_ns() // 1000),
            "metrics": {"tokens_in": 100, "tokens_out": 50, "duration_ms": duration_ms, "api_calls": 1},
            "model": "swift-1",
            **more,
        }
        for index in range(count)
    ]


async def reader_key(daemon: Daemon) -> str:
    key: str = (await daemon.post("/keys", {"name": "page", "role": "reader"}))["key"]
    return key


async def test_page_shows_agents_a_live_breach_money_and_an_audit_without_console_errors() -> None:
    slow = part("slow", max_latency_p95_ms=500)
    quiet = part("quiet", availability="99%", max_error_rate="1%")
    async with daemon_with(slow, quiet) as (daemon, agents), chromium_page() as page:
        key = await reader_key(daemon)
        await page.open(f"http://{daemon.address}/#key={key}")
        await page.wait_text("#connection", "live")
        shown = await page.wait_text("#agents", "healthy")
        assert "slow" in shown
        await page.wait_text("#agents", "promised ≤ 500 ms")
        # No task has run: latency and error rate are not zero but unknown.
        assert "no data" in await page.text("#agents")
        assert await page.text("#open-breaches") == "No breach is open."
        assert "Nothing was reported today" in await page.text("#usage")
        assert key not in await page.evaluate("location.href")

        wanted = {
            "delegator": DELEGATOR,
            "delegate": agents[0].part.urn,
            "scopes": ["task.execute"],
            "constraints": {"max_cost_usd": 10, "expires_at": "2099-01-01T00:00:00Z"},
        }
        issued = await daemon.post("/delegations", wanted)
        ask = {"delegation": issued["id"], "action": "task.execute", "task_id": "t", "estimate": {"cost_usd": 4}}
        await daemon.post("/delegations/authorize", ask)
        await page.wait_text("#delegations", "$6.00 of $10.00 left")
        assert await page.evaluate("document.querySelector('.meter > div').style.width") == "60%"

        sent = await daemon.admin.post("/usage", json=events(agents[0], 30, duration_ms=900))
        assert sent.status_code == 201
        breach = await page.wait_text("#open-breaches", "slow: p95 latency")
        assert "promised 500ms" in breach
        assert await page.evaluate("document.title") == "(1) asapd"
        await page.wait_text("#usage", "4,500")

        await page.evaluate("document.getElementById('verify').click()")
        await page.wait_text("#audit", "entries verified")
        assert page.errors == []


async def test_the_api_is_described_on_a_page_of_its_own() -> None:
    async with daemon_with() as (daemon, _), chromium_page() as page:
        await page.open(f"http://{daemon.address}/docs#Breach")
        await page.wait_text("#operations", "POST /usage")
        assert "breach_type, always: string, one of availability" in await page.wait_text("#Breach", "breach_type")
        description = (await daemon.admin.get("/openapi.json")).json()
        operations = sum(len(methods) for methods in description["paths"].values())
        assert await page.evaluate("document.querySelectorAll('#operations details').length") == operations
        typed = "(box) => { box.value = 'post silence'; box.dispatchEvent(new Event('input')); }"
        await page.evaluate(f"({typed})(document.getElementById('find'))")
        shown = await page.text("#operations")
        assert "POST /silences" in shown
        assert "/usage" not in shown
        assert page.errors == []


async def test_breach_resolves_on_the_page_without_a_reload() -> None:
    async with daemon_with(part("slow", max_latency_p95_ms=500)) as (daemon, agents), chromium_page() as page:
        await page.open(f"http://{daemon.address}/#key={await reader_key(daemon)}")
        await page.wait_text("#agents", "promised ≤ 500 ms")
        await page.wait_text("#connection", "live")
        await daemon.admin.post("/usage", json=events(agents[0], 20, duration_ms=900))
        await page.wait_text("#open-breaches", "slow: p95 latency")
        # Twenty in five hundred is below five per cent.
        await daemon.admin.post("/usage", json=events(agents[0], 500, duration_ms=90))
        await page.wait_text("#open-breaches", "No breach is open.")
        assert "recovered" in await page.text("#history")
        assert page.errors == []


async def test_page_asks_for_a_key_refuses_a_wrong_one_and_says_what_to_do_when_there_is_nothing_yet() -> None:
    async with daemon_with() as (daemon, _), chromium_page() as page:
        await page.open(f"http://{daemon.address}/")
        await page.wait_text("#key-form", "asapctl keys create")
        type_key = "document.getElementById('key').value = {!r}; document.querySelector('#key-form button').click()"
        await page.evaluate(type_key.format("asapd_wrong_key"))
        await page.wait_text("#problem", "not known here")
        assert await page.evaluate("sessionStorage.length") == 0
        await page.evaluate(type_key.format(await reader_key(daemon)))
        await page.wait_text("#connection", "live")
        assert "asapctl agents add" in await page.wait_text("#agents", "No agents yet")
        assert "asapctl delegation issue" in await page.text("#delegations")
        assert "POST /usage" in await page.text("#usage")
        assert await page.text("#open-breaches") == "No breach is open."
        assert await page.evaluate("localStorage.length") == 0
        await page.evaluate("document.getElementById('forget').click()")
        await page.wait_text("#problem", "forgotten")
        assert await page.evaluate("sessionStorage.length") == 0
        # What a browser says of a 401 by itself is the only error.
        assert all("401" in error for error in page.errors), page.errors


async def test_a_one_time_address_opens_the_page_whose_scripts_cannot_see_the_session_and_which_logs_out() -> None:
    async with daemon_with() as (daemon, _), chromium_page() as page:
        made = await daemon.post("/login", {})
        assert made["url"] == f"http://{daemon.address}{made['path']}"
        await page.open(made["url"])
        await page.wait_text("#connection", "live")
        assert await page.evaluate("location.href") == f"http://{daemon.address}/"
        assert await page.evaluate("document.cookie") == ""
        entries = await page.call("Page.getNavigationHistory")
        assert not [entry["url"] for entry in entries["entries"] if "token" in entry["url"]]
        assert page.errors == []
        assert await page.wait_text("#forget", "Log out")
        await page.evaluate("document.getElementById('forget').click()")
        await page.wait_text("#problem", "Logged out.")
        await page.open(f"http://{daemon.address}/?again")
        await page.wait_text("#key-form", "asapctl dashboard")
        await page.open(made["url"])
        await page.wait_text("#problem", "used before, or is older than five minutes")


async def test_markup_that_an_agent_sends_is_shown_as_text() -> None:
    hostile = "<img src=x onerror=document.title=1>"
    async with daemon_with(part("liar", **{hostile: 1})) as (daemon, _), chromium_page() as page:
        await page.open(f"http://{daemon.address}/#key={await reader_key(daemon)}")
        await page.wait_text("#agents", hostile)
        assert await page.evaluate("document.images.length") == 0
        assert await page.evaluate("document.title") == "asapd"
        assert page.errors == []


async def test_page_says_so_when_the_daemon_is_gone() -> None:
    async with chromium_page() as page:
        async with daemon_with() as (daemon, _):
            await page.open(f"http://{daemon.address}/#key={await reader_key(daemon)}")
            await page.wait_text("#connection", "live")
        await page.wait_text("#problem", "asapd does not answer")


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
async def test_nothing_is_wider_than_the_screen(size: tuple[int, int]) -> None:
    slow = part("a-name-that-goes-on-for-quite-a-while-without-any-space-to-break-it-at", max_latency_p95_ms=500)
    async with daemon_with(slow) as (daemon, agents), chromium_page() as page:
        await page.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=True
        )
        await page.open(f"http://{daemon.address}/#key={await reader_key(daemon)}")
        await page.wait_text("#agents", "promised ≤ 500 ms")
        await daemon.admin.post("/usage", json=events(agents[0], 30, duration_ms=900))
        await page.wait_text("#open-breaches", "p95 latency")
        await page.evaluate("document.getElementById('verify').click()")
        await page.wait_text("#audit", "entries verified")
        assert await page.evaluate("document.documentElement.scrollWidth") == size[0]
