"""Evidence of a breach, recomputed: from what was counted to the verdict, and whether the breach says the same.

Everything that evidence holds is integers, text and lists, so that two parties compute the same to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from asapd.core import burnrate
from asapd.core.exclusions import Observed, observe
from asapd.core.intervals import joined
from asapd.core.quantiles import MAX_BUCKET, Histogram, bucket_of
from asapd.core.sla import Metrics, Promise, TermVerdict, burns, evaluate, measure
from asapd.core.types import datetime_us
from asapd.core.uptime import UptimeTimeline
from asapd.core.windows import step_us, window_text


class EvidenceError(ValueError):
    """The document does not have the form of evidence; whoever made it has to ask the daemon for it again."""


def arithmetic(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """The comparison that decided, in whole numbers: the breach stands while `left` is greater than `right`.

    Raises:
        EvidenceError: the form is not that of evidence.
    """
    try:
        promise, kind = _promise(evidence), evidence["breach_type"]
        match kind:
            case "availability":
                assert promise.availability_percent is not None
                allowed = 100 - promise.availability_percent
                known_us = evidence["up_us"] + evidence["down_us"]
                return _compared(
                    "100 * down_us", 100 * evidence["down_us"], f"{allowed} * known_us", allowed * known_us
                )
            case "error_rate":
                assert promise.max_error_rate_percent is not None
                tasks = evidence["tasks_completed"] + evidence["tasks_failed"]
                right = promise.max_error_rate_percent * tasks
                text = f"{promise.max_error_rate_percent} * tasks"
                return _compared("100 * tasks_failed", 100 * evidence["tasks_failed"], text, right)
            case "latency":
                right = Decimal(5 * evidence["samples"])
                return _compared("100 * over_promise", 100 * evidence["over_promise"], "5 * samples", right)
            case "burn_rate":
                burn = evidence["burn"]
                term = burn["term"]
                rates = [burns(_metrics(one), promise).get(term) for one in (evidence, burn["short"])]
                shown = [None if rate is None else str(burnrate.shown_burn(rate)) for rate in rates]
                return {
                    "rule": "both burn rates are at least the factor",
                    "burn_rates": shown,
                    "factor": burn["factor"],
                }
    except (KeyError, TypeError, ValueError, AssertionError, InvalidOperation) as problem:
        raise EvidenceError(f"it cannot be computed with: {problem!r}") from None
    return {}


def _compared(left: str, left_value: int, right: str, right_value: Decimal) -> dict[str, Any]:
    return {"rule": f"{left} > {right}", "left": str(left_value), "right": f"{right_value.normalize():f}"}


def differences(breach: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[str]:
    """Recompute a breach of an agent from its evidence; what differs, in words, nothing when all of it agrees.

    Raises:
        EvidenceError: the form is not that of evidence.
    """
    try:
        found = _sums("", evidence)
        verdict, rule_severity = _verdict(evidence, found)
        for name in ("agent_id", "breach_type"):
            _compare(found, f"breach.{name}", breach[name], evidence[name])
        if verdict is None:
            return [*found, f"promise: has no term that a breach of type {evidence['breach_type']} could be of"]
        _compare(found, "breach.threshold", breach["threshold"], verdict.threshold_text)
        _compare(found, "breach.threshold_value", float(breach["threshold_value"]), float(verdict.threshold))
        _compare(found, "breach.actual", breach["actual"], verdict.actual_text)
        actual = None if verdict.actual is None else float(verdict.actual)
        given = breach["actual_value"]
        _compare(found, "breach.actual_value", None if given is None else float(given), actual)
        _compare(found, "breach.samples", breach["samples"], verdict.samples)
        _compare(found, "breach.severity", breach["severity"], rule_severity)
        _compare(found, "breach.window", breach["window"], window_text(evidence["window_us"]))
        found += _times(breach, evidence)
        if evidence["min_samples"] < 0:
            found.append(f"min_samples: is {evidence['min_samples']}, which is below 0")
        if verdict.met is not False:
            found.append("verdict: the promise is kept by what the evidence holds, so there is no breach")
        if verdict.samples < evidence["min_samples"]:
            found.append(f"verdict: {verdict.samples} samples are below the {evidence['min_samples']} that are needed")
    except EvidenceError:
        raise
    except (KeyError, TypeError, ValueError, InvalidOperation, StopIteration) as problem:
        raise EvidenceError(f"it has not the form of evidence: {problem!r}") from None
    return found


def _times(breach: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[str]:
    """Whether a breach was detected when it was judged, and has ended just when it says so."""
    found: list[str] = []
    detected_us, ended = _time_us(breach["detected_at"]), breach["resolved_at"]
    after_us = detected_us - evidence["period_end_us"]
    # A clock that went back makes the period end later than now, by no more than the window. What escalated was
    # detected before it was judged last.
    if after_us > evidence["window_us"] or (after_us < -evidence["window_us"] and "opened_with" not in evidence):
        found.append(f"breach.detected_at: is {breach['detected_at']}, which is not when the period ended")
    is_over = breach["state"] == "resolved"
    told = {is_over, ended is not None, breach["resolve_reason"] is not None}
    if breach["state"] not in ("open", "resolved") or len(told) > 1:
        found.append(f"breach.state: is {breach['state']}, and resolved_at is {ended}")
    elif is_over and _time_us(ended) < detected_us:
        found.append(f"breach.resolved_at: is {ended}, which is before it was detected")
    return found


def _time_us(text: str) -> int:
    return datetime_us(datetime.fromisoformat(text))


def _verdict(evidence: Mapping[str, Any], found: list[str]) -> tuple[TermVerdict | None, str]:
    promise = _promise(evidence)
    if evidence["breach_type"] != "burn_rate":
        verdicts = {one.breach_type: one for one in evaluate(_metrics(evidence), promise)}
        verdict = verdicts.get(evidence["breach_type"])
        return verdict, "critical" if verdict is not None and verdict.critical else "warning"
    burn = evidence["burn"]
    found += _sums("burn.short.", burn["short"])
    _compare(found, "burn.short.agent_id", burn["short"]["agent_id"], evidence["agent_id"])
    long, short = _metrics(evidence), _metrics(burn["short"])
    rule = next((one for one in burnrate.RULES if str(one.factor) == burn["factor"]), None)
    if rule is None or (rule.long_us, rule.short_us) != (long.window_us, short.window_us):
        found.append(f"burn: there is no rule of factor {burn['factor']} over these windows")
        return None, "warning"
    held = burnrate.hold(rule, burn["term"], long, short, promise, evidence["min_samples"])
    verdict = burnrate.as_verdict(held)
    return verdict, rule.severity


def _sums(place: str, evidence: Mapping[str, Any]) -> list[str]:
    """Whether the sums of evidence are those of its parts."""
    found: list[str] = []
    start_us, end_us = evidence["period_start_us"], evidence["period_end_us"]
    parts = ("up_us", "down_us", "unknown_us", "excluded_us")
    window_us = evidence["window_us"]
    if abs(end_us - start_us - window_us) > step_us(window_us):
        found.append(f"{place}period: is {end_us - start_us} us long, and the window {window_us} us")
    found += [
        f"{place}{name}: holds what is not within the period"
        for name in ("segments", "excluded", "blind")
        if any(not start_us <= first_us < last_us <= end_us for first_us, last_us, *_ in evidence[name])
    ]
    total_us = sum(evidence[name] for name in parts)
    if any(evidence[name] < 0 for name in (*parts, "blind_us", "tasks_completed", "tasks_failed", "over_promise")):
        found.append(f"{place}sums: a count is negative")
    if total_us != end_us - start_us:
        found.append(f"{place}period: its parts are {total_us} us together, and it is {end_us - start_us} us long")
    if not evidence["segments_left_out"]:
        timeline = UptimeTimeline()
        for first_us, last_us, up in evidence["segments"]:
            timeline.extend(first_us, last_us, bool(up))
        excluded, blind = (joined((a, b) for a, b in evidence[name]) for name in ("excluded", "blind"))
        seen = observe(timeline, start_us, end_us, excluded, blind)
        for name in (*parts, "blind_us"):
            _compare(found, f"{place}{name}", evidence[name], getattr(seen, name))
    counted = sum(count for _, count in evidence["latency_buckets"])
    _compare(found, f"{place}samples", evidence["samples"], counted)
    limit = evidence["promise"]["max_latency_p95_ms"]
    if limit is not None:
        edge = bucket_of(limit)
        surely = sum(count for bucket, count in evidence["latency_buckets"] if bucket > edge)
        at_most = sum(count for bucket, count in evidence["latency_buckets"] if bucket >= edge)
        if not surely <= evidence["over_promise"] <= at_most:
            found.append(
                f"{place}over_promise: is {evidence['over_promise']}, and the histogram has {surely} to {at_most}"
            )
    return found


def _metrics(evidence: Mapping[str, Any]) -> Metrics:
    latency = Histogram()
    for bucket, count in evidence["latency_buckets"]:
        if not 0 <= bucket <= MAX_BUCKET or count <= 0:
            raise EvidenceError("latency_buckets: holds what is no bucket with a count")
        latency.add_bucket(bucket, count)
    return measure(
        evidence["agent_id"],
        window_us=evidence["window_us"],
        period=(evidence["period_start_us"], evidence["period_end_us"]),
        completed=evidence["tasks_completed"],
        failed=evidence["tasks_failed"],
        latency=latency,
        over_promise=evidence["over_promise"],
        uptime=Observed(
            *(evidence[name] for name in ("up_us", "down_us", "unknown_us", "excluded_us", "blind_us")),
        ),
        probes=evidence["probes"],
        max_latency_p95_ms=evidence["promise"]["max_latency_p95_ms"],
    )


def _promise(evidence: Mapping[str, Any]) -> Promise:
    terms = evidence["promise"]
    availability, errors = terms["availability_percent"], terms["max_error_rate_percent"]
    return Promise(
        None if availability is None else Decimal(availability),
        terms["max_latency_p95_ms"],
        None if errors is None else Decimal(errors),
    )


def _compare(found: list[str], name: str, given: object, computed: object) -> None:
    if given != computed:
        found.append(f"{name}: is {given}, and what the evidence holds makes {computed}")
