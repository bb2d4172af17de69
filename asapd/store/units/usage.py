"""Units of usage and tasks: what is recorded, corrected, retired and added up."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.core.errors import Refusal
from asapd.core.repricing import Correction
from asapd.core.usage import Cost, UsageEvent
from asapd.store.units.unit import RowWritten, Taken, Unit
from asapd.store.visibility import EVERYTHING, Visibility


class UsageConflict(msgspec.Struct, frozen=True, tag=True):
    """Events whose identity is already taken by other content: index in the request, and the stored row's number."""

    conflicts: list[tuple[int, int]]


class UsageTooLate(msgspec.Struct, frozen=True, tag=True):
    """New events from before `before_us`, up to which retention took events with their identities: their indices.

    Nobody can tell any more whether they were recorded before.
    """

    before_us: int
    events: list[int]


class Attribution(msgspec.Struct, frozen=True):
    """What a report was made under: the delegation of a token that came with it, by its id where it is known here.

    `code` and `detail` say why the token allows nothing; `token_id` is what it calls itself, as far as it can be read.
    """

    delegation: str | None
    token_id: str | None
    code: str | None = None
    detail: str | None = None


class Recorded(msgspec.Struct, frozen=True, tag=True):
    """What became of a batch. `ids` is in the order of the request, duplicates included.

    `unauthorised` of the new ones were done without permission. `conflicts` are events, each by its index, with the row
    that has its identity. Where the unit had `places`, this has those of `ids`, and events are told by their places.

    Of telemetry `covered` are the places of spans that do not count, for others of their traces do, and `set_aside`
    has for resources the ids and tokens of events of metrics that do not count, for spans tell of the same calls.
    """

    recorded: int
    duplicates: int
    unprotected: int
    ids: list[str]
    conflicts: list[tuple[int, int]] = []
    unauthorised: int = 0
    places: list[int] | None = None
    late: list[tuple[int, str]] = []
    resent: list[int] = []
    covered: list[int] = []
    set_aside: list[tuple[bytes, str, int]] = []


class RecordUsage(Unit[Recorded | UsageConflict | UsageTooLate], frozen=True):
    """Record events once each: rows, rollups, ledger and audit entries together.

    With `partial` the conflicting events, and with `places` those that come too late, are left out instead of refusing
    the whole. An `attribution` is no part of what the client says of an event, so a repeat under another token is still
    a repeat. `places` says where in the request each event stood, and `late` which others were left out for their time
    and why: both come back, `late` with what is left out here, so that a repeat of the request is answered alike when
    other events are late. `contents` are the events' `content_digest`s, made by who has time for it: in the daemon,
    beside the writer. Without them the writer makes them. With `is_bound` events debit only delegations of which one
    side is of the tenant.
    """

    tenant: str
    actor: str
    now_us: int
    events: list[UsageEvent]
    costs: list[Cost]
    partial: bool = False
    attribution: Attribution | None = None
    places: list[int] | None = None
    late: list[tuple[int, str]] = []
    contents: list[bytes] = []
    is_bound: bool = False


class Recall(Unit[Any], frozen=True):
    """Refuse, unless the request's Idempotency-Key was answered before: then that answer comes first."""

    refusal: Refusal


class StreamValue(msgspec.Struct, frozen=True, array_like=True):
    """The last point of a cumulative stream: tokens and calls from `start_ns` to `time_ns`."""

    start_ns: int
    time_ns: int
    value: int
    calls: int


class StreamChanged(msgspec.Struct, frozen=True, array_like=True):
    """A cumulative stream went on from one value, None if it is new, to the next."""

    stream: bytes
    before: StreamValue | None
    after: StreamValue


class CollectionPart(msgspec.Struct, frozen=True, array_like=True):
    """What one point added to its collection; `is_void` once an operator voided the event that it was counted in."""

    bucket: str
    tokens: int
    calls: int
    is_void: bool = False


class CollectionChanged(msgspec.Struct, frozen=True, array_like=True):
    """A collection of points got parts, by their streams: `before` what it had, None if it is new.

    `event` is the place of its event in the unit's usage, which takes the place of the one before.
    """

    key: bytes
    resource: bytes
    rank: int
    time_us: int
    event: int
    before: dict[bytes, CollectionPart] | None
    after: dict[bytes, CollectionPart]


class SpanFact(msgspec.Struct, frozen=True, array_like=True):
    """Which span an event is of: trace id (16 bytes) and span id (8).

    With `gives_way` it counts only while no span below it does that has tokens, or none of them has. `told_of` is the
    resource that told tokens by it, be it 0, empty where it told none: while it counts, it is evidence.
    """

    span: bytes
    gives_way: bool
    told_of: bytes = b""


class Evidence(msgspec.Struct, frozen=True, array_like=True):
    """A resource told of its usage at a time, by spans or metrics of a rank: near it those of a lower one are void."""

    resource: bytes
    rank: int
    time_us: int


class StreamsMoved(msgspec.Struct, frozen=True, tag=True):
    """Another export moved a stream or a collection in between: read it again and make the events anew."""


class RecordTelemetry(Unit[Recorded | UsageConflict | UsageTooLate | StreamsMoved], frozen=True):
    """Record usage that OpenTelemetry reported, together with what has to be remembered of the export.

    `spans` are of the events, one each, or none at all; `links` as in `wire.otlp_spans`. Evidence, `evidence` and that
    of spans, holds for `near_us` before and after its time; with `spans_ended`, when spans are counted no longer, that
    of spans ends with the last of them. What was last heard of before `forget_before_us` is dropped; it is 0 where
    another part of the same export may still go by that. `by` is who reports: see `asapd.store.superseding`.
    """

    usage: RecordUsage
    forget_before_us: int
    near_us: int = 0
    streams: list[StreamChanged] = []
    collections: list[CollectionChanged] = []
    evidence: list[Evidence] = []
    spans: list[SpanFact] = []
    links: list[tuple[bytes, bytes]] = []
    by: Visibility = EVERYTHING
    spans_ended: bool = False

    @property
    def is_narrow(self) -> bool:
        """Whether who reports may not do so for every agent."""
        return "*" not in self.by.agents


class Voided(msgspec.Struct, frozen=True, tag=True):
    """A void: the id and row of the compensating event, and the id of the event that counts no longer."""

    id: str
    seq: int
    voids: str
    refunded_microusd: int


class VoidUsage(Unit[Voided | Refusal], frozen=True):
    """Take row `seq` out of all sums by a row with its negative, once; what it spent is given back.

    What delegations and hard-limited budgets counted is not `by` anybody's to give back: see `asapd.store.voids`.
    """

    seq: int
    reason: str
    actor: str
    now_us: int
    by: Visibility = EVERYTHING


class CostsCorrected(msgspec.Struct, frozen=True, tag=True):
    """How many costs were corrected, and the rows left alone because something had changed them since.

    Of `estimates_kept` the reservation was settled at an estimate of unknown size, which stays as it is.
    """

    corrected: int
    skipped: list[int]
    estimates_kept: int


class CorrectCosts(Unit[CostsCorrected], frozen=True):
    """Bring events to another cost by rows that hold the difference, where they still cost what each says."""

    corrections: list[Correction]
    price_version: str
    actor: str
    now_us: int


class UsageRetired(msgspec.Struct, frozen=True, tag=True):
    """Rows that a step of retention took, and whether there are more that are due."""

    taken: Taken
    more: bool


class RetireUsage(Unit[UsageRetired], frozen=True):
    """Drop at most `limit` of the oldest events from before `before_us`, their identities too; the rollups stay.

    Those of the hours `kept`, which are in order, stay as well: their sums are not what they come to. So does what came
    behind row `through_row`, after hours were looked at.
    """

    before_us: int
    actor: str
    now_us: int
    limit: int = 500
    kept: list[int] = []
    through_row: int = 2**63 - 1


class DaysAddedUp(msgspec.Struct, frozen=True, tag=True):
    """Rows of hourly sums that were added to days, and whether there are more that are due."""

    rows: int
    more: bool


class AddUpDays(Unit[DaysAddedUp], frozen=True):
    """Add the next hourly sums, of days that ended before `before_us`, to the sums of days."""

    before_us: int


class TaskEvent(msgspec.Struct, frozen=True):
    """One step in the life of a task: state is `started`, `completed` or `failed`."""

    task_id: str
    agent: str
    consumer: str
    state: str
    timestamp_us: int
    error: str | None = None
    parent_task_id: str | None = None


class RecordTask(Unit[RowWritten | Refusal], frozen=True):
    """A task began or ended. A task ends once: the same end again changes nothing, another is refused."""

    task: TaskEvent
    actor: str
    tenant: str
    now_us: int


class KeepHorizon(Unit[RowWritten], frozen=True):
    """Take no events from before `edge_us` any more, nor from longer than `late_max_us` before the newest commit."""

    edge_us: int
    late_max_us: int
