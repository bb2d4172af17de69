"""The daemon's figures as OpenMetrics text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest


def render(status: dict[str, Any], lag: Sequence[tuple[object, int]], lag_sum_s: float) -> bytes:
    """The text for a status as `/status` shows it; `lag` are upper bounds in seconds and how many looks were within."""
    registry = CollectorRegistry()
    registry.register(_Collector(status, lag, lag_sum_s))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]  # the package leaves it bare
    return text


class _Collector:
    def __init__(self, status: dict[str, Any], lag: Sequence[tuple[object, int]], lag_sum_s: float) -> None:
        self._status = status
        self._lag = lag
        self._lag_sum_s = lag_sum_s

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield GaugeMetricFamily("asapd_ready", "Whether the daemon serves", float(status["ready"]))
        yield GaugeMetricFamily("asapd_uptime_seconds", "Time since the start", status["uptime_seconds"])
        ok = float(status["config"]["state"] == "ok")
        yield GaugeMetricFamily("asapd_config_ok", "Whether the configuration file was accepted when last read", ok)
        restarts = CounterMetricFamily("asapd_actor_restarts", "Restarts of an actor", labels=["actor"])
        depth = GaugeMetricFamily("asapd_actor_mailbox", "Messages that wait for an actor", labels=["actor"])
        running = GaugeMetricFamily("asapd_actor_running", "Whether an actor runs", labels=["actor"])
        for name, actor in status["actors"].items():
            restarts.add_metric([name], actor["restarts"])
            depth.add_metric([name], actor["mailbox"])
            running.add_metric([name], float(actor["state"] == "running"))
        yield from (restarts, depth, running)
        http = status["http"]
        yield GaugeMetricFamily("asapd_http_open_connections", "Connections now open", http["open_connections"])
        yield CounterMetricFamily("asapd_http_connections", "Connections accepted", http["connections_total"])
        yield CounterMetricFamily("asapd_http_refused", "Connections over the limit", http["refused_total"])
        yield CounterMetricFamily(
            "asapd_http_guarded_errors", "Connections that ended in an error", http["guarded_errors_total"]
        )
        lag = HistogramMetricFamily("asapd_loop_lag_seconds", "How late the event loop ran what was due")
        lag.add_metric([], [(str(bound), float(count)) for bound, count in self._lag], self._lag_sum_s)
        yield lag
        store = status["store"]
        yield GaugeMetricFamily("asapd_store_bytes", "Size of the database file", store["size_bytes"])
        yield GaugeMetricFamily("asapd_store_pending_units", "Units that wait for their commit", store["pending"])
        unpriced = status["usage"]["unpriced_events"]
        yield GaugeMetricFamily("asapd_usage_unpriced_events", "Recorded events whose cost nobody knows", unpriced)
        yield CounterMetricFamily(
            "asapd_otlp_missing_tokens",
            "Tokens of metrics that spans of far fewer were counted instead of",
            status["usage"]["otlp_missing_tokens"],
        )
        failures = status["audit"]["witness_failures"]
        yield CounterMetricFamily("asapd_audit_witness_failures", "Checkpoints that a witness did not take", failures)
        agents = status["agents"]
        yield GaugeMetricFamily("asapd_agents", "Agents of the directory", agents["total"])
        troubled = GaugeMetricFamily(
            "asapd_agents_troubled", "Agents that /status names, at most 100 of a kind", labels=["trouble"]
        )
        for trouble in ("paused", "flapping", "not_probed", "sla_errors"):
            troubled.add_metric([trouble], len(agents[trouble]))
        yield troubled
        yield GaugeMetricFamily("asapd_alert_seq", "Number of the newest breach transition", status["last_alert"])
