"""Operations of agents, their service levels, and alerts."""

from __future__ import annotations

from asapd.edge.description.operation import (
    EVENTS,
    INGEST,
    JSON,
    OBJECT,
    OPERATE,
    READ,
    READ_ALL,
    TEXT,
    Answer,
    Operation,
    made,
    one_of,
    page,
    reference,
    shows,
)
from asapd.edge.description.queries import (
    AGENT,
    BREACHES,
    FLAG,
    HISTORY,
    LAST_EVENT,
    MIN_SEVERITY,
    OFFSET,
    PAGE,
    PERIOD,
    SEARCH,
    WINDOW,
    named,
)
from asapd.edge.http.agent_keys import NewAgentKey
from asapd.edge.http.agent_life import Heartbeat, PauseReason
from asapd.edge.http.agents import NewAgent
from asapd.edge.http.alerts import Acknowledgement, NewSilence
from asapd.edge.http.breach_groups import Acknowledgements
from asapd.edge.http.maintenance import NewMaintenance

_EXPLAIN = {"explain": {**FLAG, "description": "say how each figure came about"}}
_UPGRADE = Answer(101, "A WebSocket that speaks JSON-RPC 2.0", {})

OPERATIONS = (
    Operation("GET /agents", "Search the directory", READ, (page(reference("Agent")),), {**SEARCH, **PAGE, **OFFSET}),
    Operation(
        "POST /agents",
        "Add an agent, or change it",
        OPERATE,
        (made(reference("Agent")), shows(reference("Agent"), "It was changed")),
        body={JSON: NewAgent},
        idempotency_key=True,
    ),
    Operation("GET /agents/{agent}", "Show an agent", READ, (shows(reference("Agent")),), WINDOW),
    Operation("DELETE /agents/{agent}", "Remove an agent", OPERATE, (shows(OBJECT, "It was removed"),)),
    Operation(
        "POST /agents/{agent}/pause",
        "Stop asking and judging an agent",
        OPERATE,
        (shows(OBJECT, "Its state"),),
        body={JSON: PauseReason},
        may_be_empty=True,
    ),
    Operation(
        "POST /agents/{agent}/resume",
        "Ask and judge an agent again",
        OPERATE,
        (shows(OBJECT, "Its state"),),
        body={JSON: PauseReason},
        may_be_empty=True,
    ),
    Operation(
        "POST /agents/{agent}/heartbeat",
        "Report how the agent is, by itself",
        INGEST,
        (shows(OBJECT, "Its state, and until when that holds"),),
        body={JSON: Heartbeat},
        may_be_empty=True,
    ),
    Operation("GET /agents/{agent}/history", "What happened to an agent, the newest first", READ, (page(),), PAGE),
    Operation("GET /agents/{agent}/manifests", "List the versions of its manifest", READ, (page(),), PAGE),
    Operation("GET /agents/{agent}/manifests/{digest}", "Show a version of its manifest", READ, (shows(),)),
    Operation("GET /agents/{agent}/keys", "List its public keys", READ, (page(),), PAGE),
    Operation(
        "POST /agents/{agent}/keys",
        "Import a public key",
        OPERATE,
        (made(OBJECT, "Its keys"), shows(OBJECT, "It was there before")),
        body={JSON: NewAgentKey},
        idempotency_key=True,
    ),
    Operation(
        "DELETE /agents/{agent}/keys/{kid}",
        "Retire a public key, or dismiss a claimed one",
        OPERATE,
        (shows(OBJECT, "Its keys"),),
        {"overlap": named("how long it still verifies older tokens, such as 24h or 0s")},
    ),
    Operation(
        "GET /agents/{agent}/health",
        "Its state, uptime, transitions and probes",
        READ,
        (page(),),
        {**PERIOD, **WINDOW, **PAGE},
    ),
    Operation(
        "GET /agents/{agent}/sla",
        "How an agent keeps its promise",
        READ,
        (shows(reference("ServiceLevel")),),
        {**WINDOW, **_EXPLAIN},
    ),
    Operation(
        "GET /agents/{agent}/sla/history", "Its figures of the past", READ, (page(reference("Figures")),), HISTORY
    ),
    Operation(
        "GET /agents/{agent}/sla/breaches", "Its breaches", READ, (page(reference("Breach")),), {**BREACHES, **PAGE}
    ),
    Operation(
        "GET /agents/{agent}/sla/penalty",
        "The credit for a month's availability",
        READ,
        (shows(),),
        {"period": named("a month, such as 2026-11")},
    ),
    Operation(
        "GET /sla",
        "How all agents keep their promises",
        READ,
        (page(reference("ServiceLevel")),),
        {**AGENT, **WINDOW, **_EXPLAIN, **PAGE, **OFFSET},
    ),
    Operation(
        "GET /sla/history",
        "Figures of the past, agent by agent",
        READ,
        (page(reference("Figures")),),
        {**AGENT, **HISTORY},
    ),
    Operation("GET /sla/breaches", "Breaches", READ, (page(reference("Breach")),), {**AGENT, **BREACHES, **PAGE}),
    Operation("GET /breaches/{breach}/evidence", "What a breach was judged on, signed", READ, (shows(),)),
    Operation(
        "POST /breaches/{breach}/ack",
        "Acknowledge an open breach",
        OPERATE,
        (made(OBJECT, "It was acknowledged"), shows(OBJECT, "Somebody had")),
        body={JSON: Acknowledgement},
        may_be_empty=True,
        idempotency_key=True,
    ),
    Operation(
        "GET /breaches/groups",
        "Breaches put together",
        READ,
        (page(),),
        {"group_by": named("any of agent, type and severity, joined by commas"), **AGENT, **BREACHES, **PAGE, **OFFSET},
    ),
    Operation(
        "POST /breaches/ack",
        "Acknowledge all open breaches that fit",
        OPERATE,
        (shows(OBJECT, "Those that nobody had"),),
        body={JSON: Acknowledgements},
    ),
    Operation(
        "GET /silences",
        "List silences",
        READ,
        (page(),),
        {"expired": {**FLAG, "description": "those of the last month too"}, **PAGE, **OFFSET},
    ),
    Operation(
        "POST /silences",
        "Keep alerts from being pushed for a while",
        OPERATE,
        (made(),),
        body={JSON: NewSilence},
        idempotency_key=True,
    ),
    Operation("DELETE /silences/{silence}", "End a silence", OPERATE, (shows(OBJECT, "It was ended"),)),
    Operation("GET /alerts/targets", "How webhooks and commands do", READ_ALL, (page(),), PAGE),
    Operation(
        "GET /alerts/dead-letters",
        "List what targets did not take",
        READ_ALL,
        (page(),),
        {"target": TEXT, **PAGE},
    ),
    Operation(
        "POST /alerts/dead-letters/{letter}/redeliver",
        "Have a dead letter delivered again",
        OPERATE,
        (shows(OBJECT, "It will be", status=202),),
    ),
    Operation(
        "GET /maintenance",
        "List maintenance",
        READ,
        (page(),),
        {**AGENT, "state": one_of("planned", "running", "over"), **PAGE},
    ),
    Operation(
        "POST /maintenance",
        "Take time out of the figures",
        OPERATE,
        (made(),),
        body={JSON: NewMaintenance},
        idempotency_key=True,
    ),
    Operation("DELETE /maintenance/{window}", "End maintenance now, or call it off", OPERATE, (shows(),)),
    Operation(
        "GET /events",
        "Follow alerts as server-sent events",
        READ,
        (Answer(200, "Server-sent events `sla.breach`, `gap`, `goodbye`", {EVENTS: TEXT}),),
        {**AGENT, **MIN_SEVERITY, **LAST_EVENT},
    ),
    Operation("GET /ws", "Follow alerts and delegations over a WebSocket", READ, (_UPGRADE,)),
    Operation("GET /asap/ws", "The same, for clients of the reference implementation", READ, (_UPGRADE,)),
)
