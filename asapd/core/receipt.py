"""What the entries of a task come to: the same sums for whoever gives a receipt and for whoever checks it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from asapd.core.canonical import exact

_COUNTED = ("tokens_in", "tokens_out", "duration_ms", "api_calls")


class ReceiptError(ValueError):
    """The entries are not those of one task; the message says which is not."""


_EVENT_OF = {"usage.repriced": "reprices_row", "usage.voided": "voids_row"}


def same_totals(given: object, sums: dict[str, int]) -> bool:
    """Whether a receipt gives these sums, in whatever form it gives those beyond 2**53-1."""
    return bool(exact(given) == exact(sums))


def totals(task_id: str, entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The sums over entries (`event_type` and `details`) of one task, money in micro-USD.

    A void takes its event out of every sum, a correction changes its cost. Events of unknown cost are counted in
    `unpriced`; entries whose content was erased, and voids and corrections of those, in `erased` and in nothing else.

    Raises:
        ReceiptError: an entry is of another task, or of something that is not there.
    """
    rows: dict[int, dict[str, Any]] = {}
    sums = dict.fromkeys(("events", *_COUNTED, "cost_microusd", "unpriced", "erased"), 0)
    for entry in entries:
        details, kind = entry["details"], entry["event_type"]
        if details is None:
            sums["erased"] += 1
        elif kind.startswith("usage."):
            if details.get("task_id") != task_id:
                raise ReceiptError(f"entry {entry['seq']} is of task {details.get('task_id')}")
            _add(sums, rows, kind, details, entry["seq"])
    return sums


def _add(sums: dict[str, int], rows: dict[int, dict[str, Any]], kind: str, details: dict[str, Any], seq: int) -> None:
    cost = details["cost_microusd"]
    match kind:
        case "usage.recorded":
            rows[details["row"]] = details
            sums["events"] += 1
            sums["unpriced"] += cost is None
            for name in _COUNTED:
                sums[name] += details[name]
            sums["cost_microusd"] += cost or 0
        case "usage.repriced" | "usage.voided" if sums["erased"] and details.get(_EVENT_OF[kind]) not in rows:
            sums["erased"] += 1
        case "usage.repriced":
            sums["unpriced"] -= details["was_microusd"] is None
            sums["cost_microusd"] += cost or 0
        case "usage.voided":
            voided = rows.get(details["voids_row"])
            if voided is None:
                raise ReceiptError(f"entry {seq} voids an event that is not among the entries")
            sums["events"] -= 1
            sums["unpriced"] -= cost is None
            for name in _COUNTED:
                sums[name] -= voided[name]
            sums["cost_microusd"] -= cost or 0
        case _:
            raise ReceiptError(f"entry {seq} is {kind}, which is no usage of a task")
