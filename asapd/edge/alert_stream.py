"""What WebSocket and server-sent events of alerts have in common: who is told what, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from wsproto.frame_protocol import FrameProtocol

from asapd.actors.notifier import Alert
from asapd.core.access import Caller
from asapd.wire import jsonrpc
from asapd.wire.asap_usage import BREACH, picked

# Their models refuse any other.
_REFERENCE_TYPES = frozenset({"availability", "latency", "error_rate"})

# Subscribers that follow live are all at the same alert, or nearly so.
_KEPT_FRAMES = 64


def alert_filter(caller: Caller, agent: str | None, min_severity: str | None) -> Callable[[Alert], bool]:
    """Which alerts a subscriber gets: what it may see of what it wants; severity is the breach's highest so far."""

    def accept(alert: Alert) -> bool:
        if agent is not None and alert.agent_id != agent:
            return False
        if min_severity == "critical" and alert.severity != "critical":
            return False
        if caller.tenant is not None and alert.tenant != caller.tenant:
            return False
        return "*" in caller.agents or caller.matches(alert.agent_id)

    return accept


def known_to_reference(alert: Alert) -> bool:
    """Whether a client of the reference implementation knows such an alert: a breach of a term, which opens."""
    return alert.event == "opened" and alert.params["breach"]["breach_type"] in _REFERENCE_TYPES


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A notification as text, and as the frame that carries it over a WebSocket (RFC 6455)."""

    text: str
    raw: bytes


class Frames:
    """Notifications, made once for all who follow."""

    def __init__(self, shape: Callable[[Alert], dict[str, Any]]) -> None:
        self._shape = shape
        self._made: dict[int, Frame] = {}

    def of(self, alert: Alert) -> Frame:
        """The notification of an alert."""
        frame = self._made.get(alert.seq)
        if frame is None:
            text = jsonrpc.notification("sla.breach", self._shape(alert))
            frame = Frame(text, bytes(FrameProtocol(client=False, extensions=[]).send_data(text)))
            if len(self._made) >= _KEPT_FRAMES:
                del self._made[next(iter(self._made))]
            self._made[alert.seq] = frame
        return frame


def own_shape(alert: Alert) -> dict[str, Any]:
    """The parameters as asapd's own subscribers get them."""
    return alert.params


def reference_shape(alert: Alert) -> dict[str, Any]:
    """The same for clients of the reference implementation."""
    return {
        "event": alert.event,
        "seq": alert.seq,
        "breach": picked(alert.params["breach"], BREACH),
    }
