"""Parsing the file: what is accepted, and that every problem is named by line, field and in plain words."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.config import Bind, Config, ConfigError, Problem, load, parse, remarks, resolve
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US

KEY = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
PEM = (
    "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----"
)


def problems(text: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return caught.value.problems


def only(text: str) -> Problem:
    found = problems(text)
    assert len(found) == 1, found
    return found[0]


def test_nothing_at_all_gives_the_defaults() -> None:
    assert parse("") == Config()


def test_values_are_read_into_integers_and_exact_decimals() -> None:
    config = parse(f"""
        state_dir = "/srv/asapd"
        [http]
        bind = ["[::1]:0", "unix:/run/a.sock", "fd://3", "localhost:80"]
        max_body = "512 KiB"
        allowed_hosts = ["asapd.example.org", "[::1]", "10.0.0.1"]
        allowed_origins = ["https://dash.example.org:8443"]
        [admin]
        mode = "0600"
        [metering]
        clock_skew_max = "0s"
        late_max = "2w"
        [prober]
        interval = "250ms"
        jitter = "0%"
        allow = ["host", "10.0.0.0/8", "fd00::/8", "192.0.2.1"]
        [sla]
        windows = ["1h", "90m"]
        breach_window = "1m"
        default_tier = "gold"
        [[sla.tier]]
        name = "gold"
        availability = "99.999999%"
        max_latency_p95_ms = 5
        [[budget]]
        name = "b"
        period = "day"
        timezone = "Europe/Berlin"
        soft_usd = 0.1
        hard_usd = "12.345678"
        match = {{ agent = "urn:asap:agent:x*", delegation = "d" }}
        [[alerts.webhook]]
        url = "https://hooks.example.org/a?b=c"
        events = ["opened"]
        min_severity = "critical"
        [retention]
        audit = "7d"
        [[ingest.allow]]
        uid = 0
        agents = ["*", "urn:*", "urn:asap:agent:a*", "urn:asap:agent:b"]
        [[agents]]
        id = "urn:asap:agent:a"
        url = "http://127.0.0.1:9000/base"
        public_key = "{KEY}"
        tier = "gold"
        sla = {{ max_error_rate = "1%", support_hours = "24/7" }}
        [[agents]]
        id = "urn:asap:agent:b"
        url = "https://agent.example.org"
        public_key = '''{PEM}'''
        tenant = "acme"
    """)
    assert config.state_dir == Path("/srv/asapd")
    assert [bind.text for bind in config.http.bind] == ["[::1]:0", "unix:/run/a.sock", "fd://3", "localhost:80"]
    assert all(bind.is_local for bind in config.http.bind)
    assert config.http.max_body_bytes == 512 * 1024
    assert config.admin.mode == 0o600
    assert (config.metering.clock_skew_max_us, config.metering.late_max_us) == (0, 14 * DAY_US)
    assert config.prober.interval_us == 250_000
    assert config.prober.jitter_percent == 0
    assert config.prober.allow_host
    assert [str(network) for network in config.prober.allow_networks] == ["10.0.0.0/8", "fd00::/8", "192.0.2.1/32"]
    assert config.sla.windows_us == (HOUR_US, 90 * MINUTE_US)
    assert config.sla.breach_window_us == MINUTE_US
    assert config.sla.tiers[0].availability_percent == Decimal("99.999999")
    assert (config.budgets[0].soft_microusd, config.budgets[0].hard_microusd) == (100_000, 12_345_678)
    assert config.budgets[0].match.delegation == "d"
    assert config.alerts.webhooks[0].events == ("opened",)
    assert config.retention.audit_us == 7 * DAY_US
    assert config.ingest.allow[0].uid == 0
    assert config.agents[0].sla is not None
    assert config.agents[0].sla.max_error_rate_percent == 1
    assert config.agents[1].tenant == "acme"


def test_forever_is_no_bound() -> None:
    assert parse('[retention]\naudit = "forever"').retention.audit_us is None


def test_all_problems_are_reported_each_once_at_its_own_line() -> None:
    text = """\
interval = "3s"
[http]
bind = [
  "0.0.0.0:8727",
  "x",
]
auth = "none"
max_bod = "3MiB"
[prober]
interval = 30
healthy_after = "1"
unhealthy_after = 0
unhealthy_within = 61
[metering]
late_max = "500d"
[[budget]]
name = "b"
period = "year"
soft_usd = 1
[[agents]]
id = "urn:asap:agent:a"
url = "http://127.0.0.1:1"
tier = "gold"
[[agents]]
url = "nowhere"
[[agents]]
id = "urn:asap:agent:a"
url = "http://127.0.0.1:2"
"""
    assert [(problem.line, problem.field) for problem in problems(text)] == [
        (1, "interval"),
        (4, "http.bind[0]"),
        (4, "http.bind[0]"),
        (5, "http.bind[1]"),
        (8, "http.max_bod"),
        (10, "prober.interval"),
        (11, "prober.healthy_after"),
        (12, "prober.unhealthy_after"),
        (13, "prober.unhealthy_within"),
        (15, "metering.late_max"),
        (18, "budget[0].period"),
        (23, "agents[0].tier"),
        (24, "agents[1].id"),
        (25, "agents[1].url"),
        (27, "agents[2].id"),
    ]


def test_the_message_has_path_line_field_and_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('[prober]\ninterval = 30\n[sla]\nhold = "x"', path="asapd.toml")
    assert str(caught.value) == (
        'asapd.toml:2: prober.interval: must be a duration in quotes with a unit, such as "30s" or "5m"\n'
        'asapd.toml:4: sla.hold: must be a duration such as "250ms", "30s", "5m", "1h" or "7d", not "x"'
    )


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("[prober]\nintervall = '3s'", "prober.intervall", 'did you mean "interval"?'),
        ("[htpp]\nbind = []", "htpp", 'did you mean "http"?'),
        ("[http]\nstate_dir = '/x'", "http.state_dir", "it belongs at the top of the file"),
        ("[sla]\nhealthy_after = 1", "sla.healthy_after", "it belongs in [prober]"),
        ("[audit]\nzzz = 1", "audit.zzz", "known here are: enabled, checkpoint_every, verify_every, witness"),
        ('"a\\nb" = 1', '"a\\nb"', "unknown setting"),
        ("[store]\nsynchronous = 'off'", "store.synchronous", 'must be "full" or "normal"'),
        ("[audit]\nmask = ['a+']", "audit.mask[0]", "repeats without an end"),
        ("[audit]\nenabled = 'yes'", "audit.enabled", "true or false"),
        ("[admin]\ngroup = 7", "admin.group", "text in quotes"),
        ("[admin]\nsocket = ''", "admin.socket", "not empty"),
        ("[admin]\nsocket = 1", "admin.socket", "a path in quotes"),
        ("[admin]\nmode = 0o660", "admin.mode", 'such as "0660"'),
        ("[admin]\nmode = '0999'", "admin.mode", 'such as "0660"'),
        ("[limits]\nmax_connections = '8'", "limits.max_connections", "whole number, without quotes"),
        ("[limits]\nmax_connections = 1.0", "limits.max_connections", "whole number"),
        ("[limits]\nmax_connections = true", "limits.max_connections", "whole number"),
        ("[limits]\nmax_connections = 1_000_001", "limits.max_connections", "at most 1000000"),
        ("[limits]\nmax_buffered = 1", "limits.max_buffered", "must be a size in quotes"),
        ("[limits]\nrate_per_key = 5", "limits.rate_per_key", "must be a rate in quotes"),
        ("[limits]\nrate_per_key = '0/s'", "limits.rate_per_key", "must be a rate in quotes"),
        ("[limits]\nrate_per_key = '1000001/s'", "limits.rate_per_key", 'from "1/h" to "1000000/s"'),
        ("[limits]\nrate_per_key = '5/d'", "limits.rate_per_key", "must be a rate in quotes"),
        ("[limits]\nrate_burst = 0", "limits.rate_burst", "at least 1"),
        ("http = 1", "http", "write [http] with its settings below"),
        ("[[http]]", "http", "write [http], with single brackets"),
        ("[agents]\nid = 'x'", "agents", "write [[agents]], with two brackets"),
        ("[http]\nbind = '127.0.0.1:1'", "http.bind", "must be a list in [ ]"),
        ("[http]\nbind = []", "http.bind", "must not be empty"),
        ("[http]\nbind = [8727]", "http.bind[0]", "an address in quotes"),
        ("[http]\nbind = ['8727']", "http.bind[0]", "must be HOST:PORT"),
        ("[http]\nbind = ['127.0.0.1:65536']", "http.bind[0]", "port from 0 to 65535"),
        ("[http]\nbind = ['::1:8727']", "http.bind[0]", "in brackets"),
        ("[http]\nbind = ['[127.0.0.1]:8727']", "http.bind[0]", "in brackets"),
        ("[http]\nbind = ['*:8727']", "http.bind[0]", "name a host or an IP address"),
        ("[http]\nbind = ['[x]:8727']", "http.bind[0]", "name a host or an IP address"),
        ("[http]\nbind = ['fd://x']", "http.bind[0]", '"fd://3"'),
        ("[http]\nmax_body = 8", "http.max_body", "a size in quotes"),
        ("[http]\nmax_body = '8 Mb'", "http.max_body", '"8MiB"'),
        ("[http]\nmax_body = '0B'", "http.max_body", "between 1B and 1024GiB"),
        ("[http]\nallowed_hosts = ['http://x']", "http.allowed_hosts[0]", "without scheme"),
        ("[http]\nallowed_origins = ['https://x/']", "http.allowed_origins[0]", "without path"),
        ("[http]\nallowed_origins = ['https://ü']", "http.allowed_origins[0]", "xn--"),
        ("[http.tls]\ncert_file = 'c'", "http.tls.key_file", "is missing"),
        ("[prober]\ninterval = '1ms'", "prober.interval", "at least 10ms"),
        ("[prober]\nallow = ['10.0.0.1/8']", "prober.allow[0]", 'write "10.0.0.0/8"'),
        ("[prober]\nallow = ['lan']", "prober.allow[0]", '"host"'),
        ("[prober]\nallow = [10]", "prober.allow[0]", '"host"'),
        ("[sla]\nbreach_window = '31d'", "sla.breach_window", "at most 30d"),
        ("[sla]\nbreach_window = '59s'", "sla.breach_window", "at least 1m"),
        ("[sla]\nwindows = ['1h', '60m']", "sla.windows[1]", "1h is already listed"),
        ("[sla]\nhold = '40000d'", "sla.hold", "at most 36500d"),
        ("[sla]\ndefault_tier = 'x'", "sla.default_tier", "none is declared"),
        ("[[sla.tier]]\nname='a'\n[[sla.tier]]\nname='a'", "sla.tier[1].name", 'already named "a"'),
        ("[[sla.tier]]\nname='a'\navailability='99.5.5%'", "sla.tier[0].availability", '"99.5%"'),
        ("[[sla.tier]]\nname='a'\navailability='100.1%'", "sla.tier[0].availability", '"0%" to "100%"'),
        ("[[sla.tier]]\nname='a'\navailability='1.1234567%'", "sla.tier[0].availability", "six decimals"),
        ("[[sla.tier]]\nname='a'\navailability=99.5", "sla.tier[0].availability", "a percentage in quotes"),
        ("[[sla.tier]]\nname=' a'", "sla.tier[0].name", "without spaces around"),
        ("[delegation]\nroots = ['x']", "delegation.roots[0]", "urn:asap:agent:writer"),
        ("[retention]\nusage = 'forever'", "retention.usage", "must be a duration"),
        ("[retention]\naudit = 'always'", "retention.audit", 'or "forever"'),
        ("[[alerts.webhook]]\nurl = 'http://x/#y'", "alerts.webhook[0].url", "# part"),
        ("[[alerts.webhook]]\nurl = 'ftp://x/'", "alerts.webhook[0].url", "http or https"),
        ("[[alerts.webhook]]\nurl = 'http://[x/'", "alerts.webhook[0].url", "http or https"),
        ("[[alerts.webhook]]\nurl = 'http://x'\nevents = []", "alerts.webhook[0].events", "must not be empty"),
        (
            "[[alerts.webhook]]\nurl = 'http://x'\n[[alerts.webhook]]\nurl = 'http://x'\nmin_severity = 'critical'",
            "alerts.webhook[1].name",
            "give each a name",
        ),
        (
            "[[alerts.webhook]]\nname = 'x'\nurl = 'http://x'\n[[alerts.command]]\nargv = ['/bin/x']",
            "alerts.command[0].name",
            'already named "x"',
        ),
        ("[[alerts.command]]\nargv = []", "alerts.command[0].argv", "must not be empty"),
        ("[[alerts.webhook]]\nurl = 'http://x'\nformat = 'xml'", "alerts.webhook[0].format", "alertmanager"),
        ("[alerts]\nallow = ['internet']", "alerts.allow[0]", '"host"'),
        ("[[budget]]\nname='b'\nperiod='day'", "budget[0]", "limits nothing"),
        ("[[budget]]\nname='b'\nperiod='day'\nhard_usd=-1", "budget[0].hard_usd", "must not be negative"),
        ("[[budget]]\nname='b'\nperiod='day'\nhard_usd=[1]", "budget[0].hard_usd", "an amount of USD"),
        ("[[budget]]\nname='b'\nperiod='day'\nsoft_tasks=2\nhard_tasks=1", "budget[0].soft_tasks", "above hard_tasks"),
        ("[[budget]]\nname='b'\nperiod='day'\nsoft_usd=2\nhard_usd=1", "budget[0].soft_usd", "2.0 is above"),
        (
            "[[budget]]\nname='b'\nperiod='day'\nhard_tasks=1\ntimezone='Mars/Olympus'",
            "budget[0].timezone",
            'not "Mars/Olympus"',
        ),
        (
            "[[budget]]\nname='b'\nperiod='day'\nhard_tasks=1\nmatch={project=''}",
            "budget[0].match.project",
            "1 to 200 printable",
        ),
        (
            "[[budget]]\nname='b'\nperiod='day'\nhard_tasks=1\n[[budget]]\nname='b'\nperiod='day'\nhard_tasks=1",
            "budget[1].name",
            'already named "b"',
        ),
        ("[[ingest.allow]]\nagents=['*']", "ingest.allow[0]", "exactly one of"),
        ("[[ingest.allow]]\nuid=1\ngid=1\nagents=['*']", "ingest.allow[0]", "it has uid and gid"),
        ("[[ingest.allow]]\nuid=1\nagents=['agent*']", "ingest.allow[0].agents[0]", "with * at the end"),
        ("[[ingest.allow]]\nuid=1\nagents=['urn:asap:agent:a*b']", "ingest.allow[0].agents[0]", "agent:writer"),
        ("[ingest]\nbind=['0.0.0.0:1']", "ingest.bind[0]", "speaks plain HTTP only"),
        ("[ingest]\nbind=['127.0.0.1:8727']", "ingest.bind[0]", "already used by http.bind"),
        ("[admin]\nsocket='/a'\n[ingest]\nsocket='/a'", "ingest.socket", "same file as admin.socket"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_answered_in_words_that_help(text: str, field: str, words: str) -> None:
    problem = only(text)
    assert problem.field == field
    assert words in problem.reason


AGENT = '[[agents]]\nid = "urn:asap:agent:a"\nurl = "http://127.0.0.1:1"\n'


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ("id = 'agent'", "agents[0].id", "must be an agent's name"),
        ("url = 'http://u:hunter2@h/'", "agents[0].url", "must not hold a user name or password"),
        ("url = 'http://h/?'", "agents[0].url", "without ? or # parts"),
        ("url = 'http://h:99999/'", "agents[0].url", "http or https"),
        ("public_key = 'AAAA'", "agents[0].public_key", "32 bytes"),
        ("public_key = 'ü'", "agents[0].public_key", "32 bytes"),
        (f"public_key = '''{PEM.replace('VwAyEA', 'VuAyEA')}'''", "agents[0].public_key", "not of an Ed25519"),
        (f"public_key = '''{PEM.replace('PUBLIC', 'PRIVATE')}'''", "agents[0].public_key", "is a private key"),
        ("sla = { availability = '101%' }", "agents[0].sla.availability", '"0%" to "100%"'),
        ("sla = { uptime = '1%' }", "agents[0].sla.uptime", "unknown setting"),
        ("sla = { max_latency_p95_ms = 0 }", "agents[0].sla.max_latency_p95_ms", "at least 1"),
        ("tier = 'gold'", "agents[0].tier", "none is declared"),
        ("password = 'hunter2'", "agents[0].password", "secrets do not belong in this file"),
        ("Token = 'hunter2'", "agents[0].Token", "*_file"),
    ],
)
def test_a_wrong_agent_is_named_and_nothing_secret_is_repeated(line: str, field: str, words: str) -> None:
    key = line.split(" ", 1)[0]
    kept = [old for old in AGENT.splitlines() if not old.startswith(key)]
    problem = only("\n".join([*kept, line]))
    assert problem.field == field
    assert words in problem.reason
    assert "hunter2" not in problem.reason
    assert "MCow" not in problem.reason


def test_a_listed_agent_is_not_listed_again() -> None:
    assert only(AGENT + AGENT) == Problem(5, "agents[1].id", "urn:asap:agent:a is already listed")


def test_an_event_may_not_be_later_than_its_record_is_kept() -> None:
    assert parse('[metering]\nlate_max = "400d"').metering.late_max_us == 400 * DAY_US
    assert parse("[prober]\nunhealthy_within = 2").prober.unhealthy_within == 2
    few = only("[prober]\nunhealthy_after = 3\nunhealthy_within = 2")
    assert (few.line, few.field) == (3, "prober.unhealthy_within")
    assert "never the 3 failures" in few.reason
    late = only('[metering]\nlate_max = "401d"')
    assert (late.line, late.field) == (2, "metering.late_max")
    short = only('[prober]\n[retention]\nusage = "6d"')
    assert (short.line, short.field) == (3, "retention.usage")
    assert short.reason.startswith("events up to 7d late are accepted (late_max), and kept for 6d (retention.usage): ")


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.org:1"])
def test_the_http_door_opens_to_other_hosts_only_with_keys_and_tls(address: str) -> None:
    tls = '[http.tls]\ncert_file = "c"\nkey_file = "k"\n'
    bind = f'[http]\nbind = ["127.0.0.1:1", "{address}"]\n'
    assert parse(bind + tls).http.bind[1].is_local is False
    assert "put a TLS proxy before it" in only(bind).reason
    assert 'set auth = "keys"' in only(bind + 'auth = "none"\n' + tls).reason
    assert len(problems(bind + 'auth = "none"\n')) == 2


def test_no_keys_and_plain_http_are_fine_on_this_host() -> None:
    config = parse('[http]\nauth = "none"\nbind = ["127.0.0.9:1", "[::1]:2", "unix:/x", "localhost:3", "127.0.0.1:0"]')
    assert config.http.auth == "none"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('[http]\nbind = ["0.0.0.0:1"]\n[http.tls]\ncert_file = "c"', "http.tls.key_file"),
        ('[metering]\nlate_max = "500d"\n[retention]\nusage = "bad"', "retention.usage"),
        ('[metering]\nlate_max = "bad"\n[retention]\nusage = "1d"', "metering.late_max"),
        ('[sla]\ndefault_tier = "a"\n[sla.tier]\nname = "a"', "sla.tier"),
        ('[http]\nbind = ["x"]', "http.bind[0]"),
        ("[[agents]]\nid = 1\nurl = 'http://127.0.0.1:1'", "agents[0].id"),
        ("[[budget]]\nname = 'b'\nperiod = 'day'\nhard_usd = 'x'", "budget[0].hard_usd"),
    ],
)
def test_what_is_wrong_is_not_taken_as_evidence_of_more(text: str, field: str) -> None:
    assert only(text).field == field


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('[[agents]]\nid = "x"', ["agents[0].id", "agents[0].url"]),
        (
            '[[agents]]\nid = "x"\n[[agents]]\ntier = "none"',
            ["agents[0].id", "agents[0].url", "agents[1].id", "agents[1].tier", "agents[1].url"],
        ),
        ("agents = [3, {}]", ["agents[0]", "agents[1].id", "agents[1].url"]),
        ('[[agents]]\nid = "x"\nhealth = "none"', ["agents[0].id", "agents[0].health", "agents[0].url"]),
        ("[[ingest.allow]]\nuid = 1\ngid = 2\nagents = []", ["ingest.allow[0]", "ingest.allow[0].agents"]),
        (
            '[[ingest.allow]]\nuid = 1\nagents = ["*", "x", 3]',
            ["ingest.allow[0].agents[1]", "ingest.allow[0].agents[2]"],
        ),
        ("[[ingest.allow]]\nagents = [[1]]", ["ingest.allow[0]", "ingest.allow[0].agents[0]"]),
        ('[[ingest.allow]]\nuid = "x"\nagents = ["x"]', ["ingest.allow[0].uid", "ingest.allow[0].agents[0]"]),
        ("[[budget]]", ["budget[0].name", "budget[0].period"]),
        ('[[budget]]\nname = "b"\nperiod = "x"', ["budget[0]", "budget[0].period"]),
        ('[[budget]]\nname = "b"\nhard_usd = "x"', ["budget[0].hard_usd", "budget[0].period"]),
    ],
)
def test_a_setting_that_is_wrong_hides_no_other_of_its_table(text: str, fields: list[str]) -> None:
    assert sorted(problem.field for problem in problems(text)) == sorted(fields)


def test_a_tier_whose_name_is_wrong_or_missing_hides_no_unknown_one() -> None:
    agent = '[[agents]]\nid = "urn:asap:agent:a"\nurl = "http://127.0.0.1:1"\ntier = "none"\n'
    for tier, wrong in (("", "sla.tier[0].name"), ("name = 1\n", "sla.tier[0].name")):
        found = problems(agent + "[[sla.tier]]\n" + tier + '[[sla.tier]]\nname = "gold"\n')
        assert [problem.field for problem in found] == ["agents[0].tier", wrong]
        assert found[0].reason == 'no [[sla.tier]] is named "none"; known are: gold'


@pytest.mark.parametrize("host", ["169.254.1.1", "[fe80::1]", "[::ffff:169.254.1.1]"])
def test_nothing_is_sent_to_a_link_local_address(host: str) -> None:
    hook = only(f'[[alerts.webhook]]\nurl = "http://{host}:1/x"\n')
    assert (hook.line, hook.field) == (2, "alerts.webhook[0].url")
    assert "must not be a link-local address" in hook.reason
    agent = parse(f'[[agents]]\nid = "urn:asap:agent:a"\nurl = "http://{host}:1"\n')
    [remark] = remarks(agent)
    assert remark.startswith("urn:asap:agent:a is at a link-local address, which is never probed")


def test_reporters_whom_the_host_does_not_know_are_remarked_on_and_refused_nothing() -> None:
    rules = "".join(
        f'[[ingest.allow]]\n{key} = {value}\nagents = ["*"]\n'
        for key, value in (("user", '"root"'), ("uid", 0), ("user", '"nouserx"'), ("group", '"nogroupx"'))
    )
    assert [remark.split(",")[0] for remark in remarks(parse(rules))] == [
        'ingest.allow[2] is for the user "nouserx"',
        'ingest.allow[3] is for the group "nogroupx"',
    ]


def test_a_longest_reservation_that_is_shorter_than_any_is_remarked_on_where_it_is_written() -> None:
    assert remarks(parse('[delegation]\nreservation_ttl = "2h"')) == ()
    assert remarks(parse('[delegation]\nreservation_ttl = "2h"\nmax_reservation_ttl = "2h"')) == ()
    [remark] = remarks(parse('[delegation]\nreservation_ttl = "2h"\nmax_reservation_ttl = "1h"'))
    assert remark.startswith("delegation.max_reservation_ttl is 1h, and reservations stand for 2h")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a = 1\nb = = 2", 2, "this is not a TOML value"),
        ("[http]\nauth = keys", 2, "text needs quotes"),
        ("[http]\nauth", 2, "Expected '='"),
        ("[http]\nauth = 'none'\nauth = 'keys'", 3, "written twice"),
        ("[http]\n[http]\n", 2, "twice"),
        ("!\n", 1, "neither a [section] nor a key = value"),
        ("\na = '''", 2, "Expected"),
        ("a = " + "[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_broken_toml_is_named_with_its_line(text: str, line: int, words: str) -> None:
    problem = only(text)
    assert (problem.line, problem.field) == (line, "syntax")
    assert words in problem.reason


def test_a_file_is_read_and_its_paths_start_from_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "asapd.toml"
    file.write_bytes(
        b"\xef\xbb\xbf"
        b'state_dir = "state"\n[http]\nbind = ["unix:http.sock", "127.0.0.1:1"]\n'
        b'[http.tls]\ncert_file = "tls/c"\nkey_file = "/etc/k"\n'
        b'[metering.pricing]\nfile = "prices.toml"\n[delegation]\nkeys_dir = "keys"\n'
        b'[[alerts.webhook]]\nurl = "http://127.0.0.1/"\nsecret_file = "s"\n'
    )
    config = load(file)
    assert config.state_dir == tmp_path / "state"
    assert config.http.bind[0] == Bind("unix", path=tmp_path / "http.sock")
    assert config.http.tls is not None
    assert (config.http.tls.cert_file, config.http.tls.key_file) == (tmp_path / "tls/c", Path("/etc/k"))
    assert config.metering.pricing.file == tmp_path / "prices.toml"
    assert config.delegation.keys_dir == tmp_path / "keys"
    assert config.alerts.webhooks[0].secret_file == tmp_path / "s"
    assert config.admin.socket is None
    assert resolve(Config(), tmp_path) == Config()


def test_a_file_that_cannot_be_read_is_a_problem_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"asapd.toml: file: cannot be read: No such file"):
        load(tmp_path / "asapd.toml")
    with pytest.raises(ConfigError, match=r"file: cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"a = 1\n# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.toml:2: file: is not UTF-8"):
        load(tmp_path / "latin.toml")
    (tmp_path / "bad.toml").write_text("x = 1")
    with pytest.raises(ConfigError, match=r"bad.toml:1: x: unknown"):
        load(tmp_path / "bad.toml")


ATOMS = st.sampled_from(
    ["1", "-1", "1.5", "true", '""', '"30s"', '"x"', "[]", "{}", "2026-01-01", "[1]", '{ a = "b" }']
)
HEADERS = st.sampled_from(
    ["[http]", "[[http]]", "[http.tls]", "[agents]", "[[agents]]", "[[agents.sla]]", "[agents.sla]", "[[sla.tier]]",
     "[sla]", "[[budget]]", "[budget.match]", "[[alerts.webhook]]", "[prober]", "[[ingest.allow]]", "[retention]"]
)  # fmt: skip
KEYS = st.sampled_from(
    ["bind", "auth", "id", "url", "sla", "tier", "name", "period", "match", "hard_usd", "interval", "allow", "agents",
     "windows", "availability", "usage", "audit", "uid", "http", "http.tls", "sla.tier", "bogus", "secret"]
)  # fmt: skip


@given(st.lists(HEADERS | st.builds("{} = {}".format, KEYS, ATOMS), max_size=12).map("\n".join))
def test_any_toml_is_taken_or_refused_with_lines(text: str) -> None:
    """Nothing but ConfigError leaves, each problem has a line of the file, and a refusal stands when asked again."""
    found = outcome(text)
    assert found == outcome(text)
    lines = text.count("\n") + 1
    assert all(problem.line is not None and 1 <= problem.line <= lines for problem in found)
    assert all(problem.field and problem.reason for problem in found)


def outcome(text: str) -> list[Problem]:
    try:
        parse(text)
    except ConfigError as error:
        return error.problems
    return []


@given(st.integers(1, 10**5), st.sampled_from([("ms", 1000), ("s", SECOND_US), ("m", MINUTE_US), ("h", HOUR_US)]))
def test_a_duration_is_its_number_times_its_unit(number: int, unit: tuple[str, int]) -> None:
    config = parse(f'[sla]\nhold = "{number}{unit[0]}"')
    assert config.sla.hold_us == number * unit[1]


def test_an_agent_that_is_probed_needs_an_address_and_one_that_reports_by_itself_none() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('[[agents]]\nid = "urn:asap:agent:a"\n')
    (problem,) = caught.value.problems
    assert problem.field == "agents[0].url"
    assert 'health = "heartbeat"' in problem.reason
    silent = parse('[[agents]]\nid = "urn:asap:agent:a"\nhealth = "heartbeat"\n').agents[0]
    assert (silent.url, silent.health) == (None, "heartbeat")
