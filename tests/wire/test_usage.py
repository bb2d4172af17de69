"""Usage events from outside: every form means the same, every mistake is named, nothing makes the decoder raise."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.errors import FieldError, Refusal
from asapd.core.types import MAX_INT
from asapd.core.usage import UsageEvent
from asapd.wire.usage import (
    MAX_ERRORS,
    MAX_EVENTS,
    BodyFormat,
    Events,
    WireEvent,
    decode_event,
    decode_events,
    parse_timestamp,
)

COUNTS = {"tokens_in": 10, "tokens_out": 5, "duration_ms": 250, "api_calls": 1}
NESTED: dict[str, Any] = {
    "task_id": "t1",
    "agent": "urn:asap:agent:a",
    "consumer": "urn:asap:agent:b",
    "metrics": COUNTS,
    "timestamp": "2026-11-20T09:00:01.250Z",
}
FLAT: dict[str, Any] = {
    "task_id": "t1",
    "agent_id": "urn:asap:agent:a",
    "consumer_id": "urn:asap:agent:b",
    **COUNTS,
    "timestamp": "2026-11-20T09:00:01.250Z",
}
EVENT = UsageEvent("t1", "urn:asap:agent:a", "urn:asap:agent:b", 1_795_165_201_250_000, 10, 5, 250, 1)
FORMATS: tuple[BodyFormat, ...] = ("json", "ndjson", "msgpack")


def decoded(value: Any, body_format: BodyFormat = "json") -> Events:
    body = msgspec.msgpack.encode(value) if body_format == "msgpack" else msgspec.json.encode(value)
    found = decode_events(body, body_format)
    assert isinstance(found, Events)
    return found


def errors(value: Any) -> list[tuple[str, str, int | None]]:
    """What is said of a body, the same in JSON and in msgpack."""
    found = decoded(value).errors
    assert decoded(value, "msgpack").errors == found
    return [(error.field, error.reason, error.index) for error in found]


def single(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**NESTED, **changes}.items() if value is not ...}


# --- forms

NULLABLE_COUNTS = (
    *("duration_ms", "api_calls", "cached_tokens_in"),
    *("cache_write_tokens", "reasoning_tokens", "cache_write_1h_tokens"),
)
NULLABLE = (
    *("id", "source", "seq", "outcome", "error", "model", "provider", "cost_usd", "delegation", "reservation"),
    *("action", "partial", "parent_task_id", "project", "labels", "trace_id"),
)


@pytest.mark.parametrize("name", [*NULLABLE, *NULLABLE_COUNTS])
def test_null_of_an_optional_field_is_as_if_it_was_left_out(name: str) -> None:
    tokens = {"tokens_in": 10, "tokens_out": 5}
    nested, flat = {**NESTED, "metrics": tokens}, {**FLAT, **tokens}
    for count in ("duration_ms", "api_calls"):
        del flat[count]
    without = decoded(nested).events
    if name in NULLABLE_COUNTS:
        nulls = [{**nested, "metrics": {**tokens, name: None}}, {**flat, name: None}, {**nested, name: None}]
    else:
        nulls = [{**nested, name: None}, {**flat, name: None}]
    for event in nulls:
        assert [decode_event(msgspec.json.encode(event))] == without
        for body_format in FORMATS:
            assert decoded(event, body_format).events == without
        for form in ({"usage": event}, {"events": [event]}, [event], {"usage": nested, name: None}):
            assert (decoded(form).events, decoded(form, "msgpack").events) == (without, without)
        beside_another = decoded([event, single(task_id=5)])
        assert beside_another.events == without
        assert [(bad.field, bad.index) for bad in beside_another.errors] == [("task_id", 1)]
    # Where something is wrong, what is null is not.
    assert [field for field, _, _ in errors({"events": [single(task_id=5)], name: None})] == ["task_id"]


@pytest.mark.parametrize(
    ("counts", "tells"),
    [
        ({}, False),
        ({"api_calls": 1, "cached_tokens_in": 0}, False),
        ({"tokens_in": 0}, True),
        ({"tokens_out": 0}, True),
        ({"tokens_in": 0, "tokens_out": 0}, True),
        ({"tokens_out": 3}, True),
    ],
)
@pytest.mark.parametrize("body_format", FORMATS)
def test_tokens_that_are_not_told_are_not_zero_of_them(
    counts: dict[str, int], tells: bool, body_format: BodyFormat
) -> None:
    flat = {name: value for name, value in FLAT.items() if name not in COUNTS}
    forms = [{**NESTED, "metrics": counts}, {**flat, **counts}, {**flat, **counts, "metrics": None}]
    for form in forms:
        (event,) = decoded(form, body_format).events
        assert event.tells_tokens is tells
        assert (event.tokens_in, event.tokens_out) == (0, counts.get("tokens_out", 0))
        assert not any(isinstance(number, bool) for number in (event.tokens_in, event.tokens_out))
    (event,) = decoded({**flat, "tokens_out": 0, "metrics": {"duration_ms": 5}}, body_format).events
    assert event.tells_tokens


@pytest.mark.parametrize(
    ("said", "is_assumed"),
    [({}, False), ({"reservation": "r"}, True), ({"reservation": "r", "action": "task.execute"}, False)],
)
def test_an_action_is_assumed_only_where_a_reservation_is_named_and_none_is(
    said: dict[str, str], is_assumed: bool
) -> None:
    (event,) = decoded(single(**said)).events
    assert (event.action, event.is_action_assumed) == ("task.execute", is_assumed)


def test_parts_of_tokens_are_held_to_their_sums_beside_nulls() -> None:
    parts = dict.fromkeys(NULLABLE_COUNTS[2:])
    for part, sum_of in (
        *(("cached_tokens_in", "tokens_in"), ("cache_write_tokens", "tokens_in")),
        *(("reasoning_tokens", "tokens_out"), ("cache_write_1h_tokens", "cache_write_tokens")),
    ):
        found = errors(single(metrics={"tokens_in": 1, "tokens_out": 1, **parts, part: 2}))
        assert [field for field, _, _ in found] == [f"metrics.{sum_of}"]


@pytest.mark.parametrize("body_format", ["json", "msgpack"])
@pytest.mark.parametrize("form", [NESTED, FLAT, {"usage": NESTED}, {"usage": FLAT}])
def test_one_event_in_every_form_is_the_same_event(form: dict[str, Any], body_format: BodyFormat) -> None:
    found = decoded(form, body_format)
    assert found.events == [EVENT]
    assert found.places == [0]
    assert not found.is_batch
    assert found.refusal is None


@pytest.mark.parametrize("body_format", ["json", "msgpack"])
@pytest.mark.parametrize("form", [[NESTED, FLAT], {"events": [FLAT, NESTED]}])
def test_many_events_in_every_form_are_a_batch(form: Any, body_format: BodyFormat) -> None:
    found = decoded(form, body_format)
    assert found.events == [EVENT, EVENT]
    assert found.places == [0, 1]
    assert found.is_batch


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17])
def test_msgpack_arrays_of_every_header_are_batches(count: int) -> None:
    assert decoded([FLAT] * count, "msgpack").events == [EVENT] * count


def test_a_msgpack_array_with_a_32_bit_length_is_a_batch() -> None:
    body = b"\xdd\x00\x00\x00\x01" + msgspec.msgpack.encode(FLAT)
    found = decode_events(body, "msgpack")
    assert isinstance(found, Events)
    assert found.events == [EVENT]


def test_ndjson_skips_blank_lines_and_takes_both_line_endings() -> None:
    line = json.dumps(NESTED).encode()
    spaced = line.replace(b", ", b",\r")
    found = decode_events(b"\n" + line + b"\r\n \t\r\n" + spaced + b"\n\r\t " + line + b" \t\r", "ndjson")
    assert isinstance(found, Events)
    assert found.events == [EVENT] * 3
    assert found.is_batch


@pytest.mark.parametrize(
    "line", ["\v{0}", "\f{0}", "{0}\v", "{0}\f", "\v", "\x1e{0}", "{0}\r{0}", "\ufeff{0}", "{0}\u2028{0}"]
)
def test_only_newlines_part_lines_and_only_white_space_of_json_surrounds_an_event(line: str) -> None:
    good = json.dumps(NESTED)
    found = decode_events(f"{good}\n{line.format(good)}\n{good}".encode(), "ndjson")
    assert isinstance(found, Events)
    assert (found.events, found.places, found.code) == ([EVENT] * 2, [0, 2], "malformed")
    assert [(error.field, error.index) for error in found.errors] == [("event", 1)]


@pytest.mark.parametrize(("lines", "unread"), [("{0}\n{1}\n{2},{2}", [0, 1, 2]), ("{2}\n{0}\n{1}\n{2},{2}", [1, 2, 3])])
def test_lines_that_make_as_many_events_only_together_are_not_taken(lines: str, unread: list[int]) -> None:
    whole = json.dumps(NESTED)
    found = decode_events(lines.format(*whole.split(", ", 1), whole).encode(), "ndjson")
    assert [error.index for error in found.errors] == unread
    refusal = found if isinstance(found, Refusal) else found.refusal
    assert refusal is not None
    assert refusal.code == "malformed"


@pytest.mark.parametrize("line", ["{0},{0}", "{0},{1}", '{{"task_id":"t"\n"agent":"a"}}'])
def test_ndjson_has_one_event_a_line(line: str) -> None:
    body = line.format(json.dumps(NESTED), '{"task_id":5}').encode()
    found = decode_events(b"\n".join([json.dumps(NESTED).encode(), body]), "ndjson")
    assert isinstance(found, Events)
    assert found.events == [EVENT]
    assert {(error.field, error.index) for error in found.errors} <= {("event", 1), ("event", 2)}
    assert found.refusal is not None
    assert found.refusal.code == "malformed"


def test_a_line_that_cannot_be_read_is_named_and_keeps_out_no_other() -> None:
    line = json.dumps(NESTED).encode()
    bad = (
        b'{"a":',
        b'{"task_id": "\xff"}',
        b"[" * 100_000,
        json.dumps(single(task_id=5)).encode(),
        b'{"task_id": "\\ud800"}',
        b"{} {}",
    )
    found = decode_events(b"\n".join([line, *bad, b"", line]), "ndjson")
    assert isinstance(found, Events)
    assert found.events == [EVENT, EVENT]
    assert found.places == [0, 7]
    named = [(error.field, error.index) for error in found.errors]
    assert named == [("event", 1), ("event", 2), ("event", 3), ("task_id", 4), ("event", 5), ("event", 6)]
    refusal = found.refusal
    assert refusal is not None
    assert refusal.code == "malformed"
    assert refusal.detail.startswith("nothing was recorded: event 1 cannot be read: it ends too early")
    assert refusal.errors == found.errors


def test_what_is_no_ndjson_at_all_is_malformed_and_says_what_a_line_is() -> None:
    found = decode_events(json.dumps({"a": 1}, indent=1).encode(), "ndjson")
    assert isinstance(found, Refusal)
    assert found.code == "malformed"
    assert "each line has to be one event in JSON, and none is; event 0 cannot be read" in found.detail
    assert [error.index for error in found.errors] == [0, 1, 2]


def test_white_space_before_an_array_is_taken() -> None:
    found = decode_events(b" \n\t[" + json.dumps(FLAT).encode() + b"]")
    assert isinstance(found, Events)
    assert found.is_batch


def test_everything_a_client_may_say_is_kept() -> None:
    said = {
        "id": "e1",
        "source": "s",
        "seq": 7,
        "outcome": "failed",
        "error": "boom\nwith a second line",
        "model": "m",
        "provider": "p",
        "cost_usd": "0.25",
        "delegation": "del_1",
        "reservation": "rsv_1",
        "action": "task.plan",
        "partial": True,
        "parent_task_id": "t0",
        "project": "x",
        "labels": {"k": "v"},
        "trace_id": "abc",
    }
    (event,) = decoded(single(**said)).events
    assert event == msgspec.structs.replace(
        EVENT,
        id="e1",
        source="s",
        source_seq=7,
        outcome=2,
        error="boom\nwith a second line",
        model="m",
        provider="p",
        reported_microusd=250_000,
        delegation="del_1",
        reservation="rsv_1",
        action="task.plan",
        partial=True,
        parent_task_id="t0",
        project="x",
        labels={"k": "v"},
        trace_id="abc",
    )


def test_token_parts_are_kept() -> None:
    parts = {"cached_tokens_in": 4, "cache_write_tokens": 6, "reasoning_tokens": 5, "cache_write_1h_tokens": 2}
    nested = decoded(single(metrics={**COUNTS, **parts})).events
    flat = decoded(single(metrics=..., **COUNTS, **parts)).events
    assert nested == flat
    (event,) = nested
    assert (event.cached_tokens_in, event.cache_write_tokens, event.reasoning_tokens) == (4, 6, 5)
    assert event.cache_write_1h_tokens == 2


@pytest.mark.parametrize("cost", [0.1, "0.1", "0.0999999", 0.09999999, f"0.0999999{'0' * 1080}1"])
def test_a_reported_cost_is_exact_and_rounds_up(cost: float | str) -> None:
    assert [event.reported_microusd for event in decoded(single(cost_usd=cost)).events] == [100_000]


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"task_id": ...}, "task_id", "missing"),
        ({"agent": ...}, "agent", "missing"),
        ({"consumer": ...}, "consumer", "missing"),
        ({"timestamp": ...}, "timestamp", "missing"),
        ({"agent": "a"}, "agent", "URN"),
        ({"agent_id": "urn:asap:agent:z"}, "agent_id", "something else"),
        ({"consumer_id": "urn:asap:agent:z"}, "consumer_id", "something else"),
        ({"task_id": None}, "task_id", "missing"),
        ({"agent": None}, "agent", "missing"),
        ({"consumer": None}, "consumer", "missing"),
        ({"timestamp": None}, "timestamp", "missing"),
        ({"task_id": ""}, "task_id", "must have at least 1 character"),
        ({"task_id": "x" * 257}, "task_id", "must have at most 256 characters"),
        ({"task_id": 5}, "task_id", "must be text, not a number"),
        ({"agent": 5}, "agent", "must be text, not a number"),
        ({"timestamp": []}, "timestamp", "must be a number or text, not an array"),
        ({"model": 5}, "model", "must be text or null, not a number"),
        ({"task_id": "a\x00b"}, "task_id", "control"),
        ({"consumer": "a\nb"}, "consumer", "control"),
        ({"trace_id": "a\x7f"}, "trace_id", "control"),
        ({"consumer": "a\x9bb"}, "consumer", "control"),
        ({"tokens": 5}, "tokens", "labels"),
        ({"tokens_in": 5}, "metrics", "beside counts"),
        ({"metrics": 5}, "metrics", "object"),
        ({"metrics": {"tokens_inn": 5}}, "metrics.tokens_inn", "labels"),
        ({"metrics": {"tokens_in": -1}}, "metrics.tokens_in", "must be a whole number, at least 0"),
        ({"metrics": {"tokens_in": None}}, "metrics.tokens_in", "must be a whole number, not null"),
        ({"metrics": {"tokens_out": None}}, "metrics.tokens_out", "must be a whole number, not null"),
        ({"metrics": {"duration_ms": 1.5}}, "metrics.duration_ms", "must be a whole number or null, not a fraction"),
        (
            {"metrics": {"tokens_in": MAX_INT + 1}},
            "metrics.tokens_in",
            "must be a whole number, at most 9007199254740991",
        ),
        ({"metrics": {"tokens_in": 2**70}}, "metrics.tokens_in", "whole number"),
        ({"metrics": {"tokens_in": "5"}}, "metrics.tokens_in", "must be a whole number, not text"),
        ({"metrics": {"tokens_in": 5, "cached_tokens_in": 6}}, "metrics.tokens_in", "include"),
        ({"metrics": {"tokens_in": 5, "cache_write_tokens": 6}}, "metrics.tokens_in", "include"),
        (
            {"metrics": {"tokens_in": 5, "cache_write_tokens": 2, "cache_write_1h_tokens": 3}},
            "metrics.cache_write_tokens",
            "include",
        ),
        ({"metrics": {"tokens_in": 5, "cache_write_1h_tokens": 3}}, "metrics.cache_write_tokens", "include"),
        ({"cache_write_tokens": 1}, "metrics", "beside counts"),
        ({"metrics": {"tokens_out": 5, "reasoning_tokens": 6}}, "metrics.tokens_out", "include"),
        ({"timestamp": "yesterday"}, "timestamp", "date and time"),
        ({"timestamp": "2026-13-20T09:00:01Z"}, "timestamp", "date and time"),
        ({"timestamp": -1}, "timestamp", "epoch"),
        ({"timestamp": 10**18}, "timestamp", "epoch"),
        ({"timestamp": True}, "timestamp", "not true or false"),
        ({"outcome": "maybe"}, "outcome", "one of completed, failed"),
        ({"cost_usd": -1}, "cost_usd", "negative"),
        ({"cost_usd": "much"}, "cost_usd", "such as"),
        ({"cost_usd": "1_000"}, "cost_usd", "such as"),
        ({"cost_usd": " 1"}, "cost_usd", "such as"),
        ({"cost_usd": "１"}, "cost_usd", "such as"),
        ({"cost_usd": True}, "cost_usd", "must be a number, text or null, not true or false"),
        ({"cost_usd": "0" * 1101}, "cost_usd", "at most 1100 characters"),
        ({"cost_usd": "NaN"}, "cost_usd", "finite"),
        ({"cost_usd": 10**12}, "cost_usd", "at most"),
        ({"action": "a b"}, "action", "dots"),
        ({"labels": {str(n): "" for n in range(17)}}, "labels", "must have at most 16 entries"),
        ({"labels": {"good": "", "a": 1}}, "labels.a", "must be text, not a number"),
        ({"labels": {"a": "x" * 257}}, "labels.a", "at most 256 characters"),
        ({"labels": {"x" * 257: "a"}}, "labels." + "x" * 100, "a name that must have at most 256 characters"),
        ({"labels": {"": "a"}}, "labels", "empty name"),
        ({"labels": 5}, "labels", "object"),
        ({"id": "x" * 129}, "id", "at most 128 characters"),
        ({"partial": "yes"}, "partial", "must be true or false or null, not text"),
        ({"seq": 1.5}, "seq", "must be a whole number or null, not a fraction"),
    ],
)
def test_every_mistake_names_its_field_and_place(changes: dict[str, Any], field: str, word: str) -> None:
    if changes.get("metrics", {}) == {"tokens_in": 2**70}:  # more than msgpack can say
        alone = [(error.field, error.reason, error.index) for error in decoded(single(**changes)).errors]
        among = [(error.field, error.reason, error.index) for error in decoded([NESTED, single(**changes)]).errors]
    else:
        alone = errors(single(**changes))
        among = errors([NESTED, single(**changes)])
    assert [(name, index) for name, _, index in alone] == [(field, None)]
    assert word in alone[0][1]
    assert among == [(field, alone[0][1], 1)]
    assert errors({"usage": NESTED}) == []


def test_the_right_events_of_a_batch_are_kept_beside_the_errors() -> None:
    found = decoded([NESTED, single(task_id=5), FLAT, single(agent="x")])
    assert found.events == [EVENT, EVENT]
    assert found.places == [0, 2]
    assert [(error.field, error.index) for error in found.errors] == [("task_id", 1), ("agent", 3)]
    assert found.refusal is not None
    assert found.refusal.code == "invalid"
    assert "task_id of event 1" in found.refusal.detail
    assert "(and 1 more)" in found.refusal.detail


def test_all_mistakes_of_one_event_are_named_at_once() -> None:
    bad = single(task_id=..., agent="x", consumer=..., timestamp="never", action="-!-", cost_usd=-1)
    assert {name for name, _, _ in errors(bad)} == {
        "task_id",
        "agent",
        "consumer",
        "timestamp",
        "action",
        "cost_usd",
    }


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        (
            {"x": 1, "agent": "foo", "metrics": {"tokens_in": -1, "zz": 2}, "cost_usd": "a", "timestamp": "q"},
            ["x", "metrics.tokens_in", "metrics.zz", "consumer", "agent", "task_id", "timestamp", "cost_usd"],
        ),
        ({"x": 1}, ["x", "agent", "consumer", "task_id", "timestamp"]),
        (single(agent=5, action="-!-"), ["agent", "action"]),
        ({**FLAT, "agent_id": 5, "consumer_id": 5}, ["agent_id", "consumer_id"]),
        (single(metrics=5, labels={"a": 5}, cost_usd=-1), ["metrics", "labels.a", "cost_usd"]),
        (single(metrics={"tokens_in": 1, "tokens_out": 1, "reasoning_tokens": -1}), ["metrics.reasoning_tokens"]),
        (single(metrics={"tokens_out": -1, "reasoning_tokens": 2}), ["metrics.tokens_out"]),
        ({str(n): n for n in range(MAX_ERRORS + 1)}, [str(n) for n in range(MAX_ERRORS)]),
        ({str(n): n for n in range(MAX_ERRORS - 1)}, [*(str(n) for n in range(MAX_ERRORS - 1)), "agent"]),
    ],
)
def test_what_is_missing_or_wrong_by_its_value_is_named_beside_what_is_of_a_wrong_type(
    event: dict[str, Any], fields: list[str]
) -> None:
    assert [name for name, _, _ in errors(event)] == fields
    among = errors([NESTED, event, NESTED])
    assert [(name, index) for name, _, index in among] == [(field, 1) for field in fields]


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        ({"usage": NESTED, "task_id": "t"}, "task_id", "beside usage"),
        ({"usage": NESTED, "usages": 1}, "usages", "beside usage"),
        ({"usage": NESTED, "events": []}, "usage", "beside events"),
        ({"events": [], "tokens_in": 4}, "tokens_in", "beside events"),
        ({"events": NESTED}, "events", "array"),
        ({"usage": [NESTED]}, "usage", "must be an event"),
        ({"usage": None}, "usage", "must be an event"),
        (5, "event", "object"),
        ("text", "event", "object"),
        (None, "event", "object"),
    ],
)
def test_an_envelope_that_holds_something_else_is_named(body: Any, field: str, word: str) -> None:
    ((name, reason, index),) = errors(body)
    assert (name, index) == (field, None)
    assert word in reason


@pytest.mark.parametrize("item", [5, None, [], "x", [[]]])
def test_an_item_that_is_no_event_is_named_by_its_index(item: Any) -> None:
    assert [(name, index) for name, _, index in errors([NESTED, item])] == [("event", 1)]


@pytest.mark.parametrize(
    ("body", "body_format"),
    [
        (b"", "json"),
        (b"", "msgpack"),
        (b"{", "json"),
        (b"nope", "json"),
        (b'{"task_id": "\xff"}', "json"),
        (b'{"usage": 5, "x": "\xff"}', "json"),
        (b"[" * 100_000, "json"),
        (b'{"usage": 5, "x":' + b"[" * 100_000, "json"),
        (b"\x91" * 100_000, "msgpack"),
        (b"\xc1", "msgpack"),
        (b"nope\n", "ndjson"),
        (b"", "ndjson"),
        (b"\r\n \n", "ndjson"),
    ],
)
def test_what_cannot_be_read_is_malformed(body: bytes, body_format: BodyFormat) -> None:
    found = decode_events(body, body_format)
    assert isinstance(found, Refusal)
    assert found.code == "malformed"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"task_id":', "it ends too early"),
        (b'{"task_id": "t', "it ends too early"),
        (b'{"task_id": "\\ud800', "it ends too early"),
        (b'{"task_id": "\\\\ud800"', "it ends too early"),
        (b'{"task_id": "\\ud800"}', "half of a surrogate pair"),
        (b'{"task_id": "\\ud800 and more"}', "surrogate pair"),
        (b"nope", "invalid character"),
    ],
)
def test_why_a_body_cannot_be_read_is_told_apart(body: bytes, why: str) -> None:
    found = decode_events(body)
    assert isinstance(found, Refusal)
    assert why in found.detail


@pytest.mark.parametrize("event", [{**FLAT}, {**FLAT, "oops": 1}])
def test_more_events_than_a_commit_takes_are_refused(event: dict[str, Any]) -> None:
    body = msgspec.json.encode([event] * (MAX_EVENTS + 1))
    found = decode_events(body)
    assert isinstance(found, Refusal)
    assert found.code == "too_many_events"
    assert str(MAX_EVENTS) in found.detail


def test_the_refusal_of_a_broken_batch_is_bounded() -> None:
    refusal = decoded([{}] * 200).refusal
    assert refusal is not None
    assert len(refusal.errors) == MAX_ERRORS
    assert "(and 799 more)" in refusal.detail


# --- times


@pytest.mark.parametrize(
    "value",
    [
        "2026-11-20T09:00:01Z",
        "2026-11-20T09:00:01",
        "2026-11-20 09:00:01",
        "2026-11-20t09:00:01z",
        "2026-11-20T10:00:01+01:00",
        "2026-11-20T09:00:01.000000Z",
        1_795_165_201,
        1_795_165_201.0,
        1_795_165_201_000,
        1_795_165_201_000.0,
    ],
)
def test_a_time_in_every_form_is_the_same_time(value: str | float) -> None:
    assert parse_timestamp(value) == 1_795_165_201_000_000


@pytest.mark.parametrize(
    "value",
    ["", "now", "2026-11-20", "2026-11-20X09:00:01Z", "0001-01-01T00:00:00+23:59x", float("nan"), float("inf"), -0.1],
)
def test_what_is_no_time_is_refused_with_a_reason(value: str | float) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_timestamp(value)


@pytest.mark.parametrize(
    "value",
    [
        "2026-W47-5T09:00:00Z",
        "2026-W47-5 09:00:00",
        "2026-11-20T090000Z",
        "2026-11-20T0900Z....",
        "2026-11-20T09",
        "2026-11-20T09Z",
        "2026-11-20T09:",
        "20261120T09:00:00Z",
        "2026-11-20_09:00:00Z",
    ],
)
def test_other_forms_of_times_than_those_of_rfc_3339_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="must be a date and time such as"):
        parse_timestamp(value)


@pytest.mark.parametrize("value", ["2026-11-20T09:00", "2026-11-20T09:00Z", "2026-11-20T10:00:00,000+0100"])
def test_seconds_may_be_left_out_and_fractions_and_offsets_be_those_of_iso_8601(value: str) -> None:
    assert parse_timestamp(value) == 1_795_165_200_000_000


@pytest.mark.parametrize("value", ["2026-06-30T23:59:60Z", "2026-07-01T05:29:60.5+05:30"])
def test_a_leap_second_is_refused_as_what_it_is(value: str) -> None:
    with pytest.raises(ValueError, match=r"leap second.*send second 59"):
        parse_timestamp(value)


@given(st.text(max_size=40) | st.integers() | st.floats())
def test_reading_a_time_raises_nothing_else(value: str | float) -> None:
    try:
        found: int | str = parse_timestamp(value)
    except ValueError as error:
        found = str(error)
    assert isinstance(found, int) or found.startswith("must be")


@pytest.mark.parametrize("text", ["a\x07b", "a\x7fb", "a\x85b", "\\u0007"])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_control_characters_are_found_however_they_are_written(text: str, ensure_ascii: bool) -> None:
    for value in ({**NESTED, "project": text}, [{**NESTED, "project": text}]):
        body = json.dumps(value, ensure_ascii=ensure_ascii).encode()
        found = decode_events(body)
        assert isinstance(found, Events)
        is_control = not text.startswith("\\")
        assert [error.field for error in found.errors] == ["project"] * is_control
        assert decode_event(body) == (None if is_control or isinstance(value, list) else found.events[0])


# --- laws

keys = st.sampled_from([*NESTED, *FLAT, "usage", "events", "id", "cost_usd", "labels", "seq"])
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8)
values: st.SearchStrategy[Any] = st.deferred(
    lambda: leaves | st.lists(values, max_size=3) | st.dictionaries(keys, values, max_size=4)
)
broken_events = st.dictionaries(st.sampled_from([*NESTED, *FLAT, "id", "cost_usd", "labels"]), values, max_size=3).map(
    lambda changes: {**NESTED, **changes}
)


@given(st.binary(max_size=200), st.sampled_from(FORMATS))
def test_no_bytes_make_the_decoder_raise(body: bytes, body_format: BodyFormat) -> None:
    assert isinstance(decode_events(body, body_format), Events | Refusal)


@given(broken_events.map(msgspec.json.encode) | values.map(msgspec.json.encode) | st.binary(max_size=60))
def test_the_quick_way_to_one_event_finds_what_the_whole_one_finds_or_nothing(body: bytes) -> None:
    found, quick = decode_events(body), decode_event(body)
    if quick is not None:
        assert found == Events([quick], [0], (), is_batch=False)
    elif isinstance(found, Events) and not found.errors and body[:1] == b"{":
        assert found.is_batch or b"usage" in body


_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(WireEvent)}
# Defaults, which dumps of classes may have beside them, more often than what is something else.
beside = st.lists(
    st.sampled_from(sorted(_DEFAULTS.items(), key=str))
    | st.tuples(st.sampled_from([*_DEFAULTS, "tokenz"]), st.sampled_from([None, 0, 0.0, 1, False, "", "failed", {}])),
    max_size=2,
).map(dict)


@given(beside, st.sampled_from(["events", "usage"]), st.sampled_from(("json", "msgpack")))
def test_what_may_stand_beside_events_does_not_depend_on_whether_they_are_right(
    fields: dict[str, Any], holder: str, body_format: BodyFormat
) -> None:
    """Wrong ones are looked at again, slowly: what is said of the rest is the same."""
    wrong = single(tokens_in=-1, metrics=...)
    held: tuple[Any, Any] = (NESTED, wrong) if holder == "usage" else ([NESTED], [NESTED, wrong])
    without, with_wrong = (decoded({**fields, holder: it}, body_format) for it in held)
    if without.errors:
        assert with_wrong == without
    else:
        assert with_wrong.events == ([] if holder == "usage" else without.events)
        assert [bad.field for bad in with_wrong.errors] == ["tokens_in"]


@given(values | broken_events | st.lists(broken_events, max_size=4), st.sampled_from(("json", "msgpack")))
def test_no_document_makes_the_decoder_raise_and_every_error_has_a_field(value: Any, body_format: BodyFormat) -> None:
    body = msgspec.msgpack.encode(value) if body_format == "msgpack" else msgspec.json.encode(value)
    found = decode_events(body, body_format)
    assert isinstance(found, Events)
    assert all(error.field and error.reason for error in found.errors)
    assert all((error.index is not None) == found.is_batch for error in found.errors)
    assert len(found.events) == len(found.places)


@given(st.binary(max_size=120))
def test_bytes_behind_the_head_of_an_event_make_nothing_raise(tail: bytes) -> None:
    head = msgspec.json.encode(NESTED)[:-1] + b","
    assert isinstance(decode_events(head + tail), Events | Refusal)
    whole = msgspec.msgpack.encode(NESTED)
    widened = bytes([whole[0] + 1]) + whole[1:]
    assert isinstance(decode_events(widened + tail, "msgpack"), Events | Refusal)


counts = st.integers(0, 2**40)
names = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=20).filter(str.isprintable)
good = st.fixed_dictionaries(
    {
        "task_id": names,
        "agent": st.from_regex(r"urn:asap:agent:[a-z0-9]{1,9}", fullmatch=True),
        "consumer": names,
        "metrics": st.fixed_dictionaries(dict.fromkeys(COUNTS, counts)),
        "timestamp": st.integers(0, 2 * 10**9) | st.just("2026-11-20T09:00:01Z"),
    },
    optional={"id": names, "model": names, "partial": st.booleans(), "cost_usd": st.integers(0, 10**6)},
)


@given(st.lists(good, max_size=5))
def test_ndjson_msgpack_and_the_flat_form_equal_nested_json(events: list[dict[str, Any]]) -> None:
    flat = [
        {
            **{name: value for name, value in event.items() if name not in {"agent", "consumer", "metrics"}},
            "agent_id": event["agent"],
            "consumer_id": event["consumer"],
            **event["metrics"],
        }
        for event in events
    ]
    nested = decoded(events)
    assert nested.refusal is None
    assert len(nested.events) == len(events)
    if events:  # where there is no line, none can be read
        assert decode_events(b"\n".join(map(msgspec.json.encode, events)), "ndjson") == nested
    assert decoded(events, "msgpack") == nested
    assert decoded(flat) == nested
    assert decoded({"events": flat}, "msgpack") == nested


@given(good, st.sampled_from(["tokenz", "cost", "Agent"]))
def test_a_field_nobody_knows_is_refused_and_leaves_the_rest_of_the_batch(event: dict[str, Any], typo: str) -> None:
    found = decoded([event, {**event, typo: 0}, event])
    assert found.errors == (FieldError(typo, "is not a field of a usage event; what is yours goes into labels", 1),)
    assert found.places == [0, 2]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\n" * 300_000, "malformed"),
        (b" \n" * 300_000, "malformed"),
        (b"1\n" * 300_000, "too_many_events"),
        (b"1\r\n" * (MAX_EVENTS + 1), "too_many_events"),
        (b"1\r" * 300_000, "malformed"),
    ],
)
def test_ndjson_of_short_and_blank_lines_is_not_taken_apart(body: bytes, code: str) -> None:
    tracemalloc.start()
    try:
        found = decode_events(body, "ndjson")
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 2_000_000
    assert isinstance(found, Refusal)
    assert found.code == code
