"""What a reload has to tell whom."""

from __future__ import annotations

import msgspec
import pytest

from asapd.config import Changes, diff, parse

AGENT = '[[agents]]\nid = "urn:asap:agent:{}"\nurl = "http://127.0.0.1:{}"\n'


def test_equal_files_change_nothing() -> None:
    text = AGENT.format("a", 1) + '[prober]\ninterval = "1m"'
    changes = diff(parse(text), parse(text + "\n# comment"))
    assert changes == Changes()
    assert not changes.any
    assert not changes.agents


def test_agents_are_told_apart_by_id() -> None:
    old = parse(AGENT.format("a", 1) + AGENT.format("b", 2) + AGENT.format("c", 3))
    new = parse(AGENT.format("d", 4) + AGENT.format("c", 3) + AGENT.format("b", 9))
    changes = diff(old, new)
    assert [agent.id for agent in changes.agents_added] == ["urn:asap:agent:d"]
    assert [agent.id for agent in changes.agents_removed] == ["urn:asap:agent:a"]
    assert [(agent.id, agent.url) for agent in changes.agents_changed] == [("urn:asap:agent:b", "http://127.0.0.1:9")]
    assert changes.agents
    assert changes.any
    assert changes.restart_required == ()


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("prober", '[prober]\ntimeout = "1s"'),
        ("sla", '[[sla.tier]]\nname = "gold"'),
        ("delegation", "[delegation]\nmax_depth = 3"),
        ("metering", '[metering.pricing]\nprefer = "reported"'),
        ("budgets", '[[budget]]\nname = "b"\nperiod = "day"\nhard_tasks = 1'),
        ("alerts", '[[alerts.webhook]]\nurl = "http://127.0.0.1/"'),
        ("audit", "[audit]\nenabled = false"),
        ("retention", '[retention]\naudit = "400d"'),
    ],
)
def test_each_part_is_flagged_alone(part: str, text: str) -> None:
    changes = diff(parse(""), parse(text))
    assert msgspec.structs.replace(changes, settings=()) == msgspec.structs.replace(Changes(), **{part: True})
    assert len(changes.settings) == 1
    assert diff(parse(text), parse("")) == changes


def test_what_a_reload_applies_is_named_as_in_the_file() -> None:
    text = '[http]\nmax_body = "1MiB"\n[prober]\ninterval = "1m"\n[audit]\nmask = ["corp"]\n'
    text += '[metering.pricing]\nprefer = "reported"\n'
    more = '[[alerts.webhook]]\nurl = "http://127.0.0.1/"\n[[sla.tier]]\nname = "gold"\n'
    changes = diff(parse(""), parse(text + more + AGENT.format("a", 1)))
    assert changes.settings == (
        "metering.pricing.prefer",
        "prober.interval",
        "sla.tier",
        "alerts.webhook",
        "audit.mask",
    )


def test_what_only_a_restart_applies_is_named_as_in_the_file() -> None:
    new = parse("""
        state_dir = "/x"
        [http]
        bind = ["127.0.0.1:1"]
        max_body = "1MiB"
        tls = { cert_file = "c", key_file = "k" }
        [admin]
        mode = "0600"
        [ingest]
        bind = ["127.0.0.1:2"]
        [limits]
        max_connections = 1
        max_buffered = "1MiB"
        rate_per_key = "1/s"
        rate_burst = 1
        [store]
        group_commit_wait = "1ms"
    """)
    changes = diff(parse(""), new)
    assert changes.restart_required == (
        "state_dir",
        "http.bind",
        "http.max_body",
        "http.tls",
        "admin.mode",
        "ingest.bind",
        "limits.max_connections",
        "limits.max_buffered",
        "limits.rate_per_key",
        "limits.rate_burst",
        "store.group_commit_wait",
    )
    assert changes == Changes(restart_required=changes.restart_required)
