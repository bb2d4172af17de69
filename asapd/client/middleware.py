"""What the middleware for ASGI and for WSGI have in common: who, for whom, under what, and what is answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

from asapd.client.delegation import Allowed, Authorization, Denied, Estimate, Unavailable, is_token
from asapd.client.event import encode, new_id
from asapd.client.meter import Meter
from asapd.client.stats import Counters
from asapd.client.task import Task

TASK_HEADER = "x-asap-task-id"
CONSUMER_HEADER = "x-asap-consumer"
DELEGATION_HEADER = "x-asap-delegation"
TOKEN_HEADER = "x-asap-delegation-token"  # noqa: S105 -- a name, not a token
NOBODY = "urn:asap:agent:unknown"
RETRY_AFTER_S = 5

_NAME_CHARS = 256
# What the daemon refuses in a name: control characters, and lone surrogates, which are not UTF-8.
_UNTAKEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Headers: TypeAlias = Mapping[str, str]
"""The headers of a request, with names in lower case."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How requests are metered.

    The consumer is the header `x-asap-consumer`, which is the caller's own word, unless `consumer` is a function that
    knows better, from the headers; the header counts for nothing then. None stands for the meter's consumer. Where the
    function fails or says what is no name, nobody is known to pay: the usage is `urn:asap:agent:unknown`'s, and with
    `require_delegation` there is no permission. The usage of a request is under the token in `x-asap-delegation-token`,
    if it brings one, and flagged where that does not allow `action`. With `require_delegation` a request without a
    token that allows it, there or in `x-asap-delegation`, gets 403 (an id is not enough: it is no secret), and 503
    while the daemon cannot be asked. Paths in `skip` are neither metered nor guarded: their task records nothing. A
    response of 500 and more, or an exception before it is complete, is a failed task.

    Raises:
        ValueError: for a `skip` that is one text, in which every part of it would be found: a comma is missing.
    """

    agent: str | None = None
    consumer: Callable[[Headers], str | int | UUID | None] | None = None
    action: str = "task.execute"
    require_delegation: bool = False
    estimate: Estimate | Callable[[Headers], Estimate] | None = None
    skip: Collection[str] = ()

    def __post_init__(self) -> None:
        """Refuse what would leave paths unguarded that nobody meant."""
        if isinstance(self.skip, str):
            raise ValueError(f"skip of Rules is a collection of paths: write skip=({self.skip!r},), not {self.skip!r}")


@dataclass(frozen=True)
class Answer:
    """A response in place of the application's."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True)
class _Unrecorded:
    """The recorder of a task that counts for nothing, so that code deep inside the work finds one on every path."""

    counters: Counters

    def submit(self, event: dict[str, Any]) -> bool:  # noqa: ARG002 -- what it is given goes nowhere
        """Take an event in, and leave it at that."""
        return True


class Request:
    """One request: the task that it is, and the permission it has."""

    def __init__(self, meter: Meter, rules: Rules, path: str, headers: Headers) -> None:
        self._meter = meter
        self._rules = rules
        self._headers = headers
        self._reservation: str | None = None
        self._is_answered = False
        self.is_skipped = path in rules.skip
        if self.is_skipped:
            self.task: Task = Task(_Unrecorded(meter.counters), "", "", None)
            return
        consumer = self._told_consumer()
        self._is_consumer_known = consumer is not None
        self.task = meter.task(
            agent=rules.agent,
            consumer=consumer or NOBODY,
            task_id=_name(headers.get(TASK_HEADER)) or new_id(),
            action=rules.action,
        )
        token = headers.get(TOKEN_HEADER)
        if token and not rules.require_delegation:
            # Nobody is turned away; whether the token allowed the work, the daemon says with its usage.
            self.task.describe(delegation_token=token)

    def _told_consumer(self) -> str | None:
        """Who the request is for; None where the service's own function could not say it."""
        tell = self._rules.consumer
        named: str | None
        if tell is None:
            named = _name(self._headers.get(CONSUMER_HEADER))
        else:
            # The header is nothing to fall back on: who makes the function fail would choose who pays.
            try:
                named = _consumer(tell(self._headers))
            except Exception as error:  # noqa: BLE001 -- metering never breaks the request
                self._meter.counters.add("misused")
                self._meter.counters.complain("the consumer of a request could not be told", error=error)
                return None
        return named or self._meter.consumer or NOBODY

    @property
    def is_guarded(self) -> bool:
        """Whether `authorize` has to be asked first."""
        return self._rules.require_delegation and not self.is_skipped

    @property
    def shown(self) -> list[tuple[str, str]]:
        """What its response says of the task."""
        return [] if self.is_skipped else [(TASK_HEADER, self.task.task_id)]

    def authorize(self) -> Answer | None:
        """Ask for permission, waiting for the daemon; an answer means that the application is not to be called."""
        credential = (self._headers.get(TOKEN_HEADER) or self._headers.get(DELEGATION_HEADER) or "").strip()
        if not is_token(credential):
            detail = f"this service works under a delegation only: send its token in the header {TOKEN_HEADER}"
            return _problem(403, {"title": "A delegation is needed", "detail": detail, "code": "delegation_required"})
        return self._judge(self._ask(credential))

    def unasked(self, reason: str) -> Answer | None:
        """The answer where `authorize` could not be called."""
        return self._judge(Unavailable(reason))

    def _ask(self, credential: str) -> Authorization:
        if not self._is_consumer_known:
            # As nobody it would pass by the budgets of whoever it is.
            return Unavailable("the consumer could not be told")
        estimate = self._rules.estimate
        if callable(estimate):
            try:
                estimate = estimate(self._headers)
            except Exception as error:  # noqa: BLE001 -- without an estimate there is no permission
                self._meter.counters.complain("the estimate of a request could not be made", error=error)
                return Unavailable("the estimate could not be made")
        return self._meter.authorize(
            credential,
            task_id=self.task.task_id,
            action=self._rules.action,
            agent=self.task.agent,
            consumer=self.task.consumer,
            estimate=estimate,
        )

    def _judge(self, outcome: Authorization) -> Answer | None:
        match outcome:
            case Allowed():
                self._reservation = outcome.reservation
                self.task.describe(delegation=outcome.delegation, reservation=outcome.reservation)
                return None
            case Denied() if not outcome.is_decided:
                said = f"{outcome.code}: {outcome.reason}"
                self._meter.counters.complain("requests are turned away, asapd refuses to judge them: %s", said)
                detail = "whether the delegation allows this cannot be judged as this service asks: do not try again"
                problem = {"title": "Cannot authorise", "detail": detail, "code": "authorization_refused"}
                return _problem(403, {**problem, "reason": outcome.code})
            case Denied():
                # What a budget of this host has spent is for its people, not for whoever asks for work.
                return _problem(403, {name: what for name, what in outcome.problem.items() if name != "budget"})
            case Unavailable():
                self._meter.counters.complain("requests are turned away, nobody can authorise them: %s", outcome.reason)
                detail = "whether the delegation allows this cannot be asked at present: try again"
                problem = {"title": "Cannot authorise", "detail": detail, "code": "authorization_unavailable"}
                return _problem(503, problem)

    def answered(self) -> None:
        """The response is complete: the time is over, and what fails from here on is not the request."""
        self._is_answered = True
        self.task.stop()

    def finish(self, status: int | None, error: BaseException | None) -> None:
        """Record the request; `status` is None when there was no response."""
        if self._is_answered and status is not None and status < 500:
            error = None
        if error is None and (status is None or status >= 500):
            self.task.failed("no response" if status is None else f"HTTP status {status}")
        self.task.finish(error)
        self.release()

    def release(self) -> None:
        """Have settled what `authorize` reserved."""
        if self._reservation is not None:
            self._meter.settle(self._reservation)

    def abandon(self) -> None:
        """Settle it where nobody waits for the answer any more, so that the request is not served after all."""
        if self._reservation is not None:
            self._meter.settle_unwanted(self._reservation)


def _name(value: str | None) -> str | None:
    """A name in a header; anything but printable ASCII that a caller sends is as good as nothing."""
    return value if value and len(value) <= _NAME_CHARS and value.isascii() and value.isprintable() else None


def _consumer(said: object) -> str | None:
    """What the service's own function said, as the daemon takes it; None where it names nobody.

    Raises:
        ValueError: for what is no consumer.
    """
    if said is None or said == "":
        return None
    is_number = isinstance(said, int | UUID) and not isinstance(said, bool)
    name = str(said) if is_number else said
    if isinstance(name, str) and len(name) <= _NAME_CHARS and not _UNTAKEN.search(name):
        return name
    takes = f"text of at most {_NAME_CHARS} characters without control characters, an int or a UUID"
    raise ValueError(f"the function `consumer` of Rules has to return {takes}, or None, not {said!r:.100}")


def _problem(status: int, document: Mapping[str, Any]) -> Answer:
    whole = {"type": f"urn:asapd:problem:{document.get('code', 'forbidden')}", **document, "status": status}
    body = encode(whole)
    headers = [
        ("content-type", "application/problem+json"),
        ("content-length", str(len(body))),
        ("cache-control", "no-store"),
    ]
    if status == 503:
        headers.append(("retry-after", str(RETRY_AFTER_S)))
    return Answer(status, "Forbidden" if status == 403 else "Service Unavailable", headers, body)
