"""Every feature works under the system calls that the service's unit allows."""

from __future__ import annotations

import ctypes
import shutil
import sys
import time
from pathlib import Path

import pytest

from asapd.actors.verifier import SHORT
from tests.e2e import sandbox
from tests.e2e.every_feature import house

pytestmark = pytest.mark.load

UNIT = Path(__file__).parents[2] / "systemd" / "asapd.service"
ARRAY = 1_000


def can_be_made() -> bool:
    """Whether systemd's tool and library are here."""
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return False
    return shutil.which("systemd-analyze") is not None


@pytest.mark.systemd
@pytest.mark.skipif(not can_be_made(), reason="systemd or its libseccomp is missing")
def test_every_feature_works_under_the_services_filter_of_system_calls() -> None:
    with house([sys.executable, sandbox.__file__, str(UNIT)]) as made:
        made.everything()
        # A log of so many entries is verified in a process of its own.
        for number in range(SHORT // ARRAY + 1):
            now_s = int(time.time())
            events = [
                {
                    "id": f"{number}-{index}",
                    "task_id": f"{number}-{index}",
                    "agent_id": "urn:asap:agent:many",
                    "consumer_id": "urn:asap:agent:one",
                    "metrics": {"tokens_in": 1, "tokens_out": 1, "duration_ms": 1, "api_calls": 1},
                    "timestamp": now_s,
                }
                for index in range(ARRAY)
            ]
            made.ask("POST", "/usage", events)
        verified = made.daemon.admin_get("/audit/verify")
        assert verified.status_code == 200, verified.text
        assert verified.json()["valid"] is True, verified.text
        assert [line for line in made.daemon.log() if "Operation not permitted" in str(line)] == []
