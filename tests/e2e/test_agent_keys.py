"""Keys of agents on a real daemon: learned, changed behind its back, confirmed, rotated, and never leaked."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from nacl.signing import SigningKey

from asapd.wire.keys import jwk_thumbprint, private_pem, public_base64
from tests.e2e.agent import Agent
from tests.e2e.daemon import QUICK, Daemon, until
from tests.e2e.tokens import Party

ROOT, LEAF = Party("root"), Party("leaf")


class SigningAgent(Agent):
    """An agent that signs its manifest."""

    def __init__(self, party: Party) -> None:
        super().__init__(party.urn.rpartition(":")[2])
        self.sign(party.key)

    def sign(self, key: SigningKey) -> None:
        manifest = self.manifest.get("manifest", self.manifest)
        signature = base64.b64encode(key.sign(rfc8785.dumps(manifest)).signature).decode()
        self.manifest = {
            "manifest": manifest,
            "signature": {"alg": "ed25519", "signature": signature, "trust_level": "self-signed"},
            "public_key": public_base64(bytes(key.verify_key)),
        }


def configuration(agent: Agent | None, root_key: str, **delegation: str) -> str:
    settings = "".join(f'{name} = "{value}"\n' for name, value in delegation.items())
    agents = f'[[agents]]\nid = "{ROOT.urn}"\nurl = "http://127.0.0.1:9"\npublic_key = "{root_key}"\n'
    if agent is not None:
        agents += f'[[agents]]\nid = "{agent.urn}"\nurl = "{agent.url}"\n'
    return f"{QUICK}[delegation]\n{settings}{agents}"


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    made = Daemon("")
    yield made
    made.close()


def judge(daemon: Daemon, token: str) -> str | None:
    code: str | None = daemon.admin_request("POST", "/delegations/validate", json={"token": token}).json()["code"]
    return code


def keys(daemon: Daemon, agent: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = daemon.admin_get(f"/agents/{agent}/keys").json()["data"]
    return rows


async def test_a_changed_key_of_a_manifest_is_told_and_believed_only_after_an_import(daemon: Daemon) -> None:
    worker, thief = Party("worker"), Party("worker")
    root = ROOT.grant(worker, expires_in_s=7200)
    with SigningAgent(worker) as agent:
        daemon.config.write_text(configuration(agent, ROOT.public_key))
        daemon.start()

        async def claimed() -> Any:
            return daemon.status()["keys"]["unconfirmed"]

        async def learned() -> Any:
            return [row for row in keys(daemon, worker.urn) if row["state"] == "active"]

        assert [row["source"] for row in await until(learned)] == ["manifest"]
        mine, theirs = worker.grant(LEAF, parent=root), thief.grant(LEAF, parent=root)

        async def known() -> Any:
            return judge(daemon, mine) is None

        await until(known)  # a row that was committed is seen before those hear of it who go by it
        assert judge(daemon, theirs) == "bad_signature"
        assert judge(daemon, worker.grant(LEAF)) == "untrusted_root"

        agent.sign(thief.key)
        (claim,) = await until(claimed)
        kid = jwk_thumbprint(bytes(thief.key.verify_key))
        assert (claim["agent"], claim["kid"]) == (worker.urn, kid)
        assert (judge(daemon, mine), judge(daemon, theirs)) == (None, "bad_signature")
        row = daemon.admin_get(f"/agents/{worker.urn}").json()
        assert row["key_alert"]["kid"] == kid
        assert row["manifest"]["verification"] == "key_changed"
        events = daemon.admin_get(f"/audit/logs?subject={worker.urn}&event_type=agent.key_claimed").json()["data"]
        assert [event["details"]["kid"] for event in events] == [kid]
        assert [line["level"] for line in daemon.log() if kid in line["message"]] == ["warning"]

        sent = daemon.admin_request("POST", f"/agents/{worker.urn}/keys", json={"public_key": thief.public_key})
        assert sent.status_code == 201
        # At once, and what was issued before goes on while the overlap runs.
        assert (judge(daemon, mine), judge(daemon, theirs)) == (None, None)
        first = jwk_thumbprint(bytes(worker.key.verify_key))
        assert daemon.admin_request("DELETE", f"/agents/{worker.urn}/keys/{first}?overlap=0s").status_code == 200
        assert judge(daemon, mine) == "bad_signature"
        assert judge(daemon, theirs) is None
        assert daemon.status()["keys"]["unconfirmed"] == []
        assert daemon.admin_get("/audit/verify").json()["valid"] is True
        daemon.stop()


async def test_strict_learns_nothing_and_a_restart_forgets_nothing(daemon: Daemon) -> None:
    worker = Party("worker")
    link = worker.grant(LEAF, parent=ROOT.grant(worker, expires_in_s=7200))
    with SigningAgent(worker) as agent:
        daemon.config.write_text(configuration(agent, ROOT.public_key, manifest_keys="strict"))
        daemon.start()

        async def seen() -> Any:
            return keys(daemon, worker.urn)

        (row,) = await until(seen)
        assert (row["source"], row["verifies"]) == ("manifest", "none")
        assert judge(daemon, link) == "unknown_key"
        daemon.config.write_text(configuration(agent, ROOT.public_key, manifest_keys="tofu"))
        assert daemon.admin_request("POST", "/reload").status_code == 200
        assert judge(daemon, link) is None
        daemon.kill()
        daemon.start()
        assert judge(daemon, link) is None
        daemon.stop()


def test_a_pin_is_rotated_by_a_reload_with_an_overlap_or_without(daemon: Daemon) -> None:
    successor = Party("root")
    daemon.config.write_text(configuration(None, ROOT.public_key, key_overlap="1h"))
    daemon.start()
    old, new = ROOT.grant(LEAF), successor.grant(LEAF)
    assert (judge(daemon, old), judge(daemon, new)) == (None, "bad_signature")
    daemon.config.write_text(configuration(None, successor.public_key, key_overlap="1h"))
    assert daemon.admin_request("POST", "/reload").status_code == 200
    assert (judge(daemon, old), judge(daemon, new)) == (None, None)
    later = ROOT.grant(LEAF, iat=2_000_000_000, exp=2_000_000_100)
    assert judge(daemon, later) == "bad_signature"
    kid = jwk_thumbprint(bytes(ROOT.key.verify_key))
    assert daemon.admin_request("DELETE", f"/agents/{ROOT.urn}/keys/{kid}?overlap=0s").status_code == 200
    assert judge(daemon, old) == "bad_signature"
    daemon.stop()


def test_held_keys_come_and_go_with_a_reload_and_stay_in_their_files(daemon: Daemon) -> None:
    boss = SigningKey.generate()
    daemon.config.write_text(QUICK)
    daemon.start()
    wanted = {"delegator": "urn:asap:agent:boss", "delegate": LEAF.urn, "scopes": ["task.*"]}
    wanted["constraints"] = {"expires_at": "2100-01-01T00:00:00Z"}

    def issue() -> int:
        return daemon.admin_request("POST", "/delegations", json=wanted).status_code

    assert issue() == 422
    path = daemon.state_dir / "keys" / "boss.pem"
    path.parent.mkdir(mode=0o700)
    path.write_bytes(private_pem(boss))
    path.chmod(0o640)
    assert daemon.admin_request("POST", "/reload").status_code == 200
    (problem,) = daemon.status()["keys"]["problems"]
    assert str(path) in problem
    assert "0640" in problem
    assert daemon.admin_get("/agents/urn:asap:agent:boss/keys").status_code == 404
    path.chmod(0o600)
    assert daemon.admin_request("POST", "/reload").status_code == 200
    assert daemon.status()["keys"]["problems"] == []
    assert issue() == 201
    assert keys(daemon, "urn:asap:agent:boss")[0]["source"] == "held"
    path.unlink()
    assert daemon.admin_request("POST", "/reload").status_code == 200
    assert [row["verifies"] for row in keys(daemon, "urn:asap:agent:boss")] == ["none"]
    daemon.stop()
    forms = (bytes(boss), bytes(boss).hex().encode(), base64.b64encode(bytes(boss)), private_pem(boss).splitlines()[1])
    for file in [*daemon.state_dir.rglob("*"), daemon.stderr]:
        if file.is_file():
            content = file.read_bytes()
            assert not any(form in content for form in forms), file


async def test_the_daemons_own_key_can_be_replaced_while_it_is_stopped(daemon: Daemon, tmp_path: Path) -> None:
    daemon.config.write_text(QUICK)
    daemon.start()

    async def own() -> list[str]:
        async with daemon.client("") as client:
            found = await client.get("/.well-known/jwks.json")
            assert found.headers["cache-control"] == "public, max-age=300"
            return [key["kid"] for key in found.json()["keys"]]

    (first,) = await own()
    daemon.stop()
    fresh = SigningKey.generate()
    path = daemon.state_dir / "identity.pem"
    path.rename(tmp_path / "identity.old.pem")
    path.write_bytes(private_pem(fresh))
    path.chmod(0o600)
    daemon.start()
    assert await own() == [jwk_thumbprint(bytes(fresh.verify_key)), first]
    async with daemon.client("") as client:
        manifest = (await client.get("/.well-known/asap/manifest.json")).json()
    assert manifest["public_key"] == public_base64(bytes(fresh.verify_key))
    daemon.stop()
