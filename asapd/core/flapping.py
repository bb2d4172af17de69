"""Flapping: an agent whose verdict keeps changing is called so, and its state is held still until it has settled.

What is counted are changes from one result to the next, so that an agent cannot change its state every time it is
asked, however it goes about it: down and up, or degraded and healthy.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Verdict = Literal["healthy", "degraded", "down"]

MEMORY = 60
"""Results that are remembered: half an hour at 30 s, and their bits fit a signed integer of 64 bits."""

_MASK = (1 << MEMORY) - 1


class Flaps(Struct, frozen=True):
    """How often the verdict changed of late: a bit for each of the last `MEMORY` results, the newest lowest.

    `since_us` is since when the agent flaps, None when it does not.
    """

    changed: int = 0
    verdict: Verdict | None = None
    since_us: int | None = None


def fold(flaps: Flaps, verdict: Verdict, now_us: int, *, flapping_after: int, settled_after: int) -> Flaps:
    """Fold a result in.

    `flapping_after` changes among the remembered results make an agent flap, 0 never does; `settled_after` results in
    a row without a change end it.
    """
    is_change = flaps.verdict not in (None, verdict)
    changed = (flaps.changed << 1 | is_change) & _MASK
    since_us = flaps.since_us
    if since_us is None:
        # Only by a change: what has just settled must not flap again over changes of long ago.
        if is_change and flapping_after and changed.bit_count() >= flapping_after:
            since_us = now_us
    elif not flapping_after or changed & ((1 << settled_after) - 1) == 0:
        since_us = None
    return Flaps(changed, verdict, since_us)
