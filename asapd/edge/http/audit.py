"""Routes of the audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.reads import AuditFilter
from asapd.core.access import Permission
from asapd.core.canonical import LARGEST_WRITTEN, canonical
from asapd.core.errors import Refusal
from asapd.core.types import MAX_INT, format_us
from asapd.edge.http.context import raw_body, require_everything, sent_json
from asapd.edge.http.parameters import Parameters, bad_parameter, decode_body, encode_cursor
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.audit_export import FORMATS
from asapd.wire.keys import public_base64
from asapd.wire.signed_note import NoteMalformedError
from asapd.wire.tlog_proof import write_proof
from asapd.wire.witness import SIZE_TYPE, read_request

EXPORT_PAGE = 500
"""Entries in memory of one export; reading and writing them out takes some milliseconds."""

_PLAIN = "text/plain; charset=utf-8"


class Erasure(msgspec.Struct, forbid_unknown_fields=True):
    """Whose traces are to be erased, and why."""

    consumer: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


class Vouching(msgspec.Struct, forbid_unknown_fields=True):
    """Why somebody vouches for what nobody signed."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/audit/logs")
    async def get_logs() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        limit = parameters.limit()
        descending = parameters.choice("order", ("asc", "desc"), "asc") == "desc"
        filters = _filters(parameters)
        after = parameters.cursor(int)
        parameters.done()
        rows, at = await services.reads.audit.entries(filters, limit=limit, after=after, descending=descending)
        return reply({"data": rows, "count": len(rows), "next_cursor": None if at is None else encode_cursor(at)})

    @app.get("/audit/export")
    async def get_audit_export() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        name = parameters.choice("format", FORMATS, "ndjson") or "ndjson"
        filters = _filters(parameters)
        parameters.done()
        head, _ = await services.reads.audit.head()
        first, last = await services.reads.audit.span(filters)
        form = FORMATS[name]()

        async def parts() -> AsyncIterator[bytes]:
            yield form.begin()
            after, through = first - 1, min(last, head)
            while after < through:
                page = await services.reads.audit.page(filters, after, through, EXPORT_PAGE, form.rows)
                yield page.data
                after = page.last
            yield form.end()

        response = Response(parts(), content_type=form.content_type)
        response.headers["Asapd-Snapshot"] = str(head)
        response.headers["Content-Disposition"] = f'attachment; filename="audit.{name}"'
        response.timeout = None
        return response

    @app.post("/audit/erase")
    async def post_erase() -> Response:
        caller = require_everything(Permission.ADMINISTER)
        parameters = Parameters()
        dry_run = parameters.flag("dry_run")
        parameters.done()
        body = decode_body(await sent_json(), Erasure)
        return reply(await services.erase(body.consumer, body.reason, caller.actor, dry_run))

    @app.post("/audit/vouch")
    async def post_vouch() -> Response:
        caller = require_everything(Permission.ADMINISTER)
        parameters = Parameters()
        dry_run = parameters.flag("dry_run")
        parameters.done()
        body = decode_body(await sent_json(), Vouching)
        return reply(await services.verifier.vouch(body.reason, caller.actor, dry_run=dry_run))

    @app.get("/audit/logs/<entry>")
    async def get_entry(entry: str) -> Response:
        require_everything(Permission.READ_ALL)
        Parameters().done()
        found = await services.reads.audit.entry(entry)
        if found is None:
            return refuse(Refusal("entry_not_found", f"there is no audit entry {entry}: check the id"))
        return reply(found)

    @app.get("/audit/checkpoint")
    async def get_checkpoint() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        size = parameters.number("size", 0, 1, MAX_INT) if parameters.text("size") else None
        form = parameters.choice("format", ("note", "json"), "note")
        parameters.done()
        sealed = await services.sealer.current() if size is None else await services.sealer.sealed_at(size)
        if isinstance(sealed, Refusal):
            return refuse(sealed)
        if form == "note":
            return Response(await services.sealer.noted(sealed), content_type=_PLAIN)
        return reply(
            {
                "origin": services.sealer.origin,
                "size": sealed.size,
                "root_hash": sealed.root.hex(),
                "sealed_at": format_us(sealed.sealed_us),
                "public_key": public_base64(services.sealer.public_key),
                "note": await services.sealer.noted(sealed),
            }
        )

    @app.post("/witness/add-checkpoint")
    async def post_add_checkpoint() -> Response:
        try:
            asked = read_request(await raw_body())
        except NoteMalformedError as error:
            return refuse(Refusal("malformed", f"the body {error}"))
        answer = await services.witnesses.add(asked)
        if isinstance(answer, Refusal):
            return refuse(answer)
        if isinstance(answer, str):
            return Response(answer, content_type=_PLAIN)
        return Response(f"{answer.size}\n", 409, content_type=SIZE_TYPE)

    @app.get("/audit/proof/inclusion")
    async def get_inclusion() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        entry = parameters.text("id")
        form = parameters.choice("format", ("json", "tlog-proof"), "json")
        parameters.done()
        if entry is None:
            raise bad_parameter("id", "must be the id or the number of an entry")
        proof = await services.sealer.inclusion(entry)
        if isinstance(proof, Refusal):
            return refuse(proof)
        if form == "json":
            return reply(proof)
        hashes = [bytes.fromhex(node) for node in proof["hashes"]]
        entry_text = canonical(proof["entry"], largest=LARGEST_WRITTEN)
        text = write_proof(proof["leaf_index"], hashes, proof["checkpoint"], entry_text)
        return Response(text, content_type=_PLAIN)

    @app.get("/audit/proof/consistency")
    async def get_consistency() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        if parameters.text("from") is None:
            raise bad_parameter("from", "must be the size that the log had")
        first = parameters.number("from", 0, 0, MAX_INT)
        second = parameters.number("to", 0, 0, MAX_INT) if parameters.text("to") else None
        parameters.done()
        return reply(await services.sealer.consistency(first, second))


def _filters(parameters: Parameters) -> AuditFilter:
    start_us, end_us = parameters.period_us()
    return AuditFilter(
        actor=parameters.text("actor"),
        subject=parameters.text("subject"),
        event_type=parameters.text("event_type"),
        task=parameters.text("task", "task_id"),
        agent=parameters.text("agent", "agent_id"),
        start_us=start_us,
        end_us=end_us,
    )
