"""Usage events from the outside: nested and flat JSON, arrays, NDJSON and msgpack, to one normal form.

A typed decoder takes what is right in one pass; only when it objects is the body looked at again,
slowly, to name every bad field.
"""

from __future__ import annotations

import re
from collections.abc import Container, Generator, Iterator
from datetime import datetime
from itertools import islice
from types import NoneType
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType

from asapd.core.delegation import is_action
from asapd.core.errors import FieldError, Refusal
from asapd.core.money import MoneyError, parse_usd
from asapd.core.types import AGENT_URN, MAX_INT, SECOND_US, datetime_us
from asapd.core.usage import ASSUMED_ACTION, UsageEvent
from asapd.wire.mismatch import reason_of, why_unreadable

MAX_EVENTS = 5_000
"""As many as one commit takes; more is 413 `too_many_events`."""

MAX_ERRORS = 100
"""Enough to see the pattern of a broken batch; the reply says when there are more."""

BodyFormat = Literal["json", "ndjson", "msgpack"]

_Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Short = Annotated[str, Meta(max_length=128)]
_Time = str | int | float
_Label = Annotated[str, Meta(max_length=256)]
_LabelName = Annotated[str, Meta(min_length=1, max_length=256)]
_MAX_LABELS = 16
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# What is not blank of a line: eight megabytes of short or of empty ones are read in 50 ms, not in a second. Blank is
# the white space of JSON alone, to which a carriage return belongs: it parts no lines.
_LINE = re.compile(rb"[^ \t\r\n][^\n]*")
_EPOCH_MS_ABOVE = 10**11
"""An epoch above this is in milliseconds."""
_NO_TIME = "must be a date and time such as 2026-11-20T09:00:01Z"
_LEAP_SECOND = "must not be in second 60, a leap second, which asapd does not count: send second 59 instead"


_UNTOLD: Final = False
"""Stands where a count of tokens was not given. No format holds it as a number, so it is told from a 0 that somebody
wrote, and it adds up and compares as the 0 that it counts as."""


class WireMetrics(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """The counts of an event in its nested form.

    Null is as if left out, as dumps of classes have it, but of the tokens: a sum that is not known is not zero.
    """

    tokens_in: _Count = _UNTOLD
    tokens_out: _Count = _UNTOLD
    duration_ms: _Count | None = None
    api_calls: _Count | None = 0
    cached_tokens_in: _Count | None = 0
    cache_write_tokens: _Count | None = 0
    reasoning_tokens: _Count | None = 0
    cache_write_1h_tokens: _Count | None = 0


class WireEvent(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One event as clients write it: the nested form and the reference implementation's flat one.

    Null is as if left out, as in `WireMetrics`.
    """

    task_id: _Name | None = None
    agent: _Name | None = None
    agent_id: _Name | None = None
    consumer: _Name | None = None
    consumer_id: _Name | None = None
    timestamp: _Time | None = None
    metrics: WireMetrics | None = None
    tokens_in: _Count = _UNTOLD
    tokens_out: _Count = _UNTOLD
    duration_ms: _Count | None = None
    api_calls: _Count | None = 0
    cached_tokens_in: _Count | None = 0
    cache_write_tokens: _Count | None = 0
    reasoning_tokens: _Count | None = 0
    cache_write_1h_tokens: _Count | None = 0
    id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    source: Annotated[str, Meta(max_length=256)] | None = None
    seq: _Count | None = None
    outcome: Literal["completed", "failed"] | None = "completed"
    error: Annotated[str, Meta(max_length=2000)] | None = None
    model: _Short | None = None
    provider: _Short | None = None
    cost_usd: int | float | str | None = None
    delegation: _Name | None = None
    reservation: _Name | None = None
    action: _Short | None = None
    partial: bool | None = False
    parent_task_id: _Name | None = None
    project: _Short | None = None
    labels: Annotated[dict[_LabelName, _Label], Meta(max_length=_MAX_LABELS)] | None = None
    trace_id: _Short | None = None


class _Body(WireEvent, forbid_unknown_fields=True):
    """An object body: an event itself, or one that holds `usage` or `events`."""

    usage: WireEvent | UnsetType = UNSET
    events: list[WireEvent] | UnsetType = UNSET


_json_event = msgspec.json.Decoder(WireEvent)
_json_list = msgspec.json.Decoder(list[WireEvent])
_json_body = msgspec.json.Decoder(_Body)
_msgpack_list = msgspec.msgpack.Decoder(list[WireEvent])
_msgpack_body = msgspec.msgpack.Decoder(_Body)


class Events(msgspec.Struct, frozen=True):
    """What a body held: the events that are right, each with its place in the request, and the errors of the others.

    `code` is that of the refusal of the whole: `malformed` when one of the others could not be read at all.
    """

    events: list[UsageEvent]
    places: list[int]
    errors: tuple[FieldError, ...]
    is_batch: bool
    code: str = "invalid"

    @property
    def refusal(self) -> Refusal | None:
        """The refusal of a body that must be right as a whole."""
        if not self.errors:
            return None
        return Refusal(self.code, _summary(self.errors), self.errors[:MAX_ERRORS])


_WHOLE = "event"
"""What stands for all of an event where a field is named."""
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _summary(errors: tuple[FieldError, ...]) -> str:
    first = errors[0]
    where = "" if first.index is None else f" {first.index}" if first.field == _WHOLE else f" of event {first.index}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"nothing was recorded: {first.field}{where} {first.reason}{more}"


def decode_event(body: bytes) -> UsageEvent | None:
    """The event that a JSON object is, in two thirds of the time; None for all else, of which `decode_events` tells."""
    if body[:1] != b"{":
        return None
    try:
        whole = _json_body.decode(body)
    except _UNREADABLE:
        return None
    if whole.events is not UNSET or whole.usage is not UNSET:
        return None
    event = normalise(whole, is_plain=_is_plain(body))
    return event if isinstance(event, UsageEvent) else None


def decode_events(body: bytes, body_format: BodyFormat = "json") -> Events | Refusal:
    """Decode a body of one event, `{"usage"}`, `{"events"}` or an array; never raises.

    A `Refusal` is for what is not events at all: `malformed`, `too_many_events`.
    """
    read = _read(body, body_format)
    if not isinstance(read, tuple):
        return read
    typed, is_batch = read
    found = _Found(is_batch, is_plain=body_format != "msgpack" and _is_plain(body))
    found.take(typed, 0)
    return found.events()


def decode_steps(body: bytes, body_format: BodyFormat = "json") -> Generator[None, None, Events | Refusal]:
    """`decode_events` for who has others waiting: yields about every millisecond, and returns the same at its end."""
    read = _read(body, body_format)
    if not isinstance(read, tuple):
        return read
    typed, is_batch = read
    found = _Found(is_batch, is_plain=body_format != "msgpack" and _is_plain(body))
    for start in range(0, len(typed), SLICE):
        yield
        found.take(typed[start : start + SLICE], start)
    return found.events()


def _read(body: bytes, body_format: BodyFormat) -> tuple[list[WireEvent], bool] | Events | Refusal:
    """What a body holds, in its own form, and whether as a batch; what is wrong with it otherwise."""
    if body_format == "ndjson":
        return _read_lines(body)
    try:
        typed, is_batch = _typed(body, body_format == "msgpack")
    except msgspec.ValidationError:
        return _explain(body, body_format == "msgpack")
    except _UNREADABLE as error:
        return malformed(error, body)
    if len(typed) > MAX_EVENTS:
        return too_many(len(typed))
    return typed, is_batch


def _read_lines(body: bytes) -> tuple[list[WireEvent], bool] | Events | Refusal:
    """Each line for itself: joined to one array, what is no event in any line may be one across two."""
    lines = [found[0] for found in islice(_LINE.finditer(body), MAX_EVENTS + 1)]
    if len(lines) > MAX_EVENTS:
        return Refusal("too_many_events", f"more than {MAX_EVENTS} lines in one request: send them in parts")
    if not lines:
        return Refusal("malformed", "the body cannot be read: it is empty, and each line has to be one event in JSON")
    try:
        return [_json_event.decode(line) for line in lines], True
    except _UNREADABLE:
        return _explain_lines(lines)


def malformed(error: Exception, body: bytes) -> Refusal:
    """The refusal of a body that no decoder could read."""
    return Refusal("malformed", f"the body cannot be read: {why_unreadable(error, body)}")


def too_many(count: int) -> Refusal:
    """The refusal of a request with more events than `MAX_EVENTS`."""
    return Refusal("too_many_events", f"{count} events in one request, at most {MAX_EVENTS}: send them in parts")


def _typed(body: bytes, is_msgpack: bool) -> tuple[list[WireEvent], bool]:
    is_list = _is_msgpack_array(body) if is_msgpack else body.lstrip()[:1] == b"["
    if is_list:
        return (_msgpack_list if is_msgpack else _json_list).decode(body), True
    whole = (_msgpack_body if is_msgpack else _json_body).decode(body)
    if whole.events is UNSET and whole.usage is UNSET:
        return [whole], False
    beside = any(
        (value := getattr(whole, field.name)) is not None and value != field.default
        for field in msgspec.structs.fields(WireEvent)
    )
    if beside or (whole.events is not UNSET and whole.usage is not UNSET):
        raise msgspec.ValidationError("fields beside `usage` or `events`")
    if whole.events is not UNSET:
        return whole.events, True
    assert whole.usage is not UNSET
    return [whole.usage], False


def _is_msgpack_array(body: bytes) -> bool:
    return bool(body) and (0x90 <= body[0] <= 0x9F or body[0] in (0xDC, 0xDD))


def _is_plain(body: bytes) -> bool:
    """Whether no text in a JSON body can hold a control character: but for DEL they stand in it escaped."""
    return b"\\" not in body and b"\x7f" not in body and body.isascii()


SLICE = 250
"""Events normalised at a stretch: about a millisecond."""


class _Found:
    """What the events of a body are, as far as they were taken in."""

    __slots__ = ("_errors", "_events", "_is_batch", "_is_plain", "_places")

    def __init__(self, is_batch: bool, *, is_plain: bool) -> None:
        self._is_batch = is_batch
        self._is_plain = is_plain
        self._events: list[UsageEvent] = []
        self._places: list[int] = []
        self._errors: list[FieldError] = []

    def take(self, typed: list[WireEvent], start: int) -> None:
        """Take in what comes next, from the place `start` on."""
        for index, wire in enumerate(typed, start):
            event = normalise(wire, is_plain=self._is_plain)
            if isinstance(event, UsageEvent):
                self._events.append(event)
                self._places.append(index)
            else:
                place = index if self._is_batch else None
                self._errors += [FieldError(bad.field, bad.reason, place) for bad in event]

    def events(self) -> Events:
        """All of it."""
        return Events(self._events, self._places, tuple(self._errors), self._is_batch)


def normalise(wire: WireEvent, *, is_plain: bool = False) -> UsageEvent | list[FieldError]:
    """The normal form of an event, or what is wrong with it; `is_plain` says that no text has a control character."""
    errors: list[FieldError] = []
    agent = wire.agent if wire.agent_id is None and wire.agent is not None else party_of(wire, "agent", errors)
    consumer = (
        wire.consumer if wire.consumer_id is None and wire.consumer is not None else party_of(wire, "consumer", errors)
    )
    if not AGENT_URN.match(agent) and agent:
        errors.append(FieldError("agent", "must be a URN of the form urn:asap:agent:<name>"))
    if wire.task_id is None:
        errors.append(FieldError("task_id", "is missing"))
    counts = _counts(wire, errors)
    action = wire.action or ASSUMED_ACTION
    if action != ASSUMED_ACTION and not is_action(action):
        errors.append(FieldError("action", "must be words joined by dots, such as task.execute"))
    timestamp_us = 0
    if wire.timestamp is None:
        errors.append(FieldError("timestamp", "is missing"))
    else:
        try:
            timestamp_us = parse_timestamp(wire.timestamp)
        except ValueError as error:
            errors.append(FieldError("timestamp", str(error)))
    event = UsageEvent(
        wire.task_id or "",
        agent,
        consumer,
        timestamp_us,
        counts.tokens_in or 0,
        counts.tokens_out or 0,
        counts.duration_ms,
        counts.api_calls or 0,
        counts.cached_tokens_in or 0,
        counts.cache_write_tokens or 0,
        counts.reasoning_tokens or 0,
        2 if wire.outcome == "failed" else 1,
        wire.partial or False,
        wire.id or "",
        wire.source or "",
        wire.seq,
        wire.error,
        wire.model or "",
        wire.provider or "",
        wire.project or "",
        None if wire.cost_usd is None else _cost(wire.cost_usd, errors),
        wire.delegation,
        wire.reservation,
        action,
        wire.parent_task_id,
        wire.labels or None,
        wire.trace_id,
        counts.cache_write_1h_tokens or 0,
        (
            counts.tokens_in is not _UNTOLD
            or counts.tokens_out is not _UNTOLD
            or wire.tokens_in is not _UNTOLD
            or wire.tokens_out is not _UNTOLD
        ),
        wire.reservation is not None and not wire.action,
    )
    if not is_plain and not _is_printable(event):
        errors += [
            FieldError(name, "must not hold control characters")
            for name in _TEXTS
            if (text := getattr(event, name)) and CONTROL.search(text)
        ]
    return errors or event


def _is_printable(event: UsageEvent) -> bool:
    texts = f"{event.task_id}{event.consumer}{event.id}{event.source}{event.model}{event.provider}{event.project}"
    names = f"{event.delegation}{event.reservation}{event.parent_task_id}{event.trace_id}"
    return texts.isprintable() and names.isprintable()


_TEXTS = (
    "task_id",
    "consumer",
    "id",
    "source",
    "model",
    "provider",
    "project",
    "delegation",
    "reservation",
    "parent_task_id",
    "trace_id",
)


def party_of(wire: msgspec.Struct, name: str, errors: list[FieldError]) -> str:
    """An `agent` or a `consumer`, under its name or that of the reference implementation."""
    nested: str | None = getattr(wire, name)
    flat: str | None = getattr(wire, f"{name}_id")
    if nested is None and flat is None:
        errors.append(FieldError(name, "is missing"))
    elif nested is not None and flat is not None and nested != flat:
        errors.append(FieldError(f"{name}_id", f"says something else than {name}"))
    return nested or flat or ""


def _counts(wire: WireEvent, errors: list[FieldError]) -> WireEvent | WireMetrics:
    counts: WireEvent | WireMetrics = wire
    prefix = ""
    if wire.metrics is not None:
        counts, prefix = wire.metrics, "metrics."
        beside = wire.tokens_in or wire.tokens_out or wire.duration_ms is not None or wire.api_calls
        parts = wire.cached_tokens_in or wire.cache_write_tokens or wire.cache_write_1h_tokens or wire.reasoning_tokens
        if beside or parts:
            errors.append(
                FieldError("metrics", "stands beside counts at the top level: put all of them into one place")
            )
    written = counts.cache_write_tokens or counts.cache_write_1h_tokens
    if written or counts.cached_tokens_in or counts.reasoning_tokens:
        cache_write_tokens = counts.cache_write_tokens or 0
        if (counts.cached_tokens_in or 0) + cache_write_tokens > counts.tokens_in:
            errors.append(FieldError(f"{prefix}tokens_in", "must include cached_tokens_in and cache_write_tokens"))
        if (counts.cache_write_1h_tokens or 0) > cache_write_tokens:
            errors.append(FieldError(f"{prefix}cache_write_tokens", "must include cache_write_1h_tokens"))
        if (counts.reasoning_tokens or 0) > counts.tokens_out:
            errors.append(FieldError(f"{prefix}tokens_out", "must include reasoning_tokens"))
    return counts


def parse_timestamp(value: str | float) -> int:
    """Microseconds since the epoch from RFC 3339 (naive means UTC), or from an epoch in seconds or milliseconds.

    Raises:
        ValueError: with a reason for the client.
    """
    if isinstance(value, str):
        try:
            # Python takes more than RFC 3339: dates by the week, any separator, hours and minutes without a colon.
            if value[13] != ":" or value[10] not in "Tt " or value[7] != "-":
                raise ValueError
            # RFC 3339 allows a small z, which Python does not read.
            return datetime_us(datetime.fromisoformat(value[:-1] + "Z" if value[-1] == "z" else value))
        except (ValueError, OverflowError, IndexError):
            raise ValueError(_LEAP_SECOND if value[16:19] == ":60" else _NO_TIME) from None
    if not 0 <= value <= 253_402_300_799_000:
        raise ValueError("must be an epoch between 1970 and 9999")
    if value > _EPOCH_MS_ABOVE:
        return round(value * 1000)
    return value * SECOND_US if isinstance(value, int) else round(value * SECOND_US)


def _cost(value: float | str, errors: list[FieldError]) -> int | None:
    try:
        return parse_usd(value, round_up=True)
    except MoneyError as error:
        errors.append(FieldError("cost_usd", str(error)))
        return None


# --- the slow way, which names every bad field


def _explain(body: bytes, is_msgpack: bool) -> Events | Refusal:
    try:
        raw = msgspec.msgpack.decode(body) if is_msgpack else msgspec.json.decode(body)
    except _UNREADABLE as error:
        return malformed(error, body)
    if isinstance(raw, dict) and ("events" in raw or "usage" in raw):
        holder, wanted = ("events", list) if "events" in raw else ("usage", dict)
        stray = [
            FieldError(str(name), f"does not belong beside {holder}")
            for name, value in raw.items()
            if name != holder and not _says_nothing(name, value)
        ]
        if stray:
            return Events([], [], tuple(stray), is_batch=False)
        raw = raw[holder]
        if not isinstance(raw, wanted):
            reason = "must be an array of events" if wanted is list else "must be an event"
            return Events([], [], (FieldError(holder, reason),), is_batch=False)
    is_batch = isinstance(raw, list)
    items = raw if isinstance(raw, list) else [raw]
    if len(items) > MAX_EVENTS:
        return too_many(len(items))
    return _judged(items, is_batch)


def _says_nothing(name: Any, value: Any) -> bool:
    """Whether a field beside events is as if left out: what the typed decoder takes for that it cannot tell from it."""
    if value is None:
        return name in _NULLABLE
    return name in _DEFAULTS and value == _DEFAULTS[name] and _mismatch(value, _EVENT_TYPES[name]) is None


def _explain_lines(lines: list[bytes]) -> Events | Refusal:
    """Each line by itself, so that one that cannot be read is named, and is no reason to leave out the others."""
    items = [_read_line(line) for line in lines]
    unread = sum(isinstance(item, FieldError) for item in items)
    found = _judged(items, is_batch=True)
    if not unread:
        return found
    if unread < len(lines):
        return msgspec.structs.replace(found, code="malformed")
    detail = "the body cannot be read: each line has to be one event in JSON, and none is"
    return Refusal("malformed", f"{detail}; event 0 {found.errors[0].reason}", found.errors[:MAX_ERRORS])


def _read_line(line: bytes) -> Any:
    """The value in a line, or what keeps it from being read."""
    try:
        return msgspec.json.decode(line)
    except _UNREADABLE as error:
        return FieldError(_WHOLE, f"cannot be read: {why_unreadable(error, line)}")


def _judged(items: list[Any], is_batch: bool) -> Events:
    """What values are as events; a `FieldError` among them is of one that could not be read."""
    events: list[UsageEvent] = []
    places: list[int] = []
    errors: list[FieldError] = []
    for index, item in enumerate(items):
        found = _read_one(item, explain=len(errors) < MAX_ERRORS)
        if isinstance(found, UsageEvent):
            events.append(found)
            places.append(index)
        else:
            errors += [FieldError(bad.field, bad.reason, index if is_batch else None) for bad in found]
    return Events(events, places, tuple(errors), is_batch)


def _read_one(item: Any, *, explain: bool) -> UsageEvent | list[FieldError]:
    """One event, or what is wrong with it: field by field only with `explain`, because that is slow."""
    if isinstance(item, FieldError):
        return [item]
    try:
        return normalise(msgspec.convert(item, WireEvent))
    except msgspec.ValidationError:
        return _all_errors(item) if explain else [FieldError(_WHOLE, "is wrong too")]


def _all_errors(item: Any) -> list[FieldError]:
    """What `field_errors` finds, and what is missing or wrong by its value among the rest; at most `MAX_ERRORS`."""
    errors = field_errors(item)
    if not isinstance(item, dict) or len(errors) == MAX_ERRORS:
        return errors
    named = {bad.field for bad in errors}
    # Who gave `agent_id` badly is not told that `agent` is missing.
    also = named | {name.removesuffix("_id") for name in ("agent_id", "consumer_id") if name in named}
    rest = normalise(right_part(item, named))
    if isinstance(rest, list):
        errors += [bad for bad in rest if bad.field not in also]
    return errors[:MAX_ERRORS]


def right_part(item: dict[Any, Any], named: Container[str]) -> WireEvent:
    """The event without what `field_errors` names; without labels, of which nothing else can be wrong."""
    kept = {name: value for name, value in item.items() if name in _EVENT_TYPES and name not in named}
    kept.pop("labels", None)
    if isinstance(metrics := kept.get("metrics"), dict):
        kept["metrics"] = {
            name: value for name, value in metrics.items() if name in _METRICS_TYPES and f"metrics.{name}" not in named
        }
    return msgspec.convert(kept, WireEvent)


def field_errors(item: Any) -> list[FieldError]:
    """What keeps a decoded value from being a `WireEvent`, at most `MAX_ERRORS` of it; empty when nothing does."""
    if not isinstance(item, dict):
        return [FieldError(_WHOLE, "must be an object")]
    return list(islice(_bad_fields(item, _EVENT_TYPES, ""), MAX_ERRORS))


def _types_of(shape: type[msgspec.Struct]) -> dict[Any, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(shape)}


_REQUIRED = {**dict.fromkeys(("task_id", "agent", "agent_id", "consumer", "consumer_id"), _Name), "timestamp": _Time}
"""Fields that may be null as far as their types in `WireEvent` go, and are missing then."""
_EVENT_TYPES = {**_types_of(WireEvent), **_REQUIRED}
_METRICS_TYPES = _types_of(WireMetrics)
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(WireEvent) if field.default is not None}
_NULLABLE = frozenset(name for name, kind in _types_of(WireEvent).items() if NoneType in get_args(kind))
"""Fields of which null is as if they were left out."""


def _bad_fields(item: dict[Any, Any], types: dict[Any, Any], prefix: str) -> Iterator[FieldError]:
    for name, value in item.items():
        if name not in types:
            shown = str(name)[:100]
            yield FieldError(f"{prefix}{shown}", "is not a field of a usage event; what is yours goes into labels")
        elif name == "metrics" and isinstance(value, dict):
            yield from _bad_fields(value, _METRICS_TYPES, "metrics.")
        elif name == "labels" and isinstance(value, dict) and len(value) <= _MAX_LABELS:
            yield from _bad_labels(value)
        elif not (value is None and name in _REQUIRED):
            reason = _mismatch(value, types[name])
            if reason is not None:
                yield FieldError(f"{prefix}{name}", reason)


def _bad_labels(labels: dict[Any, Any]) -> Iterator[FieldError]:
    for name, value in labels.items():
        if name == "":
            yield FieldError("labels", "must not hold an empty name")
            continue
        field = f"labels.{str(name)[:100]}"
        if (reason := _mismatch(name, _LabelName)) is not None:
            yield FieldError(field, f"has a name that {reason}")
        if (reason := _mismatch(value, _Label)) is not None:
            yield FieldError(field, reason)


def _mismatch(value: Any, wanted: Any) -> str | None:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        return reason_of(error, wanted)
    return None
