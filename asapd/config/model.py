"""Every setting of the file, with its default: the only place where defaults live.

A field is named after its unit (`interval_us`) and carries the name it has in the file as alias
(`interval`). Checks that involve more than one field are in `asapd.config.checks`.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from asapd.config import values
from asapd.config.values import MILLISECOND_US, Bind
from asapd.core.flapping import MEMORY
from asapd.core.rates import Rate
from asapd.core.types import DAY_US, DEFAULT_TENANT, HOUR_US, MAX_INT, MINUTE_US, SECOND_US

T = TypeVar("T")

# Loops never spin faster than this, however the file is written.
_TICK_US = 10 * MILLISECOND_US


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Many = Annotated[tuple[T, ...], BeforeValidator(_as_tuple)]
Duration = Annotated[int, PlainValidator(values.read_duration)]
Tick = Annotated[int, PlainValidator(values.duration_between(_TICK_US))]
Window = Annotated[int, PlainValidator(values.duration_between(MINUTE_US, 30 * DAY_US))]
Kept = Annotated[int, PlainValidator(values.duration_between(SECOND_US))]
KeptOrForever = Annotated[int | None, PlainValidator(values.read_duration_or_forever)]
Size = Annotated[int, PlainValidator(values.read_size)]
Percent = Annotated[Decimal, PlainValidator(values.read_percent)]
Usd = Annotated[int, PlainValidator(values.read_usd)]
Mode = Annotated[int, PlainValidator(values.read_mode)]
Path = Annotated[FilePath, PlainValidator(values.read_path)]
Address = Annotated[Bind, PlainValidator(values.read_bind)]
Network = Annotated[IPv4Network | IPv6Network | Literal["host"], PlainValidator(values.read_network)]
Urn = Annotated[str, AfterValidator(values.check_urn)]
AgentPattern = Annotated[str, AfterValidator(values.check_agent_pattern)]
Name = Annotated[str, AfterValidator(values.check_name)]
Text = Annotated[str, AfterValidator(values.check_text)]
MaskPattern = Annotated[str, AfterValidator(values.check_mask)]
Host = Annotated[str, AfterValidator(values.check_host)]
Origin = Annotated[str, AfterValidator(values.check_origin)]
AgentUrl = Annotated[str, AfterValidator(values.check_agent_url)]
WebhookUrl = Annotated[str, AfterValidator(values.check_webhook_url)]
PublicKey = Annotated[str, AfterValidator(values.check_public_key)]
Hours = Annotated[str, AfterValidator(values.check_support_hours)]
TimeZone = Annotated[str, AfterValidator(values.check_timezone)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Severity = Literal["warning", "critical"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tls(_Section):
    """Certificate and key of the HTTP door; with `client_ca_file`, clients need a certificate of that authority."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None


class Http(_Section):
    """The HTTP door."""

    bind: Many[Address] = Field(default=(Bind("tcp", host="127.0.0.1", port=8727),), min_length=1)
    auth: Literal["keys", "none"] = "keys"
    max_body_bytes: Size = Field(default=8 * 2**20, alias="max_body")
    allowed_hosts: Many[Host] = ()
    allowed_origins: Many[Origin] = ()
    tls: Tls | None = None


class Admin(_Section):
    """The admin socket; without `socket` it is `admin.sock` in the runtime directory."""

    socket: Path | None = None
    mode: Mode = 0o660
    group: Name | None = None


class IngestAllow(_Section):
    """What one local user or group may report: exactly one of the four names it."""

    uid: Annotated[int, Field(ge=0, le=2**32 - 2)] | None = None
    gid: Annotated[int, Field(ge=0, le=2**32 - 2)] | None = None
    user: Name | None = None
    group: Name | None = None
    agents: Many[AgentPattern] = Field(min_length=1)


class Ingest(_Section):
    """The ingest socket, `ingest.sock` in the runtime directory unless named, and the fast lane on TCP."""

    socket: Path | None = None
    mode: Mode = 0o660
    group: Name | None = None
    bind: Many[Address] = ()
    allow: Many[IngestAllow] = ()


class Limits(_Section):
    """Bounds against exhaustion."""

    max_connections: int = Field(default=4096, ge=1, le=1_000_000)
    # Half of it is room for four reports of the largest size at once, where those of up to 64 KiB need none; the other
    # half for two exports.
    max_buffered_bytes: Size = Field(default=64 * 2**20, alias="max_buffered")
    rate_per_key: Annotated[Rate, PlainValidator(values.read_rate)] | None = None
    rate_burst: int = Field(default=100, ge=1, le=1_000_000)


class Store(_Section):
    """How commits are made durable and shared."""

    synchronous: Literal["full", "normal"] = "full"
    # Measured: beyond some five thousand rows a commit gains nothing and holds up everybody behind it.
    group_commit_max: int = Field(default=5_000, ge=1, le=100_000)
    group_commit_wait_us: Annotated[int, PlainValidator(values.duration_between(0, SECOND_US))] = Field(
        default=0, alias="group_commit_wait"
    )


class Pricing(_Section):
    """The price table, and which figure counts when an event is both priced and reported."""

    file: Path | None = None
    prefer: Literal["priced", "reported"] = "priced"


class Otlp(_Section):
    """How OpenTelemetry is read: the attributes that name whom usage is of, best first, and when spans win.

    `counts` leaves a whole signal out: traces that are sampled tell of a part of the calls. `inference` are operations
    that are calls of a model, besides those that are known.
    """

    agent: Many[Name] = ("asap.agent.id", "gen_ai.agent.id", "gen_ai.agent.name", "service.name")
    consumer: Many[Name] = ("asap.consumer.id", "enduser.id", "user.id", "enduser.pseudo.id")
    task: Many[Name] = ("asap.task.id",)
    project: Many[Name] = ("asap.project",)
    inference: Many[Name] = ()
    counts: Literal["both", "spans", "metrics"] = "both"
    spans_win_us: Duration = Field(default=HOUR_US, alias="spans_win")
    # Spans with the content of conversations have some 20 kB each, and SDKs send 512 at once. What is made to be dear
    # takes 27 times its size to decode, one at a time.
    max_body_bytes: Size = Field(default=16 * 2**20, alias="max_body")


class CloudEvents(_Section):
    """The types of CloudEvents whose data is a usage event, besides `asap.usage`."""

    types: Many[Name] = ()


class Metering(_Section):
    """Which usage events are taken."""

    clock_skew_max_us: Duration = Field(default=5 * MINUTE_US, alias="clock_skew_max")
    late_max_us: Duration = Field(default=7 * DAY_US, alias="late_max")
    task_timeout_us: Kept = Field(default=DAY_US, alias="task_timeout")
    pricing: Pricing = Pricing()
    otlp: Otlp = Otlp()
    cloudevents: CloudEvents = CloudEvents()


class Prober(_Section):
    """How agents are probed. `jitter_percent` spreads each interval by up to that share either way.

    `flapping_after` 0: no agent is ever called flapping. `unhealthy_within` None: only failures in a row count.
    """

    interval_us: Tick = Field(default=30 * SECOND_US, alias="interval")
    timeout_us: Tick = Field(default=5 * SECOND_US, alias="timeout")
    jitter_percent: Percent = Field(default=Decimal(10), alias="jitter")
    healthy_after: int = Field(default=1, ge=1, le=1_000)
    unhealthy_after: int = Field(default=2, ge=1, le=1_000)
    unhealthy_within: int | None = Field(default=None, ge=1, le=MEMORY)
    flapping_after: int = Field(default=6, ge=0, le=MEMORY)
    settled_after: int = Field(default=12, ge=1, le=MEMORY)
    manifest_interval_us: Tick = Field(default=5 * MINUTE_US, alias="manifest_interval")
    allow: Many[Network] = ("host",)

    @property
    def allow_host(self) -> bool:
        """Whether loopback and the host's own networks may be reached."""
        return "host" in self.allow

    @property
    def allow_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks that may be reached besides."""
        return tuple(network for network in self.allow if network != "host")


class SlaTerms(_Section):
    """What an agent promises; a term left out is not promised."""

    availability_percent: Percent | None = Field(default=None, alias="availability")
    max_latency_p95_ms: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    max_error_rate_percent: Percent | None = Field(default=None, alias="max_error_rate")
    support_hours: Hours | None = None


class SlaTier(SlaTerms):
    """A promise with a name, for agents to refer to."""

    name: Name


class SlaCredit(_Section):
    """What is given back of a period's cost when availability was below a percentage."""

    below_percent: Percent = Field(alias="below")
    credit_percent: Percent = Field(alias="credit")


class Sla(_Section):
    """How promises are judged. `default_tier` names the tier of agents that have no SLA."""

    windows_us: Many[Window] = Field(default=(HOUR_US, DAY_US, 7 * DAY_US, 30 * DAY_US), alias="windows", min_length=1)
    breach_window_us: Window = Field(default=HOUR_US, alias="breach_window")
    min_samples: int = Field(default=20, ge=1, le=MAX_INT)
    hold_us: Duration = Field(default=0, alias="hold")
    evaluate_every_us: Tick = Field(default=SECOND_US, alias="evaluate_every")
    default_tier: Name | None = None
    tiers: Many[SlaTier] = Field(default=(), alias="tier")
    credits: Many[SlaCredit] = Field(default=(), alias="credit")


class RevocationSource(_Section):
    """Another daemon whose signed lists are believed, and the agents whose delegations it may revoke."""

    public_key: PublicKey
    issuers: Many[AgentPattern] = Field(min_length=1)


class Delegation(_Section):
    """Which chains of delegation are believed. `keys_dir` holds the keys the daemon signs with.

    `manifest_keys`: whether the first key that an agent's manifests are signed with is taken for its own, or none is.
    """

    max_depth: int = Field(default=8, ge=1, le=64)
    roots: Many[Urn] = ()
    keys_dir: Path | None = None
    manifest_keys: Literal["tofu", "strict"] = "tofu"
    key_overlap_us: Annotated[int, PlainValidator(values.duration_between(0, 400 * DAY_US))] = Field(
        default=DAY_US, alias="key_overlap"
    )
    reservation_ttl_us: Annotated[int, PlainValidator(values.duration_between(_TICK_US, 30 * DAY_US))] = Field(
        default=60 * SECOND_US, alias="reservation_ttl"
    )
    max_reservation_ttl_us: Annotated[int, PlainValidator(values.duration_between(_TICK_US, 30 * DAY_US))] = Field(
        default=HOUR_US, alias="max_reservation_ttl"
    )
    revocation_sources: Many[RevocationSource] = Field(default=(), alias="revocation_source")


class BudgetMatch(_Section):
    """Which work a budget counts: all that fits every key given; without any, all work on the host."""

    agent: AgentPattern | None = None
    consumer: Text | None = None
    project: Text | None = None
    delegation: Text | None = None


class Budget(_Section):
    """A limit for a calendar period: soft ones alert, hard ones refuse."""

    name: Name
    match: BudgetMatch = BudgetMatch()
    period: Literal["day", "week", "month"]
    timezone: TimeZone = "UTC"
    soft_microusd: Usd | None = Field(default=None, alias="soft_usd")
    hard_microusd: Usd | None = Field(default=None, alias="hard_usd")
    soft_tokens: Count | None = None
    hard_tokens: Count | None = None
    soft_tasks: Count | None = None
    hard_tasks: Count | None = None


class _PushTarget(_Section):
    name: Name | None = None
    events: Many[Literal["opened", "escalated", "resolved"]] = Field(
        default=("opened", "escalated", "resolved"), min_length=1
    )
    min_severity: Severity = "warning"
    retry_for_us: Kept = Field(default=DAY_US, alias="retry_for")


class Webhook(_PushTarget):
    """Where breach alerts are posted; with `secret_file` they are signed."""

    url: WebhookUrl
    secret_file: Path | None = None
    format: Literal["asapd", "alertmanager"] = "asapd"

    @property
    def target(self) -> str:
        """What it is called: its name, else one that shows the host alone, for the path may be a secret."""
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        return self.name or f"{urlsplit(self.url).hostname}-{digest}"


class Command(_PushTarget):
    """A program that is run for each alert, with the alert on its standard input."""

    argv: Many[Text] = Field(min_length=1)
    timeout_us: Tick = Field(default=10 * SECOND_US, alias="timeout")

    @property
    def target(self) -> str:
        """What it is called: its name, else the program's."""
        return self.name or FilePath(self.argv[0]).name


class Alerts(_Section):
    """Who is told of breaches, besides live subscribers and the log; `allow` None is as the prober's."""

    allow: Many[Network] | None = None
    webhooks: Many[Webhook] = Field(default=(), alias="webhook")
    commands: Many[Command] = Field(default=(), alias="command")


class Witness(_Section):
    """Another daemon that is shown every checkpoint, at the URL before `/add-checkpoint`, and signs it with its key."""

    url: WebhookUrl
    public_key: PublicKey


class WitnessedLog(_Section):
    """Another daemon whose checkpoints are signed here."""

    public_key: PublicKey


class Audit(_Section):
    """The audit log."""

    enabled: bool = True
    checkpoint_every_us: Annotated[int, PlainValidator(values.duration_between(_TICK_US, DAY_US))] = Field(
        default=60 * SECOND_US, alias="checkpoint_every"
    )
    verify_every_us: Annotated[int, PlainValidator(values.duration_between(_TICK_US, 30 * DAY_US))] = Field(
        default=HOUR_US, alias="verify_every"
    )
    witnesses: Many[Witness] = Field(default=(), alias="witness")
    witness_for: Many[WitnessedLog] = ()
    witness_file: Path | None = None
    witness_command: Many[Text] = ()
    former_keys: Many[PublicKey] = ()
    mask: Annotated[Many[MaskPattern], Field(max_length=16)] = ()


class Retention(_Section):
    """How long records are kept; `audit_us` None is forever."""

    usage_us: Kept = Field(default=400 * DAY_US, alias="usage")
    probes_us: Kept = Field(default=35 * DAY_US, alias="probes")
    alerts_us: Kept = Field(default=400 * DAY_US, alias="alerts")
    audit_us: KeptOrForever = Field(default=None, alias="audit")


class Agent(_Section):
    """An agent of the directory. Terms in `sla` win over those of `tier`.

    `health`: it is probed, or reports by itself; then it needs no `url`.
    """

    id: Urn
    url: AgentUrl | None = None
    health: Literal["probe", "heartbeat"] = "probe"
    public_key: PublicKey | None = None
    sla: SlaTerms | None = None
    tier: Name | None = None
    tenant: Name = DEFAULT_TENANT


class Config(_Section):
    """The whole file. Make one with `asapd.config.parse`, which also checks what involves several fields."""

    state_dir: Path | None = None
    http: Http = Http()
    admin: Admin = Admin()
    ingest: Ingest = Ingest()
    limits: Limits = Limits()
    store: Store = Store()
    metering: Metering = Metering()
    prober: Prober = Prober()
    sla: Sla = Sla()
    delegation: Delegation = Delegation()
    budgets: Many[Budget] = Field(default=(), alias="budget")
    alerts: Alerts = Alerts()
    audit: Audit = Audit()
    retention: Retention = Retention()
    agents: Many[Agent] = ()
