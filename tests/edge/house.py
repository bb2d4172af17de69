"""The doors of a daemon with real actors over a real store, all in the test's own event loop."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import msgspec
import trio
from nacl.signing import SigningKey
from quart_trio import QuartTrio

from asapd import config
from asapd.actors.alert_desk import AlertDesk
from asapd.actors.archivist import Archivist
from asapd.actors.auditor import run_auditor
from asapd.actors.backups import Backups
from asapd.actors.dispatcher import Dispatch, run_dispatcher
from asapd.actors.eraser import erase_consumer
from asapd.actors.gatekeeper import KeyRing, run_gatekeeper
from asapd.actors.janitor import JanitorSettings, apply_retention
from asapd.actors.messages import CreateKeyRequest
from asapd.actors.meter import MeterSettings, run_meter
from asapd.actors.notifier import Subscription, run_notifier
from asapd.actors.packs import Packs
from asapd.actors.prober import ProberSettings, run_prober
from asapd.actors.reads import Reads
from asapd.actors.receipts import Receipts
from asapd.actors.registry import RegistrySettings, run_registry
from asapd.actors.repricer import reprice
from asapd.actors.retirer import Retirer
from asapd.actors.revocations import Revocations
from asapd.actors.sealer import Sealer
from asapd.actors.verifier import Verifier
from asapd.actors.watcher import WatcherSettings, run_watcher
from asapd.actors.witnesses import Witnesses
from asapd.core.access import Caller, Tenants
from asapd.core.errors import Refusal
from asapd.core.pricing import PriceTable
from asapd.core.types import HOUR_US, SECOND_US, Role
from asapd.edge.http.app import create_app
from asapd.edge.serve import Door, HttpServer
from asapd.edge.services import Mailboxes, Services
from asapd.edge.sessions import Sessions
from asapd.edge.sockets import Peer, open_tcp, open_unix, peer_credentials
from asapd.runtime.ask import ask
from asapd.runtime.fanout import Feed, Wakeup
from asapd.runtime.fetch import FetchFailed
from asapd.runtime.posting import post_text
from asapd.store.breaches import Alert, alert_bounds
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.writer import Writer
from asapd.wire.keys import private_pem
from asapd.wire.statement import sign_evidence

A, B, C = (f"urn:asap:agent:{letter}" for letter in "abc")
T0 = 1_800_000_000 * SECOND_US
NOW = "2027-01-15T08:00:00Z"
LOG = logging.getLogger("test.edge")
ME = Peer(os.getpid(), os.getuid(), os.getgid())
HELD = SigningKey(b"a" * 32)
IDENTITY = SigningKey(b"i" * 32)


class SetClock:
    """Wall time that moves when told."""

    def __init__(self) -> None:
        self.us = T0

    def now_us(self) -> int:
        return self.us

    def monotonic_s(self) -> float:
        return trio.current_time()


class SilentFetcher:
    """Agents that never answer."""

    async def get(self, url: str, *, deadline_s: float, max_bytes: int) -> FetchFailed:
        await trio.sleep_forever()
        raise AssertionError


class NotConfigured:
    """A daemon without a configuration file."""

    async def show(self) -> dict[str, Any]:
        return {"path": None}

    async def diff(self, number: int | None) -> Refusal:
        return Refusal("no_config_file", "there is none")

    async def versions(self) -> Refusal:
        return Refusal("no_config_file", "there is none")

    async def text(self, number: int) -> Refusal:
        return Refusal("config_version_not_found", f"there is no version {number}")


class Reply(msgspec.Struct):
    """What a route answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, with exact numbers."""
        return json.loads(self.body, parse_float=Decimal)

    def refused(self, status: int) -> Any:
        """The problem document, which every refusal has to be."""
        assert self.status == status, (self.status, self.body)
        assert self.headers["content-type"] == "application/problem+json"
        document = self.json
        assert {"type", "title", "status", "detail", "code"} <= set(document)
        assert document["status"] == status
        return document

    def ok(self, status: int = 200) -> Any:
        """The JSON of a reply that is no refusal."""
        assert self.status == status, (self.status, self.body)
        assert self.headers["content-type"] == "application/json"
        return self.json


@dataclass
class Edge:
    """Services over actors that run, an application over the services, and keys of every role."""

    database: Database
    connection: apsw.Connection
    feed: Feed[Alert]
    committed: Wakeup
    clock: SetClock
    services: Services
    mailboxes: dict[str, tuple[trio.MemorySendChannel[Any], trio.MemoryReceiveChannel[Any]]]
    dispatch: Dispatch
    meter: MeterSettings
    keys: dict[str, str] = field(default_factory=dict)
    settings: config.Config = field(default_factory=config.Config)
    calls: list[tuple[str, ...]] = field(default_factory=list)
    reload_outcome: dict[str, Any] | Refusal = field(default_factory=lambda: {"state": "ok"})
    ready: bool = True
    numbers: Any = field(default_factory=lambda: count(1))

    @cached_property
    def app(self) -> QuartTrio:
        """The application."""
        return create_app(self.services, LOG)

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = "admin",
        headers: dict[str, str] | None = None,
        door: dict[str, Any] | None = None,
        services: Services | None = None,
    ) -> Reply:
        """Send one request in by a door, with the key of a role or none; a body that is not bytes goes as JSON."""
        app = self.app if services is None else create_app(services, LOG)
        sent = {"Host": "localhost", **(headers or {})}
        if key is not None:
            sent.setdefault("Authorization", f"Bearer {self.keys.get(key, key)}")
        data = body if body is None or isinstance(body, bytes) else msgspec.json.encode(body)
        # The path as it was sent, which the server has and the test client forgets.
        scope = {"asapd": door or {"door": "http"}, "raw_path": path.partition("?")[0].encode()}
        response = await app.test_client().open(path, method=method, data=data, headers=sent, scope_base=scope)
        raw = await response.get_data(as_text=False)
        return Reply(response.status_code, {name.lower(): value for name, value in response.headers.items()}, raw)

    async def get(self, path: str, **options: Any) -> Reply:
        """GET."""
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = b"", **options: Any) -> Reply:
        """POST."""
        return await self.call("POST", path, body, **options)

    async def delete(self, path: str, **options: Any) -> Reply:
        """DELETE."""
        return await self.call("DELETE", path, **options)

    async def new_key(self, name: str, role: str, *agents: str, tenant: str | None = None, sign: bool = False) -> str:
        """Make a key through the gatekeeper, known to `call` by its name from then on."""
        made = await ask(
            self.services.mailboxes.gatekeeper,
            lambda to: CreateKeyRequest(ROOT, name, role, agents or ("*",), tenant, sign, to),
            deadline_s=5,
        )
        assert not isinstance(made, Refusal)
        self.keys[name] = made.secret
        return made.secret

    async def breach(
        self,
        event: str = "opened",
        *,
        agent: str = A,
        severity: str = "warning",
        number: int = 1,
        tenant: str = "default",
        kind: str = "latency",
    ) -> None:
        """Commit a transition of a breach, as the watcher does."""
        state = "resolved" if event == "resolved" else "open"
        row = BreachRow(
            f"brc_{number}",
            agent,
            kind,
            HOUR_US,
            "500ms",
            500.0,
            "900ms",
            900.0,
            severity,
            state,
            self.clock.us,
            20,
            tenant,
            self.clock.us if state == "resolved" else None,
            evidence={"samples": 20},
        )
        assert not isinstance(await self.database.submit(WriteBreach(event, row, self.clock.us)), Refusal)

    @asynccontextmanager
    async def served(self, tmp_path: Path, **options: Any) -> AsyncIterator[tuple[HttpServer, int, Path]]:
        """The application behind real sockets: the server, its TCP port, and its admin socket."""
        server = HttpServer(self.app, max_connections=50, grace_s=options.pop("grace_s", 1.0), log=LOG, **options)
        (tcp,) = await open_tcp("127.0.0.1:0")
        # Accepted connections inherit it: a client that does not read is noticed after few bytes.
        tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        port = tcp.socket.getsockname()[1]
        admin = open_unix(tmp_path / "admin.sock", 0o600, None)
        doors = [Door(tcp, "http"), Door(admin, "admin", lambda stream: {"peer": peer_credentials(stream)})]
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run, doors)
            yield server, port, tmp_path / "admin.sock"
            nursery.cancel_scope.cancel()

    def with_settings(self, **sections: Any) -> None:
        """Change the configuration in force."""
        self.settings = self.settings.model_copy(update=sections)


ROOT = Caller("root", Role.ADMIN)


@asynccontextmanager
async def open_edge(connection: apsw.Connection, tmp_path: Path, **paused: bool) -> AsyncIterator[Edge]:
    """Start every actor but those named in `paused`, whose mailboxes nobody reads."""
    committed, directory_changed, clock = Wakeup(), Wakeup(), SetClock()
    database = Database(
        InlineRunner(Writer(connection, key=IDENTITY), lambda _: committed.notify()), InlineReaders(connection)
    )
    # As in the daemon: what was there before the start is read from the store.
    feed: Feed[Alert] = Feed(100, last=alert_bounds(connection)[1])
    tenants = Tenants()
    ring = KeyRing(tenants)
    entropy_numbers, ids = count(1), count(1)
    keys_dir = tmp_path / "keys"
    keys_dir.mkdir()
    (keys_dir / "a.pem").write_bytes(private_pem(HELD))
    (keys_dir / "a.pem").chmod(0o600)
    settings = config.Config()
    bounds = {"meter": 4}
    names = ("meter", "registry", "prober", "watcher", "gatekeeper", "auditor")
    boxes = {name: trio.open_memory_channel[Any](bounds.get(name, 50)) for name in names}
    holder: list[Edge] = []
    stopping = trio.Event()

    async def status() -> dict[str, Any]:
        return {"ready": True}

    async def metrics() -> bytes:
        return b"# EOF\n"

    async def reload(actor: str) -> dict[str, Any] | Refusal:
        holder[0].calls.append(("reload", actor))
        return holder[0].reload_outcome

    async def restart(name: str, actor: str) -> bool:
        holder[0].calls.append(("restart", name, actor))
        return name in names

    meter, dispatch = MeterSettings(settings.metering, PriceTable()), Dispatch()

    async def erase(consumer: str, reason: str, actor: str, dry_run: bool) -> dict[str, Any] | Refusal:
        return await erase_consumer(
            database,
            clock,
            consumer=consumer,
            pseudonym=f"ers_{next(ids)}",
            reason=reason,
            actor=actor,
            dry_run=dry_run,
        )

    sealer = Sealer(database, clock, IDENTITY, tmp_path / "checkpoints.log", settings.audit, LOG)
    services = Services(
        decoding=trio.Lock(),
        mailboxes=Mailboxes(**{name: send for name, (send, _) in boxes.items()}),
        reads=Reads(database, clock),
        ring=ring,
        clock=clock,
        settings=lambda: holder[0].settings,
        subscribe=partial(Subscription, database, feed),
        last_alert=lambda: feed.last,
        status=status,
        is_ready=lambda: holder[0].ready,
        reload=reload,
        restart_actor=restart,
        metrics=metrics,
        manifest=lambda: {"id": "urn:asap:agent:asapd"},
        health=lambda: {"status": "healthy"},
        ingest_caller=lambda peer: Caller(f"uid:{peer.uid}", Role.INGEST) if peer.pid else None,
        daemon_uid=os.geteuid(),
        version="0",
        sign_evidence=lambda breach, evidence: sign_evidence(breach, evidence, IDENTITY, clock.now_us()),
        retain=partial(
            apply_retention,
            database,
            clock,
            JanitorSettings(settings.retention, settings.metering),
            Archivist(database, clock, tmp_path / "audit", sealer.covering, LOG),
            Retirer(database, clock, LOG),
            LOG,
        ),
        prices=lambda: meter.prices,
        reprice=partial(reprice, database, clock, meter),
        committed=committed,
        stopping=stopping,
        revocations=Revocations(
            database,
            clock,
            IDENTITY,
            skew_us=lambda: settings.metering.clock_skew_max_us,
            changed=committed,
            stopping=stopping,
        ),
        desk=AlertDesk(database, clock, dispatch, lambda: feed.last),
        sealer=sealer,
        erase=erase,
        witnesses=Witnesses(database, clock, IDENTITY, settings.audit, LOG, post_text),
        receipts=Receipts(database, clock, sealer),
        packs=Packs(database, clock, sealer, IDENTITY),
        sessions=Sessions(clock, ring, lambda size: next(entropy_numbers).to_bytes(size, "big")),
        pages=lambda: ["http://127.0.0.1:8727"],
        configuration=NotConfigured(),
        backups=Backups(database, clock, sealer, Path(connection.filename), tmp_path / "asapd.db.backup"),
        verifier=Verifier(
            database,
            clock,
            tmp_path / "asapd.db",
            tmp_path / "checkpoints.log",
            bytes(IDENTITY.verify_key),
            settings.audit,
            LOG,
        ),
    )
    edge = Edge(database, connection, feed, committed, clock, services, boxes, dispatch, meter, settings=settings)
    holder.append(edge)
    common = {"database": database, "clock": clock, "beat": lambda: None, "log": LOG}
    runs: dict[str, Callable[..., Awaitable[None]]] = {
        "meter": partial(run_meter, settings=meter),
        "registry": partial(
            run_registry,
            settings=RegistrySettings(
                settings.delegation, keys_dir, identity=bytes(IDENTITY.verify_key), tenants=tenants
            ),
            directory_changed=directory_changed,
            revocations_changed=committed,
            new_id=lambda now_us: f"del_{next(ids)}",
        ),
        "prober": partial(
            run_prober,
            fetcher=SilentFetcher(),
            random=lambda: 0.5,
            settings=ProberSettings(settings.prober, []),
            directory_changed=directory_changed,
            tenants=tenants,
        ),
        "watcher": partial(
            run_watcher,
            settings=WatcherSettings(settings.sla),
            committed=committed,
            directory_changed=directory_changed,
            new_breach_id=lambda now_us: f"brc_{next(ids)}",
        ),
        "gatekeeper": partial(
            run_gatekeeper,
            ring=ring,
            entropy=lambda size: next(entropy_numbers).to_bytes(size, "big"),
            seed=bytes(IDENTITY),
        ),
        "auditor": run_auditor,
    }
    async with trio.open_nursery() as nursery:
        for name, run in runs.items():
            if not paused.get(name):
                await nursery.start(partial(run, boxes[name][1].clone(), **common))
        await nursery.start(
            partial(run_notifier, database=database, feed=feed, committed=committed, beat=lambda: None, log=LOG)
        )
        await nursery.start(
            partial(
                run_dispatcher,
                database=database,
                clock=clock,
                dispatch=dispatch,
                subscribe=partial(Subscription, database, feed),
                random=lambda: 1.0,
                beat=lambda: None,
                log=LOG,
            )
        )
        for role in Role:
            await edge.new_key(str(role), role, sign=role is Role.ADMIN)
        yield edge
        nursery.cancel_scope.cancel()
