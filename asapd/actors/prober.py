"""The prober: owns the directory, and sees to it that every agent in it is watched, each by a task of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from typing import assert_never

import trio

from asapd import config
from asapd.actors.agent_watch import AgentWatch, watch_of
from asapd.actors.heartbeats import Heartbeats
from asapd.actors.messages import (
    HeartbeatRequest,
    ImportKeyRequest,
    ProberMessage,
    PutAgentRequest,
    ReconfigureProber,
    RemoveAgentRequest,
    RetireKeyRequest,
    SetPausedRequest,
)
from asapd.actors.rounds import RECORD_TRIES, HealthFetcher, ProberSettings, Rounds, back_off
from asapd.core.access import Tenants
from asapd.core.errors import Refusal
from asapd.runtime import mailbox
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup
from asapd.store.agents import directory
from asapd.store.database import OUTCOME_UNKNOWN, Database, ReadTooLongError
from asapd.store.failed_probes import failed_probes
from asapd.store.units.agents import (
    AgentRecord,
    AgentsChanged,
    ChangeAgentState,
    ImportAgentKey,
    PutAgent,
    RemoveAgent,
    RetireAgentKey,
    SyncAgents,
)
from asapd.store.units.exchange import Idempotency
from asapd.store.units.unit import Unit
from asapd.store.visibility import EVERYTHING

__all__ = ["DirectoryNotSyncedError", "ProberSettings", "run_prober"]

# After "outcome unknown" a dying writer may still finish its commit for as long as its supervisor gives it.
LOOK_AGAIN_FOR_S = 30.0
LOOK_AGAIN_EVERY_S = 5.0


class DirectoryNotSyncedError(Exception):
    """The store could not take the configured agents at the prober's start; a later start may do. See its reason."""


async def run_prober(
    inbox: trio.MemoryReceiveChannel[ProberMessage],
    *,
    database: Database,
    fetcher: HealthFetcher,
    clock: Clock,
    random: Callable[[], float],
    settings: ProberSettings,
    directory_changed: Wakeup,
    beat: Callable[[], None],
    log: logging.Logger,
    tenants: Tenants | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Probe every agent of the directory, and serve changes of it, until the mailbox is closed.

    `settings` is changed in place by a reconfiguration. `directory_changed` is notified after each commit that changed
    an agent or stored a manifest, and `tenants` holds what the directory says before a change is answered. `random`
    gives 0 <= x < 1.

    Raises:
        DirectoryNotSyncedError: at the start.
    """

    def failed(message: ProberMessage, error: Exception) -> None:
        log.error("prober: %s failed", type(message).__name__, exc_info=error)

    async with trio.open_nursery() as nursery:
        prober = _Prober(nursery, database, fetcher, clock, random, settings, directory_changed, log, tenants)
        outcome = await prober.sync(settings.agents, "asapd")
        if isinstance(outcome, Refusal):
            raise DirectoryNotSyncedError(outcome.detail)
        task_status.started()
        await mailbox.serve(inbox, prober.handle, failed=failed, beat=beat)
        nursery.cancel_scope.cancel()


class _Prober:
    def __init__(
        self,
        nursery: trio.Nursery,
        database: Database,
        fetcher: HealthFetcher,
        clock: Clock,
        random: Callable[[], float],
        settings: ProberSettings,
        directory_changed: Wakeup,
        log: logging.Logger,
        tenants: Tenants | None,
    ) -> None:
        self._tenants = tenants or Tenants()
        self._nursery = nursery
        self._database = database
        self._clock = clock
        self._random = random
        self._settings = settings
        self._directory_changed = directory_changed
        self._log = log
        self._watches: dict[str, AgentWatch] = {}
        self._rounds = Rounds(database, fetcher, clock, random, settings, directory_changed, self._watches.values, log)
        self._beats = Heartbeats(database, clock, lambda: settings.prober, self._rounds.guard, log)
        self._changing = trio.Lock()
        self._look_again_until_s: float | None = None

    # --- the directory

    async def handle(self, message: ProberMessage) -> None:
        now_us = self._clock.now_us()
        match message:
            case PutAgentRequest(agent=agent, actor=actor):
                put = PutAgent(agent, actor, now_us, self._settings.key_overlap_us, message.is_bound)
                message.reply.send(await self._change(put, agent.id, self._touched(agent.id), message.idempotency))
            case RemoveAgentRequest(id=agent_id, actor=actor):
                remove = RemoveAgent(agent_id, actor, now_us)
                message.reply.send(await self._change(remove, agent_id, self._touched(agent_id)))
            case ImportKeyRequest(agent=agent_id, public_key=key, actor=actor):
                known = ImportAgentKey(agent_id, key, actor, now_us, self._settings.key_overlap_us, message.is_bound)
                message.reply.send(await self._change(known, agent_id, self._touched(agent_id), message.idempotency))
            case RetireKeyRequest(agent=agent_id, kid=kid, overlap_us=overlap_us, actor=actor):
                wanted_us = self._settings.key_overlap_us if overlap_us is None else overlap_us
                retire = RetireAgentKey(agent_id, kid, actor, now_us, wanted_us)
                message.reply.send(await self._change(retire, agent_id, self._touched(agent_id)))
            case SetPausedRequest(agent=agent_id, paused=paused, reason=reason, actor=actor):
                change = ChangeAgentState(agent_id, "pause" if paused else "resume", actor, now_us, reason)
                message.reply.send(await self._change(change, agent_id, self._touched(agent_id)))
            case HeartbeatRequest():
                watch = self._watches.get(message.agent)
                missing = f"there is no agent {message.agent} in the directory: add it, or check the id"
                heard = Refusal("agent_not_found", missing) if watch is None else await self._beats.hear(watch, message)
                message.reply.send(heard)
            case ReconfigureProber(settings=settings, agents=agents, actor=actor):
                if message.key_overlap_us is not None:
                    self._settings.key_overlap_us = message.key_overlap_us
                message.reply.send(await self.sync(agents, actor, settings))
            case _:
                assert_never(message)

    async def sync(self, agents: list[AgentRecord], actor: str, prober: config.Prober | None = None) -> _Outcome:
        """Make the configured agents be these, and go by other settings; a refusal is of both."""

        def committed() -> None:
            # Before anything else can fail: the next incarnation must not bring back what was configured before.
            self._settings.agents = agents
            if prober is not None:
                self._settings.prober = prober
                self._rounds.reconfigured.notify()

        wanted = {agent.id: agent for agent in agents}
        outcome: _Outcome = OUTCOME_UNKNOWN
        for tried in range(RECORD_TRIES):
            await back_off(tried, self._random)
            unit = SyncAgents(agents, actor, self._clock.now_us(), self._settings.key_overlap_us)
            touched = [watch for watch in self._watches.values() if _is_touched(watch, wanted.get(watch.id))]
            outcome = await self._change(unit, None, touched, committed=committed)
            if not isinstance(outcome, Refusal):
                break
        return outcome

    def _touched(self, agent: str) -> list[AgentWatch]:
        watch = self._watches.get(agent)
        return [] if watch is None else [watch]

    async def _change(
        self,
        unit: Unit[AgentsChanged | Refusal] | Unit[AgentsChanged],
        agent: str | None,
        touched: Iterable[AgentWatch],
        idempotency: Idempotency | None = None,
        committed: Callable[[], None] = lambda: None,
    ) -> _Outcome:
        """Submit a change of one agent, or with None of all, and follow what the store then holds."""
        async with self._changing, AsyncExitStack() as held:
            for watch in touched:
                await held.enter_async_context(watch.recording)
            outcome = await self._database.submit(unit, idempotency=idempotency)
            if isinstance(outcome, AgentsChanged):
                committed()
                if outcome.added or outcome.changed or outcome.removed:
                    self._directory_changed.notify()
            try:
                await self._follow(agent)
                known = not (isinstance(outcome, Refusal) and outcome.code == OUTCOME_UNKNOWN.code)
            except ReadTooLongError:
                known = False
            if not known:
                self._look_again_for_a_while()
        return outcome

    async def _follow(self, agent: str | None) -> None:
        """Start, replace and stop watches, so that they are those of the directory. Call with `_changing` held."""
        found = {row.id: row for row in await self._database.read(directory, EVERYTHING, agent)}
        fresh = [row for row in found.values() if row.id not in self._watches or not self._watches[row.id].fits(row)]
        within, failed = self._settings.prober.unhealthy_within, {}
        if within is not None:
            failed = await self._database.read(failed_probes, [row.id for row in fresh], within)
        if agent is None:
            self._tenants.replace({row.id: row.tenant for row in found.values()})
        else:
            self._tenants.put(agent, found[agent].tenant if agent in found else None)
        for gone in [known for known in self._watches if known not in found and agent in (None, known)]:
            self._watches.pop(gone).scope.cancel()
            self._forget_troubles(gone)
        for known in self._watches.values():
            if known.id in found:
                known.origin = found[known.id].origin
        for row in fresh:
            if row.id in self._watches:
                self._watches[row.id].scope.cancel()
                self._forget_troubles(row.id)
            self._watches[row.id] = watch = watch_of(row, failed.get(row.id, 0))
            self._nursery.start_soon(self._keep, watch)

    def _forget_troubles(self, agent: str) -> None:
        self._settings.unprobed.clear(agent)
        self._settings.without_manifest.clear(agent)

    def _look_again_for_a_while(self) -> None:
        started = self._look_again_until_s is not None
        self._look_again_until_s = trio.current_time() + LOOK_AGAIN_FOR_S
        if not started:
            self._nursery.start_soon(self._look_again)

    async def _look_again(self) -> None:
        while self._look_again_until_s is not None and trio.current_time() < self._look_again_until_s:
            await trio.sleep(LOOK_AGAIN_EVERY_S)
            try:
                async with self._changing:
                    await self._follow(None)
            except ReadTooLongError as error:
                self._log.warning("prober: the directory could not be read: %s", error)
                continue
            self._directory_changed.notify()
        self._look_again_until_s = None

    async def _keep(self, watch: AgentWatch) -> None:
        with watch.scope:
            if watch.is_paused:
                await trio.sleep_forever()
            elif watch.health == "heartbeat":
                await self._beats.keep_listening(watch)
            else:
                await self._rounds.keep_asking(watch)


_Outcome = AgentsChanged | Refusal


def _is_touched(watch: AgentWatch, wanted: AgentRecord | None) -> bool:
    if wanted is None:
        return watch.origin == "config"
    mine = (watch.tenant, watch.url, watch.public_key, watch.health)
    return mine != (wanted.tenant, wanted.url, wanted.public_key, wanted.health)
