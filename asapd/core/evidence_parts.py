"""The parts of evidence: whether they make its sums, so that nothing of either was left out, added or altered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any

from asapd.core.earlier_evidence import is_earlier
from asapd.core.exclusions import Exclusions, Hours, observe
from asapd.core.intervals import Interval, cut, joined, total_us, without
from asapd.core.quantiles import bucket_of
from asapd.core.support_hours import ALWAYS, SupportHours
from asapd.core.types import DAY_US, SECOND_US, datetime_us
from asapd.core.uptime import UptimeTimeline
from asapd.core.windows import step_us, window_bounds

FORM = 2
"""The form of evidence that is made now; 1, which says nothing of it, holds no steps, nor why time was excluded."""

MOST_SEGMENTS = 1_000
"""Evidence is kept for good, and an agent that flaps at every probe of a long window must not bloat it: of what is
older it has the sums and a digest."""

# Whoever verifies lays out the support hours of a window: a made-up one must not keep them for ever.
_MAX_WINDOW_US = 30 * DAY_US

_TIMES = ("up_us", "down_us", "unknown_us", "excluded_us", "blind_us")
_COUNTS = ("tasks_completed", "tasks_failed", "samples", "over_promise", "probes", "segments_left_out")

ReadHours = Callable[[str | None], tuple[SupportHours, tzinfo] | None]
"""Reads support hours and their zone; None where there are none, or they cannot be understood."""


def faults(evidence: Mapping[str, Any], read_hours: ReadHours, place: str = "") -> list[str]:
    """What differs between the parts of evidence and its sums, in words that begin with `place`.

    Raises:
        KeyError, TypeError, ValueError: the form is not that of evidence.
    """
    found: list[str] = []
    if evidence.get("form", FORM) != FORM:
        found.append(f"form: is {evidence['form']}, which this asapd does not know: have a newer one verify it")
    if any(evidence[name] < 0 for name in (*_TIMES, *_COUNTS)):
        found.append("sums: a count is negative")
    off_period = _period(evidence)
    found += [*off_period, *_uptime(evidence), *_latencies(evidence)]
    if "form" in evidence and not off_period:
        found += [*_exclusions(evidence, read_hours), *_steps(evidence)]
    return [f"{place}{one}" for one in found]


def on_trust(evidence: Mapping[str, Any]) -> list[str]:
    """What evidence says that cannot be computed from it."""
    tasks, left_out = evidence["tasks_completed"] + evidence["tasks_failed"], evidence["segments_left_out"]
    counted = f"that {tasks} tasks and {evidence['probes']} probes were counted is asapd's word"
    rows = f"usage up to row {evidence.get('usage_seq')} and probes up to row {evidence.get('probe_seq')}"
    found = [f"{counted}: hold them to {rows}"]
    if "form" not in evidence:
        found.append("an earlier asapd made this: why time was excluded, and when what was counted, is not in it")
    if left_out:
        found.append(f"{left_out} older stretches of uptime are left out: their sums are asapd's word")
    if evidence["hold_us"]:
        found.append(f"that it had lasted for {evidence['hold_us'] // SECOND_US} s is asapd's word")
    if is_earlier(evidence):
        found.append("time that does not count was not known to the asapd of then: none was left out")
    return found


def ending(breach: Mapping[str, Any]) -> list[str]:
    """Whether a breach has ended just when it says so, and lasted for as long as it says."""
    ended = breach["resolved_at"]
    is_over = breach["state"] == "resolved"
    told = {is_over, ended is not None, breach["resolve_reason"] is not None, breach["duration_seconds"] is not None}
    if breach["state"] not in ("open", "resolved") or len(told) > 1:
        return [f"breach.state: is {breach['state']}, and resolved_at is {ended}"]
    if not is_over:
        return []
    lasted_us = time_us(ended) - time_us(breach["detected_at"])
    found = differs("breach.duration_seconds", float(breach["duration_seconds"]), lasted_us / SECOND_US)
    if lasted_us < 0:
        found.insert(0, f"breach.resolved_at: is {ended}, which is before it was detected")
    return found


def time_us(text: str) -> int:
    """A time as breaches show it, in microseconds.

    Raises:
        ValueError: it is none.
    """
    return datetime_us(datetime.fromisoformat(text))


def differs(name: str, given: object, computed: object) -> list[str]:
    """What to say where a figure is not what it is computed to be."""
    return [] if given == computed else [f"{name}: is {given}, and what the evidence holds makes {computed}"]


def _period(evidence: Mapping[str, Any]) -> list[str]:
    period = (evidence["period_start_us"], evidence["period_end_us"])
    if not 0 < evidence["window_us"] <= _MAX_WINDOW_US:
        raise ValueError(f"window_us: is {evidence['window_us']}, and no window is longer than 30 days")
    found: list[str] = []
    if period != window_bounds(evidence["window_us"], period[1]):
        found.append(f"period: is {period[1] - period[0]} us long, and the window {evidence['window_us']} us")
    names = [name for name in ("segments", "excluded", "blind", "maintenance") if name in evidence]
    for name in names:
        ends_us = period[0]
        for first_us, last_us, *_ in evidence[name]:
            if not ends_us <= first_us < last_us <= period[1]:
                found.append(f"{name}: holds what is not within the period, or not in order")
                break
            ends_us = last_us
    return found


def _uptime(evidence: Mapping[str, Any]) -> list[str]:
    period = (evidence["period_start_us"], evidence["period_end_us"])
    excluded, blind = (joined((a, b) for a, b in evidence[name]) for name in ("excluded", "blind"))
    timeline, before, kept = UptimeTimeline(), evidence.get("segments_before"), evidence["segments"]
    for first_us, last_us, up in kept:
        if up not in (True, False):
            raise ValueError(f"segments: {up!r} is neither up nor down")
        timeline.extend(first_us, last_us, up)
    seen = observe(timeline, *period, excluded, blind)
    up_us, down_us, found = seen.up_us, seen.down_us, list[str]()
    left_out = evidence["segments_left_out"]
    if left_out and "form" not in evidence:
        # All that the sums of an older form can be held to.
        before = {"until_us": kept[0][0] if kept else period[1]}
        before |= {"up_us": evidence["up_us"] - up_us, "down_us": evidence["down_us"] - down_us}
    if (before is None) != (left_out == 0) or (left_out and len(kept) != MOST_SEGMENTS):
        found.append(f"segments: {left_out} are left out where none have to be, or nothing stands for them")
    elif before is not None:
        until_us = before["until_us"]
        room = without(period[0], until_us, joined([*excluded, *blind]))
        known_us = before["up_us"] + before["down_us"]
        if min(before["up_us"], before["down_us"]) < 0 or known_us > total_us(room) or until_us != kept[0][0]:
            found.append("segments_before: is not what can lie before the segments")
        up_us, down_us = up_us + before["up_us"], down_us + before["down_us"]
    found += [*differs("up_us", evidence["up_us"], up_us), *differs("down_us", evidence["down_us"], down_us)]
    unknown_us = seen.up_us + seen.down_us + seen.unknown_us - up_us - down_us
    found += differs("unknown_us", evidence["unknown_us"], unknown_us)
    found += differs("excluded_us", evidence["excluded_us"], seen.excluded_us)
    return found + differs("blind_us", evidence["blind_us"], seen.blind_us)


def _latencies(evidence: Mapping[str, Any]) -> list[str]:
    buckets, samples, over = evidence["latency_buckets"], evidence["samples"], evidence["over_promise"]
    found = differs("samples", samples, sum(count for _, count in buckets))
    if [bucket for bucket, _ in buckets] != sorted({bucket for bucket, _ in buckets}):
        found.append("latency_buckets: are not in order, or one is there twice")
    if samples + evidence.get("untimed", 0) > evidence["tasks_completed"]:
        found.append(f"samples: are {samples}, and {evidence['tasks_completed']} tasks were completed")
    elif "untimed" in evidence:
        found += differs("untimed", evidence["untimed"], evidence["tasks_completed"] - samples)
    limit = evidence["promise"]["max_latency_p95_ms"]
    edge = None if limit is None else bucket_of(limit)
    surely = 0 if edge is None else sum(count for bucket, count in buckets if bucket > edge)
    at_most = 0 if edge is None else sum(count for bucket, count in buckets if bucket >= edge)
    if not surely <= over <= at_most:
        found.append(f"over_promise: is {over}, and the histogram has {surely} to {at_most}")
    return found


def _exclusions(evidence: Mapping[str, Any], read_hours: ReadHours) -> list[str]:
    """Whether what was excluded follows from support hours and maintenance, and from nothing else."""
    *past, (last_us, text) = evidence["support_hours"]
    ends_us = [evidence["period_start_us"], *(until_us for until_us, _ in past)]
    if last_us is not None or None in ends_us or ends_us != sorted(set(ends_us)):
        return ["support_hours: do not follow each other within the period, or the last of them end"]
    earlier = tuple(Hours(until_us, *(read_hours(before) or (ALWAYS, UTC))) for until_us, before in past)
    upkeep: tuple[Interval, ...] = tuple((first_us, last_us) for first_us, last_us in evidence["maintenance"])
    exclusions = Exclusions(*(read_hours(text) or (ALWAYS, UTC)), upkeep, earlier)
    made = exclusions.between(evidence["period_start_us"], evidence["period_end_us"])
    if [(first_us, last_us) for first_us, last_us in evidence["excluded"]] != made:
        return ["excluded: is not what support hours and maintenance make"]
    return []


def _steps(evidence: Mapping[str, Any]) -> list[str]:
    """Whether the counts are those of the steps, and each stretch of uptime was begun by a probe."""
    steps, step = evidence["steps"], step_us(evidence["window_us"])
    period = (evidence["period_start_us"], evidence["period_end_us"])
    starts = [start_us for start_us, *_ in steps]
    found: list[str] = []
    if starts != sorted(set(starts)) or any(at % step or not period[0] <= at <= period[1] for at in starts):
        found.append("steps: are not those of the window, or one is there twice")
    if any(min(counts) < 0 for counts in steps):
        found.append("steps: a count is negative")
    for place, name in enumerate(("tasks_completed", "tasks_failed", "over_promise", "probes"), 1):
        found += differs(name, evidence[name], sum(counts[place] for counts in steps))
    probed = {counts[0] for counts in steps if counts[4]}
    excluded = [(first_us, last_us) for first_us, last_us in evidence["excluded"]]
    # Of single probes the oldest may be gone, by retention.
    since_us = max(period[0] + 1, min(probed, default=period[1]))
    begun = [at for at, *_ in evidence["segments"] if at >= since_us and not cut(excluded, at, at + 1)]
    if any(at // step * step not in probed for at in begun):
        found.append("probes: there is none where a stretch of uptime begins")
    return found
