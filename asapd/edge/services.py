"""What the doors are given by the daemon."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from asapd import config
from asapd.actors.alert_desk import AlertDesk
from asapd.actors.backups import Backups
from asapd.actors.gatekeeper import KeyRing
from asapd.actors.messages import (
    AuditorMessage,
    GatekeeperMessage,
    MeterMessage,
    ProberMessage,
    RegistryMessage,
    WatcherMessage,
)
from asapd.actors.notifier import Subscription
from asapd.actors.packs import Packs
from asapd.actors.reads import Reads
from asapd.actors.receipts import Receipts
from asapd.actors.repricer import Progress, RepriceRequest
from asapd.actors.revocations import Revocations
from asapd.actors.sealer import Sealer
from asapd.actors.unprobed import Unprobed
from asapd.actors.verifier import Verifier
from asapd.actors.witnesses import Witnesses
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.pricing import PriceTable
from asapd.edge.sessions import Sessions
from asapd.edge.sockets import Peer
from asapd.edge.throttle import Throttle
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup

ASK_S = 30.0
"""How long a door waits for an actor: a commit on a slow disk behind a full queue takes seconds at worst."""


@dataclass(frozen=True)
class Mailboxes:
    """The send ends of the actors' mailboxes."""

    meter: trio.MemorySendChannel[MeterMessage]
    registry: trio.MemorySendChannel[RegistryMessage]
    prober: trio.MemorySendChannel[ProberMessage]
    watcher: trio.MemorySendChannel[WatcherMessage]
    gatekeeper: trio.MemorySendChannel[GatekeeperMessage]
    auditor: trio.MemorySendChannel[AuditorMessage]


class Subscribe(Protocol):
    """Opens a cursor over breach transitions."""

    def __call__(self, *, resume_after: int | None, wanted: Callable[[Any], bool]) -> Subscription:
        """From behind `resume_after`, or from now on."""
        ...


class Configured(Protocol):
    """The configuration as it is shown; a refusal says what is not there, or would not be accepted."""

    async def show(self) -> dict[str, Any]:
        """What is in force, without secrets."""
        ...

    async def diff(self, number: int | None) -> dict[str, Any] | Refusal:
        """What would change by a reload of the file, or with an earlier version of it."""
        ...

    async def versions(self) -> list[dict[str, Any]] | Refusal:
        """Every version of the file that was accepted and is kept."""
        ...

    async def text(self, number: int) -> str | Refusal:
        """The text of a version, secrets and all."""
        ...


@dataclass(frozen=True)
class Services:
    """Everything a door may use. `settings` answers the configuration in force now."""

    mailboxes: Mailboxes
    reads: Reads
    ring: KeyRing
    clock: Clock
    settings: Callable[[], config.Config]
    subscribe: Subscribe
    last_alert: Callable[[], int]
    status: Callable[[], Awaitable[dict[str, Any]]]
    is_ready: Callable[[], bool]
    reload: Callable[[str], Awaitable[dict[str, Any] | Refusal]]
    restart_actor: Callable[[str, str], Awaitable[bool]]
    metrics: Callable[[], Awaitable[bytes]]
    manifest: Callable[[], dict[str, Any]]
    health: Callable[[], dict[str, Any]]
    ingest_caller: Callable[[Peer], Caller | None]
    daemon_uid: int
    version: str
    retain: Callable[[str, bool], Awaitable[dict[str, Any] | Refusal]]
    """Applies retention for an actor, or with True says what would go."""
    prices: Callable[[], PriceTable]
    """The price table in force."""
    reprice: Callable[[RepriceRequest], Awaitable[tuple[dict[str, Any], Progress | None] | Refusal]]
    """Prices recorded usage again, a part of it, and says where to go on."""
    decoding: trio.Lock
    """Held by whoever decodes a large body."""
    committed: Wakeup
    """Raised by every commit."""
    stopping: trio.Event
    """Set when the daemon begins to stop: whoever streams says goodbye."""
    revocations: Revocations
    """The signed list of revoked tokens, and the news of delegations."""
    desk: AlertDesk
    """Acknowledgements, silences, named cursors, push targets."""
    sign_evidence: Callable[[dict[str, Any], dict[str, Any]], bytes]
    """Makes a breach as users see it, and its evidence, a statement signed by the daemon."""
    sealer: Sealer
    """Checkpoints of the audit log."""
    verifier: Verifier
    """Walks over the audit log."""
    witnesses: Witnesses
    """Signs checkpoints of other logs."""
    erase: Callable[[str, str, str, bool], Awaitable[dict[str, Any] | Refusal]]
    """Erases a consumer, for a reason and an actor, or with True says how much there is of it."""
    receipts: Receipts
    """Signed statements about tasks."""
    packs: Packs
    """Signed evidence of what an agent did."""
    backups: Backups
    """Copies of the database."""
    sessions: Sessions
    """Logins to the page."""
    pages: Callable[[], Sequence[str]]
    """The addresses of the HTTP door."""
    configuration: Configured
    """What is in force, and what was."""
    throttle: Throttle | None = None
    """Counts requests where there is a rate limit."""
    unprobed: Unprobed = field(default_factory=Unprobed)
    """Why agents are not probed, where they are not."""
    without_manifest: Unprobed = field(default_factory=Unprobed)
    """Why the manifests of agents could not be taken, where they could not."""
