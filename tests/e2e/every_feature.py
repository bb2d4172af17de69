"""A daemon that was used on every feature that leaves something in its database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from nacl.signing import SigningKey

from asapd.wire.keys import jwk_thumbprint, public_base64
from tests.e2e.agent import Agent
from tests.e2e.daemon import PATIENCE_S, POLL_S, QUICK, Daemon, running
from tests.e2e.test_agent_keys import SigningAgent
from tests.e2e.tokens import Party, jti_of

ROOT, BOSS, WORKER, SIGNING = (Party(name) for name in ("root", "boss", "worker", "signing"))
DAY_S = 86_400
HOUR_S = 3_600
PRICES = """
version = "{version}"
currency = "USD"
[[price]]
model = "m"
input_per_mtok = "{price}"
output_per_mtok = "15"
"""
SETTINGS = """
[[sla.tier]]
name = "fast"
availability = "99.9%"
max_latency_p95_ms = 500
max_error_rate = "10%"
support_hours = "24/7"
[[sla.credit]]
below = "99%"
credit = "10%"
[metering]
late_max = "{late}"
[metering.pricing]
file = "prices.toml"
[[budget]]
name = "all"
period = "month"
soft_usd = "0.01"
hard_usd = "1000"
hard_tasks = 1000
match = {{}}
[[budget]]
name = "by-agent"
period = "day"
soft_tokens = 1000000
match = {{ agent = "{worker}" }}
[audit]
checkpoint_every = "1s"
[[audit.witness]]
url = "{witness}/witness"
public_key = "{witness_key}"
[[audit.witness_for]]
public_key = "{witness_key}"
[retention]
usage = "{usage}"
[delegation]
key_overlap = "1h"
[[delegation.revocation_source]]
public_key = "{revoker}"
issuers = ["*"]
[[alerts.webhook]]
name = "hook"
url = "http://127.0.0.1:9/x"
retry_for = "1s"
[[agents]]
id = "{root}"
url = "http://127.0.0.1:9"
public_key = "{root_key}"
[[agents]]
id = "{signing}"
url = "{signing_url}"
tier = "fast"
"""


class House:
    """A daemon, who witnesses it, and what was made in it so far."""

    def __init__(self, daemon: Daemon, witness: Daemon, agent: Agent, signing: SigningAgent) -> None:
        self.daemon, self.witness, self.agent, self.signing = daemon, witness, agent, signing
        self.peer = SigningKey(bytes(range(1, 33)))
        self.number = 0

    def settings(self, late: str = "5d", usage: str = "6d") -> str:
        """The configuration."""
        return QUICK.replace("[sla]\n", '[sla]\nmin_samples = 1\ndefault_tier = "fast"\n') + SETTINGS.format(
            late=late,
            usage=usage,
            worker=WORKER.urn,
            witness=self.witness.url,
            witness_key=self.witness.admin_get("/audit/checkpoint?format=json").json()["public_key"],
            revoker=public_base64(bytes(self.peer.verify_key)),
            root=ROOT.urn,
            root_key=ROOT.public_key,
            signing=SIGNING.urn,
            signing_url=self.signing.url,
        )

    def ask(self, method: str, path: str, body: Any = None, *, status: int = 201) -> Any:
        """One request over the admin socket, and what came of it."""
        made = self.daemon.admin_request(method, path, json=body)
        assert made.status_code == status, (method, path, made.status_code, made.text)
        return made.json()

    def until(self, holds: Callable[[], Any]) -> Any:
        """What a function returns, once that is true."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not (found := holds()):
            assert time.monotonic() < deadline_s, self.daemon.stderr.read_text()
            time.sleep(POLL_S)
        return found

    def event(self, **more: Any) -> dict[str, Any]:
        """An event that no other call has."""
        self.number += 1
        return {
            "id": f"event-{self.number}",
            "task_id": f"task-{self.number}",
            "agent": WORKER.urn,
            "consumer": "desk",
            "timestamp": time.time(),
            "model": "m",
            "metrics": {"tokens_in": 100, "tokens_out": 7, "duration_ms": 900, "api_calls": 1},
            **more,
        }

    def prices(self, version: str, price: str) -> None:
        """Put a price table there."""
        (self.daemon.home / "prices.toml").write_text(PRICES.format(version=version, price=price))

    # --- what is done

    def everything(self) -> None:
        """Use all of it once."""
        self.directory()
        self.usage()
        self.tasks()
        self.telemetry()
        self.ledger()
        self.promises()
        self.house()

    def usage(self) -> None:
        """Reports with everything an event may have, repeats, voids, corrections, days and hours that are over."""
        now_s = time.time()
        full = self.event(
            source="gateway",
            seq=1,
            error="broke at http://u:secret@a",
            outcome="failed",
            provider="p",
            cost_usd="0.5",
            project="apollo",
            labels={"a": "1"},
            trace_id="4bf92f35",
            parent_task_id="parent",
            action="task.execute",
        )
        self.ask("POST", "/usage", full)
        self.ask("POST", "/usage", full)
        self.ask("POST", "/usage", [self.event(source="gateway", seq=seq) for seq in (2, 5, 5)])
        old = [self.event(timestamp=now_s - days * DAY_S) for days in (1.5, 2.5, 4.6, 4.7, 4.9)]
        self.ask("POST", "/usage", old)
        self.ask("POST", "/usage", [self.event(id=None, partial=True) | {"model": "unheard-of"}, self.event()])
        self.ask("POST", "/usage", [self.event(metrics={}) for _ in range(270)])
        voided = self.event(project="gemini")
        self.ask("POST", "/usage", voided)
        self.ask("POST", f"/usage/{voided['id']}/void", {"reason": "a test"})
        key = self.daemon.create_key("ingest", "*", tenant="other")
        with self.daemon_client(key) as client:
            headers = {"Idempotency-Key": "once"}
            made = client.post("/usage", json=self.event(agent="urn:asap:agent:beating"), headers=headers)
            assert made.status_code == 201, made.text
        self.prices("2", "9")
        self.ask("POST", "/reload", status=200)
        self.ask("POST", "/prices/reprice", status=200)

    def daemon_client(self, key: str) -> Any:
        """A client over TCP that does not need a loop."""
        import httpx2

        return httpx2.Client(
            base_url=self.daemon.url, headers={"Authorization": f"Bearer {key}"}, timeout=30, verify=False
        )

    def tasks(self) -> None:
        """Tasks that end well, badly, not at all, and of which usage tells another end."""
        for name, end in (("t1", "completed"), ("t2", "failed"), ("t3", None), ("task-9", "completed")):
            step = {"task_id": name, "agent": WORKER.urn, "consumer": "desk", "parent_task_id": "parent"}
            self.ask("POST", "/tasks", {**step, "state": "started", "timestamp": time.time() - 5})
            if end is not None:
                error = {"error": "broke"} if end == "failed" else {}
                self.ask("POST", "/tasks", {**step, "state": end, "timestamp": time.time(), **error})
        self.ask("POST", "/usage", self.event(task_id="t1"))

    def telemetry(self) -> None:
        """Spans and metrics, those that come late and void what was counted in their place."""
        from tests.e2e.test_fuzz import metrics, traces

        for number in (3, 2, 1):
            self.ask("POST", "/v1/metrics", metrics(number), status=200)
        for number in (1, 2):
            self.ask("POST", "/v1/traces", traces(number), status=200)

    def ledger(self) -> None:
        """Chains, every way a reservation ends, what is given back, what nobody allowed, and what is revoked."""
        root = ROOT.grant(BOSS, usd=100, tasks=1000)
        child = BOSS.grant(WORKER, usd=50, parent=root)
        made = self.ask("POST", "/delegations", {"token": child})["id"]
        doomed = self.ask("POST", "/delegations", {"token": ROOT.grant(WORKER, usd=1)})["id"]
        never = ROOT.grant(WORKER, usd=2)

        def hold(**more: Any) -> str:
            asked = {
                "delegation": made,
                "action": "task.execute",
                "task_id": "held",
                "estimate": {"cost_usd": 1, "tokens": 50},
            }
            found = self.ask("POST", "/delegations/authorize", {**asked, **more}, status=200)
            name: str = found["reservation"]["id"]
            return name

        names = [hold(consumer="desk", project="apollo", delegate=WORKER.urn) for _ in range(6)]
        hold(task_id="lapses", ttl_seconds=1)
        self.ask("POST", f"/reservations/{names[0]}/extend", {"ttl_seconds": 600}, status=200)
        for name, cost in ((names[1], "0.1"), (names[2], "5"), (names[3], "0.2")):
            self.ask("POST", "/usage", self.event(reservation=name, cost_usd=cost, model=None, task_id="held"))
        self.ask("POST", "/usage", self.event(reservation=names[5], model="unheard-of", task_id="held"))
        paid = self.event(delegation=made, cost_usd="0.3", model=None)
        self.ask("POST", "/usage", paid)
        self.ask("POST", f"/usage/{paid['id']}/void", {"reason": "another"})
        self.ask("POST", f"/reservations/{names[1]}/settle", {"cost_usd": "0.05"}, status=200)
        self.ask("POST", f"/reservations/{names[2]}/settle", {}, status=200)
        self.ask("POST", f"/reservations/{names[2]}/refund", {"cost_usd": "1", "reason": "bad work"}, status=200)
        self.ask("DELETE", f"/reservations/{names[4]}", status=200)
        self.ask("POST", "/usage", self.event(delegation=made, agent=BOSS.urn))
        self.ask("DELETE", f"/delegations/{doomed}", {"reason": "gone"}, status=200)
        entries = [(ROOT.urn, jti_of(never)), (ROOT.urn, "of-nobody")]
        self.ask("POST", "/delegations/revocations", self._list(entries), status=200)

    def _list(self, entries: list[tuple[str, str]]) -> Any:
        from msgspec import json as msgspec_json

        from asapd.wire.revocations import daemon_name
        from tests.e2e.test_revocations import signed

        return msgspec_json.decode(signed(self.peer, daemon_name(bytes(self.peer.verify_key)), *entries))

    def directory(self) -> None:
        """Agents that come, change, pause, go and get other keys; one that answers, and one that stops doing so."""
        self.ask("POST", "/agents", {"id": self.agent.urn, "url": self.agent.url, "tier": "fast"})
        worker = {"id": WORKER.urn, "url": "http://127.0.0.1:9", "sla": {"availability": "99%"}}
        self.ask("POST", "/agents", worker)
        self.ask("POST", "/agents", {**worker, "public_key": WORKER.public_key}, status=200)
        beating = {"id": "urn:asap:agent:beating", "health": "heartbeat", "tenant": "other"}
        self.ask("POST", "/agents", beating)
        self.ask("POST", f"/agents/{beating['id']}/heartbeat", {"status": "healthy", "ttl_seconds": 60}, status=200)
        gone = {"id": "urn:asap:agent:gone", "url": "http://127.0.0.1:9"}
        self.ask("POST", "/agents", gone)
        self.ask("DELETE", f"/agents/{gone['id']}", status=200)
        other = bytes(SigningKey(bytes([7]) * 32).verify_key)
        for key in (other, bytes(BOSS.key.verify_key)):
            self.ask("POST", f"/agents/{BOSS.urn}/keys", {"public_key": public_base64(key)})
        self.ask("DELETE", f"/agents/{BOSS.urn}/keys/{jwk_thumbprint(other)}", status=200)
        self.ask("POST", f"/agents/{self.agent.urn}/pause", {"reason": "a rest"}, status=200)
        self.ask("POST", f"/agents/{self.agent.urn}/resume", {}, status=200)
        self.until(lambda: self.ask("GET", f"/agents/{self.agent.urn}/manifests", status=200)["count"])
        self.agent.manifest["sla"] = {"availability": "99.5%", "max_latency_p95_ms": 100}
        self.until(lambda: self.ask("GET", f"/agents/{self.agent.urn}/manifests", status=200)["count"] > 1)
        self.agent.manifest["sla"] = {"availability": "no number"}
        self.until(lambda: self.ask("GET", f"/agents/{self.agent.urn}/manifests", status=200)["count"] > 2)
        self.until(lambda: self.ask("GET", f"/agents/{SIGNING.urn}/keys", status=200)["count"])
        self.signing.sign(SigningKey(bytes([9]) * 32))
        self.until(lambda: self.daemon.status()["keys"]["unconfirmed"])
        self.agent.health["status"] = "unhealthy"
        self.until(lambda: self.ask("GET", f"/agents/{self.agent.urn}", status=200)["state"] == "unhealthy")

    def promises(self) -> None:
        """Breaches that open and resolve, what was acknowledged, silenced, and does not count."""
        broken = self.until(lambda: self.ask("GET", "/sla/breaches?state=open", status=200)["data"])
        self.ask("POST", f"/breaches/{broken[0]['id']}/ack", {"comment": "seen"})
        self.until(lambda: self.ask("GET", "/alerts/dead-letters", status=200)["count"])
        for agent in (self.agent.urn, "urn:asap:agent:*"):
            silence = {
                "agent": agent,
                "type": "latency",
                "severity": "warning",
                "duration": "1h",
                "author": "me",
                "comment": "why",
            }
            quiet = self.ask("POST", "/silences", silence)["id"]
        self.ask("DELETE", f"/silences/{quiet}", status=200)
        for start in ("start", None):
            begins = {} if start is None else {"agent_id": WORKER.urn}
            made = self.ask("POST", "/maintenance", {**begins, "duration": "1h", "reason": "cleaning"})["id"]
        self.ask("DELETE", f"/maintenance/{made}", status=200)
        self.agent.health["status"] = "healthy"

    def house(self) -> None:
        """Keys of the house, a restart, days that are over and events past their time."""
        gone = self.daemon.create_key("reader", "urn:asap:agent:a*", tenant="other")
        self.daemon.create_key("operator", WORKER.urn, sign=True)
        self.ask("DELETE", f"/keys/{gone.split('_')[1]}", status=200)
        self.daemon.config.write_text(self.settings(late="4d", usage="4d"))
        self.ask("POST", "/reload", status=200)
        self.ask("POST", "/retention", status=200)
        self.until(lambda: self.daemon.admin_get("/audit/checkpoint").text.count("\n— asapd/") >= 2 or self._more())
        self.until(lambda: self.ask("GET", "/audit/logs?event_type=log.witnessed", status=200)["data"])
        self.daemon.stop()
        self.daemon.start()
        self.until(lambda: self.ask("GET", "/reservations?state=expired", status=200)["count"])

    def _more(self) -> bool:
        size = self.daemon.status()["audit"]["checkpoint"]
        self.ask("POST", "/usage", self.event())
        return bool(self.daemon.admin_get(f"/audit/checkpoint?size={size}").text.count("\n— asapd/") >= 2)


@contextmanager
def house(under: Sequence[str] = ()) -> Iterator[House]:
    """Everything it takes, not yet used; with `under`, the daemon is started by that command."""
    with ExitStack() as stack:
        witness = stack.enter_context(running(f'{QUICK}[audit]\ncheckpoint_every = "1s"\n'))
        agent = stack.enter_context(Agent("watched", {"availability": "99%"}))
        signing = stack.enter_context(SigningAgent(SIGNING))
        daemon = Daemon("", under)
        stack.callback(daemon.close)
        made = House(daemon, witness, agent, signing)
        made.prices("1", "3")
        daemon.config.write_text(made.settings())
        daemon.start()
        own = daemon.admin_get("/audit/checkpoint?format=json").json()["public_key"]
        more = f'[[audit.witness_for]]\npublic_key = "{own}"\n'
        more += f'[[audit.witness]]\nurl = "{daemon.url}/witness"\npublic_key = "{own}"\n'
        witness.config.write_text(f"{witness.config.read_text()}\n{more}")
        assert witness.admin_request("POST", "/reload").status_code == 200
        yield made
        daemon.stop()
