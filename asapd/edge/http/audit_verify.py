"""The route that verifies the audit log, whole or on from an entry, with progress for who wants it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, assert_never

import trio
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.verifier import Progress, Report
from asapd.core.access import Permission
from asapd.core.errors import FieldError, Refusal
from asapd.edge.http.context import raw_body, require_everything
from asapd.edge.http.parameters import Parameters, RefusedError
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.checkpoint import read_checkpoint, split_checkpoints
from asapd.wire.problem import encode_json, problem, status_of
from asapd.wire.signed_note import NoteMalformedError


def register(app: QuartTrio, services: Services) -> None:
    """Add the route."""

    @app.get("/audit/verify")
    async def get_verify() -> Response:
        require_everything(Permission.READ_ALL)
        return await verified(())

    @app.post("/audit/verify")
    async def post_verify() -> Response:
        require_everything(Permission.READ_ALL)
        # A file of many takes about a second of Python: in a thread, so that the loop goes on meanwhile.
        return await verified(await trio.to_thread.run_sync(_remembered, await raw_body()))

    async def verified(remembered: tuple[str, ...]) -> Response:
        parameters = Parameters()
        given = parameters.text("since")
        if given is not None and given.isascii() and given.isdecimal() and len(given) < 18:
            since = int(given)
        else:
            since_us = parameters.time_us("since")
            since = 0 if since_us is None else await services.verifier.entry_before(since_us)
        reconciles = parameters.choice("reconcile", ("true", "false"), "true") == "true"
        form = parameters.choice("format", ("json", "ndjson"), "json")
        parameters.done()
        if form == "ndjson":
            response = Response(_told(services, since, remembered, reconciles), content_type="application/x-ndjson")
            response.timeout = None
            return response
        found = await services.verifier.verify(since, remembered, reconcile=reconciles)
        return refuse(found) if isinstance(found, Refusal) else reply(_shown(found, len(remembered)))


def _remembered(body: bytes) -> tuple[str, ...]:
    """The checkpoints of a body, one behind the other; who signed them is for the walk to say."""
    notes: list[str] = []
    try:
        for text in split_checkpoints(body.decode().splitlines(keepends=True)):
            read_checkpoint(text)
            notes.append(text)
    except UnicodeDecodeError:
        reason = "is not text"
    except NoteMalformedError as error:
        reason = f"{error} (number {len(notes) + 1} of what is in it)"
    else:
        if notes:
            return tuple(notes)
        reason = "holds no checkpoint"
    detail = f"the body {reason}: send checkpoints as they were written, one or many"
    raise RefusedError(Refusal("invalid", detail, (FieldError("body", reason),)))


async def _told(services: Services, since: int, remembered: tuple[str, ...], reconciles: bool) -> AsyncIterator[bytes]:
    """Progress as lines, then the verdict, or the problem document of a refusal."""
    async with aclosing(services.verifier.steps(since, remembered, reconcile=reconciles)) as steps:
        async for step in steps:
            match step:
                case Progress():
                    shown = {"verified": step.verified, "entries": step.entries}
                case Report():
                    shown = _shown(step, len(remembered))
                case Refusal():
                    shown = problem(step, status=status_of(step.code))
                case _:
                    assert_never(step)
            yield encode_json(shown) + b"\n"  # noqa: ASYNC119 -- Trio ends a generator that is left


def _shown(found: Report, remembered: int) -> dict[str, Any]:
    walk, fault = found.walk, found.walk.fault
    return {
        "valid": found.is_valid,
        "verified": walk.verified,
        "erased": walk.erased,
        "since": found.since,
        "last_seq": walk.seq,
        "last_hash": walk.hash.hex(),
        "first_bad": None if fault is None else {"seq": fault.seq, "id": fault.id, "reason": fault.reason},
        "checkpoints": {"held": found.held, "remembered": remembered},
        "reconciled": None
        if found.tallies is None
        else {
            tally.table: {
                "rows": tally.rows,
                "entries": tally.entries,
                "retired": tally.retired,
                "erased": tally.erased,
                "findings": tally.findings,
                "named": list(tally.named),
            }
            for tally in found.tallies
        },
        "note": "what was entered after the last checkpoint, and then cut off, can only be seen by comparing with a "
        "copy kept elsewhere",
    }
