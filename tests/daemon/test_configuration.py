"""The configuration as it is shown: what is in force, what would change, what was accepted before."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from asapd.config import parse
from asapd.core.errors import Refusal
from asapd.daemon.boot import load
from asapd.daemon.configuration import Configuration
from asapd.daemon.reloading import Reloader
from asapd.daemon.versions import KEPT, Versions
from tests.daemon.test_reloading import BASE, House, house

__all__ = ["house"]

HOOK = '[[alerts.webhook]]\nname = "hook"\nurl = "https://hooks.example.org/{}"\n'


@pytest.fixture
def shown(house: House) -> Configuration:
    return Configuration(house.file, house.reloader, house.versions)


async def test_what_is_in_force_is_shown_as_a_file_without_secrets(house: House, shown: Configuration) -> None:
    await house.reload(BASE + HOOK.format("hidden") + '[http]\nbind = ["127.0.0.1:1"]\n[sla]\nhold = "1s"\n')
    found = await shown.show()
    assert "hidden" not in repr(found)
    assert (found["version"], found["state"], found["path"]) == (2, "ok", str(house.file))
    assert found["waiting_for_restart"] == ["http.bind"]
    assert found["config"]["http"]["bind"] == ["127.0.0.1:8727"], "in force until a restart"
    assert found["config"]["sla"]["hold"] == "1s"
    assert parse(found["toml"].replace("[masked]", "hidden")) == house.reloader.in_force


async def test_what_a_reload_would_change_is_told_and_not_done(house: House, shown: Configuration) -> None:
    await house.reload(BASE + HOOK.format("hidden-1"))
    same = await shown.diff(None)
    assert isinstance(same, dict)
    assert (same["against"], same["changes"]) == ("file", [])
    more = '[store]\nsynchronous = "normal"\n[sla]\nhold = "2s"\n'
    house.file.write_text(BASE.replace(":1", ":2") + HOOK.format("hidden-2") + more)
    found = await shown.diff(None)
    assert isinstance(found, dict)
    assert found["changes"] == [
        {"setting": "store.synchronous", "in_force": "full", "there": "normal"},
        {"setting": "sla.hold", "in_force": "0s", "there": "2s"},
        {
            "setting": "alerts.webhook[hook].url",
            "in_force": "https://hooks.example.org/[masked]",
            "there": "https://hooks.example.org/[masked]",
        },
        {"setting": "agents[urn:asap:agent:a].url", "in_force": "http://127.0.0.1:1", "there": "http://127.0.0.1:2"},
    ]
    assert found["restart_required"] == ["store.synchronous"]
    assert house.reloader.in_force.sla.hold_us == 0
    house.file.write_text("[sla]\nhold = 5\n")
    refused = await shown.diff(None)
    assert isinstance(refused, Refusal)
    assert (refused.code, refused.errors[0].field) == ("config_refused", "sla.hold")
    assert house.reloader.status()["state"] == "ok", "nothing was tried"


async def test_an_earlier_version_is_compared_with_what_is_in_force(house: House, shown: Configuration) -> None:
    await house.reload(BASE + '[sla]\nhold = "1s"\n')
    found = await shown.diff(1)
    assert isinstance(found, dict)
    assert (found["against"], found["changes"]) == (1, [{"setting": "sla.hold", "in_force": "1s", "there": "0s"}])
    unknown = await shown.diff(9)
    assert isinstance(unknown, Refusal)
    assert unknown.code == "config_version_not_found"
    rows = await shown.versions()
    assert isinstance(rows, list)
    assert [(row["version"], row["in_force"]) for row in rows] == [(2, True), (1, False)]
    assert await shown.text(1) == BASE


async def test_without_a_file_there_is_nothing_but_defaults(house: House) -> None:
    reloader = Reloader(None, load(None), house, house.versions)
    shown = Configuration(None, reloader, house.versions)
    assert (await shown.show())["path"] is None
    for refused in (await shown.diff(None), await shown.versions()):
        assert isinstance(refused, Refusal)
        assert refused.code == "no_config_file"


def test_versions_are_private_and_so_many_are_kept(tmp_path: Path) -> None:
    versions = Versions(tmp_path / "config")
    assert versions.all() == []
    assert versions.text(1) is None
    for number in range(KEPT + 3):
        kept = versions.keep(f"# {number}", 1_000_000 * number)
        assert versions.keep(f"# {number}", 1) == kept
    assert [version.number for version in versions.all()] == list(range(KEPT + 3, 3, -1))
    assert versions.all()[0].accepted_us == 1_000_000 * (KEPT + 2)
    assert stat.S_IMODE((tmp_path / "config").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "config").iterdir()} == {0o600}
    (tmp_path / "config" / "notes.toml").write_text("someone's")
    assert versions.keep("# 0", 5).number == KEPT + 4, "what is accepted again is a version of its own"
    (tmp_path / "config" / "99.toml").write_bytes(b"\xff\xfe")
    assert versions.text(99) is None
    assert versions.keep("# 1", 6).number == 100, "the number of one that cannot be read is not given again"
