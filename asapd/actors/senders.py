"""Ways to push alerts: a webhook, and a command of the operator's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from asapd.core.pushing import Failed, judge
from asapd.runtime.command import CommandFailed, run_command
from asapd.runtime.fetch import Fetched, FetchFailed
from asapd.store.breaches import Alert
from asapd.wire import webhook
from asapd.wire.webhook import Pushed

WEBHOOK_S = 10.0
"""What a receiver has for its answer, connecting included."""


class Poster(Protocol):
    """Whatever sends a POST, to addresses that are allowed."""

    async def post(
        self, url: str, body: bytes, *, headers: Mapping[str, str], deadline_s: float
    ) -> Fetched | FetchFailed:
        """Send one."""
        ...


def _pushed(alerts: Sequence[Alert]) -> list[Pushed]:
    return [Pushed(alert.seq, alert.event, alert.at_us, alert.params) for alert in alerts]


@dataclass(frozen=True)
class WebhookSender:
    """Posts, signed where there is a secret. `origin` names this daemon in ids, which repeats of a message share."""

    url: str = field(repr=False)
    secret: bytes | None = field(repr=False)
    receiver: str
    is_alertmanager: bool
    origin: str
    poster: Poster = field(compare=False)

    async def __call__(self, alerts: Sequence[Alert], now_us: int) -> Failed | None:
        """One request; several alerts only in the shape of Alertmanager."""
        pushed = _pushed(alerts)
        if self.is_alertmanager:
            body = webhook.alertmanager(pushed, self.receiver)
        else:
            (one,) = pushed
            body = webhook.plain(one)
        first, last = alerts[0].seq, alerts[-1].seq
        message_id = f"{self.origin}-{first}" if first == last else f"{self.origin}-{first}-{last}"
        headers = {"Content-Type": "application/json", **webhook.headers(message_id, now_us, body, self.secret)}
        try:
            answer = await self.poster.post(self.url, body, headers=headers, deadline_s=WEBHOOK_S)
        except OSError as error:
            return Failed(f"this host could not post: {error.strerror or error}")
        if isinstance(answer, FetchFailed):
            return Failed(f"{answer.reason}: {answer.detail}")
        return judge(answer.status, answer.headers.get("retry-after"))


@dataclass(frozen=True)
class CommandSender:
    """Runs a program with the plain JSON of an alert on its standard input; exit code 0 has taken it.

    `limiter` bounds how many run at once, over all commands.
    """

    argv: tuple[str, ...]
    timeout_s: float
    limiter: trio.CapacityLimiter = field(compare=False)

    async def __call__(self, alerts: Sequence[Alert], now_us: int) -> Failed | None:  # noqa: ARG002 -- a Sender's form
        """One run."""
        (one,) = _pushed(alerts)
        async with self.limiter:
            outcome = await run_command(self.argv, webhook.plain(one), timeout_s=self.timeout_s)
        match outcome:
            case CommandFailed(detail=detail):
                return Failed(detail)
            case _ if outcome.code == 0:
                return None
            case _:
                said = outcome.stderr.strip().splitlines()
                return Failed(f"{self.argv[0]} ended with {outcome.code}" + (f": {said[-1][:200]}" if said else ""))
