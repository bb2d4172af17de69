"""Operations of the audit log."""

from __future__ import annotations

from asapd.edge.description.operation import (
    ADMINISTER,
    JSON,
    NDJSON,
    OBJECT,
    READ_ALL,
    TEXT,
    Answer,
    Operation,
    Shape,
    one_of,
    page,
    reference,
    shows,
)
from asapd.edge.description.queries import AGENT, DRY_RUN, NUMBER, ORDER, PAGE, PERIOD, TASK, formats, named
from asapd.edge.http.audit import Erasure, Vouching

_NOTE = "text/plain"
_FILTERS = {"actor": TEXT, "subject": TEXT, "event_type": TEXT, **TASK, **AGENT, **PERIOD}
_VERIFYING = {
    "since": named("number of an entry, or a time: only what is behind it"),
    "reconcile": {**one_of("true", "false"), "default": "true"},
    **formats("json", "ndjson"),
}
_VERDICT = (Answer(200, "The verdict, as lines with the progress before it", {JSON: OBJECT, NDJSON: TEXT}),)
_CHECKPOINTS: dict[str, Shape] = {_NOTE: TEXT}

OPERATIONS = (
    Operation("GET /audit/logs", "List entries", READ_ALL, (page(reference("Entry")),), {**_FILTERS, **ORDER, **PAGE}),
    Operation("GET /audit/logs/{entry}", "Show an entry, by id or number", READ_ALL, (shows(reference("Entry")),)),
    Operation("GET /audit/verify", "Walk the log", READ_ALL, _VERDICT, _VERIFYING),
    Operation(
        "POST /audit/verify",
        "Walk the log, and hold it to checkpoints that were kept elsewhere",
        READ_ALL,
        _VERDICT,
        _VERIFYING,
        body=_CHECKPOINTS,
    ),
    Operation(
        "GET /audit/export",
        "Export entries, as a stream",
        READ_ALL,
        (Answer(200, "The entries", {JSON: OBJECT, NDJSON: TEXT, "text/csv": TEXT, _NOTE: TEXT}),),
        {**_FILTERS, **formats("ndjson", "json", "csv", "syslog")},
    ),
    Operation(
        "POST /audit/erase",
        "Erase what is kept of one consumer",
        ADMINISTER,
        (shows(OBJECT, "What went"),),
        DRY_RUN,
        body={JSON: Erasure},
    ),
    Operation(
        "POST /audit/vouch",
        "Vouch for entries that explain gaps, which older builds did not sign",
        ADMINISTER,
        (shows(OBJECT, "For which"),),
        DRY_RUN,
        body={JSON: Vouching},
    ),
    Operation(
        "GET /audit/checkpoint",
        "A signed checkpoint of the log",
        READ_ALL,
        (Answer(200, "A signed note (C2SP), or its parts", {_NOTE: TEXT, JSON: OBJECT}),),
        {"size": NUMBER, **formats("note", "json")},
    ),
    Operation(
        "GET /audit/proof/inclusion",
        "What proves that an entry is in the log",
        READ_ALL,
        (Answer(200, "The proof", {JSON: OBJECT, _NOTE: TEXT}),),
        {"id": named("id or number of the entry"), **formats("json", "tlog-proof")},
        frozenset({"id"}),
    ),
    Operation(
        "GET /audit/proof/consistency",
        "What proves that the log only grew",
        READ_ALL,
        (shows(),),
        {"from": NUMBER, "to": {**NUMBER, "description": "the size now, unless given"}},
        frozenset({"from"}),
    ),
    Operation(
        "GET /audit/pack",
        "A signed evidence pack of an agent and a period",
        READ_ALL,
        (shows(),),
        {**AGENT, **PERIOD},
        frozenset({"agent", "start"}),
    ),
    Operation(
        "POST /witness/add-checkpoint",
        "Sign the checkpoint of another daemon (C2SP tlog-witness)",
        (),
        (
            Answer(200, "The signature", {_NOTE: TEXT}),
            Answer(409, "The size that was seen", {"text/x.tlog.size": TEXT}),
        ),
        body=_CHECKPOINTS,
    ),
)
