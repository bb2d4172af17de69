"""Reload: a bad file changes nothing; a good one reaches everybody, and what only a restart applies is named."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from nacl.signing import SigningKey

from asapd import config
from asapd.core.errors import Refusal
from asapd.daemon.boot import load
from asapd.daemon.reloading import Reloader
from asapd.daemon.versions import Versions
from asapd.runtime.clock import Clock
from asapd.store.database import Database
from asapd.wire.keys import private_pem
from tests.edge.house import NOW, A, B, C, Edge, open_edge

BASE = '[[agents]]\nid = "urn:asap:agent:a"\nurl = "http://127.0.0.1:1"\n'


@dataclass
class House:
    """What a reload changes: real actors, and the configuration that the doors look up."""

    edge: Edge
    file: Path
    reloader: Reloader = None  # type: ignore[assignment]  # made from this
    versions: Versions = None  # type: ignore[assignment]  # where it keeps them
    adopted: int = 0
    hooks: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    refusal: Refusal | None = None

    @property
    def mailboxes(self) -> dict[str, trio.MemorySendChannel[Any]]:
        return {name: send for name, (send, _) in self.edge.mailboxes.items()}

    @property
    def clock(self) -> Clock:
        return self.edge.clock

    def retarget(self, settings: config.Config, secrets: Mapping[Path, bytes]) -> None:
        self.hooks = [hook.target for hook in settings.alerts.webhooks]

    async def mask(self, patterns: Sequence[str]) -> Refusal | None:
        self.masks = list(patterns)
        return self.refusal

    def adopt(self, settings: config.Config) -> None:
        self.edge.settings = settings
        self.adopted += 1

    async def reload(self, text: str) -> dict[str, Any] | Refusal:
        self.file.write_text(text)
        return await self.reloader.reload("uid:0")

    async def agents(self) -> list[str]:
        return [row["id"] for row in (await self.edge.get("/agents")).ok()["data"]]

    async def remarks(self) -> list[Any]:
        return (await self.edge.get("/audit/logs?event_type=config.reloaded")).ok()["data"]  # type: ignore[no-any-return]


@pytest.fixture
async def house(inline_database: tuple[Database, apsw.Connection], tmp_path: Path) -> AsyncIterator[House]:
    file = tmp_path / "asapd.toml"
    file.write_text(BASE)
    async with open_edge(inline_database[1], tmp_path) as edge:
        made = House(edge, file)
        loaded = load(file)
        made.adopt(loaded.config)
        made.versions = Versions(tmp_path / "config")
        made.reloader = Reloader(file, loaded, made, made.versions)
        assert isinstance(await made.reload(BASE), dict)
        yield made


async def test_what_changed_reaches_everybody_and_is_audited(house: House) -> None:
    assert await house.agents() == [A]
    outcome = await house.reload(
        BASE.replace(":1", ":2")
        + '[[agents]]\nid = "urn:asap:agent:c"\nurl = "http://127.0.0.1:1"\n'
        + '[metering]\nlate_max = "1h"\n[sla]\nwindows = ["1h"]\n[delegation]\nmax_depth = 1\n'
        + '[retention]\nprobes = "1d"\n[prober]\ninterval = "1m"\n'
    )
    assert outcome == {
        "state": "ok",
        "applied": {
            "agents_added": [C],
            "agents_changed": [A],
            "prober": True,
            "sla": True,
            "delegation": True,
            "metering": True,
            "retention": True,
        },
        "restart_required": [],
    }
    assert await house.agents() == [A, C]
    assert house.edge.settings.metering.late_max_us == 3_600_000_000
    late = {"task_id": "t", "agent": A, "consumer": B, "metrics": {}, "timestamp": "2027-01-15T06:00:00Z"}
    assert (await house.edge.post("/usage", late)).refused(422)["errors"][0]["field"] == "timestamp"
    assert (await house.edge.get("/sla?window=24h")).refused(400)
    remark = (await house.remarks())[-1]
    assert (remark["actor"], remark["subject"]) == ("uid:0", "config")
    assert "agents_added" in remark["details"]["applied"]
    gone = await house.reload("")
    assert isinstance(gone, dict)
    assert gone["applied"]["agents_removed"] == [A, C]
    assert await house.agents() == []


async def test_a_key_that_is_held_since_is_told_though_the_file_is_the_same(house: House, tmp_path: Path) -> None:
    same = f'[delegation]\nkeys_dir = "{tmp_path}"\n'
    await house.reload(same)
    (tmp_path / "a.pem").write_bytes(private_pem(SigningKey(bytes(32))))
    (tmp_path / "a.pem").chmod(0o600)
    for applied in ({"keys": [A]}, {}):
        assert await house.reload(same) == {"state": "ok", "applied": applied, "restart_required": []}


async def test_the_file_is_shown_by_its_whole_path(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(house.file.parent)
    reloader = Reloader(Path(house.file.name), load(house.file), house, house.versions)
    assert reloader.status()["path"] == str(house.file)


async def test_a_bad_file_changes_nothing_and_shows_until_it_is_mended(house: House) -> None:
    before, adopted = house.edge.settings, house.adopted
    remarks = len(await house.remarks())
    refused = await house.reload('[metering]\nlate_max = "1h"\n[prober]\nintervall = "1m"\n[sla]\nhold = 5\n')
    assert isinstance(refused, Refusal)
    assert refused.code == "config_refused"
    assert [error.field for error in refused.errors] == ["prober.intervall", "sla.hold"]
    assert refused.extra["problems"][0].startswith(f"{house.file}:4: prober.intervall: ")
    assert house.edge.settings is before
    assert house.adopted == adopted
    assert await house.agents() == [A]
    assert len(await house.remarks()) == remarks
    status = house.reloader.status()
    assert (status["state"], status["errors"], status["path"]) == (
        "error",
        refused.extra["problems"],
        str(house.file),
    )
    house.edge.clock.us += 1_000_000
    assert isinstance(await house.reload(BASE), dict)
    mended = house.reloader.status()
    assert (mended["state"], mended["errors"]) == ("ok", [])
    assert mended["loaded_at"] == "2027-01-15T08:00:01.000000Z"


async def test_a_file_that_is_gone_changes_nothing(house: House) -> None:
    house.file.unlink()
    refused = await house.reloader.reload("uid:0")
    assert isinstance(refused, Refusal)
    assert "cannot be read" in refused.detail
    assert await house.agents() == [A]


async def test_what_only_a_restart_applies_is_named_until_then_and_stays_as_it_was(house: House) -> None:
    text = BASE + '[http]\nbind = ["127.0.0.1:1"]\n[store]\nsynchronous = "normal"\n[sla]\nmin_samples = 1\n'
    for _ in range(2):
        outcome = await house.reload(text)
        assert isinstance(outcome, dict)
        assert outcome["restart_required"] == ["http.bind", "store.synchronous"]
        assert house.edge.settings.http == config.Http()
        assert house.edge.settings.sla.min_samples == 1
    again = await house.reload(BASE)
    assert isinstance(again, dict)
    assert (again["applied"], again["restart_required"]) == ({"sla": True}, [])


async def test_a_directory_that_cannot_be_changed_refuses_the_whole_reload(house: House) -> None:
    before = house.edge.settings
    house.edge.mailboxes["prober"][0].close()
    refused = await house.reload("[sla]\nmin_samples = 1\n")
    assert isinstance(refused, Refusal)
    assert refused.code == "outcome_unknown"
    assert house.edge.settings is before
    assert house.reloader.status()["errors"] == [refused.detail]


@pytest.mark.parametrize("actor", ["meter", "registry", "watcher"])
async def test_an_actor_that_is_away_makes_the_reload_fail_loudly(house: House, actor: str) -> None:
    house.edge.mailboxes[actor][0].close()
    assert isinstance(await house.reload("[sla]\nmin_samples = 1\n[audit]\nmask = ['corp']\n"), Refusal)
    assert house.reloader.status()["state"] == "error"
    assert house.masks == []


async def test_a_reload_that_cannot_be_audited_is_logged(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.edge.mailboxes["auditor"][0].close()
    assert isinstance(await house.reload(BASE), dict)
    assert "the reload is not in the audit log" in caplog.text


async def test_reloads_follow_one_another(house: House) -> None:
    outcomes: list[Any] = []

    async def reload() -> None:
        outcomes.append(await house.reloader.reload("uid:0"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(reload)
    assert outcomes == [{"state": "ok", "applied": {}, "restart_required": []}] * 5


async def test_without_a_file_there_is_nothing_to_show_but_the_defaults(house: House) -> None:
    reloader = Reloader(None, load(None), house, house.versions)
    await reloader.started()
    assert reloader.version is None
    status = reloader.status()
    assert (status["state"], status["errors"], status["path"]) == ("ok", [], None)
    assert status["loaded_at"] == NOW.replace("Z", ".000000Z")
    assert isinstance(await reloader.reload("uid:0"), dict)


async def test_patterns_of_masks_are_handed_on_and_a_store_that_is_away_refuses_the_reload(house: House) -> None:
    assert isinstance(await house.reload("[audit]\nmask = ['corp']\n"), dict)
    assert house.masks == ["corp"]
    adopted = house.adopted
    house.refusal = Refusal("overloaded", "the writer is away")
    assert await house.reload("") == house.refusal
    assert house.adopted == adopted
    assert house.masks == ["corp"]


async def test_what_is_accepted_is_kept_and_audited_with_its_number(house: House) -> None:
    await house.reloader.started()
    assert house.reloader.version == house.versions.all()[0]
    assert isinstance(await house.reload('[sla]\nhold = "1s"\n'), dict)
    assert isinstance(await house.reload("[sla]\nhold = 5\n"), Refusal)
    assert house.reloader.version == house.versions.all()[0]
    assert [version.number for version in house.versions.all()] == [2, 1]
    assert house.versions.text(1) == BASE
    assert [entry["details"]["version"] for entry in await house.remarks()] == [1, 2]


async def test_what_a_start_brings_is_audited_once(house: House) -> None:
    fresh = Reloader(house.file, load(house.file), house, Versions(house.file.with_name("kept")))
    for _ in range(2):
        await fresh.started()
        house.edge.clock.us += 1
    entries = (await house.edge.get("/audit/logs?event_type=config.loaded")).ok()["data"]
    assert [(entry["actor"], entry["details"]) for entry in entries] == [
        ("asapd", {"version": 1, "sha256": hashlib.sha256(BASE.encode()).hexdigest()})
    ]


async def test_a_version_that_cannot_be_kept_does_not_hold_up_a_reload(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.file.with_name("blocked").write_text("")
    house.reloader = Reloader(house.file, load(house.file), house, Versions(house.file.with_name("blocked")))
    assert isinstance(await house.reload(BASE), dict)
    assert house.reloader.version is None
    assert "it was not kept" in caplog.text
