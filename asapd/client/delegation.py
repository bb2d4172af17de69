"""Asking the daemon whether work may be done under a delegation, and what it said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from asapd.client.event import Usd, dollars, encode, new_id
from asapd.client.link import Requests

AUTHORIZE_S = 5.0

# Refusals of the caller, whose key or rights may be mended meanwhile, and of this moment: asked again, it may be a yes.
_NOT_FINAL = frozenset({401, 403, 408, 425, 429})


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
    """The work may not be done, and asking the same again changes nothing. `problem` is the daemon's RFC 9457 document.

    Its `decision` is `deny` where the delegation does not allow the work; without one the question itself was refused,
    such as for an estimate that is missing or for a delegation that is not known.
    """

    code: str
    reason: str
    problem: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_decided(self) -> bool:
        """Whether the delegation was judged, not the question refused."""
        return self.problem.get("decision") == "deny"


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Nobody could say: the daemon is away or overloaded, or refuses this caller, whatever it asks."""

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
        TypeError, ValueError: for what cannot be asked, such as an estimate that is none.
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
    content = encode(body)
    try:
        response = requests.post("/delegations/authorize", content, idempotency=new_id(), timeout_s=AUTHORIZE_S)
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
    if code and 400 <= status < 500 and status not in _NOT_FINAL:
        return Denied(code, str(document.get("detail", "")), document)
    return Unavailable(f"{code or 'HTTP status'} {status}: {document.get('detail', '')}")
