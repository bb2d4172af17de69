"""What happens in the demo: consumers send work, money is spent, promises are broken and kept again."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import httpx2
import msgspec
import trio
from trio_websocket import ConnectionClosed, HandshakeError, open_websocket_url

from asapd.cli.demo_agent import ACTION, FAILING_SHARE, SLOW_MS, TASKS_PATH, DemoAgent, Mood
from asapd.cli.demo_daemon import BREACH_WINDOW, DELEGATOR, Daemon
from asapd.cli.demo_screen import Scene, Screen, frame_text, short_name, usd

BUDGET_USD = 10
CONSUMERS = ("urn:asap:agent:desk", "urn:asap:agent:newsroom", "urn:asap:agent:helpline")
THINK_S = 0.05
FIGURES_EVERY_S = 0.4
STATUS_EVERY_S = 5.0
# Long enough for a baseline of a few hundred tasks, short enough for whoever watches.
CALM_S = 4.0
BROKEN_S = 3.0
# The first incident is over, and the next comes, when nobody would have watched longer.
NEXT_INCIDENT_S = 20.0
RENEW_S = 20.0
# A breach needs three seconds of slow answers; whoever waits longer wants to know that something is wrong.
BREACH_WITHIN_S = 30.0
# Slow answers are outnumbered by quick ones in seconds; failures and downtime leave the window after a minute.
RESOLVED_WITHIN_S = 75.0


class Story:
    """One run of the demo, against a daemon that is ready and agents that answer."""

    def __init__(
        self, daemon: Daemon, agents: Sequence[DemoAgent], scene: Scene, screen: Screen, random: Random
    ) -> None:
        self._daemon = daemon
        self._agents = agents
        self._scene = scene
        self._screen = screen
        self._random = random
        self._numbers = itertools.count(1)
        self._run = f"{random.getrandbits(32):08x}"
        self._alert = trio.Event()
        self._subscribed = trio.Event()
        self._open: set[tuple[str, str]] = set()
        self._states: dict[str, str] = {}
        self._broken_since_s = 0.0
        self._last_seq = 0

    async def tell(self, key: str, elapsed_s: Callable[[], float]) -> None:
        """Let it all happen, until cancelled. `key` is a reader's, which the subscriber shows."""
        self._elapsed_s = elapsed_s
        async with httpx2.AsyncClient(timeout=30, trust_env=False) as consumers, trio.open_nursery() as nursery:
            nursery.start_soon(self._subscribe, key)
            await self._subscribed.wait()
            nursery.start_soon(self._follow_figures)
            if not self._screen.is_live:
                nursery.start_soon(self._say_status)
            self._screen.say("traffic", "consumers send tasks; agents report usage in arrays and on the ingest socket")
            for agent in self._agents:
                if agent.part.delegated:
                    nursery.start_soon(self._spend, agent, consumers)
                    continue
                for _ in range(agent.part.workers):
                    nursery.start_soon(self._consume, agent, consumers)
            nursery.start_soon(self._break_promises, nursery)

    async def verify_audit(self) -> None:
        """Have the whole audit log verified, and say what came of it."""
        found = self._scene.audit = await self._daemon.get("/audit/verify")
        if found["valid"]:
            head = f"entry {found['last_seq']}, hash {found['last_hash'][:16]}…"
            self._screen.say("audit", f"verified: {found['verified']} entries intact, head is {head}")
        else:
            bad = found["first_bad"]
            self._screen.say("audit", f"BROKEN at entry {bad['seq']}: {bad['reason']}")

    async def read_figures(self) -> None:
        """Ask the daemon for everything that is shown."""
        scene, daemon = self._scene, self._daemon
        scene.agents = (await daemon.get("/agents", window=BREACH_WINDOW))["data"]
        usage = (await daemon.get("/usage/aggregate", group_by="agent"))["data"]
        scene.usage = {row["agent_id"]: row for row in usage}
        scene.totals = await daemon.get("/usage/summary")
        if scene.delegation is not None:
            scene.delegation = await daemon.get(f"/delegations/{scene.delegation['id']}")
        for agent in scene.agents:
            before, now = self._states.get(agent["id"]), agent["state"]
            self._states[agent["id"]] = now
            if before not in (None, now):
                self._screen.say("health", f"{short_name(agent['id'])}: {before} -> {now}")

    # --- the work

    def _task(self) -> dict[str, Any]:
        return {"task_id": f"task-{self._run}-{next(self._numbers)}", "consumer": self._random.choice(CONSUMERS)}

    async def _consume(self, agent: DemoAgent, consumers: httpx2.AsyncClient) -> None:
        """One consumer, which sends its next task when the last is done."""
        await trio.sleep(self._random.random() * agent.part.usual_ms / 1000)
        while True:
            # A failed task or an agent that is gone: the consumer goes on, which is what makes it visible.
            with suppress(httpx2.TransportError):
                await consumers.post(agent.url + TASKS_PATH, json=self._task())
            await trio.sleep(THINK_S)

    async def _spend(self, agent: DemoAgent, consumers: httpx2.AsyncClient) -> None:
        """A consumer that pays with a delegation until it is spent, and later with another."""
        while True:
            delegation = await self._delegate(agent)
            with trio.move_on_after(RENEW_S):
                await self._spend_all(agent, consumers, delegation)
            revoked = (await self._daemon.ask("DELETE", f"/delegations/{delegation}", reason="spent"))["revoked"]
            self._screen.say("delegation", f"{short_name(DELEGATOR)} revokes {', '.join(revoked)}")

    async def _delegate(self, agent: DemoAgent) -> str:
        constraints = {
            "max_cost_usd": BUDGET_USD,
            "expires_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds"),
        }
        wanted = {"delegator": DELEGATOR, "delegate": agent.part.urn, "scopes": [ACTION], "constraints": constraints}
        issued = await self._daemon.post("/delegations", wanted)
        scene = self._scene
        scene.delegation, scene.allowed = issued["delegation"], 0
        scene.refused.clear()
        parties = f"{short_name(DELEGATOR)} lets {agent.part.name} spend {usd(BUDGET_USD)}"
        self._screen.say("delegation", f"{parties} on its behalf: {issued['id']}, a token signed with Ed25519")
        delegation: str = issued["id"]
        return delegation

    async def _spend_all(self, agent: DemoAgent, consumers: httpx2.AsyncClient, delegation: str) -> None:
        scene, is_spent = self._scene, False
        while True:
            task = self._task() | {"delegation": delegation, "accept_short": bool(scene.refused)}
            try:
                answer = await consumers.post(agent.url + TASKS_PATH, json=task)
            except httpx2.TransportError:
                await trio.sleep(1)
                continue
            if answer.status_code == 500:
                continue
            found = answer.json()
            if answer.status_code != 403:
                scene.allowed += 1
                if found["short"]:
                    self._screen.say("delegation", f"{agent.part.name} does a shorter task for what is left")
                await trio.sleep(THINK_S)
                continue
            code = found["code"]
            if code not in scene.refused:
                left = usd((found["remaining"] or {}).get("cost_usd"))
                self._screen.say("refused", f"{agent.part.name} may not start {task['task_id']}: {code}, {left} left")
            scene.refused[code] += 1
            scene.refused_in_all[code] += 1
            is_spent = is_spent or code == "budget_exhausted"
            await trio.sleep(2.0 if is_spent else 0.5)

    # --- what is seen of it

    async def _subscribe(self, key: str) -> None:
        """Follow the alerts as any subscriber does, and resume where it was when the connection breaks."""
        url = f"ws://{self._daemon.address}/ws"
        while True:
            with suppress(ConnectionClosed, HandshakeError, OSError):
                async with open_websocket_url(url, subprotocols=["asapd.v1", f"asapd.bearer.{key}"]) as socket:
                    params = {"resume_after": self._last_seq}
                    request = {"jsonrpc": "2.0", "id": 1, "method": "sla.subscribe", "params": params}
                    await socket.send_message(frame_text(request))
                    while True:
                        self._hear(msgspec.json.decode(await socket.get_message()))
            await trio.sleep(0.5)

    def _hear(self, frame: dict[str, Any]) -> None:
        if frame.get("id") == 1 and "result" in frame:
            self._screen.say("subscribed", f"WebSocket /ws answers {frame_text(frame['result'])}")
            self._subscribed.set()
        if frame.get("method") != "sla.breach":
            return
        params = frame["params"]
        scene, breach = self._scene, params["breach"]
        self._last_seq = params["seq"]
        term = (breach["agent_id"], breach["breach_type"])
        if params["event"] == "resolved":
            self._open.discard(term)
            scene.resolved += 1
            note = f"after {breach['duration_seconds']:.1f} s"
        else:
            self._open.add(term)
            scene.opened += params["event"] == "opened"
            scene.first_breach_s = scene.first_breach_s or self._elapsed_s()
            note = f"{trio.current_time() - self._broken_since_s:.1f} s after its trouble began"
        self._screen.say_breach(params, frame_text(frame), note)
        self._screen.draw()
        self._alert.set()
        self._alert = trio.Event()

    async def _follow_figures(self) -> None:
        while True:
            try:
                await self.read_figures()
            except httpx2.HTTPError as error:
                self._screen.say("problem", f"the figures could not be read: {error!r}")
            self._screen.draw()
            await trio.sleep(FIGURES_EVERY_S)

    async def _say_status(self) -> None:
        while True:
            await trio.sleep(STATUS_EVERY_S)
            totals = self._scene.totals
            if not totals:
                continue
            used = f"{totals['total_tasks']} tasks, {totals['total_tokens']} tokens, {usd(totals['total_cost_usd'])}"
            agents = "; ".join(
                f"{short_name(agent['id'])} {agent['state']}"
                + (f" p95 {agent['latency_p95_ms']:.0f} ms" if agent["latency_p95_ms"] is not None else "")
                for agent in self._scene.agents
            )
            self._screen.say("usage", f"{used} | {agents}")

    # --- the trouble

    async def _break_promises(self, nursery: trio.Nursery) -> None:
        """One incident after another: slow answers first, later failures and a crash."""
        slow, flaky, mortal = self._agents
        await trio.sleep(CALM_S)
        for round_number in itertools.count():
            await self._incident(slow, "latency", self._slowness(slow))
            if round_number == 0:
                await self.verify_audit()
            await self._wait_resolved(slow, "latency")
            await trio.sleep(NEXT_INCIDENT_S)
            await self._incident(flaky, "error_rate", self._failures(flaky))
            await trio.sleep(NEXT_INCIDENT_S)
            await self._incident(mortal, "availability", self._crash(mortal, nursery))
            await self._wait_resolved(flaky, "error_rate")
            await self._wait_resolved(mortal, "availability")
            await self.verify_audit()
            await trio.sleep(NEXT_INCIDENT_S)

    async def _incident(self, agent: DemoAgent, term: str, trouble: AbstractAsyncContextManager[None]) -> None:
        self._broken_since_s = trio.current_time()
        async with trouble:
            with trio.move_on_after(BREACH_WITHIN_S) as patience:
                while (agent.part.urn, term) not in self._open:
                    await self._alert.wait()
            if patience.cancelled_caught:
                self._screen.say("problem", f"no breach of {agent.part.name} came within {BREACH_WITHIN_S:.0f} s")
            await trio.sleep(BROKEN_S)

    @asynccontextmanager
    async def _slowness(self, agent: DemoAgent) -> AsyncIterator[None]:
        agent.mood = Mood.SLOW
        promised = agent.part.sla["max_latency_p95_ms"]
        self._screen.say("incident", f"{agent.part.name} begins to take {SLOW_MS} ms a task; it promised {promised} ms")
        yield
        agent.mood = Mood.WELL
        self._screen.say("incident", f"{agent.part.name} is quick again")

    @asynccontextmanager
    async def _failures(self, agent: DemoAgent) -> AsyncIterator[None]:
        agent.mood = Mood.FAILING
        self._screen.say("incident", f"{agent.part.name} begins to fail {FAILING_SHARE:.0%} of its tasks")
        yield
        agent.mood = Mood.WELL
        self._screen.say("incident", f"{agent.part.name} works again; its failures leave the window in a minute")

    @asynccontextmanager
    async def _crash(self, agent: DemoAgent, nursery: trio.Nursery) -> AsyncIterator[None]:
        agent.stop()
        self._screen.say("incident", f"{agent.part.name} has crashed: nothing listens on its port any more")
        yield
        await agent.listen()
        await nursery.start(agent.serve)
        self._screen.say("incident", f"{agent.part.name} was started again; its downtime leaves the window in a minute")

    async def _wait_resolved(self, agent: DemoAgent, term: str) -> None:
        with trio.move_on_after(RESOLVED_WITHIN_S):
            while (agent.part.urn, term) in self._open:
                await self._alert.wait()
