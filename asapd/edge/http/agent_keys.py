"""Routes of public keys: the agents' as the daemon knows them, and the daemon's own."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from asapd.actors.messages import ImportKeyRequest, RetireKeyRequest
from asapd.actors.slow_reads import after_commit
from asapd.config.values import duration_between
from asapd.core.access import Caller, Permission
from asapd.core.agent_keys import AgentKey, verifying
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import AGENT_URN, DAY_US, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, require, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, bad_parameter, decode_body, page_from
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.keys import KeyFormatError, jwk_thumbprint, load_public, public_base64, public_jwk
from asapd.wire.problem import encode_json

# A verifier that holds the list longer than this may meet a checkpoint by a key it has not seen.
_JWKS_MAX_AGE_S = 300
# As the configuration bounds it.
MAX_OVERLAP_US = 400 * DAY_US


class NewAgentKey(msgspec.Struct, forbid_unknown_fields=True):
    """A public key of an agent that is to be imported."""

    public_key: Annotated[str, msgspec.Meta(min_length=1, max_length=8192)]


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    prober = services.mailboxes.prober

    async def known(caller: Caller, agent: str) -> list[AgentKey] | None:
        """An agent's keys; None where the caller may not know of it. An agent has keys without being in the
        directory, which then is nobody's but the host's."""
        if not caller.may_touch(agent):
            return None
        keys = await services.reads.agents.keys(agent)
        listed = await services.reads.agents.directory(caller, agent)
        return keys if listed or (caller.tenant is None and keys) else None

    async def rows_of(caller: Caller, agent: str) -> list[dict[str, Any]]:
        keys = await known(caller, agent) or []
        now_us = services.clock.now_us()
        tofu = services.settings().delegation.manifest_keys == "tofu"
        fresh = verifying(keys, issued_at_us=now_us, now_us=now_us, believe_manifests=tofu)
        aged = verifying(keys, issued_at_us=0, now_us=now_us, believe_manifests=tofu)
        return [_row(key, fresh, aged, now_us) for key in keys]

    async def shown(caller: Caller, agent: str) -> dict[str, Any]:
        rows = await rows_of(caller, agent)
        return {"agent": agent, "data": rows, "count": len(rows), "next_cursor": None}

    def keeps_root(caller: Caller, agent: str) -> Refusal | None:
        """The refusal of a change of a listed root's keys by who may neither sign nor administer."""
        is_root = agent in services.settings().delegation.roots
        if not is_root or caller.may_sign or caller.may(Permission.ADMINISTER):
            return None
        detail = f"{agent} begins chains, so its keys are changed by an admin, or by a key with the right to sign"
        return Refusal("forbidden", detail)

    @app.get("/agents/<agent>/keys")
    async def get_agent_keys(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit, after = parameters.limit(), parameters.cursor(int) or 0
        parameters.done()
        if await known(caller, agent) is None:
            return refuse(_unknown(agent))
        return reply({"agent": agent, **page_from(await rows_of(caller, agent), limit, after)})

    @app.post("/agents/<agent>/keys")
    async def post_agent_key(agent: str) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, NewAgentKey)
        if AGENT_URN.match(agent) is None:
            raise RefusedError(_invalid("agent", "must be a URN of the form urn:asap:agent:<name>"))
        try:
            public_key = load_public(sent.public_key)
        except KeyFormatError as error:
            raise RefusedError(_invalid("public_key", str(error))) from None
        if not caller.matches(agent):
            return refuse(Refusal("forbidden", f"this key may not act for {agent}"))
        if caller.tenant is not None and await known(caller, agent) is None:
            return refuse(_unknown(agent))
        if (refusal := keeps_root(caller, agent)) is not None:
            return refuse(refusal)
        key = idempotency(caller, body, services.clock.now_us())
        is_bound = caller.tenant is not None
        outcome = await ask_actor(
            prober, lambda to: ImportKeyRequest(agent, public_key, caller.actor, key, to, is_bound)
        )
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        with after_commit():
            return reply(await shown(caller, agent), 201 if outcome.changed else 200)

    @app.delete("/agents/<agent>/keys/<kid>")
    async def delete_agent_key(agent: str, kid: str) -> Response:
        caller = require(Permission.OPERATE)
        parameters = Parameters()
        overlap = parameters.text("overlap")
        parameters.done()
        if await known(caller, agent) is None:
            return refuse(_unknown(agent))
        if (refusal := keeps_root(caller, agent)) is not None:
            return refuse(refusal)
        overlap_us = None if overlap is None else _overlap_us(overlap)
        outcome = await ask_actor(prober, lambda to: RetireKeyRequest(agent, kid, overlap_us, caller.actor, to))
        with after_commit():
            return reply(outcome if isinstance(outcome, Refusal) else await shown(caller, agent))

    @app.get("/.well-known/jwks.json")
    async def get_jwks() -> Response:
        now_us = services.clock.now_us()
        own = await services.reads.agents.keys(services.manifest()["id"])
        # The newest first: what is signed now is what a verifier asks for most.
        keys = [
            key.public_key
            for key in sorted(own, key=lambda key: -key.since_us)
            if key.source == "identity" and (key.state == "active" or key.is_retiring(now_us))
        ]
        body = encode_json({"keys": [public_jwk(key) for key in keys]})
        response = Response(body, content_type="application/jwk-set+json")
        response.headers["Cache-Control"] = f"public, max-age={_JWKS_MAX_AGE_S}"
        response.set_etag(hashlib.sha256(body).hexdigest()[:32])
        return await response.make_conditional(request)


def _row(key: AgentKey, fresh: frozenset[bytes], aged: frozenset[bytes], now_us: int) -> dict[str, Any]:
    verifies = "none"
    if key.state == "active" and key.public_key in fresh:
        verifies = "all"
    elif key.is_retiring(now_us) and key.public_key in aged:
        verifies = "older"
    return {
        "kid": jwk_thumbprint(key.public_key),
        "public_key": public_base64(key.public_key),
        "source": key.source,
        "state": "retiring" if key.is_retiring(now_us) else key.state,
        "verifies": verifies,
        "since": format_us(key.since_us),
        "retired_at": None if key.retired_us is None else format_us(key.retired_us),
        "until": None if key.until_us is None else format_us(key.until_us),
    }


def _overlap_us(text: str) -> int:
    try:
        return duration_between(0, MAX_OVERLAP_US)(text)
    except ValueError as error:
        raise bad_parameter("overlap", str(error)) from None


def _unknown(agent: str) -> Refusal:
    return Refusal("agent_not_found", f"nothing is known of an agent {agent}: check the id")


def _invalid(field: str, reason: str) -> Refusal:
    return Refusal("invalid", f"no key was imported: {field} {reason}", (FieldError(field, reason),))
