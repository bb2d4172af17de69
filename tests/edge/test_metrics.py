"""The OpenMetrics text says what the status says."""

from __future__ import annotations

from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from asapd.edge.metrics import render

STATUS: dict[str, Any] = {
    "ready": True,
    "uptime_seconds": 12.5,
    "config": {"state": "error"},
    "actors": {
        "meter": {"state": "running", "restarts": 2, "mailbox": 3},
        "writer": {"state": "backing off", "restarts": 1, "mailbox": 0},
    },
    "http": {
        "open_connections": 1,
        "connections_total": 20,
        "refused_total": 3,
        "guarded_errors_total": 4,
    },
    "store": {"size_bytes": 4096, "pending": 5},
    "usage": {"unpriced_events": 6, "otlp_missing_tokens": 990},
    "agents": {
        "total": 8,
        "paused": [],
        "flapping": ["a"],
        "not_probed": ["b", "c"],
        "sla_errors": [{"agent": "d"}] * 3,
    },
    "audit": {"witness_failures": 9},
    "last_alert": 7,
}


def test_every_figure_is_there_under_its_name() -> None:
    text = render(STATUS, [(0.001, 4), (1.0, 6), ("+Inf", 7)], 1.5).decode()
    assert text.endswith("# EOF\n")
    samples = {
        (sample.name, next(iter(sample.labels.values()), None)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples == {
        ("asapd_ready", None): 1,
        ("asapd_uptime_seconds", None): 12.5,
        ("asapd_config_ok", None): 0,
        ("asapd_actor_restarts_total", "meter"): 2,
        ("asapd_actor_restarts_total", "writer"): 1,
        ("asapd_actor_mailbox", "meter"): 3,
        ("asapd_actor_mailbox", "writer"): 0,
        ("asapd_actor_running", "meter"): 1,
        ("asapd_actor_running", "writer"): 0,
        ("asapd_http_open_connections", None): 1,
        ("asapd_http_connections_total", None): 20,
        ("asapd_http_refused_total", None): 3,
        ("asapd_http_guarded_errors_total", None): 4,
        ("asapd_audit_witness_failures_total", None): 9,
        ("asapd_loop_lag_seconds_bucket", "0.001"): 4,
        ("asapd_loop_lag_seconds_bucket", "1.0"): 6,
        ("asapd_loop_lag_seconds_bucket", "+Inf"): 7,
        ("asapd_loop_lag_seconds_count", None): 7,
        ("asapd_loop_lag_seconds_sum", None): 1.5,
        ("asapd_store_bytes", None): 4096,
        ("asapd_store_pending_units", None): 5,
        ("asapd_usage_unpriced_events", None): 6,
        ("asapd_otlp_missing_tokens_total", None): 990,
        ("asapd_agents", None): 8,
        ("asapd_agents_troubled", "paused"): 0,
        ("asapd_agents_troubled", "flapping"): 1,
        ("asapd_agents_troubled", "not_probed"): 2,
        ("asapd_agents_troubled", "sla_errors"): 3,
        ("asapd_alert_seq", None): 7,
    }
