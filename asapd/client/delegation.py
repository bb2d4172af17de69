"""Asking the daemon whether work may be done under a delegation, and what it said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from asapd.client.event import Usd, dollars, encode, new_id
from asapd.client.link import Requests

AUTHORIZE_S = 5.0


class Estimate(TypedDict, total=False):
    """What the work may take; a limit on the way needs its unit."""

    cost_usd: Usd
    tokens: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Allowed:
    """The work may be done: name `delegation` and `reservation` in its usage, then settle."""

    delegation: str
    reservation: str
    expires_at: str
    remaining: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Denied:
    """The work may not be done. `problem` is the daemon's RFC 9457 document."""

    code: str
    reason: str
    problem: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Nobody could say: the daemon is away, or refuses this caller or request as such."""

    reason: str


Authorization = Allowed | Denied | Unavailable


def authorize(
    requests: Requests,
    credential: str,
    *,
    action: str,
    task_id: str,
    delegate: str | None,
    consumer: str | None,
    project: str | None,
    estimate: Estimate | None,
    ttl_s: int | None,
) -> Authorization:
    """Ask for a reservation. `credential` is a token, or the id of a delegation the daemon knows.

    Raises:
        ValueError: for an estimate that is none.
    """
    wanted: dict[str, Any] = dict(estimate or {})
    if "cost_usd" in wanted:
        wanted["cost_usd"] = format(dollars(wanted["cost_usd"]), "f")
    optional = {"delegate": delegate, "consumer": consumer, "project": project, "ttl_seconds": ttl_s}
    body = {
        ("token" if is_token(credential) else "delegation"): credential,
        "action": action,
        "task_id": task_id,
        "estimate": wanted,
        **{name: value for name, value in optional.items() if value is not None},
    }
    try:
        response = requests.post("/delegations/authorize", encode(body), idempotency=new_id(), timeout_s=AUTHORIZE_S)
    except (OSError, ValueError) as error:
        return Unavailable(f"{type(error).__name__}: {error}")
    return judge(response.status, response.document)


def is_token(credential: str) -> bool:
    """Whether this is a token: a JWS, which has two dots, or a JSON document; else it is the id of a delegation."""
    return credential.count(".") == 2 or "{" in credential


def judge(status: int, document: Mapping[str, Any]) -> Authorization:
    """What an answer to an authorisation means; only a clear yes allows anything."""
    code = str(document.get("code", ""))
    reservation = document.get("reservation")
    if status == 200 and document.get("decision") == "allow" and isinstance(reservation, dict):
        return Allowed(
            str(document.get("delegation", "")),
            str(reservation.get("id", "")),
            str(reservation.get("expires_at", "")),
            document.get("remaining"),
        )
    if document.get("decision") == "deny":
        return Denied(code, str(document.get("reason", "")), document)
    return Unavailable(f"{code or 'HTTP status'} {status}: {document.get('detail', '')}")
