"""What receivers get: the shapes, and signatures that a published library would verify."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from asapd.wire.webhook import Pushed, SecretError, alertmanager, headers, plain, read_secret

T0 = 1_763_633_203_000_000


def pushed(seq: int, event: str = "opened", number: int = 1, severity: str = "warning", **more: Any) -> Pushed:
    breach = {
        "id": f"brc_{number}",
        "agent_id": f"urn:asap:agent:{number}",
        "budget": None,
        "breach_type": "latency",
        "window": "1h",
        "threshold": "500ms",
        "actual": "900ms",
        "severity": severity,
        "detected_at": "2025-11-20T10:06:43.000000Z",
        "resolved_at": "2025-11-20T11:06:43.000000Z" if event == "resolved" else None,
        **more,
    }
    return Pushed(seq, event, T0, {"event": event, "seq": seq, "breach": breach})


def test_a_signature_is_the_one_of_the_specification() -> None:
    """The example of Standard Webhooks 1.0."""
    secret = read_secret(b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    found = headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330_000_000, b'{"test": 2432232314}', secret)
    assert found == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    assert "webhook-signature" not in headers("m", 1, b"", None)


def test_a_secret_is_base64_behind_its_mark_or_plain_text_and_long_enough() -> None:
    key = bytes(range(24))
    assert read_secret(b"whsec_" + base64.b64encode(key)) == key
    assert read_secret(b"  sixteen characters\n") == b"sixteen characters"
    for wrong, why in (
        (b"whsec_!!", "not base64"),
        (b"short\n", "5 bytes"),
        (b"", "0 bytes"),
        (b"whsec_QQ==", "1 byte"),
    ):
        with pytest.raises(SecretError, match=why):
            read_secret(wrong)


def test_the_plain_shape_has_type_time_and_the_params_of_a_subscriber() -> None:
    alert = pushed(7)
    assert json.loads(plain(alert)) == {
        "type": "sla.breach.opened",
        "timestamp": "2025-11-20T10:06:43.000000Z",
        "data": alert.params,
    }


def test_alertmanagers_shape_has_each_breach_once_and_labels_that_stay() -> None:
    alone = json.loads(alertmanager([pushed(1)], "pager"))
    assert alone["version"] == "4"
    assert (alone["status"], alone["receiver"], alone["groupKey"]) == ("firing", "pager", "asapd/pager")
    (alert,) = alone["alerts"]
    assert (alert["status"], alert["endsAt"]) == ("firing", "0001-01-01T00:00:00Z")
    assert alone["commonLabels"] == alert["labels"]
    assert "budget" not in alert["labels"]
    group = json.loads(alertmanager([pushed(1), pushed(2, number=2), pushed(3, "resolved")], "pager"))
    assert group["status"] == "firing"
    by_status = {one["status"]: one for one in group["alerts"]}
    assert len(group["alerts"]) == 2
    ended = by_status["resolved"]
    assert (ended["labels"], ended["fingerprint"]) == (alert["labels"], alert["fingerprint"])
    assert ended["endsAt"] == "2025-11-20T11:06:43.000000Z"
    assert by_status["firing"]["fingerprint"] != alert["fingerprint"]
    assert group["commonLabels"] == {
        "alertname": "AsapSlaBreach",
        "breach_type": "latency",
        "severity": "warning",
        "window": "1h",
    }
    assert json.loads(alertmanager([pushed(3, "resolved")], "pager"))["status"] == "resolved"


def test_a_budgets_breach_has_its_budget_as_label() -> None:
    labels = json.loads(alertmanager([pushed(1, agent_id=None, budget="team")], "x"))["alerts"][0]["labels"]
    assert labels["budget"] == "team"
    assert "agent_id" not in labels
