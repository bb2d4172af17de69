"""`asapd demo`: the daemon's main job, visibly, with a daemon, agents and traffic that are all real."""

from __future__ import annotations

import logging
import signal
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import click
import httpx2
import trio

from asapd.cli.demo_agent import DemoAgent, Part, http_report, socket_report
from asapd.cli.demo_daemon import Daemon, DaemonFailedError, free_address, furnish, running_daemon
from asapd.cli.demo_screen import Scene, Screen, usd
from asapd.cli.demo_story import Story
from asapd.cli.outcome import Exit

# A last look at a daemon that answers within milliseconds.
LAST_WORDS_S = 5.0

PARTS = (
    Part(
        "summarizer",
        "swift-1",
        usual_ms=110,
        tokens=(400, 1_600),
        sla={"availability": "99%", "max_latency_p95_ms": 500, "max_error_rate": "5%"},
        workers=6,
    ),
    Part(
        "translator",
        "swift-1",
        usual_ms=150,
        tokens=(200, 900),
        sla={"availability": "99%", "max_latency_p95_ms": 800, "max_error_rate": "2%"},
        workers=2,
        by_socket=True,
    ),
    Part(
        "analyst",
        "deep-1",
        usual_ms=240,
        tokens=(6_000, 10_000),
        sla={"availability": "99%", "max_latency_p95_ms": 2_000, "max_error_rate": "5%"},
        workers=1,
        delegated=True,
    ),
)


def run_demo(seconds: float | None, http: str | None) -> int:
    """Run for some seconds, or until Ctrl-C; the exit code. `http` is the daemon's HOST:PORT, else a free port."""
    code = Exit.DONE
    try:
        code = trio.run(_demo, seconds, http, strict_exception_groups=True)
    except* DaemonFailedError as group:
        error = _first(group)
        assert isinstance(error, DaemonFailedError)
        click.echo(f"asapd demo: {error}", err=True)
        code = error.exit_code
    except* httpx2.HTTPError as group:
        # When the daemon has ended, that it has is what counts.
        if code == Exit.DONE:
            click.echo(f"asapd demo: the daemon does not answer as it should: {_first(group)}", err=True)
            code = Exit.INTERNAL
    except* KeyboardInterrupt:
        # Before signals were ours, or after: there is nothing that would stay behind.
        pass
    return code


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _demo(seconds: float | None, http: str | None) -> Exit:
    started_s = trio.current_time()
    address = free_address(http)
    wanted = trio.CancelScope() if seconds is None else trio.CancelScope(deadline=started_s + seconds)
    scene = Scene()
    screen = Screen(scene, lambda: trio.current_time() - started_s, wanted.cancel)
    with tempfile.TemporaryDirectory(prefix="asapd-demo-") as directory:
        async with trio.open_nursery() as nursery:
            await nursery.start(_heed_signals, wanted)
            with screen.open():
                await _run(Path(directory), address, scene, screen, wanted)
            nursery.cancel_scope.cancel()
    screen.close(_summary(scene))
    return Exit.BROKEN_PIPE if screen.was_left else Exit.DONE


async def _heed_signals(
    wanted: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Turn every signal that asks for an end into an orderly one."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            wanted.cancel()


async def _run(root: Path, address: str, scene: Scene, screen: Screen, wanted: trio.CancelScope) -> None:
    """All that happens, from the agents' start to the daemon's end."""
    log = logging.getLogger("asapd.demo")
    log.addHandler(logging.NullHandler())
    log.propagate = False
    # The same numbers in every run; only what the clock measures differs.
    random = Random(8727)  # noqa: S311 -- sizes of made-up tasks
    agents = [DemoAgent(part, random, log) for part in PARTS]
    screen.say("demo", f"everything lives in {root}, which is removed at the end")
    # The nursery ends first: who waits for the daemon's end must not see the one that is wanted.
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        with wanted:
            for agent in agents:
                await agent.listen()
                await nursery.start(agent.serve)
                terms = ", ".join(f"{name} {value}" for name, value in agent.part.sla.items())
                screen.say("agent", f"{agent.part.name} at {agent.url}, signed manifest, promises {terms}")
            furnish(root, address, agents)
            screen.draw()
            daemon = await stack.enter_async_context(running_daemon(root, address))
            nursery.start_soon(daemon.wait_ended)
            story = Story(daemon, agents, scene, screen, random)
            key = await _introduce(daemon, scene, screen)
            await _connect(daemon, agents, nursery, stack)
            await story.tell(key, screen.elapsed_s)
        if scene.address:
            with trio.move_on_after(LAST_WORDS_S):
                await _look_back(story, screen)
        nursery.cancel_scope.cancel()


async def _introduce(daemon: Daemon, scene: Scene, screen: Screen) -> str:
    """Say where the daemon is, and make the key that the dashboard and the subscriber show."""
    made = await daemon.post("/keys", {"name": "dashboard", "role": "reader"})
    key: str = made["key"]
    scene.address = f"http://{daemon.address}/"
    # Browsers keep what is behind the # to themselves; the page takes the key out of the address at once.
    scene.login = f"{scene.address}#key={key}"
    screen.say("daemon", f"asapd run is ready, pid {daemon.process.pid}, serves {scene.address}")
    if not screen.is_live:
        screen.say("dashboard", scene.login)
    return key


async def _connect(daemon: Daemon, agents: Sequence[DemoAgent], nursery: trio.Nursery, stack: AsyncExitStack) -> None:
    """Give every agent a key that is good for itself alone, and a way to report."""
    for agent in agents:
        wanted = {"name": agent.part.name, "role": "ingest", "agents": [agent.part.urn]}
        client = await stack.enter_async_context(daemon.client((await daemon.post("/keys", wanted))["key"]))
        report = socket_report(daemon.ingest_socket) if agent.part.by_socket else http_report(client)
        nursery.start_soon(agent.report_to, client, report)


async def _look_back(story: Story, screen: Screen) -> None:
    try:
        await story.read_figures()
        await story.verify_audit()
    except httpx2.HTTPError as error:
        screen.say("problem", f"the last figures could not be read: {error}")
    screen.draw()


def _summary(scene: Scene) -> list[tuple[str, str]]:
    if not scene.address:
        return [("ended", "before the daemon was ready")]
    totals, audit, budget = scene.totals, scene.audit, scene.delegation
    lines = [("dashboard", f"{scene.address} (gone now)")]
    if totals:
        used = f"{totals['total_tasks']} tasks, {totals['total_tokens']} tokens, {usd(totals['total_cost_usd'])}"
        lines.append(("usage", f"{used} by {totals['unique_agents']} agents"))
    first = "" if scene.first_breach_s is None else f", the first on screen after {scene.first_breach_s:.1f} s"
    lines.append(("breaches", f"{scene.opened} opened, {scene.resolved} resolved{first}"))
    if budget is not None:
        refused = ", ".join(f"{count} x {code}" for code, count in scene.refused_in_all.items()) or "none"
        spent = f"{usd(budget['spent_usd'])} of the last {usd(budget['constraints']['max_cost_usd'])} spent"
        lines.append(("delegation", f"{spent}; authorizations refused: {refused}"))
    if audit is not None:
        verdict = f"{audit['verified']} entries intact" if audit["valid"] else "BROKEN"
        lines.append(("audit", f"{verdict}, head {audit['last_hash'][:16]}…"))
    return [*lines, ("left behind", "nothing")]
