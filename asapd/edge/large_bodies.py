"""Bodies larger than those of other requests: exports of OpenTelemetry, which carry whole conversations."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from asapd.edge.early import OTLP_PATHS
from asapd.runtime.room import Room


class LargeBodies(msgspec.Struct, frozen=True):
    """How large an export may be, and the room that large ones share while they are received and answered.

    A body needs room from before its first byte, so its length has to be said: one that comes chunked may be no larger
    than other bodies.
    """

    max_bytes: Callable[[], int]
    room: Room
    wait_s: float = 15.0
    least_bytes_per_s: int = 1_048_576
    """How fast a body has to come behind its first `wait_s`: others wait for its room, exporters wait for less."""


def is_export(target: bytes) -> bool:
    """Whether a request's target is a route of OpenTelemetry."""
    return target.partition(b"?")[0].decode("latin1").rstrip("/") in OTLP_PATHS
