"""The life of a breach of one term of one agent: none, pending, open, resolving, none.

Opening and resolving are delayed alike by a hold: the condition has to last for it without a break.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from asapd.core.sla import TermVerdict

Severity = Literal["warning", "critical"]
ResolveReason = Literal["recovered", "no_data", "sla_changed"]


class BreachState(Struct, frozen=True):
    """Where the breach of one term stands.

    `since_us` is when the condition of `pending` or `resolving` began, `threshold` the promise that is broken; None
    matches any, for a stored row that does not tell. `opened_at_us` and `severity` belong to an open or resolving
    breach, as does `breach_id`, which the caller gives it after `Opened` and this module only carries.
    """

    phase: Literal["none", "pending", "open", "resolving"] = "none"
    since_us: int = 0
    breach_id: str | None = None
    opened_at_us: int | None = None
    severity: Severity = "warning"
    threshold: Decimal | None = None

    @property
    def is_open(self) -> bool:
        """Whether a breach exists for the world: opened and not yet resolved."""
        return self.phase in ("open", "resolving")


class Opened(Struct, frozen=True, tag=True):
    """A new breach."""

    severity: Severity


class Escalated(Struct, frozen=True, tag=True):
    """An open breach went from warning to critical; at most once in its life."""


class Resolved(Struct, frozen=True, tag=True):
    """The open breach ended."""

    reason: ResolveReason


Transition = Opened | Escalated | Resolved
NONE = BreachState()


FLAPS = 5
"""What opened so often within its window is held open for longer."""
_DAMPED_SHARE = 12


def reopened(breach_id: str, *, opened_at_us: int, severity: Severity, threshold: Decimal | None) -> BreachState:
    """The state of an open breach as it was stored, as long as nothing says that it was resolving."""
    return BreachState("open", opened_at_us, breach_id, opened_at_us, severity, threshold)


def resolving_hold_us(hold_us: int, window_us: int, opened_us: Sequence[int], now_us: int) -> int:
    """For how long the recovery of a term has to last that was last opened at these times.

    What is on the edge of its promise opens and resolves with every sample. From the fifth opening within a window on,
    a twelfth of the window has to pass without a breach, so that no window holds more than 17 openings.
    """
    recent = sum(now_us - window_us < at_us <= now_us for at_us in opened_us)
    return hold_us if recent < FLAPS else max(hold_us, window_us // _DAMPED_SHARE)


def step(
    state: BreachState,
    verdict: TermVerdict | None,
    *,
    now_us: int,
    hold_us: int,
    min_samples: int,
    promise_changed: bool = False,
) -> tuple[BreachState, Transition | None]:
    """Fold one verdict in; at most one transition a step.

    `verdict` None means that nothing is promised any more. A changed or withdrawn promise resolves at once, since
    there is nothing left to hold on to; a breach of the new promise opens with a later step. A window without data
    resolves with `no_data`. Severity never falls, and like opening it needs `min_samples` to rise. When the
    clock goes back, a running hold starts again.
    """
    if state.is_open:
        return _step_open(state, verdict, now_us, hold_us, min_samples, promise_changed)
    if verdict is None or verdict.met is not False or verdict.samples < max(1, min_samples):
        return NONE, None
    same = not promise_changed and state.threshold == verdict.threshold
    running = state.phase == "pending" and same and state.since_us <= now_us
    since_us = state.since_us if running else now_us
    if now_us - since_us < hold_us:
        return BreachState("pending", since_us, threshold=verdict.threshold), None
    severity: Severity = "critical" if verdict.critical else "warning"
    return BreachState("open", now_us, None, now_us, severity, verdict.threshold), Opened(severity)


def _step_open(
    state: BreachState, verdict: TermVerdict | None, now_us: int, hold_us: int, min_samples: int, promise_changed: bool
) -> tuple[BreachState, Transition | None]:
    if verdict is None or promise_changed or (state.threshold is not None and verdict.threshold != state.threshold):
        return NONE, Resolved("sla_changed")
    empty = verdict.samples == 0 or verdict.met is None
    if verdict.met is False and not empty:
        state = replace(state, phase="open")
        if verdict.critical and state.severity == "warning" and verdict.samples >= min_samples:
            return replace(state, severity="critical"), Escalated()
        return state, None
    running = state.phase == "resolving" and state.since_us <= now_us
    since_us = state.since_us if running else now_us
    if now_us - since_us < hold_us:
        return replace(state, phase="resolving", since_us=since_us), None
    return NONE, Resolved("no_data" if empty else "recovered")
