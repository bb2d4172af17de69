"""Routes of revocation: the signed list of all that is revoked here, and the lists of others."""

from __future__ import annotations

from quart import Response, request
from quart_trio import QuartTrio

from asapd.actors.messages import ImportRevocationList
from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.core.types import MAX_INT
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, require_everything, sent_json
from asapd.edge.http.parameters import Parameters
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services

_SHOWN = 100
_WHOLE = -1


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/delegations/revocations")
    async def get_revocations() -> Response:
        require_everything(Permission.READ)
        parameters = Parameters()
        since = parameters.number("since", _WHOLE, 0, MAX_INT)
        parameters.done()
        found = await (services.revocations.current() if since == _WHOLE else services.revocations.since(since))
        if _matches(request.headers.get("If-None-Match"), found.etag):
            # Without a body Quart makes one that needs asyncio.
            response = Response(b"", 304, content_type="application/json")
            del response.headers["Content-Length"]
        else:
            response = Response(found.body, content_type="application/json")
        response.headers["ETag"] = found.etag
        # Whoever keeps it asks each time whether it still holds.
        response.headers["Cache-Control"] = "private, no-cache"
        return response

    @app.post("/delegations/revocations")
    async def post_revocations() -> Response:
        caller = require_everything(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        key = idempotency(caller, body, services.clock.now_us())
        outcome = await ask_actor(services.mailboxes.registry, lambda to: ImportRevocationList(caller, body, key, to))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        return reply(
            {
                "status": "imported",
                "issuer": outcome.signer,
                "key_id": outcome.key_id,
                "number": outcome.number,
                "entries": outcome.entries,
                "added": outcome.added,
                "known": outcome.known,
                "expired": outcome.expired,
                "revoked": outcome.revoked,
                "count": len(outcome.revoked),
                "not_allowed": len(outcome.not_allowed),
                "not_allowed_entries": [
                    {"issuer": issuer, "id": token} for issuer, token in outcome.not_allowed[:_SHOWN]
                ],
            }
        )


def _matches(header: str | None, etag: str) -> bool:
    """Whether `If-None-Match` names a tag (RFC 9110 section 13.1.2, which compares weakly)."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags
