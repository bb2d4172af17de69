"""The house: every part wired to its neighbours, started from the store outwards and stopped from the doors inwards."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio
from ulid import ULID

import asapd
from asapd import config
from asapd.actors.alert_desk import AlertDesk
from asapd.actors.auditor import run_auditor
from asapd.actors.dispatcher import Dispatch, run_dispatcher
from asapd.actors.gatekeeper import KeyRing, run_gatekeeper
from asapd.actors.janitor import JanitorSettings, apply_retention, recover_reservations, run_janitor
from asapd.actors.meter import MeterSettings, run_meter
from asapd.actors.notifier import Subscription, run_notifier
from asapd.actors.prober import ProberSettings, run_prober
from asapd.actors.reads import Reads
from asapd.actors.registry import RegistrySettings, run_registry
from asapd.actors.repricer import reprice
from asapd.actors.revocations import Revocations
from asapd.actors.watcher import WatcherSettings, run_watcher
from asapd.core.access import Tenants
from asapd.core.errors import Refusal
from asapd.daemon import descriptors
from asapd.daemon.auditing import Auditing
from asapd.daemon.boot import BootError, Loaded, Premises
from asapd.daemon.configuration import Configuration
from asapd.daemon.doors import ingest_caller, names_of
from asapd.daemon.first_key import make_first_key
from asapd.daemon.news import News
from asapd.daemon.reloading import Reloader
from asapd.daemon.serving import GRACE_S, Serving
from asapd.daemon.showing import Showing
from asapd.daemon.targets import SwappableFetcher, Targets
from asapd.daemon.versions import Versions
from asapd.edge.services import Mailboxes, Services
from asapd.edge.sessions import Sessions
from asapd.edge.throttle import Throttle
from asapd.runtime.clock import SystemClock
from asapd.runtime.fanout import Feed
from asapd.runtime.lag import LoopLag
from asapd.runtime.lookup import Lookups
from asapd.runtime.sdnotify import SystemdNotifier, watchdog_interval_s
from asapd.runtime.supervisor import Actor, Supervisor
from asapd.store import breaches, keys
from asapd.store.breaches import Alert
from asapd.store.database import Database, ProcessRunner, ThreadReaders
from asapd.store.units.house import SetMasks
from asapd.wire.keys import key_id, public_base64
from asapd.wire.statement import sign_evidence

# Each actor's mailbox. A report is at most `max_body`, but bodies in memory are bounded by connections,
# so this only has to cover a burst while the actor restarts: a thousand senders are a full house.
MAILBOX = 1024

# As many transitions as a thousand agents can make in a bad minute; behind it subscribers read the store.
FEED = 10_000

DRAIN_S = 10.0

# An actor with all hands busy does not beat. A commit on a struggling disk may keep them so for a while.
STALE_S = 60.0


class House:
    """A configured daemon. `run` serves until SIGTERM or SIGINT; the second one ends it at once."""

    def __init__(
        self, loaded: Loaded, premises: Premises, config_path: Path | None, environ: Mapping[str, str]
    ) -> None:
        self._log = logging.getLogger("asapd")
        self._premises = premises
        self._environ = environ
        self._clock = SystemClock()
        self._settings = loaded.config
        self._systemd = SystemdNotifier(environ.get("NOTIFY_SOCKET"))
        self._ready = False
        self._stop = trio.Event()
        self._news = News()
        self._runner = ProcessRunner(
            premises.database,
            synchronous=loaded.config.store.synchronous,
            group_commit_max=loaded.config.store.group_commit_max,
            group_commit_wait_us=loaded.config.store.group_commit_wait_us,
            masks=loaded.config.audit.mask,
            key=premises.identity,
            inherit=premises.locks,
            on_commit=self._news.on_commit,
        )
        self._lag = LoopLag()
        max_connections = descriptors.max_connections(loaded.config, self._log)
        self._serving = Serving(loaded.config, premises.runtime_dir, environ, max_connections, self._log)
        self._readers = ThreadReaders(premises.database)
        self._database = Database(self._runner, self._readers)
        self._reads = Reads(self._database, self._clock)
        self._tenants = Tenants()
        self._ring = KeyRing(self._tenants)
        self._feed: Feed[Alert] = Feed(FEED)
        self._fetcher = SwappableFetcher(descriptors.kept_connections(loaded.config, max_connections))
        self._fetcher.allow(loaded.config.prober.allow)
        self._secrets = loaded.secrets
        self._targets = Targets(f"asapd-{key_id(bytes(premises.identity.verify_key))}")
        self._dispatch = Dispatch()
        self._desk = AlertDesk(self._database, self._clock, self._dispatch, lambda: self._feed.last)
        self._channels: dict[str, tuple[trio.MemorySendChannel[Any], trio.MemoryReceiveChannel[Any]]] = {}
        self._meter = MeterSettings(loaded.config.metering, loaded.prices)
        self._registry = RegistrySettings(
            loaded.config.delegation,
            premises.state_dir / "keys",
            loaded.pinned,
            loaded.config.budgets,
            bytes(premises.identity.verify_key),
            loaded.config.metering.clock_skew_max_us,
            tenants=self._tenants,
        )
        self._prober = ProberSettings(loaded.config.prober, loaded.agents, loaded.config.delegation.key_overlap_us)
        self._watcher = WatcherSettings(loaded.config.sla)
        self._janitor = JanitorSettings(loaded.config.retention, loaded.config.metering)
        self._auditing = Auditing(
            self._database, self._clock, premises, loaded.config.audit, self._log.getChild("audit"), _new_id
        )
        self._writer_supervisor = self._supervise([Actor("writer", self._runner.run, lambda: self._runner.pending)])
        self._actors = self._supervise(self._make_actors())
        self._loops = self._supervise(self._make_loops())
        versions = Versions(premises.versions)
        self._reloader = Reloader(config_path, loaded, self, versions)
        self._configuration = Configuration(config_path, self._reloader, versions)
        self._showing = Showing(
            clock=self._clock,
            started_s=self._clock.monotonic_s(),
            supervisors=self._supervisors,
            serving=self._serving,
            runner=self._runner,
            lag=self._lag,
            database=premises.database,
            public_key=public_base64(bytes(premises.identity.verify_key)),
            is_ready=self._is_ready,
            last_alert=lambda: self._feed.last,
            config_status=self._reloader.status,
            reads=self._reads,
            desk=self._desk,
            auditing=self._auditing,
            registry=self._registry,
            unprobed=self._prober.unprobed,
            set_aside=self._meter.set_aside,
        )

    # --- wiring

    def _supervise(self, actors: Sequence[Actor]) -> Supervisor:
        return Supervisor(actors, random=random.random, log=self._log)

    def _make_actors(self) -> list[Actor]:
        """The actors with a mailbox: they end when it is closed and empty."""
        return [
            self._actor("meter", run_meter, settings=self._meter),
            self._actor(
                "registry",
                run_registry,
                settings=self._registry,
                directory_changed=self._news.directory,
                revocations_changed=self._news.delegations,
                new_id=partial(_new_id, "del"),
            ),
            self._actor(
                "prober",
                run_prober,
                fetcher=self._fetcher,
                random=random.random,
                settings=self._prober,
                directory_changed=self._news.directory,
                tenants=self._tenants,
            ),
            self._actor(
                "watcher",
                run_watcher,
                settings=self._watcher,
                committed=self._news.committed,
                directory_changed=self._news.directory,
                new_breach_id=partial(_new_id, "brc"),
            ),
            self._actor(
                "gatekeeper",
                run_gatekeeper,
                ring=self._ring,
                entropy=os.urandom,
                seed=bytes(self._premises.identity),
            ),
            self._actor("auditor", run_auditor),
        ]

    def _actor(self, name: str, run: Callable[..., Awaitable[None]], **extra: Any) -> Actor:
        send, receive = trio.open_memory_channel[Any](MAILBOX)
        self._channels[name] = (send, receive)

        async def incarnate(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128 -- the actor calls it
            await run(
                receive.clone(),
                database=self._database,
                clock=self._clock,
                beat=self._actors.beater(name),
                log=self._log.getChild(name),
                task_status=task_status,
                **extra,
            )

        return Actor(name, incarnate, lambda: receive.statistics().current_buffer_used)

    def _make_loops(self) -> list[Actor]:
        """What follows the store until it is cancelled; it begins with the feed that there is by then."""

        async def notifier(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128 -- the actor calls it
            await run_notifier(
                database=self._database,
                feed=self._feed,
                committed=self._news.alerts,
                beat=self._loops.beater("notifier"),
                log=self._log.getChild("alerts"),
                task_status=task_status,
            )

        async def janitor(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128 -- the actor calls it
            await run_janitor(
                database=self._database,
                clock=self._clock,
                settings=self._janitor,
                archivist=self._auditing.archivist,
                retirer=self._auditing.retirer,
                beat=self._loops.beater("janitor"),
                log=self._log.getChild("janitor"),
                task_status=task_status,
            )

        async def dispatcher(*, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128 -- the actor calls it
            await run_dispatcher(
                database=self._database,
                clock=self._clock,
                dispatch=self._dispatch,
                subscribe=partial(Subscription, self._database, self._feed),
                random=random.random,
                beat=self._loops.beater("dispatcher"),
                log=self._log.getChild("alerts"),
                task_status=task_status,
            )

        return [
            Actor("notifier", notifier),
            Actor("dispatcher", dispatcher),
            Actor("janitor", janitor),
            *self._auditing.loops(lambda name: self._loops.beater(name)),  # noqa: PLW0108 -- it is not made yet
        ]

    def _services(self) -> Services:
        limits = self._settings.limits
        throttle = None
        if limits.rate_per_key is not None:
            throttle = Throttle(limits.rate_per_key, limits.rate_burst, self._clock)
        return Services(
            decoding=trio.Lock(),
            mailboxes=Mailboxes(**{name: send for name, (send, _) in self._channels.items()}),
            reads=self._reads,
            ring=self._ring,
            clock=self._clock,
            settings=lambda: self._settings,
            subscribe=partial(Subscription, self._database, self._feed),
            last_alert=lambda: self._feed.last,
            status=self._showing.status,
            is_ready=self._is_ready,
            reload=self._reloader.reload,
            restart_actor=self._restart_actor,
            metrics=self._showing.metrics,
            manifest=self._showing.manifest,
            health=self._showing.health,
            ingest_caller=lambda peer: ingest_caller(peer, self._settings.ingest),
            daemon_uid=os.geteuid(),
            version=asapd.__version__,
            retain=partial(
                apply_retention,
                self._database,
                self._clock,
                self._janitor,
                self._auditing.archivist,
                self._auditing.retirer,
                self._log,
            ),
            prices=lambda: self._meter.prices,
            reprice=partial(reprice, self._database, self._clock, self._meter),
            committed=self._news.committed,
            stopping=self._stop,
            revocations=Revocations(
                self._database,
                self._clock,
                self._premises.identity,
                skew_us=lambda: self._settings.metering.clock_skew_max_us,
                changed=self._news.delegations,
                stopping=self._stop,
            ),
            desk=self._desk,
            sign_evidence=lambda breach, evidence: sign_evidence(
                breach, evidence, self._premises.identity, self._clock.now_us()
            ),
            throttle=throttle,
            sealer=self._auditing.sealer,
            verifier=self._auditing.verifier,
            erase=self._auditing.erase,
            witnesses=self._auditing.witnesses,
            receipts=self._auditing.receipts,
            packs=self._auditing.packs,
            backups=self._auditing.backups,
            sessions=Sessions(self._clock, self._ring, os.urandom),
            pages=lambda: self._serving.pages,
            configuration=self._configuration,
            unprobed=self._prober.unprobed,
            without_manifest=self._prober.without_manifest,
        )

    # --- life

    async def run(self) -> None:
        """Start from the store outwards, serve, stop from the doors inwards; the store commits last.

        Raises:
            CannotListen, BootFailed, RestartLimitExceeded: see there.
        """
        trio.socket.set_custom_hostname_resolver(Lookups())
        async with trio.open_nursery() as house:
            await house.start(self._follow_signals)
            async with trio.open_nursery() as store:
                await store.start(self._writer_supervisor.run)
                try:
                    await self._prepare_store()
                    await self._run_actors()
                    await self._auditing.seal_last(GRACE_S)
                finally:
                    # First, so that the writer is the last to close the file: that one folds the WAL into it.
                    self._readers.close()
                    self._runner.close()
                self._log.info("stopped")
            house.cancel_scope.cancel()

    async def _prepare_store(self) -> None:
        await self._auditing.sealer.check()
        _, newest = await self._database.read(breaches.alert_bounds)
        self._feed = Feed(FEED, last=newest)
        self._dispatch.replace(self._targets.of(self._settings, self._secrets))
        if not await self._database.read(keys.list_keys):
            await make_first_key(self._database, self._clock, self._premises.admin_key)
            self._log.info("made the first API key: %s", self._premises.admin_key)
        recovered = await recover_reservations(self._database, self._clock, self._log)
        if isinstance(recovered, Refusal):
            raise BootError(f"reservations from before could not be closed: {recovered.detail}")
        if recovered:
            self._log.info("%d reservations had lapsed before this start", recovered)

    async def _run_actors(self) -> None:
        async with trio.open_nursery() as actors:
            await actors.start(self._actors.run)
            async with trio.open_nursery() as loops:
                await loops.start(self._loops.run)
                await self._reloader.started()
                await self._run_doors()
                loops.cancel_scope.cancel()
            for send, _ in self._channels.values():
                send.close()
            actors.cancel_scope.deadline = trio.current_time() + DRAIN_S

    async def _run_doors(self) -> None:
        async with trio.open_nursery() as beside:
            async with self._serving.open(self._services()):
                beside.start_soon(self._feed_watchdog)
                beside.start_soon(self._lag.run)
                self._ready = True
                addresses = ", ".join(self._serving.addresses)
                self._systemd.ready(f"serving on {addresses}")
                self._log.info("serving on %s", addresses)
                await self._stop.wait()
                self._log.info("stopping")
                self._systemd.stopping()
                self._feed.close()
                self._news.delegations.notify()
            beside.cancel_scope.cancel()

    # --- signals and systemd

    async def _follow_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                if number == signal.SIGHUP:
                    await self._reload_on_signal()
                elif self._stop.is_set():
                    self._log.warning("stopped at once by a second signal")
                    # As shells count it. The writer finishes its commit by itself when the socket closes.
                    os._exit(128 + number)
                else:
                    self._stop.set()

    async def _reload_on_signal(self) -> None:
        if not self._ready:
            return
        self._systemd.reloading(int(self._clock.monotonic_s() * 1_000_000))
        await self._reloader.reload("signal")
        self._systemd.ready()

    async def _feed_watchdog(self) -> None:
        interval_s = watchdog_interval_s(self._environ, os.getpid())
        if interval_s is None:
            return
        while True:
            stale = [name for one in self._supervisors[1:] for name in one.stale(STALE_S)]
            if stale:
                self._log.error("no sign of life from %s: the watchdog is not fed", ", ".join(stale))
            else:
                self._systemd.watchdog()
            await trio.sleep(interval_s)

    # --- what the reloader applies

    @property
    def mailboxes(self) -> dict[str, trio.MemorySendChannel[Any]]:
        """The send ends by actor."""
        return {name: send for name, (send, _) in self._channels.items()}

    def adopt(self, settings: config.Config) -> None:
        """Make a configuration the one in force for everything that looks it up."""
        self._settings = settings
        # Users and groups may have been renamed: a reload is when the operator wants that seen.
        names_of.cache_clear()
        self._janitor.retention, self._janitor.metering = settings.retention, settings.metering
        self._auditing.adopt(settings.audit)
        self._registry.skew_us = settings.metering.clock_skew_max_us
        self._fetcher.allow(settings.prober.allow)

    async def mask(self, patterns: Sequence[str]) -> Refusal | None:
        """Mask entries by other patterns from now on, also in a writer that takes the place of this one."""
        self._runner.hand_down(patterns)
        done = await self._database.submit(SetMasks(list(patterns)), urgent=True)
        return done if isinstance(done, Refusal) else None

    def retarget(self, settings: config.Config, secrets: Mapping[Path, bytes]) -> None:
        """Push alerts to the targets of a configuration."""
        self._dispatch.replace(self._targets.of(settings, secrets))

    @property
    def clock(self) -> SystemClock:
        """The daemon's clock."""
        return self._clock

    # --- what the doors show

    @property
    def _supervisors(self) -> tuple[Supervisor, ...]:
        return (self._writer_supervisor, self._actors, self._loops)

    async def _restart_actor(self, name: str, actor: str) -> bool:
        restarted = any(supervisor.restart(name) for supervisor in self._supervisors)
        if restarted:
            self._log.info("%s restarted %s", actor, name)
        return restarted

    def _is_ready(self) -> bool:
        return self._ready and not self._stop.is_set()


def _new_id(prefix: str, now_us: int) -> str:
    return f"{prefix}_{ULID((now_us // 1000).to_bytes(6, 'big') + os.urandom(10))}"
