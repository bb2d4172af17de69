"""`asapctl config` and `asapctl dashboard` against a daemon of their own."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from asapd.cli.door import Door
from tests.cli.programs import CONFIG, Daemon, Program

HOLD = CONFIG.replace("min_samples = 1", 'min_samples = 1\nhold = "1s"')


def test_what_is_in_force_is_printed_as_a_file_that_is_valid(
    ctl: Program, host: Program, daemon: Daemon, tmp_path: Path
) -> None:
    shown = ctl("config", "show")
    assert shown.code == 0
    file = tmp_path / "shown.toml"
    file.write_text(shown.out)
    assert host("check-config", file, "--against", daemon.config).out.endswith("nothing would change\n")
    found = ctl("config", "show", "--json").json
    assert found["config"] == tomllib.loads(shown.out)
    assert found["path"] == str(daemon.config)
    assert ctl("config", "show", "--version", 1).out == CONFIG
    assert ctl("config", "show", "--version", 1, "--json").json == {"version": 1, "text": CONFIG}
    assert ctl("config", "show", "--version", 99).code == 2


def test_a_change_is_compared_applied_and_rolled_back(ctl: Program, own_daemon: Daemon) -> None:
    file = own_daemon.config
    assert "no difference" in ctl("config", "diff").out
    nothing = ctl("config", "rollback")
    assert nothing.code == 2
    assert "no other version" in nothing.err
    file.write_text(HOLD.replace('bind = ["127.0.0.1:0"]', 'bind = ["127.0.0.1:1"]'))
    file.chmod(0o604)
    different = ctl("config", "diff")
    assert different.code == 0
    assert [line.split() for line in different.out.splitlines()] == [
        ["SETTING", "IN", "FORCE", "FILE"],
        ["http.bind", "127.0.0.1:0", "127.0.0.1:1"],
        ["sla.hold", "0s", "1s"],
    ]
    assert "only a restart applies: http.bind" in different.err
    assert ctl("reload").code == 0
    assert "waits for a restart: http.bind" in ctl("config", "show").err
    assert ctl("config", "diff", 1, "--json").json["changes"] == [
        {"setting": "sla.hold", "in_force": "1s", "there": "0s"}
    ]
    back = ctl("config", "rollback")
    assert back.code == 0
    assert back.out == f"{file}: as in version 1\napplied: sla\n"
    assert file.read_text() == CONFIG
    assert stat.S_IMODE(file.stat().st_mode) == 0o604
    rows = ctl("config", "versions", "--json").json["data"]
    assert [(row["version"], row["in_force"]) for row in rows] == [(3, True), (2, False), (1, False)]
    assert "yes" in ctl("config", "versions").out
    # Twice leads back to where it began.
    assert ctl("config", "rollback", "--json").json["rolled_back_to"] == 2
    assert "hold" in file.read_text()
    assert not list(file.parent.glob("*.before-rollback"))


def test_a_file_with_a_byte_order_mark_is_known_for_the_version_that_it_is(ctl: Program, own_daemon: Daemon) -> None:
    own_daemon.config.write_text(HOLD, encoding="utf-8-sig")
    assert ctl("reload").code == 0
    assert ctl("config", "rollback", "--json").json["rolled_back_to"] == 1
    assert own_daemon.config.read_text() == CONFIG
    assert not list(own_daemon.config.parent.glob("*.before-rollback"))


def test_what_lies_where_a_rollback_could_write_first_is_left_alone(ctl: Program, own_daemon: Daemon) -> None:
    file = own_daemon.config
    lying = file.with_name("asapd.toml.new")
    lying.write_text("mine")
    file.write_text(HOLD)
    assert ctl("reload").code == 0
    assert ctl("config", "rollback").code == 0
    assert (file.read_text(), lying.read_text()) == (CONFIG, "mine")
    assert sorted(path.name for path in file.parent.glob("*asapd.toml*")) == ["asapd.toml", "asapd.toml.new"]


def test_a_file_that_was_refused_is_rolled_back_to_what_is_in_force_and_kept_beside(
    ctl: Program, own_daemon: Daemon
) -> None:
    file = own_daemon.config
    file.write_text("[sla]\nhold = 5\n")
    assert ctl("config", "diff").code == 2
    refused = ctl("config", "diff", "--json")
    assert (refused.code, refused.json["code"]) == (2, "config_refused")
    assert ctl("reload").code == 2
    assert "the file was refused" in ctl("config", "show").err
    assert ctl("config", "rollback").code == 0
    assert file.read_text() == CONFIG
    assert file.with_name("asapd.toml.before-rollback").read_text() == "[sla]\nhold = 5\n"
    assert ctl("status", "--json").json["config"]["state"] == "ok"


def test_a_version_that_is_refused_now_leaves_the_file_as_it_was(ctl: Program, own_daemon: Daemon) -> None:
    file = own_daemon.config
    without = CONFIG.replace('[metering.pricing]\nfile = "prices.toml"\n', "")
    file.write_text(without)
    assert ctl("reload").code == 0
    (file.parent / "prices.toml").unlink()
    refused = ctl("config", "rollback")
    assert refused.code == 2
    assert "put back as it was" in refused.err
    assert "prices.toml" in refused.err
    assert file.read_text() == without


def test_a_file_that_cannot_be_written_is_left_alone(
    ctl: Program, own_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_daemon.config.write_text(HOLD)
    assert ctl("reload").code == 0

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # root may write everywhere

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused = ctl("config", "rollback")
    assert [path.name for path in own_daemon.config.parent.glob("*asapd.toml*")] == ["asapd.toml"]
    assert refused.code == 4
    assert "config show --version N" in refused.err
    assert own_daemon.config.read_text() == HOLD


def test_another_users_word_for_where_the_file_is_is_not_taken(
    ctl: Program, own_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = own_daemon.config
    file.write_text(HOLD)
    assert ctl("reload").code == 0
    ours = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
    refused = ctl("config", "rollback")
    assert refused.code == 2
    assert f"add --file {file}" in refused.err
    assert file.read_text() == HOLD
    other = ctl("config", "rollback", "--file", file.with_name("other.toml"))
    assert other.code == 2
    assert "does not read" in other.err
    assert not file.with_name("other.toml").exists()
    assert ctl("config", "rollback", "--file", file).code == 0
    assert file.read_text() == CONFIG


def test_who_the_daemon_runs_as_is_known_by_the_kernel_for_each_answer(daemon: Daemon) -> None:
    door = Door(daemon.socket)
    assert door.owners == set()
    door.get("/config")
    assert door.owners == {os.geteuid()}


def test_a_socket_that_was_swapped_between_two_answers_is_not_taken_at_its_word(
    ctl: Program, own_daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_daemon.config.write_text(HOLD)
    assert ctl("reload").code == 0
    connect, asked = Door._connect, []

    def swapped(door: Door, patience_s: float | None) -> socket.socket:
        connected = connect(door, patience_s)
        asked.append(door)
        if len(asked) == 3:  # who tells the text
            door.owners.add(os.geteuid() + 1)
        return connected

    monkeypatch.setattr(Door, "_connect", swapped)
    refused = ctl("config", "rollback")
    assert refused.code == 2
    assert "add --file" in refused.err
    assert own_daemon.config.read_text() == HOLD


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def test_dashboard_prints_an_address_that_opens_once(ctl: Program, daemon: Daemon) -> None:
    printed = ctl("dashboard")
    assert printed.code == 0
    url = printed.out.strip()
    assert "opens once, until" in printed.err
    open_url = urllib.request.build_opener(_Stay(), urllib.request.ProxyHandler({})).open
    with pytest.raises(urllib.error.HTTPError) as opened:
        open_url(url)
    assert opened.value.code == 303
    cookie = opened.value.headers["Set-Cookie"].partition(";")[0]
    opened.value.close()
    request = urllib.request.Request(f"{url.partition('/login')[0]}/usage/summary", headers={"Cookie": cookie})
    with open_url(request) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError) as again:
        open_url(url)
    assert again.value.code == 410
    again.value.close()
    assert ctl("dashboard", "--json").json["url"].startswith("http://127.0.0.1:")
