"""What an evidence pack holds of the log: the same rules for whoever makes one and for whoever checks it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OF_AGENT = ("usage.", "task.", "agent.", "sla.", "maintenance.")
"""Kinds of entries that belong to an agent when they name it."""

OF_HOST = ("config.loaded", "config.reloaded", "budgets.changed", "watch.interrupted", "watch.corrected", "log.alarm")
"""Kinds of entries that concern every agent of a host; only who may see the whole host is given them."""

MADE, REVOKED = "delegation.created", "delegation.revoked"


def concerns(entry: Mapping[str, Any], agent: str) -> bool:
    """Whether an entry (`event_type`, `subject`, `details`) belongs to an agent; delegations are not judged here."""
    kind, details = entry["event_type"], entry["details"]
    if details is None:
        return False
    if kind in OF_HOST:
        return True
    if kind.startswith("maintenance."):
        return entry["subject"] in (agent, "*")
    return kind.startswith(OF_AGENT) and agent in (entry["subject"], details.get("agent"))


def leading_to(entries: Iterable[Mapping[str, Any]], agent: str) -> set[str]:
    """Of the delegations that were made by these entries, those of an agent and those they were given under."""
    made = {entry["subject"]: entry["details"] for entry in entries if entry["event_type"] == MADE}
    wanted: set[str] = set()
    ahead = [name for name, details in made.items() if agent in (details["delegator"], details["delegate"])]
    while ahead:
        name = ahead.pop()
        if name in made and name not in wanted:
            wanted.add(name)
            ahead.append(made[name]["parent"])
    return wanted


def stray(entries: Iterable[Mapping[str, Any]], agent: str, start: str, end: str) -> str | None:
    """The first entry that has no place in the pack of an agent and a period, in words; times are as in entries.

    Delegations may be older or newer than the period, as long as they lead to one of the agent's.
    """
    kept = list(entries)
    wanted = leading_to(kept, agent)
    for entry in kept:
        if entry["event_type"] in (MADE, REVOKED):
            if entry["subject"] not in wanted:
                return f"entry {entry['seq']} is about a delegation that is none of {agent}"
        elif not concerns(entry, agent):
            return f"entry {entry['seq']} is not about {agent}"
        elif not start <= entry["timestamp"] < end:
            return f"entry {entry['seq']} is not of the period"
    return None


def delegations(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tree that the entries of delegations make, in their order; money in micro-USD, times as in entries."""
    kept = [entry for entry in entries if entry["event_type"] in (MADE, REVOKED)]
    revoked = {entry["subject"]: entry["timestamp"] for entry in kept if entry["event_type"] == REVOKED}
    return [
        {
            **{name: entry["details"][name] for name in _TERMS},
            "created_at": entry["timestamp"],
            "revoked_at": revoked.get(entry["subject"]),
        }
        for entry in kept
        if entry["event_type"] == MADE
    ]


_TERMS = ("id", "parent", "delegator", "delegate", "scopes", "max_cost_microusd", "max_tasks", "expires_at")


def opened(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The breaches that were opened, by their ids, in the order of the entries."""
    return [
        entry["details"]["id"]
        for entry in entries
        if entry["event_type"] == "sla.breach" and entry["details"]["event"] == "opened"
    ]


def uncovered(periods: Sequence[Mapping[str, Any]], start: str, end: str) -> str | None:
    """Why consecutive periods (`period_start`, `period_end`) are not the whole of another one; None when they are."""
    reached = start
    for period in periods:
        if period["period_start"] != reached or period["period_end"] <= reached:
            return f"a period begins at {period['period_start']}, and the one before it ended at {reached}"
        reached = period["period_end"]
    return None if reached == end else f"the periods end at {reached}, not at {end}"
