"""Evidence of a breach, recomputed: from what was counted to the verdict, and whether the breach says the same.

Everything that evidence holds is integers, text and lists, so that two parties compute the same to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, get_args

from asapd.core import burnrate
from asapd.core.breach import ResolveReason
from asapd.core.earlier_evidence import explained, filled
from asapd.core.evidence_parts import ReadHours, differs, ending, faults, time_us
from asapd.core.exclusions import Observed
from asapd.core.quantiles import MAX_BUCKET, Histogram
from asapd.core.sla import Metrics, Promise, TermVerdict, burns, evaluate, measure
from asapd.core.windows import window_text


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


def differences(breach: Mapping[str, Any], evidence: Mapping[str, Any], read_hours: ReadHours) -> list[str]:
    """Recompute a breach of an agent from its evidence; what differs, in words, nothing when all of it agrees.

    Raises:
        EvidenceError: the form is not that of evidence.
    """
    try:
        given, evidence = evidence, filled(evidence)
        severity = _severity(evidence)
        found = [
            *_judged(breach, evidence, read_hours),
            *differs("breach.severity", breach["severity"], severity),
            *_times(breach, evidence),
        ]
        return explained(breach, given, severity, found) + _opening(breach, evidence, read_hours)
    except EvidenceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as problem:
        raise EvidenceError(f"it has not the form of evidence: {problem!r}") from None


def _judged(breach: Mapping[str, Any], evidence: Mapping[str, Any], read_hours: ReadHours) -> list[str]:
    """Whether evidence makes what a breach says was measured, and that is a breach."""
    found = faults(evidence, read_hours)
    verdict = _verdict(evidence, found, read_hours)
    for name in ("agent_id", "breach_type"):
        found += differs(f"breach.{name}", breach[name], evidence[name])
    if verdict is None:
        return [*found, f"promise: has no term that a breach of type {evidence['breach_type']} could be of"]
    actual, given = None if verdict.actual is None else float(verdict.actual), breach["actual_value"]
    for name, said, computed in (
        ("threshold", breach["threshold"], verdict.threshold_text),
        ("threshold_value", float(breach["threshold_value"]), float(verdict.threshold)),
        ("actual", breach["actual"], verdict.actual_text),
        ("actual_value", None if given is None else float(given), actual),
        ("samples", breach["samples"], verdict.samples),
        ("window", breach["window"], window_text(evidence["window_us"])),
        ("budget", breach.get("budget"), None),
    ):
        found += differs(f"breach.{name}", said, computed)
    if "form" in evidence:
        found += _sources(evidence)
    if evidence["min_samples"] < 0:
        found.append(f"min_samples: is {evidence['min_samples']}, which is below 0")
    if verdict.met is not False:
        found.append("verdict: the promise is kept by what the evidence holds, so there is no breach")
    if verdict.samples < evidence["min_samples"]:
        found.append(f"verdict: {verdict.samples} samples are below the {evidence['min_samples']} that are needed")
    return found


def _sources(evidence: Mapping[str, Any]) -> list[str]:
    """Whether there are as many rows as were counted, and a manifest where one promised."""
    found: list[str] = []
    tasks, rows = evidence["tasks_completed"] + evidence["tasks_failed"], evidence["usage_seq"]
    rows += evidence["task_outcome_seq"]
    if tasks > rows:
        found.append(f"usage_seq: there are {rows} rows up to here, and {tasks} tasks were counted")
    if evidence["probes"] > evidence["probe_seq"]:
        counted = f"{evidence['probes']} probes were counted"
        found.append(f"probe_seq: there are {evidence['probe_seq']} rows up to here, and {counted}")
    if evidence["promise_source"] == "manifest" and evidence["manifest_digest"] is None:
        found.append("manifest_digest: is of none, and a manifest is what promised")
    return found


def _severity(evidence: Mapping[str, Any]) -> str:
    if evidence["breach_type"] == "burn_rate":
        rule = _rule(evidence)
        return "warning" if rule is None else rule.severity
    verdict = _verdicts(evidence).get(evidence["breach_type"])
    return "critical" if verdict is not None and verdict.critical else "warning"


def _opening(breach: Mapping[str, Any], evidence: Mapping[str, Any], read_hours: ReadHours) -> list[str]:
    """Whether what escalated was opened by a warning, by the evidence of then."""
    given = evidence.get("opened_with")
    if given is None:
        return []
    opened = filled(given)
    verdict = _verdict(opened, [], read_hours)
    if verdict is None:
        return ["opened_with: promise: has no term that the breach could be of"]
    # What it showed then is not in the breach any more: all that has to agree is that it was one.
    then = {
        **breach,
        "threshold": verdict.threshold_text,
        "threshold_value": float(verdict.threshold),
        "actual": verdict.actual_text,
        "actual_value": None if verdict.actual is None else float(verdict.actual),
        "samples": verdict.samples,
        "window": window_text(opened["window_us"]),
    }
    severity = _severity(opened)
    found = [*_judged(then, opened, read_hours), *differs("severity", "warning", severity)]
    if opened["period_end_us"] > evidence["period_end_us"] + evidence["window_us"]:
        found.append("period: is after that of the escalation")
    return [f"opened_with: {one}" for one in explained(then, given, severity, found)]


def _times(breach: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[str]:
    """Whether a breach was detected when it was judged, has ended just when it says so, and lasted for that long."""
    found: list[str] = []
    first = evidence.get("opened_with") or evidence
    detected_us = time_us(breach["detected_at"])
    if "judged_us" in first:
        found += differs("breach.detected_at", detected_us, first["judged_us"])
    # A clock that went back makes the period end later than now, by no more than the window.
    if abs(detected_us - first["period_end_us"]) > first["window_us"]:
        found.append(f"breach.detected_at: is {breach['detected_at']}, which is not when the period ended")
    found += ending(breach)
    if breach["resolve_reason"] not in (None, *get_args(ResolveReason)):
        found.append(f"breach.resolve_reason: is {breach['resolve_reason']}, which there is not")
    return found


def _rule(evidence: Mapping[str, Any]) -> burnrate.Rule | None:
    burn = evidence["burn"]
    windows = (evidence["window_us"], burn["short"]["window_us"])
    return next(
        (one for one in burnrate.RULES if (str(one.factor), one.long_us, one.short_us) == (burn["factor"], *windows)),
        None,
    )


def _verdicts(evidence: Mapping[str, Any]) -> dict[str, TermVerdict]:
    return {one.breach_type: one for one in evaluate(_metrics(evidence), _promise(evidence))}


def _verdict(evidence: Mapping[str, Any], found: list[str], read_hours: ReadHours) -> TermVerdict | None:
    if evidence["breach_type"] != "burn_rate":
        return _verdicts(evidence).get(evidence["breach_type"])
    burn = evidence["burn"]
    found += faults(burn["short"], read_hours, "burn.short.")
    found += _within(burn["short"], evidence)
    rule = _rule(evidence)
    if rule is None:
        found.append(f"burn: there is no rule of factor {burn['factor']} over these windows")
        return None
    found += differs("burn.severity", burn["severity"], rule.severity)
    long, short = _metrics(evidence), _metrics(burn["short"])
    return burnrate.as_verdict(
        burnrate.hold(rule, burn["term"], long, short, _promise(evidence), evidence["min_samples"])
    )


def _within(short: Mapping[str, Any], long: Mapping[str, Any]) -> list[str]:
    """Whether the short window of a burn rate is the end of the long one."""
    found: list[str] = []
    for name in ("agent_id", "promise", "period_end_us"):
        found += differs(f"burn.short.{name}", short[name], long[name])
    for name in ("segments", "excluded", "blind"):
        since_us = short["period_start_us"]
        if name == "segments" and long["segments_left_out"]:
            since_us = max(since_us, long["segments"][0][0])
        ends = [
            [[max(since_us, first_us), last_us, *up] for first_us, last_us, *up in part[name] if last_us > since_us]
            for part in (short, long)
        ]
        if ends[0] != ends[1]:
            found.append(f"burn.short.{name}: are not those at the end of the long window")
    found += [
        f"burn.short.{name}: is {short[name]}, and the long window has {long[name]}"
        for name in ("tasks_completed", "tasks_failed", "samples", "over_promise", "probes")
        if short[name] > long[name]
    ]
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
