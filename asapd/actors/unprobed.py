"""Which agents cannot be probed and why: in memory, for it is known anew within an interval of a start."""

from __future__ import annotations

import msgspec


class NotProbed(msgspec.Struct, frozen=True):
    """Why an agent's last probe was not made or says nothing of it, and since when (microseconds).

    `reason` is `not_allowed` (its address is outside the networks that may be probed), `disturbed` (asapd was held up
    or its clock was set) or `host_failed` (this host could not make the request, or its resolver or network is away);
    `detail` says it to a person.
    """

    reason: str
    detail: str
    since_us: int


class Unprobed:
    """What the prober notes and the doors show; it outlives an incarnation of the prober."""

    def __init__(self) -> None:
        self._noted: dict[str, NotProbed] = {}

    def get(self, agent: str) -> NotProbed | None:
        """Why an agent is not probed; None when it is, or was not tried yet."""
        return self._noted.get(agent)

    def noted(self) -> dict[str, NotProbed]:
        """All agents that are not probed."""
        return dict(self._noted)

    def note(self, agent: str, reason: str, detail: str, now_us: int) -> None:
        """A probe says nothing of the agent; the time is kept while the reason is the same."""
        known = self._noted.get(agent)
        since_us = known.since_us if known is not None and known.reason == reason else now_us
        self._noted[agent] = NotProbed(reason, detail, since_us)

    def clear(self, agent: str) -> None:
        """The agent was probed, or is gone."""
        self._noted.pop(agent, None)
