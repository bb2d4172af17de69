"""A configuration as its file would have it reads as the same again, and what may be a secret in it can be masked."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.config import as_toml, flat, masked, parse, written
from asapd.config.values import (
    MAX_DURATION_US,
    MAX_RATE,
    MAX_SIZE_BYTES,
    duration_text,
    rate_text,
    read_duration,
    read_rate,
    read_size,
    size_text,
)
from asapd.core.rates import Rate
from asapd.core.types import HOUR_US, MINUTE_US, SECOND_US
from tests.config.test_examples import TEXT, UNHIDDEN

SECRETS = """
[audit]
witness_command = ["mail", "--password", "hidden-1"]
[[audit.witness]]
url = "https://other.example.org/hidden-5/witness"
public_key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
[[alerts.webhook]]
url = "https://hooks.example.org/services/hidden-2"
[[alerts.webhook]]
name = "query"
url = "https://hooks.example.org/?hidden-3"
[[alerts.webhook]]
url = "https://hooks.example.org"
[[alerts.command]]
argv = ["notify", "hidden-4"]
"""
KEY = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="
PEM = f"-----BEGIN PUBLIC KEY-----\\n{KEY}\\n-----END PUBLIC KEY-----"
ODD = f"""
state_dir = "a \\"quoted\\\\ directory\\u007f ü"
[http]
bind = ["[::1]:1", "unix:x.sock", "fd://3"]
[admin]
mode = "600"
[limits]
rate_per_key = "90/h"
max_buffered = "1025B"
[prober]
allow = ["host", "10.0.0.0/8", "fd00::/8"]
jitter = "0.000001%"
[retention]
audit = "90d"
[[budget]]
name = "n"
period = "day"
hard_usd = 0.000001
[[agents]]
id = "urn:asap:agent:x"
url = "http://127.0.0.1:9"
public_key = "{PEM}"
"""


@pytest.mark.parametrize("text", ["", TEXT, UNHIDDEN, SECRETS, ODD], ids=["none", "example", "all", "secrets", "odd"])
def test_what_is_written_reads_as_the_same(text: str) -> None:
    config = parse(text)
    again = as_toml(written(config))
    assert parse(again) == config
    assert as_toml(written(parse(again))) == again
    assert tomllib.loads(again) == written(config)


@given(st.integers(0, MAX_DURATION_US), st.integers(1, 10**12 - 1), st.integers(1, MAX_RATE))
def test_units_are_written_as_they_are_read(us: int, size: int, count: int) -> None:
    assert read_duration(duration_text(us)) == us
    assert read_size(size_text(size)) == size
    assert read_size(size_text(MAX_SIZE_BYTES)) == MAX_SIZE_BYTES
    for period_us in (SECOND_US, MINUTE_US, HOUR_US):
        assert read_rate(rate_text(Rate(count, period_us))) == Rate(count, period_us)


def test_what_may_be_a_secret_is_masked_and_the_rest_stays() -> None:
    document = written(parse(SECRETS))
    shown = masked(document)
    assert "hidden" not in json.dumps(shown)
    assert [hook["url"] for hook in shown["alerts"]["webhook"]] == [
        "https://hooks.example.org/[masked]",
        "https://hooks.example.org/[masked]",
        "https://hooks.example.org",
    ]
    assert shown["alerts"]["command"][0]["argv"] == ["notify", "[masked]"]
    assert shown["audit"]["witness"][0]["url"] == "https://other.example.org/[masked]"
    assert shown["audit"]["witness_command"] == ["mail", "[masked]", "[masked]"]
    assert document == written(parse(SECRETS)), "the original is left as it was"
    assert {name: shown[name] for name in shown if name not in {"alerts", "audit"}} == {
        name: document[name] for name in document if name not in {"alerts", "audit"}
    }


def test_values_have_the_names_that_messages_use() -> None:
    names = flat(written(parse(ODD + SECRETS)))
    assert names["alerts.webhook[0].url"].endswith("hidden-2")
    assert names["alerts.webhook[query].min_severity"] == "warning"
    assert names["agents[urn:asap:agent:x].url"] == "http://127.0.0.1:9"
    assert names["budget[n].hard_usd"] == "0.000001"
    assert names["retention.audit"] == "90d"
    assert names["prober.interval"] == "30s"
