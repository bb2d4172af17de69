"""What is pushed to receivers of alerts: plain JSON, or Alertmanager's webhook; and how it is signed.

Signing and headers follow Standard Webhooks 1.0 (https://www.standardwebhooks.com), so that its published libraries
verify what asapd sends.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import msgspec

from asapd.core.types import SECOND_US, format_us

SECRET_PREFIX = "whsec_"  # noqa: S105 -- marks a secret, is none
LEAST_SECRET_BYTES = 16

# Alertmanager's word for a time that has not come: the zero of Go's time.Time.
_NO_TIME = "0001-01-01T00:00:00Z"


class SecretError(Exception):
    """A secret that cannot sign; the operator's to mend, the message says how."""


class Pushed(msgspec.Struct, frozen=True):
    """One transition to push: its number, when it was committed, and its `params` as subscribers see them."""

    seq: int
    event: str
    at_us: int
    params: dict[str, Any]


def read_secret(content: bytes) -> bytes:
    """The key in a secret file: base64 behind `whsec_`, else the text itself without the space around it.

    Raises: SecretError.
    """
    text = content.strip()
    if text.startswith(SECRET_PREFIX.encode()):
        try:
            key = base64.b64decode(text.removeprefix(SECRET_PREFIX.encode()), validate=True)
        except binascii.Error:
            raise SecretError(f"what follows {SECRET_PREFIX} is not base64: write the secret as it was given") from None
    else:
        key = text
    if len(key) < LEAST_SECRET_BYTES:
        raise SecretError(f"holds {len(key)} bytes, which can be guessed: make one of at least {LEAST_SECRET_BYTES}")
    return key


def headers(message_id: str, now_us: int, body: bytes, secret: bytes | None) -> dict[str, str]:
    """`webhook-id`, `webhook-timestamp` (seconds since 1970) and, with a secret, `webhook-signature`."""
    timestamp = str(now_us // SECOND_US)
    found = {"webhook-id": message_id, "webhook-timestamp": timestamp}
    if secret is not None:
        signed = b".".join((message_id.encode(), timestamp.encode(), body))
        digest = hmac.new(secret, signed, hashlib.sha256).digest()
        found["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return found


def plain(alert: Pushed) -> bytes:
    """One transition: `type`, `timestamp` of its commit, `data` as in the notification of a subscriber."""
    kind = f"sla.breach.{alert.event}"
    return msgspec.json.encode({"type": kind, "timestamp": format_us(alert.at_us), "data": alert.params})


def alertmanager(alerts: Sequence[Pushed], receiver: str) -> bytes:
    """Transitions as one notification of Alertmanager (webhook version 4), of each breach its newest.

    An alert's labels stay the same from firing to resolved but for `severity`, which rises; `fingerprint` never
    changes.
    """
    newest = {alert.params["breach"]["id"]: alert for alert in alerts}
    shown = [_alertmanager_alert(alert) for alert in newest.values()]
    return msgspec.json.encode(
        {
            "version": "4",
            "groupKey": f"asapd/{receiver}",
            "truncatedAlerts": 0,
            "status": "firing" if any(one["status"] == "firing" for one in shown) else "resolved",
            "receiver": receiver,
            "groupLabels": {},
            "commonLabels": _common([one["labels"] for one in shown]),
            "commonAnnotations": _common([one["annotations"] for one in shown]),
            "externalURL": "",
            "alerts": shown,
        }
    )


def _common(all_of: list[dict[str, str]]) -> dict[str, str]:
    first, *rest = all_of
    return {name: value for name, value in first.items() if all(one.get(name) == value for one in rest)}


def _alertmanager_alert(alert: Pushed) -> dict[str, Any]:
    breach = alert.params["breach"]
    subject = breach["agent_id"] or breach["budget"] or ""
    labels = {
        "alertname": "AsapSlaBreach",
        "agent_id": breach["agent_id"],
        "budget": breach["budget"],
        "breach_type": breach["breach_type"],
        "severity": breach["severity"],
        "window": breach["window"],
        "breach_id": breach["id"],
    }
    annotations = {
        "summary": f"{breach['breach_type']} breach of {subject} {alert.event}",
        "threshold": breach["threshold"],
        "actual": breach["actual"],
        "event": alert.event,
        "seq": str(alert.seq),
    }
    return {
        "status": "resolved" if alert.event == "resolved" else "firing",
        # Alertmanager has no empty labels: one without a value is left out.
        "labels": {name: value for name, value in labels.items() if value},
        "annotations": {name: value for name, value in annotations.items() if value},
        "startsAt": breach["detected_at"],
        "endsAt": breach["resolved_at"] or _NO_TIME,
        "generatorURL": "",
        "fingerprint": hashlib.sha256(breach["id"].encode()).hexdigest()[:16],
    }
