"""What the daemon shows of itself: status, metrics, its own health and manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import asapd
from asapd.actors.alert_desk import AlertDesk
from asapd.actors.reads import Reads
from asapd.actors.registry import RegistrySettings
from asapd.actors.set_aside import SetAside
from asapd.actors.unprobed import Unprobed
from asapd.core.types import OWN_ID
from asapd.daemon.auditing import Auditing
from asapd.daemon.serving import Serving
from asapd.edge.metrics import render
from asapd.runtime.clock import Clock
from asapd.runtime.lag import BOUNDS_S, LoopLag
from asapd.runtime.supervisor import Supervisor
from asapd.store.database import ProcessRunner


@dataclass(frozen=True)
class Showing:
    """Views over the running parts; nothing here changes anything."""

    clock: Clock
    started_s: float
    supervisors: Sequence[Supervisor]
    serving: Serving
    runner: ProcessRunner
    lag: LoopLag
    database: Path
    public_key: str
    is_ready: Callable[[], bool]
    last_alert: Callable[[], int]
    config_status: Callable[[], dict[str, Any]]
    reads: Reads
    desk: AlertDesk
    auditing: Auditing
    registry: RegistrySettings
    unprobed: Unprobed
    set_aside: SetAside

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return round(self.clock.monotonic_s() - self.started_s, 3)

    async def status(self) -> dict[str, Any]:
        """Everything an operator asks first; the names are in docs/http.md."""
        head, digest = await self.reads.audit.head()
        return {
            **self._running(),
            "audit": {"seq": head, "hash": digest, **await self.auditing.status()},
            "agents": {**await self.reads.agents.standing(), "not_probed": sorted(self.unprobed.noted())[:100]},
            "keys": {"problems": self.registry.key_problems, "unconfirmed": await self.reads.agents.unconfirmed_keys()},
            "usage": {
                "unpriced_events": await self.reads.usage.unpriced_events(),
                "otlp_missing_tokens": self.set_aside.missing_tokens,
            },
            "alerts": {"last": self.last_alert(), "targets": await self.desk.targets()},
        }

    def _running(self) -> dict[str, Any]:
        server = self.serving.server
        return {
            "version": asapd.__version__,
            "pid": os.getpid(),
            "ready": self.is_ready(),
            "uptime_seconds": self.uptime_s,
            "listening": self.serving.addresses,
            "actors": {
                name: {
                    "state": status.state,
                    "restarts": status.restarts,
                    "mailbox": status.mailbox,
                    "last_error": status.last_error,
                }
                for supervisor in self.supervisors
                for name, status in supervisor.status().items()
            },
            "store": {
                "path": str(self.database),
                "size_bytes": sum(
                    path.stat().st_size
                    for path in (self.database, self.database.with_name(f"{self.database.name}-wal"))
                    if path.exists()
                ),
                "writer_pid": self.runner.pid,
                "pending": self.runner.pending,
            },
            "http": {
                "connections_total": server.connections_total,
                "open_connections": server.open_connections,
                "refused_total": server.refused_total,
                "guarded_errors_total": server.guarded_errors_total,
            },
            "loop": self._loop(),
            "last_alert": self.last_alert(),
            "config": self.config_status(),
        }

    def _loop(self) -> dict[str, Any]:
        lag, median, p99 = self.lag, self.lag.quantile_s(0.5), self.lag.quantile_s(0.99)
        return {
            "lag_p50_ms": None if median is None else median * 1000,
            "lag_p99_ms": None if p99 is None else p99 * 1000,
            "lag_max_ms": round(lag.worst_s * 1000, 3),
        }

    async def metrics(self) -> bytes:
        """The status as OpenMetrics text."""
        buckets = list(zip((*BOUNDS_S, "+Inf"), accumulate(self.lag.counts), strict=True))
        return render(await self.status(), buckets, self.lag.total_s)

    def health(self) -> dict[str, Any]:
        """The daemon as an ASAP agent: degraded while an actor is not running."""
        states = [status.state for supervisor in self.supervisors for status in supervisor.status().values()]
        healthy = self.is_ready() and all(state == "running" for state in states)
        return {
            "status": "healthy" if healthy else "degraded",
            "agent_id": OWN_ID,
            "version": asapd.__version__,
            "asap_version": "0.1",
            "uptime_seconds": self.uptime_s,
            "load": None,
        }

    def manifest(self) -> dict[str, Any]:
        """What the daemon says of itself to other agents."""
        address = next(iter(self.serving.addresses), "")
        return {
            "id": OWN_ID,
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
            "public_key": self.public_key,
            "ttl_seconds": 300,
        }
