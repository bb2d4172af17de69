"""A usage event in its one normal form, and how events fold into hourly rollups."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import Final, NamedTuple

import msgspec

from asapd.core.errors import FieldError, Refusal
from asapd.core.types import HOUR_US, Outcome, format_us

FLAG_UNRESERVED = 1
"""Names a delegation but no reservation."""
FLAG_OVERRUN = 2
"""Passed the estimate of its reservation, the limit of an account on its path, or the hard limit of a budget."""
FLAG_UNPRICED = 4
"""Cost unknown under a reservation: the ledger settled at the estimate."""
FLAG_UNAUTHORISED = 8
"""Under a delegation that is unknown, revoked, expired, or does not allow the action."""
FLAG_CLOSED_RESERVATION = 16
"""Names a reservation that is unknown, another agent's beside a delegation of its own, or no longer open: debited
without a hold."""
FLAG_UNTIMED = 32
"""Nobody said how long it took: its duration of 0 is no latency. No flag of the ledger's, so it is shown by itself."""
FLAG_ACROSS_RESERVATION = 64
"""Debited to a reservation although its row is of another tenant. For the ledger alone, so it is not shown."""
FLAG_ACROSS_DELEGATION = 128
"""The same of a delegation."""
FLAG_NOT_BY_RESERVATION = 256
"""Debited to the delegation that it names although it names a reservation that is there. For the ledger alone."""
FLAGS_OF_THE_LEDGER = FLAG_ACROSS_RESERVATION | FLAG_ACROSS_DELEGATION | FLAG_NOT_BY_RESERVATION
"""What says to which account a row was debited, and so goes with each that is about it."""

FLAG_NAMES = {
    FLAG_UNRESERVED: "unreserved",
    FLAG_OVERRUN: "overrun",
    FLAG_UNPRICED: "unpriced",
    FLAG_UNAUTHORISED: "unauthorised",
    FLAG_CLOSED_RESERVATION: "reservation_closed",
}


ASSUMED_ACTION: Final = "task.execute"
"""What an event did that names neither an action nor a reservation, which has one."""


class UsageEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a client says was used, normalised.

    Token and call counts are integers in 0 .. 2**53-1. `tokens_in` includes cached and cache-write
    tokens, `cache_write_tokens` those kept for an hour, `tokens_out` reasoning tokens. `timestamp_us` is the
    end of the work. An empty `id` means that the client gave none: the daemon names the event and cannot tell
    a resend. `duration_ms` None means that nobody said how long it took: it adds nothing, and is no latency.
    Without `tells_tokens` neither `tokens_in` nor `tokens_out` was given: they count as 0, but what they cost nobody
    knows. That is for the price alone, and no part of what makes two events the same.
    `is_action_assumed` says that a reservation is named and no action: it is that of the reservation then, which the
    store knows.
    """

    task_id: str
    agent: str
    consumer: str
    timestamp_us: int
    tokens_in: int = 0
    tokens_out: int = 0
    duration_ms: int | None = 0
    api_calls: int = 0
    cached_tokens_in: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    outcome: int = Outcome.COMPLETED
    partial: bool = False
    id: str = ""
    source: str = ""
    source_seq: int | None = None
    error: str | None = None
    model: str = ""
    provider: str = ""
    project: str = ""
    reported_microusd: int | None = None
    delegation: str | None = None
    reservation: str | None = None
    action: str = ASSUMED_ACTION
    parent_task_id: str | None = None
    labels: dict[str, str] | None = None
    trace_id: str | None = None
    cache_write_1h_tokens: int = 0
    tells_tokens: bool = True
    is_action_assumed: bool = False


class Cost(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an event cost: `microusd` is None when nobody knows; never guessed, never 0 instead."""

    microusd: int | None = None
    source: str | None = None
    priced_microusd: int | None = None
    price_version: str | None = None


UNKNOWN_COST = Cost()


OTLP = "otlp"
"""The `source` of every event that comes from OpenTelemetry."""

_encoder = msgspec.msgpack.Encoder(order="sorted")
_FIRST_FIELDS = UsageEvent.__struct_fields__.index("trace_id") + 1
_CONTENT_FIELDS = UsageEvent.__struct_fields__.index("cache_write_1h_tokens") + 1


def content_digest(event: UsageEvent) -> bytes:
    """16 bytes over everything the client supplied, after normalisation: equal means the same event.

    A field that is younger than the first version takes part only where it is not its default: what was recorded
    before the field was known is still the same event when it is sent again. No duration and one of 0 are the same
    here, as they were when the one was taken for the other, and so are no tokens and 0 of them. That an action is
    assumed takes no part: who leaves it out sends the same again, whatever the reservation was for.
    """
    if event.duration_ms is None:
        event = msgspec.structs.replace(event, duration_ms=0)
    fields = _CONTENT_FIELDS if event.cache_write_1h_tokens else _FIRST_FIELDS
    return blake2b(_encoder.encode(msgspec.structs.astuple(event)[:fields]), digest_size=16).digest()


Identity = tuple[str, str, str, str]
"""Under which an event counts once: tenant, agent, source, id."""


def identity_key(tenant: str, agent: str, source: str, event_id: str) -> bytes:
    """An identity as a key that sorts as ids of one length do: what is reported with ordered ids lies in few pages.

    The id: as text, as the 16 bytes of a UUID in its usual form, or, when it is long, as its beginning and a digest;
    then ten bytes for (tenant, agent, source). So ids that are ordered whoever made them, such as UUIDs of version 7,
    lie side by side. No two identities share a key but by a collision of BLAKE2b.
    """
    of = _origin(tenant, agent, source)
    if len(event_id) == _UUID_CHARS and (uuid := _uuid(event_id)) is not None:
        return b"u" + uuid + of
    whole = event_id.encode()
    if len(whole) <= _LONG_ID:
        return b"t" + whole + of
    return b"l" + whole[:_LONG_ID] + blake2b(whole, digest_size=16).digest() + of


_UUID_CHARS = 36
_LONG_ID = 32


@lru_cache(maxsize=4_096)
def _origin(tenant: str, agent: str, source: str) -> bytes:
    # Encoded with their lengths: no character joins or splits them.
    return blake2b(_encoder.encode((tenant, agent, source)), digest_size=10).digest()


def _uuid(text: str) -> bytes | None:
    try:
        raw = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        return None
    plain = raw.hex()
    usual = f"{plain[:8]}-{plain[8:12]}-{plain[12:16]}-{plain[16:20]}-{plain[20:]}"
    return raw if usual == text else None


def identity_digest(identity: Identity) -> bytes:
    """16 bytes over an identity: its key in files of schema version 7 and before."""
    return blake2b(_encoder.encode(identity), digest_size=16).digest()


class RollupKey(NamedTuple):
    """One row of the hourly rollup. `hour` counts whole hours since the epoch, UTC."""

    hour: int
    agent: str
    consumer: str
    model: str
    project: str
    outcome: int


class RollupSums(NamedTuple):
    """What an hourly row adds up; integers throughout, so that any order gives the same sums."""

    events: int = 0
    tasks: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens_in: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    duration_ms: int = 0
    api_calls: int = 0
    cost_microusd: int = 0
    unpriced: int = 0
    cache_write_1h_tokens: int = 0


_COUNTS: Final = frozenset(RollupSums._fields) - {"events", "tasks", "cost_microusd", "unpriced"}


def too_late(before_us: int) -> str:
    """What is wrong with the time of an event from before the oldest that is taken."""
    return f"is too late: events from before {format_us(before_us)} are no longer taken"


def past_64_bits(column: str) -> Refusal:
    """The refusal of what no sum of an hour can hold: over a thousand reports of the most that one may say.

    `column` is what could not hold it: of `RollupSums`, or of another table.
    """
    field = "cost_usd" if column == "cost_microusd" else f"metrics.{column}" if column in _COUNTS else "metrics"
    return Refusal(
        "invalid",
        "nothing was written: what one agent used in an hour for one consumer, with one model, project and outcome, "
        "would pass 64 bits: check the counts",
        (FieldError(field, "would make the sum of an hour pass 64 bits"),),
    )


def rollup(priced: Iterable[tuple[UsageEvent, Cost]]) -> dict[RollupKey, RollupSums]:
    """Fold events into hourly sums; splitting a batch and adding the parts gives the same.

    `tasks` counts events that are not partial, as the reference implementation does.
    """
    found: dict[tuple[int, str, str, str, str, int], list[int]] = {}
    for event, cost in priced:
        key = (event.timestamp_us // HOUR_US, event.agent, event.consumer, event.model, event.project, event.outcome)
        sums = found.get(key)
        if sums is None:
            sums = found[key] = [0] * len(RollupSums._fields)
        sums[0] += 1
        sums[1] += not event.partial
        sums[2] += event.tokens_in
        sums[3] += event.tokens_out
        sums[8] += event.api_calls
        if event.duration_ms:
            sums[7] += event.duration_ms
        if cost.microusd is None:
            sums[10] += 1
        else:
            sums[9] += cost.microusd
        # What most events have none of: a look costs less than an addition, and the writer adds for each of them.
        if event.cached_tokens_in:
            sums[4] += event.cached_tokens_in
        if event.reasoning_tokens:
            sums[6] += event.reasoning_tokens
        if event.cache_write_tokens:
            sums[5] += event.cache_write_tokens
        if event.cache_write_1h_tokens:
            sums[11] += event.cache_write_1h_tokens
    return {RollupKey(*key): RollupSums(*sums) for key, sums in found.items()}
