"""OTLP/HTTP: traces and metrics of agents that are instrumented with OpenTelemetry, as usage.

Source: the OTLP 1.x specification, section OTLP/HTTP.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio

from asapd import config
from asapd.actors.messages import ReportMetrics, ReportSpans, TelemetryRecorded
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.edge.asking import ask_actor
from asapd.edge.early import OTLP_PATHS, OTLP_TYPES, otlp_error
from asapd.edge.http.context import raw_body, require
from asapd.edge.http.parameters import RefusedError
from asapd.edge.json_body import foreign_charset
from asapd.edge.services import Services
from asapd.edge.unpacking import INLINE_BYTES
from asapd.runtime.ask import Reply
from asapd.wire.bodies import unpack
from asapd.wire.otlp import (
    CONTENT_TYPES,
    Encoding,
    OtlpSettings,
    encode_metrics_response,
    encode_traces_response,
    reasons,
)
from asapd.wire.otlp_metrics import MetricsOutcome, decode_metrics
from asapd.wire.otlp_spans import OtlpOutcome, decode_traces
from asapd.wire.problem import PROBLEM_JSON

T = TypeVar("T")

# What unpacks to more may take six times its size once it is decoded.
LARGE_BYTES: Final = 1_048_576
# As many are decoded and wait for their commits at once, whether their senders still wait for them or not: 100 MiB of
# those that are not large, 200 MiB of those that are as large as they may be. One of 48 000 spans takes some seconds,
# so two have their answers before anybody gives up.
MEDIUM_AT_ONCE: Final = 16
LARGE_AT_ONCE: Final = 2
# Who waits longer for others is told to come again, before anything of theirs is recorded.
TURN_S: Final = 15.0


class _Size(msgspec.Struct, frozen=True):
    """What exports that unpack to so many bytes at most share; small ones share nothing, and need no thread."""

    bound_bytes: int
    turns: trio.Semaphore | None = None
    # The decoders hold the GIL, so more at once would only take turns; large ones are not waited for.
    threads: trio.CapacityLimiter | None = None


class _Turn:
    """A turn, given back when whoever holds it is done: the request, and the meter with what the request exports."""

    def __init__(self, turns: trio.Semaphore | None) -> None:
        self._turns = turns
        self._holders = 1

    def hand_over(self) -> Callable[[Reply[Any]], None]:
        """Have it held by the meter as well, until the reply ends."""
        self._holders += 1
        return lambda _: self.leave()

    def leave(self) -> None:
        """One of the holders is done."""
        self._holders -= 1
        if self._turns is not None and not self._holders:
            self._turns.release()


def settings_of(otlp: config.Otlp) -> OtlpSettings:
    """The configured names of attributes and operations, as the decoders take them."""
    return OtlpSettings(
        agent=otlp.agent, consumer=otlp.consumer, task=otlp.task, project=otlp.project, inference=otlp.inference
    )


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    sizes = (
        _Size(INLINE_BYTES),
        _Size(LARGE_BYTES, trio.Semaphore(MEDIUM_AT_ONCE), trio.CapacityLimiter(1)),
        _Size(sys.maxsize, trio.Semaphore(LARGE_AT_ONCE), trio.CapacityLimiter(1)),
    )

    @app.after_request
    async def as_status(response: Response) -> Response:
        """Every error of these two routes, whoever made it, has the body that exporters understand."""
        if request.path in OTLP_PATHS and response.mimetype == PROBLEM_JSON:
            document = msgspec.json.decode(await response.get_data(as_text=False))
            content_type, body = otlp_error(document["code"], document["detail"], request.mimetype)
            response.set_data(body)
            response.content_type = content_type
        return response

    @asynccontextmanager
    async def decoded(decoder: Callable[..., T | Refusal]) -> AsyncIterator[tuple[T, Encoding, _Turn]]:
        """What the request exports, how it is written, and the turn that it has."""
        encoding = CONTENT_TYPES.get(request.mimetype)
        if encoding is None:
            detail = f"{request.mimetype or 'no content type'} is not taken: send {' or '.join(CONTENT_TYPES)}"
            raise RefusedError(Refusal("unsupported_media_type", detail))
        if encoding == "json" and (foreign := foreign_charset(request.content_type)) is not None:
            raise RefusedError(foreign)
        settings = services.settings()
        body, packed = await raw_body(), request.headers.get("Content-Encoding")
        names, most_bytes = settings_of(settings.metering.otlp), settings.metering.otlp.max_body_bytes

        def within(bound_bytes: int) -> T | Refusal:
            plain = unpack(body, packed, bound_bytes)
            return plain if isinstance(plain, Refusal) else decoder(plain, encoding, names)

        # Nobody knows what a body unpacks to before it has: it is tried as a small one first, for a part of the price.
        # That of much that is packed is high even where it is nothing that it unpacks to.
        for size in sizes:
            bound_bytes = min(size.bound_bytes, most_bytes)
            if len(body) > bound_bytes < most_bytes:
                continue
            async with _turn(size) as turn:
                if size.threads is None:
                    found = within(bound_bytes)
                else:
                    found = await trio.to_thread.run_sync(within, bound_bytes, limiter=size.threads)
                if isinstance(found, Refusal):
                    if found.code == "too_large" and bound_bytes < most_bytes:
                        continue
                    raise RefusedError(found)
                yield found, encoding, turn
                return

    @app.post("/v1/traces")
    async def post_traces() -> Response:
        caller = require(Permission.INGEST)
        async with decoded(decode_traces) as (outcome, encoding, turn):
            own, rejected = _own(caller, outcome.spans, lambda span: span.event.agent)
            recorded: TelemetryRecorded | Refusal = TelemetryRecorded(0, 0, [])
            if own or outcome.links:
                recorded = await ask_actor(
                    services.mailboxes.meter,
                    lambda reply: ReportSpans(caller, own, outcome.links, reply),
                    then=turn.hand_over(),
                )
            if isinstance(recorded, Refusal):
                raise RefusedError(recorded)
            rejected += recorded.rejected
            return _reply(encode_traces_response, outcome, rejected, recorded.notes, encoding)

    @app.post("/v1/metrics")
    async def post_metrics() -> Response:
        caller = require(Permission.INGEST)
        async with decoded(decode_metrics) as (outcome, encoding, turn):
            own, rejected = _own(caller, outcome.points, lambda point: point.of.agent)
            recorded: TelemetryRecorded | Refusal = TelemetryRecorded(0, 0, [])
            if own:
                recorded = await ask_actor(
                    services.mailboxes.meter,
                    lambda reply: ReportMetrics(caller, own, reply),
                    then=turn.hand_over(),
                )
            if isinstance(recorded, Refusal):
                raise RefusedError(recorded)
            rejected += recorded.rejected
            return _reply(encode_metrics_response, outcome, rejected, recorded.notes, encoding)


@asynccontextmanager
async def _turn(size: _Size) -> AsyncIterator[_Turn]:
    """One of the turns of a size, waited for a while."""
    if size.turns is not None:
        with trio.move_on_after(TURN_S) as waiting:
            await size.turns.acquire()
        if waiting.cancelled_caught:
            detail = f"other exports are being recorded, and this one waited {TURN_S:.0f} s for them in vain"
            raise RefusedError(
                Refusal("overloaded", f"{detail}: nothing of it was recorded, send it again", retry_after_s=5)
            )
    turn = _Turn(size.turns)
    try:
        yield turn
    finally:
        turn.leave()


def _own(caller: Caller, found: list[T], agent_of: Callable[[T], str]) -> tuple[list[T], list[str]]:
    """What is of agents that the caller may report for, and a reason for each of the others."""
    own = [one for one in found if caller.may_touch(agent_of(one))]
    if len(own) == len(found):
        return own, []
    others = [agent_of(one) for one in found if not caller.may_touch(agent_of(one))]
    return own, [f"{agent} is not one that this caller may report for" for agent in others]


def _reply(
    encode: Callable[[int, str, Encoding], bytes],
    outcome: OtlpOutcome | MetricsOutcome,
    rejected: list[str],
    notes: Iterable[str],
    encoding: Encoding,
) -> Response:
    """The success of an export, `partial_success` if something of it was left out, or there is something to tell."""
    message = "; ".join(text for text in (outcome.message, reasons(rejected), *notes) if text)
    return Response(encode(outcome.rejected + len(rejected), message, encoding), 200, content_type=OTLP_TYPES[encoding])
