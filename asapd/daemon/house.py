"""The house: every part wired to its neighbours, started from the store outwards and stopped from the doors inwards."""

from __future__ import annotations

import contextlib
import functools
import grp
import logging
import os
import pwd
import random
import signal
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio
from ulid import ULID

import asapd
from asapd import config
from asapd.actors.auditor import run_auditor
from asapd.actors.gatekeeper import KEY_PREFIX, KeyRing, digest_of, run_gatekeeper
from asapd.actors.janitor import JanitorSettings, run_janitor
from asapd.actors.meter import MeterSettings, run_meter
from asapd.actors.notifier import Subscription, run_notifier
from asapd.actors.prober import ProberSettings, run_prober
from asapd.actors.reads import Reads
from asapd.actors.registry import RegistrySettings, run_registry
from asapd.actors.watcher import WatcherSettings, run_watcher
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import Role
from asapd.daemon.boot import BootError, Loaded, Premises, write_private
from asapd.daemon.reloading import Reloader
from asapd.edge import sockets
from asapd.edge.auth import ingest_socket_caller
from asapd.edge.connection import Limits
from asapd.edge.http.app import create_app
from asapd.edge.ingest import run_ingest
from asapd.edge.metrics import render
from asapd.edge.reporting import report_frame
from asapd.edge.serve import Door, HttpServer
from asapd.edge.services import Mailboxes, Services
from asapd.edge.sockets import CannotListen, Peer
from asapd.runtime.clock import SystemClock
from asapd.runtime.fanout import Feed, Wakeup
from asapd.runtime.fetch import Fetched, Fetcher, FetchFailed, own_networks
from asapd.runtime.sdnotify import SystemdNotifier, listen_fds, watchdog_interval_s
from asapd.runtime.supervisor import Actor, Supervisor
from asapd.store import breaches, keys
from asapd.store.breaches import Alert
from asapd.store.database import Database, ProcessRunner, ThreadReaders
from asapd.store.units import ApiKey, CreateKey
from asapd.wire.frames import MAX_FRAME_BYTES
from asapd.wire.keys import public_base64

M = TypeVar("M")

# Each actor's mailbox. A report is at most `max_body`, but bodies in memory are bounded by connections,
# so this only has to cover a burst while the actor restarts: a thousand senders are a full house.
MAILBOX = 1024

# As many transitions as a thousand agents can make in a bad minute; behind it subscribers read the store.
FEED = 10_000

DRAIN_S = 10.0
GRACE_S = 5.0

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
        self._started_s = self._clock.monotonic_s()
        self._settings = loaded.config
        self._systemd = SystemdNotifier(environ.get("NOTIFY_SOCKET"))
        self._ready = False
        self._stop = trio.Event()
        self._addresses: list[str] = []
        self._committed = Wakeup()
        self._directory_changed = Wakeup()
        self._runner = ProcessRunner(
            premises.database,
            synchronous=loaded.config.store.synchronous,
            group_commit_max=loaded.config.store.group_commit_max,
            group_commit_wait_us=loaded.config.store.group_commit_wait_us,
            inherit=(premises.lock_descriptor,),
            on_commit=self._committed.notify,
        )
        self._readers = ThreadReaders(premises.database)
        self._database = Database(self._runner, self._readers)
        self._reads = Reads(self._database, self._clock)
        self._ring = KeyRing()
        self._feed: Feed[Alert] = Feed(FEED)
        self._fetcher = _SwappableFetcher(loaded.config.prober)
        self._channels: dict[str, tuple[trio.MemorySendChannel[Any], trio.MemoryReceiveChannel[Any]]] = {}
        keys_dir = loaded.config.delegation.keys_dir or premises.state_dir / "keys"
        self._meter = MeterSettings(loaded.config.metering, loaded.prices)
        self._registry = RegistrySettings(loaded.config.delegation, keys_dir, loaded.pinned)
        self._prober = ProberSettings(loaded.config.prober, loaded.agents)
        self._watcher = WatcherSettings(loaded.config.sla)
        self._janitor = JanitorSettings(loaded.config.retention)
        self._writer_supervisor = self._supervise([Actor("writer", self._runner.run, lambda: self._runner.pending)])
        self._actors = self._supervise(self._make_actors())
        self._loops = self._supervise(self._make_loops())
        self._reloader = Reloader(config_path, loaded, self)

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
                directory_changed=self._directory_changed,
                new_id=partial(_new_id, "del"),
            ),
            self._actor(
                "prober",
                run_prober,
                fetcher=self._fetcher,
                random=random.random,
                settings=self._prober,
                directory_changed=self._directory_changed,
            ),
            self._actor(
                "watcher",
                run_watcher,
                settings=self._watcher,
                committed=self._committed,
                directory_changed=self._directory_changed,
                new_breach_id=partial(_new_id, "brc"),
            ),
            self._actor("gatekeeper", run_gatekeeper, ring=self._ring, entropy=os.urandom),
            self._actor("auditor", run_auditor),
        ]

    def _actor(self, name: str, run: Callable[..., Awaitable[None]], **extra: Any) -> Actor:
        send, receive = trio.open_memory_channel[Any](MAILBOX)
        self._channels[name] = (send, receive)

        async def incarnate(*, task_status: trio.TaskStatus[None]) -> None:
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
        """What follows the store until it is cancelled."""

        async def notifier(*, task_status: trio.TaskStatus[None]) -> None:
            await run_notifier(
                database=self._database,
                feed=self._feed,
                committed=self._committed,
                beat=self._loops.beater("notifier"),
                log=self._log.getChild("alerts"),
                task_status=task_status,
            )

        async def janitor(*, task_status: trio.TaskStatus[None]) -> None:
            await run_janitor(
                database=self._database,
                clock=self._clock,
                settings=self._janitor,
                beat=self._loops.beater("janitor"),
                log=self._log.getChild("janitor"),
                task_status=task_status,
            )

        return [Actor("notifier", notifier), Actor("janitor", janitor)]

    def _services(self, server: Callable[[], HttpServer]) -> Services:
        return Services(
            mailboxes=Mailboxes(**{name: send for name, (send, _) in self._channels.items()}),
            reads=self._reads,
            ring=self._ring,
            clock=self._clock,
            settings=lambda: self._settings,
            subscribe=partial(Subscription, self._database, self._feed),
            last_alert=lambda: self._feed.last,
            status=lambda: self._status(server()),
            is_ready=lambda: self._ready and not self._stop.is_set(),
            reload=self._reloader.reload,
            restart_actor=self._restart_actor,
            metrics=lambda: self._metrics(server()),
            manifest=self._manifest,
            health=self._health,
            ingest_caller=self._ingest_caller,
            daemon_uid=os.geteuid(),
            version=asapd.__version__,
        )

    # --- life

    async def run(self) -> None:
        """Start from the store outwards, serve, stop from the doors inwards; the store commits last.

        Raises:
            CannotListen, BootFailed, RestartLimitExceeded: see there.
        """
        async with trio.open_nursery() as house:
            await house.start(self._follow_signals)
            async with trio.open_nursery() as store:
                await store.start(self._writer_supervisor.run)
                try:
                    await self._prepare_store()
                    await self._run_actors()
                finally:
                    with trio.move_on_after(DRAIN_S, shield=True):
                        await self._runner.close()
                self._log.info("stopped")
            self._readers.close()
            house.cancel_scope.cancel()

    async def _prepare_store(self) -> None:
        _, newest = await self._database.read(breaches.alert_bounds)
        self._feed = Feed(FEED, last=newest)
        if not await self._database.read(keys.list_keys):
            await self._make_first_key()

    async def _make_first_key(self) -> None:
        """The key that lets the operator in over HTTP: written to a file before it counts, its path logged."""
        secret, key_id, now_us = os.urandom(32).hex(), os.urandom(5).hex(), self._clock.now_us()
        path = self._premises.admin_key
        write_private(path, f"{KEY_PREFIX}_{key_id}_{secret}\n".encode())
        key = ApiKey(key_id, "admin", Role.ADMIN, ["*"], None, True, digest_of(secret), now_us)
        made = await self._database.submit(CreateKey(key, "asapd", now_us))
        if isinstance(made, Refusal):
            raise BootError(f"the first API key could not be stored: {made.detail}")
        self._log.info("made the first API key: %s", path)

    async def _run_actors(self) -> None:
        async with trio.open_nursery() as actors:
            await actors.start(self._actors.run)
            async with trio.open_nursery() as loops:
                await loops.start(self._loops.run)
                await self._run_doors()
                loops.cancel_scope.cancel()
            for send, _ in self._channels.values():
                send.close()
            actors.cancel_scope.deadline = trio.current_time() + DRAIN_S

    async def _run_doors(self) -> None:
        http = self._settings.http
        limits = Limits(max_body_bytes=http.max_body_bytes)
        holder: list[HttpServer] = []
        services = self._services(lambda: holder[0])
        server = HttpServer(
            create_app(services, self._log.getChild("http")),
            max_connections=self._settings.limits.max_connections,
            limits=limits,
            grace_s=GRACE_S,
            log=self._log.getChild("http"),
        )
        holder.append(server)
        async with contextlib.AsyncExitStack() as unlinking, trio.open_nursery() as doors:
            http_doors = await self._open_http_doors(unlinking)
            ingest = self._open_socket(self._settings.ingest, "ingest.sock", unlinking)
            served = await doors.start(_serve_http, server, http_doors)
            ingest_scope = await doors.start(self._serve_ingest, ingest, services, server)
            doors.start_soon(self._feed_watchdog)
            self._ready = True
            self._systemd.ready(f"serving on {', '.join(self._addresses)}")
            self._log.info("serving on %s", ", ".join(self._addresses))
            await self._stop.wait()
            self._log.info("stopping")
            self._systemd.stopping()
            self._feed.close()
            server.stop()
            ingest_scope.cancel()
            with trio.move_on_after(GRACE_S + 3):
                await served.wait()
            doors.cancel_scope.cancel()

    async def _serve_ingest(
        self,
        listener: trio.SocketListener,
        services: Services,
        server: HttpServer,
        *,
        task_status: trio.TaskStatus[trio.CancelScope],
    ) -> None:
        async def handle(body: bytes, peer: Peer) -> bytes:
            return await report_frame(services, self._ingest_caller(peer), body)

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    partial(
                        run_ingest,
                        listener,
                        handle,
                        max_frame_bytes=min(self._settings.http.max_body_bytes, MAX_FRAME_BYTES),
                        max_connections=self._settings.limits.max_connections,
                        log=self._log.getChild("ingest"),
                        http=lambda stream, peer: server.serve_connection(
                            stream, door="ingest", annotations={"peer": peer}
                        ),
                        grace_s=GRACE_S,
                    )
                )
                task_status.started(scope)

    async def _open_http_doors(self, unlinking: contextlib.AsyncExitStack) -> list[Door]:
        http = self._settings.http
        tls = _tls_context(http.tls)
        doors: list[Door] = []
        passed = [fd for fd, name in listen_fds(self._environ, os.getpid()) if name in {"http", "unknown"}]
        doors += [Door(sockets.adopt(descriptor), "http", ssl_context=tls) for descriptor in passed]
        for bind in () if passed else http.bind:
            if bind.path is not None:
                listener = sockets.open_unix(bind.path, 0o660, None)
                _unlink_later(unlinking, bind.path)
                doors.append(Door(listener, "http"))
            elif bind.kind == "fd":
                doors.append(Door(sockets.adopt(bind.fd), "http", ssl_context=tls))
            else:
                doors += [Door(one, "http", ssl_context=tls) for one in await sockets.open_tcp(bind.text)]
        scheme = "http" if tls is None else "https"
        self._addresses = [_address(door.listener, scheme) for door in doors]
        admin = self._open_socket(self._settings.admin, "admin.sock", unlinking)
        doors.append(Door(admin, "admin", lambda stream: {"peer": sockets.peer_credentials(stream)}))
        return doors

    def _open_socket(
        self, section: config.Admin | config.Ingest, name: str, unlinking: contextlib.AsyncExitStack
    ) -> trio.SocketListener:
        path = section.socket or self._premises.runtime_dir / name
        listener = sockets.open_unix(path, section.mode, section.group)
        _unlink_later(unlinking, path)
        self._addresses.append(f"unix:{path}")
        return listener

    # --- signals and systemd

    async def _follow_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                if number == signal.SIGHUP:
                    await self._reload_on_signal()
                elif self._stop.is_set():
                    self._log.warning("stopped at once by a second signal")
                    os._exit(1)  # the writer finishes its commit by itself when the socket closes
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
        self._janitor.retention = settings.retention
        self._fetcher.allow(settings.prober)

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

    async def _status(self, server: HttpServer) -> dict[str, Any]:
        head, digest = await self._reads.audit_head()
        return {**self._figures(server), "audit": {"seq": head, "hash": digest}}

    def _figures(self, server: HttpServer) -> dict[str, Any]:
        database = self._premises.database
        return {
            "version": asapd.__version__,
            "pid": os.getpid(),
            "ready": self._ready and not self._stop.is_set(),
            "uptime_seconds": round(self._clock.monotonic_s() - self._started_s, 3),
            "listening": self._addresses,
            "actors": {
                name: {
                    "state": status.state,
                    "restarts": status.restarts,
                    "mailbox": status.mailbox,
                    "last_error": status.last_error,
                }
                for supervisor in self._supervisors
                for name, status in supervisor.status().items()
            },
            "store": {
                "path": str(database),
                "size_bytes": sum(
                    path.stat().st_size for path in (database, database.with_name("asapd.db-wal")) if path.exists()
                ),
                "writer_pid": self._runner.pid,
                "pending": self._runner.pending,
            },
            "http": {
                "connections_total": server.connections_total,
                "open_connections": server.open_connections,
                "refused_total": server.refused_total,
                "guarded_errors_total": server.guarded_errors_total,
            },
            "last_alert": self._feed.last,
            "config": self._reloader.status(),
        }

    def _metrics(self, server: HttpServer) -> bytes:
        return render(self._figures(server))

    def _health(self) -> dict[str, Any]:
        states = [status.state for supervisor in self._supervisors for status in supervisor.status().values()]
        healthy = self._ready and all(state == "running" for state in states)
        return {
            "status": "healthy" if healthy else "degraded",
            "agent_id": "urn:asap:agent:asapd",
            "version": asapd.__version__,
            "asap_version": "0.1",
            "uptime_seconds": round(self._clock.monotonic_s() - self._started_s, 3),
            "load": None,
        }

    def _manifest(self) -> dict[str, Any]:
        address = self._addresses[0] if self._addresses else ""
        return {
            "id": "urn:asap:agent:asapd",
            "name": "asapd",
            "version": asapd.__version__,
            "description": "usage metering, delegation, health, SLA and audit of this host's agents",
            "capabilities": {
                "asap_version": "0.1",
                "skills": [],
                "state_persistence": True,
                "streaming": False,
                "mcp_tools": [],
            },
            "endpoints": {"asap": address, "events": f"{address.replace('http', 'ws', 1)}/ws"},
            "public_key": public_base64(bytes(self._premises.identity.verify_key)),
            "ttl_seconds": 300,
        }

    def _ingest_caller(self, peer: Peer) -> Caller | None:
        ingest = self._settings.ingest
        if not ingest.allow:
            return ingest_socket_caller(peer, ingest, frozenset(), None)
        user, groups = _names_of(peer.uid, peer.gid)
        return ingest_socket_caller(peer, ingest, groups, user)


async def _serve_http(server: HttpServer, doors: list[Door], *, task_status: trio.TaskStatus[trio.Event]) -> None:
    """Run the server; the event it reports is set once every connection is closed."""
    served = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, doors)
        task_status.started(served)
    served.set()


class _SwappableFetcher:
    """A fetcher whose allowed networks a reload may change."""

    def __init__(self, prober: config.Prober) -> None:
        self._networks: list[Any] = []
        self._fetcher: Fetcher | None = None
        self.allow(prober)

    def allow(self, prober: config.Prober) -> None:
        networks = [*prober.allow_networks, *(own_networks() if prober.allow_host else [])]
        if networks != self._networks or self._fetcher is None:
            self._networks = networks
            self._fetcher = Fetcher(networks)

    async def get(self, url: str, *, deadline_s: float, max_bytes: int) -> Fetched | FetchFailed:
        assert self._fetcher is not None
        return await self._fetcher.get(url, deadline_s=deadline_s, max_bytes=max_bytes)


def _unlink_later(unlinking: contextlib.AsyncExitStack, path: Path) -> None:
    own = sockets.inode(path)
    if own is not None:
        unlinking.callback(sockets.close_unix, path, own)


def _new_id(prefix: str, now_us: int) -> str:
    return f"{prefix}_{ULID((now_us // 1000).to_bytes(6, 'big') + os.urandom(10))}"


def _address(listener: trio.SocketListener, scheme: str) -> str:
    name = listener.socket.getsockname()
    if isinstance(name, str | bytes):
        return f"unix:{name if isinstance(name, str) else name.decode()}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{scheme}://{host}:{name[1]}"


def _tls_context(tls: config.Tls | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file)
        if tls.client_ca_file is not None:
            context.load_verify_locations(tls.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise CannotListen(f"the certificate or key of [http.tls] cannot be used: {error}") from None
    return context


@functools.lru_cache(maxsize=1024)
def _names_of(uid: int, gid: int) -> tuple[str | None, frozenset[str]]:
    """A local user's name and the names of its groups."""
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        return None, frozenset()
    groups = set()
    for one in os.getgrouplist(user, gid):
        with contextlib.suppress(KeyError):
            groups.add(grp.getgrgid(one).gr_name)
    return user, frozenset(groups)
