"""A consumer is erased while all kinds of things are reported, some of them under its name."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, closing
from itertools import count
from random import Random
from typing import Any

import httpx2
import pytest

from tests.e2e.daemon import Daemon, running

pytestmark = pytest.mark.load

AGENT, ACME = "urn:asap:agent:a", "acme"
_numbers = count(1)


def event(random: Random, consumer: str, **fields: Any) -> dict[str, Any]:
    number = next(_numbers)
    called = {role: random.choice([ACME, "x"]) for role in ("project", "model", "provider", "source")}
    who = {"id": f"e{number}", "task_id": f"t{number}", "agent": AGENT, "consumer": consumer, "timestamp": time.time()}
    return {**who, "metrics": {"tokens_in": 5, "tokens_out": 5}, **called, **fields}


class _Reporter:
    """Reports in a thread until it is told to stop."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self._random = Random(seed)
        key = {"Authorization": f"Bearer {daemon.admin_key}"}
        self._client = httpx2.Client(base_url=f"http://127.0.0.1:{daemon.port}", headers=key, timeout=60)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.recorded = 0
        self.wrong: list[str] = []
        self._thread.start()

    def _run(self) -> None:
        random = self._random
        while not self._stop.is_set():
            events = [event(random, random.choice([ACME, "eve"])) for _ in range(random.choice([1, 3, 40]))]
            if random.random() < 0.3:
                events[0]["delegation"] = "nosuch"
            self._post("/usage", events)
            again = self._post("/usage", events[:2])
            if again.get("duplicates") != len(events[:2]):
                self.wrong.append(f"repeats: {again}")
            self.recorded += len(events)
            if random.random() < 0.3:
                void = {"id": events[0]["id"], "agent": AGENT, "source": events[0]["source"], "reason": "r"}
                self._client.post("/usage/void", json=void)
            state = {"agent": AGENT, "consumer": random.choice([ACME, "eve"]), "timestamp": time.time()}
            self._post("/tasks", {**state, "task_id": f"k{next(_numbers)}", "state": "started"})

    def _post(self, path: str, body: Any) -> dict[str, Any]:
        answer = self._client.post(path, json=body)
        if answer.status_code != 201:
            self.wrong.append(answer.text)
        found: dict[str, Any] = answer.json()
        return found

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


def verify(daemon: Daemon) -> None:
    found = daemon.admin_get("/audit/verify").json()
    assert found["valid"], {table: its for table, its in found["reconciled"].items() if its["findings"]}


def erase(daemon: Daemon) -> str:
    while True:
        asked = daemon.admin_request("POST", "/audit/erase", json={"consumer": ACME, "reason": "request 17"})
        assert asked.status_code == 200, asked.text
        done = asked.json()
        if not done["more"]:
            return str(done["pseudonym"])


def test_an_erasure_beside_reports_ends_and_the_log_verifies() -> None:
    with running() as daemon:
        random = Random(0)
        first = [event(random, ACME) for _ in range(200)]
        assert daemon.admin_request("POST", "/usage", json=first).status_code == 201
        reporters: list[_Reporter] = []
        with ExitStack() as stack:
            reporters += [stack.enter_context(closing(_Reporter(daemon, seed))) for seed in (1, 2)]
            pseudonym = erase(daemon)
            verify(daemon)
            assert erase(daemon) != pseudonym
            verify(daemon)
        assert [reporter.wrong for reporter in reporters] == [[], []]
        last = erase(daemon)
        verify(daemon)
        consumers = {row["consumer_id"] for row in daemon.admin_get("/usage/consumers").json()["data"]}
        assert ACME not in consumers
        assert {pseudonym, last, "eve"} <= consumers
        projects = daemon.admin_get("/usage/aggregate?group_by=project,model").json()["data"]
        assert {ACME, "x"} <= {row["project"] for row in projects}
        again = daemon.admin_request("POST", "/usage", json=first).json()
        assert (again["recorded"], again["duplicates"]) == (0, 200)
        daemon.stop()
        daemon.start()
        verify(daemon)
