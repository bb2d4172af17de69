"""Operations of the daemon itself."""

from __future__ import annotations

from asapd.edge.description.operation import (
    ADMINISTER,
    BINARY,
    JSON,
    OBJECT,
    READ,
    READ_ALL,
    TEXT,
    Answer,
    Operation,
    made,
    page,
    reference,
    shows,
)
from asapd.edge.description.queries import DRY_RUN, PAGE
from asapd.edge.http.admin import NewKey

_PAGE = Answer(200, "A page", {"text/html": TEXT})

OPERATIONS = (
    Operation("GET /healthz", "Whether the process answers", (), (shows(),)),
    Operation(
        "GET /readyz", "Whether every actor is up", (), (shows(OBJECT, "All are"), shows(OBJECT, "Not yet", status=503))
    ),
    Operation("GET /.well-known/asap/health", "asapd's own health", (), (shows(),)),
    Operation("GET /.well-known/asap/manifest.json", "asapd's own manifest", (), (shows(),)),
    Operation(
        "GET /.well-known/jwks.json",
        "asapd's own public keys",
        (),
        (Answer(200, "A JSON Web Key Set", {"application/jwk-set+json": OBJECT}),),
    ),
    Operation("GET /openapi.json", "This description", (), (shows(),)),
    Operation("GET /asyncapi.json", "The description of what is live, in AsyncAPI 3.0", (), (shows(),)),
    Operation("GET /docs", "This description as a page", (), (_PAGE,)),
    Operation("GET /", "The page of figures", (), (_PAGE,)),
    Operation(
        "GET /web/{name}",
        "A part of a page",
        (),
        (Answer(200, "The part", {"text/html": TEXT, "text/javascript": TEXT, "text/css": TEXT}),),
    ),
    Operation("POST /login", "A one-time address that opens the page", READ, (made(),)),
    Operation(
        "GET /login",
        "Open the page with a one-time address",
        (),
        (Answer(303, "To the page, with the cookie of a session", {}),),
        {"token": TEXT},
        frozenset({"token"}),
    ),
    Operation("DELETE /login", "End the session of the page", (), (shows(OBJECT, "Whether there was one"),)),
    Operation("GET /status", "How the daemon is", READ_ALL, (shows(reference("Status")),)),
    Operation(
        "GET /metrics",
        "Metrics in OpenMetrics",
        READ_ALL,
        (Answer(200, "The metrics", {"application/openmetrics-text": BINARY}),),
    ),
    Operation("GET /keys", "List API keys", ADMINISTER, (page(),), PAGE),
    Operation(
        "POST /keys",
        "Make an API key, which is shown this once",
        ADMINISTER,
        (made(),),
        body={JSON: NewKey},
        idempotency_key=True,
    ),
    Operation("DELETE /keys/{key}", "Revoke an API key", ADMINISTER, (shows(OBJECT, "It was revoked"),)),
    Operation("GET /config", "The configuration in force, without secrets", READ_ALL, (shows(),)),
    Operation(
        "GET /config/diff",
        "What a reload of the file would change, or an earlier version of it",
        READ_ALL,
        (shows(),),
        {"version": {"type": "integer", "minimum": 1}},
    ),
    Operation("GET /config/versions", "The versions of the file that were accepted", READ_ALL, (page(),), PAGE),
    Operation("GET /config/versions/{version}", "The text of a version, as it was written", ADMINISTER, (shows(),)),
    Operation("POST /reload", "Read the configuration again", ADMINISTER, (shows(OBJECT, "What was applied"),)),
    Operation(
        "POST /retention",
        "Take what is past its time; a dry run takes a reader, the rest an admin",
        READ_ALL,
        (shows(OBJECT, "What went"),),
        DRY_RUN,
    ),
    Operation(
        "POST /backup",
        "A copy of the database as it is now",
        ADMINISTER,
        (Answer(200, "The copy", {"application/vnd.sqlite3": BINARY}),),
    ),
    Operation(
        "POST /actors/{actor}/restart",
        "Start an actor afresh",
        ADMINISTER,
        (shows(OBJECT, "It was", status=202),),
    ),
)
