"""Operations of delegations and reservations."""

from __future__ import annotations

from asapd.edge.decisions import AuthorizationRequest
from asapd.edge.description.operation import (
    INGEST,
    JSON,
    OBJECT,
    OPERATE,
    READ,
    TEXT,
    Answer,
    Operation,
    made,
    one_of,
    page,
    reference,
    shows,
)
from asapd.edge.description.queries import AGENT, NUMBER, PAGE, TASK, named
from asapd.edge.http.delegations import NewDelegation, TokenQuestion
from asapd.edge.http.reservations import Extension, Refund, Settlement
from asapd.wire.problem import PROBLEM_JSON

_RESERVATION = shows(reference("Reservation"), "The reservation as it is now")

OPERATIONS = (
    Operation(
        "POST /delegations",
        "Issue a delegation with a key that the daemon holds, which takes an operator, or register a token",
        INGEST + OPERATE,
        (made(reference("Issued")), shows(reference("Issued"), "It was registered before")),
        body={JSON: NewDelegation},
        idempotency_key=True,
    ),
    Operation(
        "GET /delegations",
        "List delegations",
        READ,
        (page(reference("Delegation")),),
        {"delegator": TEXT, "delegate": TEXT, "state": one_of("active", "revoked", "expired"), **PAGE},
    ),
    Operation(
        "GET /delegations/{delegation}",
        "Show a delegation; limit and cursor page through spend_by_task",
        READ,
        (shows(reference("Delegation")),),
        PAGE,
    ),
    Operation(
        "DELETE /delegations/{delegation}",
        "Revoke a delegation and all its descendants",
        OPERATE,
        (shows(OBJECT, "What is revoked"),),
        {"reason": {**TEXT, "maxLength": 1000}},
    ),
    Operation(
        "POST /delegations/validate",
        "Say whether a token holds, reserving nothing",
        INGEST + READ,
        (shows(reference("TokenVerdict"), "The verdict"),),
        body={JSON: TokenQuestion},
    ),
    Operation(
        "POST /delegations/authorize",
        "Ask for a reservation",
        INGEST,
        (
            shows(reference("Authorization"), "A reservation was made"),
            Answer(403, "Denied, or not permitted", {PROBLEM_JSON: reference("Denial")}),
        ),
        body={JSON: AuthorizationRequest},
        idempotency_key=True,
    ),
    Operation(
        "GET /delegations/revocations",
        "The signed list of what is revoked, with an ETag",
        READ,
        (shows(), Answer(304, "It is the same as before", {})),
        {"since": {**NUMBER, "description": "only what came behind this number of the list"}},
    ),
    Operation(
        "POST /delegations/revocations",
        "Take in the signed list of another",
        OPERATE,
        (shows(OBJECT, "What came of it"),),
        body={JSON: OBJECT},
        idempotency_key=True,
    ),
    Operation(
        "GET /reservations",
        "List reservations, the newest first",
        READ,
        (page(reference("Reservation")),),
        {
            "state": one_of("open", "settled", "released", "expired"),
            "delegation": TEXT,
            **AGENT,
            "delegate": named("another name for agent"),
            **TASK,
            **PAGE,
        },
    ),
    Operation(
        "GET /reservations/{reservation}",
        "Show a reservation",
        INGEST + READ,
        (shows(reference("Reservation")),),
    ),
    Operation(
        "POST /reservations/{reservation}/settle",
        "Close a reservation",
        INGEST,
        (_RESERVATION,),
        body={JSON: Settlement},
        may_be_empty=True,
        idempotency_key=True,
    ),
    Operation(
        "POST /reservations/{reservation}/extend",
        "Prolong a reservation",
        INGEST,
        (_RESERVATION,),
        body={JSON: Extension},
        may_be_empty=True,
        idempotency_key=True,
    ),
    Operation(
        "POST /reservations/{reservation}/refund",
        "Give back what was spent",
        OPERATE,
        (_RESERVATION,),
        body={JSON: Refund},
        idempotency_key=True,
    ),
    Operation(
        "DELETE /reservations/{reservation}",
        "Give back what a reservation holds; under a revoked delegation also for operators of those who delegated",
        INGEST + OPERATE,
        (_RESERVATION,),
    ),
)
