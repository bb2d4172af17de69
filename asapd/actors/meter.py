"""The meter: judges when events happened, prices them, and hands each report to the store as one unit."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import assert_never

import msgspec
import trio

from asapd import config
from asapd.actors.messages import (
    Idempotency,
    MeterMessage,
    ReconfigureMeter,
    Report,
    ReportMetrics,
    ReportSpans,
    ReportTask,
    VoidRequest,
)
from asapd.actors.set_aside import Aside, SetAside, Tokens
from asapd.actors.slow_reads import refusing_slow
from asapd.actors.telemetry import record_metrics
from asapd.actors.telemetry_spans import record_spans
from asapd.actors.telemetry_terms import Times
from asapd.core.access import Caller
from asapd.core.errors import FieldError, Refusal
from asapd.core.money import to_usd
from asapd.core.pricing import PriceTable
from asapd.core.types import DEFAULT_TENANT, Outcome, format_us
from asapd.core.usage import Cost, UsageEvent, content_digest, too_late
from asapd.runtime import mailbox
from asapd.runtime.clock import Clock
from asapd.store import horizon, usage_rows
from asapd.store.database import Database, UnitFailedError
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import (
    KeepHorizon,
    Recall,
    Recorded,
    RecordTask,
    RecordUsage,
    UsageConflict,
    UsageTooLate,
    VoidUsage,
)
from asapd.store.visibility import Visibility

# Messages other than plain reports in hand at once, each with a task of its own.
CONCURRENCY = 256
# Reports on their way to their commit. At 8 000 single events a second, the most that was measured, half a second of
# them; of large bodies the store's bound on bytes in flight lets far fewer through.
REPORTS_IN_FLIGHT = 4_096


@dataclass
class MeterSettings:
    """What the meter goes by. It outlives an incarnation, so that a restarted one uses the newest."""

    metering: config.Metering
    prices: PriceTable
    horizon_us: int = 0
    """Events from before this are too late. It never moves back, so that identity holds as long as it must."""
    set_aside: SetAside = field(default_factory=SetAside)
    """How spans compare with the metrics that they won over."""


def price(events: list[UsageEvent], prices: PriceTable, prefer: str) -> list[Cost]:
    """What each event cost."""
    return [prices.cost(event, prefer=prefer) for event in events]


def untimely(events: list[UsageEvent], horizon_us: int, latest_us: int) -> list[tuple[int, str]]:
    """The events that are too old to be told from resent ones, or that claim to come from the future, and why."""
    found = []
    for index, event in enumerate(events):
        if event.timestamp_us < horizon_us:
            found.append((index, too_late(horizon_us)))
        elif event.timestamp_us > latest_us:
            reason = f"is in the future: the newest time taken now is {format_us(latest_us)}; check the clock"
            found.append((index, reason))
    return found


def refuse_untimely(found: list[tuple[int, str]], places: list[int] | None) -> Refusal:
    """The refusal of a report some of whose events are untimely."""
    errors = tuple(FieldError("timestamp", reason, None if places is None else places[at]) for at, reason in found)
    return Refusal("invalid", f"nothing was recorded: timestamp {errors[0].reason}", errors[:100])


async def run_meter(
    inbox: trio.MemoryReceiveChannel[MeterMessage],
    *,
    database: Database,
    clock: Clock,
    settings: MeterSettings,
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve reports until the mailbox is closed."""
    newest_us = await database.read(usage_rows.newest_commit)
    _move_horizon(settings, max(newest_us, clock.now_us()))
    settings.horizon_us = max(settings.horizon_us, await database.read(horizon.edge))
    if not await database.read(horizon.is_kept, settings.metering.late_max_us):
        await _keep_horizon(database, settings)

    async def handle(message: MeterMessage) -> None:
        assert not isinstance(message, Report), "is passed on"
        match message:
            case ReportSpans() | ReportMetrics():
                _move_horizon(settings, now_us := clock.now_us())
                make = partial(_unit, message.caller, settings, now_us)
                compare = partial(_compare, settings.set_aside, now_us, log)
                times, counts = _times(settings, now_us), settings.metering.otlp.counts
                if isinstance(message, ReportSpans):
                    message.reply.send(await record_spans(message, database, make, times, compare, counts))
                else:
                    message.reply.send(await record_metrics(message, database, make, times, compare, counts))
            case ReportTask():
                message.reply.send(await _record_task(message, database, settings, clock.now_us()))
            case VoidRequest():
                caller = message.caller
                by = Visibility(caller.tenant, caller.agents)
                unit = VoidUsage(message.seq, message.reason, caller.actor, clock.now_us(), by)
                message.reply.send(await database.submit(unit, idempotency=message.idempotency))
            case ReconfigureMeter():
                _move_horizon(settings, clock.now_us())
                is_kept = settings.metering.late_max_us == message.metering.late_max_us
                settings.metering, settings.prices = message.metering, message.prices
                if not is_kept:
                    await _keep_horizon(database, settings)
                message.reply.send(None)
            case _:
                assert_never(message)

    def failed(message: MeterMessage, error: Exception) -> None:
        log.error("a %s could not be handled", type(message).__name__, exc_info=error)

    async with inbox, trio.open_nursery() as nursery:
        reports = _Reports(database, settings, clock, nursery, log)

        async def pass_on(message: MeterMessage) -> bool:
            if isinstance(message, Report):
                if not reports.gather(message):
                    await reports.take(message)
                return True
            await reports.send_gathered()
            return False

        task_status.started()
        try:
            await mailbox.serve(
                inbox,
                refusing_slow(handle, log),
                failed=failed,
                passes_on=pass_on,
                rests=reports.send_gathered,
                concurrency=CONCURRENCY,
                beat=beat,
            )
            await reports.wait_settled()
        finally:
            reports.close()


def _move_horizon(settings: MeterSettings, now_us: int) -> None:
    settings.horizon_us = max(settings.horizon_us, now_us - settings.metering.late_max_us)


async def _keep_horizon(database: Database, settings: MeterSettings) -> None:
    """Have the store remember the horizon, which a restart under another `late_max` must not move back.

    A store that cannot write now takes no events either; the next start tries again.
    """
    await database.submit(KeepHorizon(settings.horizon_us, settings.metering.late_max_us))


def _times(settings: MeterSettings, now_us: int) -> Times:
    metering = settings.metering
    return Times(settings.horizon_us, now_us + metering.clock_skew_max_us, metering.otlp.spans_win_us)


def _compare(
    set_aside: SetAside,
    now_us: int,
    log: logging.Logger,
    agents: Mapping[bytes, str],
    *,
    spans: Tokens,
    metrics: Sequence[Aside],
) -> None:
    for gap in set_aside.note(now_us, agents, spans=spans, metrics=metrics):
        log.warning(
            "spans of %s told of %d tokens, and the metrics that were set aside for them of %d: where traces are "
            'sampled, or some calls are not traced, have metrics counted (metering.otlp.counts = "metrics")',
            gap.agent,
            gap.spans,
            gap.metrics,
        )


def _unit(caller: Caller, settings: MeterSettings, now_us: int, events: list[UsageEvent]) -> RecordUsage:
    costs = price(events, settings.prices, settings.metering.pricing.prefer)
    contents = [content_digest(event) for event in events]
    tenant = caller.tenant or DEFAULT_TENANT
    return RecordUsage(
        tenant, caller.actor, now_us, events, costs, contents=contents, is_bound=caller.tenant is not None
    )


_Outcome = Recorded | UsageConflict | UsageTooLate | Refusal | UnitFailedError


class _Reports:
    """Reports on their way to their commit: no task waits for any of them, the store's answer ends their replies.

    Single events are gathered until `send_gathered`.
    """

    def __init__(
        self, database: Database, settings: MeterSettings, clock: Clock, nursery: trio.Nursery, log: logging.Logger
    ) -> None:
        self._database = database
        self._settings = settings
        self._clock = clock
        self._nursery = nursery
        self._log = log
        self._in_flight = 0
        self._settled = trio.lowlevel.ParkingLot()
        self._closed = False
        self._gathered: dict[tuple[str | None, str], list[Report]] = {}

    def gather(self, message: Report) -> bool:
        """Keep a single event, which shares a unit with others then; false for a report that has to have its own."""
        if not _stands_alone(message):
            return False
        caller = message.caller
        self._gathered.setdefault((caller.tenant, caller.actor), []).append(message)
        return True

    async def take(self, message: Report) -> None:
        """Refuse what came too late or too early, and send the rest to the store; waits while too much is in flight.

        What is refused for its time may be a repeat that was taken when it was in time: with an Idempotency-Key the
        store says so before it refuses.
        """
        now_us, settings = self._clock.now_us(), self._settings
        _move_horizon(settings, now_us)
        events = message.events
        latest_us = now_us + settings.metering.clock_skew_max_us
        places, late = message.places, []
        found = untimely(events, settings.horizon_us, latest_us)
        if found and not message.partial:
            refusal = refuse_untimely(found, places)
            if message.idempotency is None:
                message.reply.send(refusal)
            else:
                await self._post(message, Recall(refusal))
            return
        if found:
            assert places is not None, "a report in part says where its events stood"
            late = [(places[index], reason) for index, reason in found]
            left_out = {index for index, _ in found}
            events = [event for index, event in enumerate(events) if index not in left_out]
            places = [place for index, place in enumerate(places) if index not in left_out]
        await self.send_gathered()  # what came first goes first
        unit = msgspec.structs.replace(
            _unit(message.caller, settings, now_us, events),
            partial=message.partial,
            attribution=message.attribution,
            places=places if message.partial else None,
            late=late,
        )
        await self._post(message, unit)

    async def send_gathered(self) -> None:
        """Send the single events that were gathered, those of one caller as one unit, which costs each half as much."""
        while self._gathered:
            messages = self._timely(self._gathered.pop(next(iter(self._gathered))))
            if len(messages) > 1:
                await self._send_together(messages)
            elif messages:
                await self._send_alone(messages[0])

    def _timely(self, messages: list[Report]) -> list[Report]:
        """Single events without those that came too late or too early, which are refused."""
        now_us, settings = self._clock.now_us(), self._settings
        _move_horizon(settings, now_us)
        events = [message.events[0] for message in messages]
        found = dict(untimely(events, settings.horizon_us, now_us + settings.metering.clock_skew_max_us))
        for index, reason in found.items():
            messages[index].reply.send(refuse_untimely([(0, reason)], messages[index].places))
        return [message for index, message in enumerate(messages) if index not in found] if found else messages

    async def _send_alone(self, message: Report) -> None:
        try:
            await self._post(message, self._unit(message))
        except Exception as error:  # noqa: BLE001 -- one report must not stop the others
            self._log.error("a %s could not be handled", type(message).__name__, exc_info=error)
            message.reply.fail()
        except BaseException:
            message.reply.close()
            raise

    async def _send_together(self, messages: list[Report]) -> None:
        try:
            unit = msgspec.structs.replace(self._unit(*messages), partial=True, places=list(range(len(messages))))
            await self._send(unit, partial(self._settle_each, messages), len(messages))
        except Exception:  # noqa: BLE001 -- it happens again to the one whose it is
            await self._send_each(messages)
        except BaseException:
            for message in messages:
                message.reply.close()
            raise

    async def _send_each(self, messages: list[Report]) -> None:
        """Send reports one by one, in their order."""
        left = deque(messages)
        try:
            while left:
                await self._send_alone(left.popleft())
        finally:
            for message in left:
                message.reply.close()

    def _unit(self, *messages: Report) -> RecordUsage:
        events = [message.events[0] for message in messages]
        return _unit(messages[0].caller, self._settings, self._clock.now_us(), events)

    async def _post(self, message: Report, unit: RecordUsage | Recall) -> None:
        await self._send(unit, partial(self._settle, message), 1, message.idempotency)

    async def _send(
        self, unit: RecordUsage | Recall, settle: Callable[[_Outcome], None], count: int, key: Idempotency | None = None
    ) -> None:
        while self._in_flight >= REPORTS_IN_FLIGHT:
            await self._settled.park()
        self._in_flight += count
        try:
            await self._database.post(unit, settle, idempotency=key)
        except BaseException:
            self._in_flight -= count  # it never got on its way, so nobody settles it
            raise

    def _settle_each(self, messages: list[Report], outcome: _Outcome) -> None:
        """Tell each of the reports that went together what became of its event; who is left goes again, alone."""
        self._in_flight -= len(messages)
        self._settled.unpark_all()
        again: list[Report] = []
        match outcome:
            case Recorded(ids=ids, resent=[]) if len(ids) == len(messages):
                for message, event_id in zip(messages, ids, strict=True):
                    message.reply.send(_of_one(message, event_id, is_repeat=False))
            case Recorded(ids=ids, places=list(places), resent=resent, late=late):
                found, repeats, reasons = dict(zip(places, ids, strict=True)), set(resent), dict(late)
                for place, message in enumerate(messages):
                    if place in found:
                        message.reply.send(_of_one(message, found[place], is_repeat=place in repeats))
                    elif place in reasons:
                        message.reply.send(refuse_untimely([(0, reasons[place])], message.places))
                    else:
                        again.append(message)
            case Refusal(code=code) if code != "invalid":
                for message in messages:
                    message.reply.send(outcome)
            case _:
                again = messages  # of one that was refused or failed nobody knows which it was: nothing was written
        if again and not self._closed:
            self._nursery.start_soon(self._send_each, again)
            return
        for message in again:
            message.reply.close()

    def _settle(self, message: Report, outcome: _Outcome) -> None:
        self._in_flight -= 1
        self._settled.unpark_all()
        match outcome:
            case Recorded() | Refusal():
                message.reply.send(outcome)
            case UnitFailedError():
                self._log.error("a %s could not be handled", type(message).__name__, exc_info=outcome)
                message.reply.fail()
            case UsageTooLate(before_us=before_us, events=late):
                reason = too_late(before_us)
                message.reply.send(refuse_untimely([(index, reason) for index in late], message.places))
            case UsageConflict():
                if self._closed:
                    message.reply.close()
                else:
                    self._nursery.start_soon(self._explain, message, outcome)
            case _:
                assert_never(outcome)

    async def _explain(self, message: Report, conflict: UsageConflict) -> None:
        async def explain(message: Report) -> None:
            message.reply.send(await _explain_conflict(message, conflict, self._database))

        with message.reply:
            try:
                await refusing_slow(explain, self._log)(message)
            except Exception as error:  # noqa: BLE001 -- one report must not stop the others
                self._log.error("a conflict could not be explained", exc_info=error)
                message.reply.fail()

    async def wait_settled(self) -> None:
        """Return once nothing is in flight."""
        while self._in_flight:
            await self._settled.park()

    def close(self) -> None:
        """What the store answers from now on is passed on, but no conflict is explained any more."""
        self._closed = True
        for messages in self._gathered.values():
            for message in messages:
                message.reply.close()


def _of_one(message: Report, event_id: str, *, is_repeat: bool) -> Recorded:
    unprotected = not is_repeat and not message.events[0].id
    return Recorded(int(not is_repeat), int(is_repeat), int(unprotected), [event_id])


def _stands_alone(message: Report) -> bool:
    """Whether a report is one event that nothing but its identity connects with others: it may share their unit."""
    if len(message.events) != 1 or message.partial or message.idempotency or message.attribution:
        return False
    event = message.events[0]
    return event.delegation is None and event.reservation is None


def clash(event_id: str, *, was_reported: bool) -> str:
    """Why an event is refused whose id another has: one that was reported, or one before it in the request."""
    if was_reported:
        return f"{event_id} was reported before with other content"
    return f"{event_id} stands twice in this request with different content"


async def _explain_conflict(message: Report, outcome: UsageConflict, database: Database) -> Refusal:
    """Name the conflicting events, and show the stored ones to a caller who may read them."""
    errors = tuple(
        FieldError(
            "id",
            clash(message.events[index].id, was_reported=bool(seq)),
            None if message.places is None else message.places[index],
        )
        for index, seq in outcome.conflicts[:100]
    )
    index, seq = outcome.conflicts[0]
    extra = {"received": _shown(message.events[index]), "stored": None}
    if seq and message.caller.may_read(message.events[index].agent, message.events[index].consumer):
        extra["stored"] = await database.read(usage_rows.get_usage, seq)
    detail = f"nothing was recorded: {errors[0].reason}; give a new event a new id"
    return Refusal("usage_conflict", detail, errors, extra)


def _shown(event: UsageEvent) -> dict[str, object]:
    """An event by the names of a stored row, so that both can be laid side by side."""
    shown = {name: value for name in event.__struct_fields__ if (value := getattr(event, name)) not in (None, "")}
    for inner, outer in (("agent", "agent_id"), ("consumer", "consumer_id")):
        shown[outer] = shown.pop(inner)
    reported = shown.pop("reported_microusd", None)
    if reported is not None:
        shown["reported_cost_usd"] = to_usd(reported)
    del shown["timestamp_us"], shown["tells_tokens"]
    if shown.pop("is_action_assumed"):
        del shown["action"]
    return {**shown, "outcome": Outcome(event.outcome).name.lower(), "timestamp": format_us(event.timestamp_us)}


async def _record_task(
    message: ReportTask, database: Database, settings: MeterSettings, now_us: int
) -> RowWritten | Refusal:
    _move_horizon(settings, now_us)
    latest_us = now_us + settings.metering.clock_skew_max_us
    task = message.task
    if not settings.horizon_us <= task.timestamp_us <= latest_us:
        reason = f"must be between {format_us(settings.horizon_us)} and {format_us(latest_us)}"
        refusal = Refusal("invalid", f"nothing was recorded: timestamp {reason}", (FieldError("timestamp", reason),))
        if message.idempotency is None:
            return refusal
        repeated: RowWritten | Refusal = await database.submit(Recall(refusal), idempotency=message.idempotency)
        return repeated
    unit = RecordTask(task, message.caller.actor, message.caller.tenant or DEFAULT_TENANT, now_us)
    return await database.submit(unit, idempotency=message.idempotency)
