"""An event's identity and content are exact, and rollups add up in any order."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.types import HOUR_US, Outcome
from asapd.core.usage import (
    FLAG_NAMES,
    UNKNOWN_COST,
    Cost,
    RollupKey,
    RollupSums,
    UsageEvent,
    content_digest,
    identity_digest,
    identity_key,
    rollup,
)

NOW_US = 1_795_169_203_000_000
EVENT = UsageEvent("t", "a", "c", NOW_US, id="e", labels={"x": "1", "y": "2"})

OTHER: dict[str, Any] = {
    "outcome": Outcome.FAILED,
    "partial": True,
    "labels": {"x": "1"},
    "action": "task.other",
}


@pytest.mark.parametrize(
    "field",
    [name for name in UsageEvent.__struct_fields__ if name not in {"tells_tokens", "is_action_assumed"}],
)
def test_a_change_of_any_field_changes_the_content(field: str) -> None:
    old = getattr(EVENT, field)
    new = OTHER.get(field, old + 1 if isinstance(old, int) else f"{old or ''}x" if isinstance(old, str) else 1)
    if (old is None) and field not in {"source_seq", "reported_microusd"}:
        new = "x"
    assert content_digest(replace(EVENT, **{field: new})) != content_digest(EVENT)


@pytest.mark.parametrize("kept", [0, 5])
def test_that_an_action_is_assumed_is_no_part_of_the_content(kept: int) -> None:
    event = replace(EVENT, cache_write_1h_tokens=kept)
    assert content_digest(replace(event, is_action_assumed=True)) == content_digest(event)


def test_what_was_recorded_before_a_field_was_known_has_the_content_it_had() -> None:
    event = UsageEvent(
        "t",
        "urn:asap:agent:a",
        "c",
        NOW_US,
        tokens_in=10,
        tokens_out=2,
        duration_ms=3,
        api_calls=1,
        cached_tokens_in=4,
        cache_write_tokens=5,
        reasoning_tokens=1,
        id="e",
        source="s",
        source_seq=7,
        model="m",
        provider="p",
        project="x",
        reported_microusd=9,
        labels={"b": "2", "a": "1"},
        trace_id="f",
    )
    # As asapd 0.1.0 computed them.
    assert content_digest(event).hex() == "a9e1d7145d80b6f8564daec9a5ee5291"
    identity = ("default", event.agent, event.source, event.id)
    assert identity_digest(identity).hex() == "a15c6ae8fddfb989de4ace927786bff6"


@pytest.mark.parametrize("kept_for_an_hour", [0, 1])
def test_no_tokens_and_none_that_are_told_are_the_same_content(kept_for_an_hour: int) -> None:
    event = replace(EVENT, cache_write_1h_tokens=kept_for_an_hour)
    assert content_digest(replace(event, tells_tokens=False)) == content_digest(event)


def test_content_does_not_depend_on_the_order_of_labels_or_on_the_journey() -> None:
    turned = replace(EVENT, labels={"y": "2", "x": "1"})
    assert content_digest(turned) == content_digest(EVENT)
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(EVENT), type=UsageEvent)
    assert content_digest(travelled) == content_digest(EVENT)


parts = st.text("a\0|,", max_size=3)
identities = st.tuples(parts, parts, parts, parts)


@given(identities, identities)
def test_identities_are_equal_only_when_all_four_parts_are(
    one: tuple[str, str, str, str], other: tuple[str, str, str, str]
) -> None:
    assert (identity_key(*one) == identity_key(*other)) == (one == other)
    assert (identity_digest(one) == identity_digest(other)) == (one == other)


UUID = "0190a1b2-c3d4-7e5f-8a6b-0123456789ab"


@given(st.data())
def test_ids_of_every_kind_have_keys_of_their_own(data: st.DataObject) -> None:
    near = st.sampled_from(
        [UUID, UUID.upper(), UUID.replace("-", ""), f"{UUID[:-1]} ", UUID[:8] + UUID[9:13] + "-" + UUID[13:], "x" * 36]
    )
    ids = near | st.uuids().map(str) | st.text(max_size=40) | st.text("aé", min_size=14, max_size=36)
    one, other = data.draw(ids), data.draw(ids)
    assert (identity_key("t", "a", "s", one) == identity_key("t", "a", "s", other)) == (one == other)


def test_keys_of_one_origin_sort_as_their_ids_and_are_short() -> None:
    ordered = [f"{number:08d}" for number in range(50)]
    keys = [identity_key("t", "a", "s", event_id) for event_id in ordered]
    assert keys == sorted(keys)
    uuids = sorted(f"0190a1b2-c3d4-7e5f-8a6b-{number:012x}" for number in range(50))
    assert [identity_key("t", "a", "s", its) for its in uuids] == sorted(identity_key("t", "a", "s", i) for i in uuids)
    assert len(identity_key("t", "a", "s", UUID)) == 27
    assert len(identity_key("t", "a", "s", "x" * 128)) == 59


def test_keys_of_ids_that_many_make_in_turn_lie_side_by_side() -> None:
    uuids = [f"0190a1b2-c3d4-7e5f-8a6b-{number:012x}" for number in range(50)]
    keys = [identity_key("t", f"agent {number % 7}", "", its) for number, its in enumerate(uuids)]
    assert keys == sorted(keys)


def test_a_rollup_counts_in_its_hour_and_leaves_interim_reports_out_of_the_tasks() -> None:
    hour = NOW_US // HOUR_US
    first = replace(EVENT, tokens_in=3, timestamp_us=hour * HOUR_US)
    interim = replace(first, partial=True, timestamp_us=(hour + 1) * HOUR_US - 1)
    later = replace(first, timestamp_us=(hour + 1) * HOUR_US)
    sums = rollup([(first, Cost(5)), (interim, UNKNOWN_COST), (later, Cost(0))])
    assert sums == {
        RollupKey(hour, "a", "c", "", "", Outcome.COMPLETED): RollupSums(
            events=2, tasks=1, tokens_in=6, cost_microusd=5, unpriced=1
        ),
        RollupKey(hour + 1, "a", "c", "", "", Outcome.COMPLETED): RollupSums(events=1, tasks=1, tokens_in=3),
    }


counts = st.integers(0, 2**53 - 1)
events = st.builds(
    UsageEvent,
    task_id=st.just("t"),
    agent=st.sampled_from("ab"),
    consumer=st.sampled_from("cd"),
    timestamp_us=st.integers(0, 3 * HOUR_US),
    tokens_in=counts,
    tokens_out=counts,
    duration_ms=st.none() | counts,
    api_calls=counts,
    cached_tokens_in=counts,
    cache_write_tokens=counts,
    reasoning_tokens=counts,
    cache_write_1h_tokens=counts,
    outcome=st.sampled_from(Outcome),
    partial=st.booleans(),
    model=st.sampled_from(("", "m")),
    project=st.sampled_from(("", "p")),
)
priced = st.lists(st.tuples(events, st.builds(Cost, st.none() | counts)), max_size=12)


@given(priced, st.integers(0, 12), st.randoms(use_true_random=False))
def test_splitting_and_reordering_change_no_sum(
    batch: list[tuple[UsageEvent, Cost]], cut: int, chance: random.Random
) -> None:
    whole = rollup(batch)
    shuffled = list(batch)
    chance.shuffle(shuffled)
    added: dict[RollupKey, RollupSums] = {}
    for part in (shuffled[:cut], shuffled[cut:]):
        for key, sums in rollup(part).items():
            old = added.get(key, RollupSums())
            added[key] = RollupSums(*map(sum, zip(old, sums, strict=True)))
    assert added == whole
    assert sum(sums.events for sums in whole.values()) == len(batch)
    for field in set(RollupSums._fields) & set(UsageEvent.__struct_fields__):
        of_each = (getattr(event, field) or 0 for event, _ in batch)
        assert sum(getattr(sums, field) for sums in whole.values()) == sum(of_each), field


def test_flags_are_single_bits_with_a_name_each() -> None:
    assert sorted(FLAG_NAMES) == [1 << bit for bit in range(len(FLAG_NAMES))]
