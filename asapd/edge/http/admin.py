"""Routes of administration: keys, reload, actors. The admin socket leads here, and admin keys."""

from __future__ import annotations

from typing import Annotated

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import CreateKeyRequest, RevokeKeyRequest
from asapd.core.access import Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import Role, format_us, may_match_an_agent
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, no_body, require_everything, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page_from
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services

_Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """An API key that is to be made."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    role: Role
    agents: Annotated[list[_Pattern], msgspec.Meta(min_length=1, max_length=64)] = msgspec.field(
        default_factory=lambda: ["*"]
    )
    tenant: Annotated[str, msgspec.Meta(min_length=1, max_length=128)] | None = None
    sign: bool = False


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    gatekeeper = services.mailboxes.gatekeeper

    @app.post("/keys")
    async def post_key() -> Response:
        caller = require_everything(Permission.ADMINISTER)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, NewKey)
        if not sent.name.isprintable():
            error = FieldError("name", "may hold printable characters and spaces only")
            raise RefusedError(Refusal("invalid", f"no key was made: name {error.reason}", (error,)))
        bad = next((pattern for pattern in sent.agents if "*" in pattern[:-1]), None)
        if bad is not None:
            error = FieldError("agents", f"{bad}: a * may stand at the end only")
            raise RefusedError(Refusal("invalid", f"no key was made: agents {error.reason}", (error,)))
        strange = [pattern for pattern in sent.agents if not may_match_an_agent(pattern)]
        if strange and sent.role is Role.INGEST:
            reason = f"{strange[0]} matches no agent: an agent's name has the form urn:asap:agent:<name>"
            raise RefusedError(Refusal("invalid", f"no key was made: {reason}", (FieldError("agents", reason),)))
        repeated = idempotency(caller, body, services.clock.now_us())
        outcome = await ask_actor(
            gatekeeper,
            lambda to: CreateKeyRequest(
                caller, sent.name, sent.role, tuple(sent.agents), sent.tenant, sent.sign, to, repeated
            ),
        )
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        shown = {"id": outcome.key.id, "name": outcome.key.name, "role": outcome.key.role, "agents": outcome.key.agents}
        # A consumer may have any name, so who reads may be given one.
        notes = [f"{pattern} matches no agent, only consumers: agents are urn:asap:agent:<name>" for pattern in strange]
        return reply({**shown, "notes": notes, "key": outcome.secret}, 201)

    @app.get("/keys")
    async def get_keys() -> Response:
        require_everything(Permission.ADMINISTER)
        parameters = Parameters()
        limit, after = parameters.limit(), parameters.cursor(int) or 0
        parameters.done()
        keys = await services.reads.keys()
        rows = [
            {
                "id": key.id,
                "name": key.name,
                "role": key.role,
                "agents": key.agents,
                "tenant": key.tenant,
                "sign": key.may_sign,
                "created_at": format_us(key.created_us),
                "revoked_at": None if key.revoked_us is None else format_us(key.revoked_us),
            }
            for key in keys
        ]
        return reply(page_from(rows, limit, after))

    @app.delete("/keys/<key>")
    async def delete_key(key: str) -> Response:
        caller = require_everything(Permission.ADMINISTER)
        Parameters().done()
        outcome = await ask_actor(gatekeeper, lambda to: RevokeKeyRequest(caller, key, to))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        return reply({"id": outcome.id, "name": outcome.name, "revoked": True})

    @app.post("/reload")
    async def post_reload() -> Response:
        caller = require_everything(Permission.ADMINISTER)
        Parameters().done()
        await no_body()
        return reply(await services.reload(caller.actor))

    @app.post("/actors/<actor>/restart")
    async def post_restart(actor: str) -> Response:
        caller = require_everything(Permission.ADMINISTER)
        Parameters().done()
        await no_body()
        if not await services.restart_actor(actor, caller.actor):
            return refuse(Refusal("actor_not_found", f"there is no running actor {actor}: see the status"))
        return reply({"restarted": actor}, 202)
