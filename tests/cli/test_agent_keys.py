"""`asapctl agents keys` against a daemon that runs."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from nacl.signing import SigningKey

from asapd.wire.keys import jwk_thumbprint, public_base64
from tests.cli.programs import Daemon, Program

# Its thumbprint begins with a dash.
KEY = bytes(SigningKey(bytes([7]) * 32).verify_key)


def test_a_key_is_imported_listed_and_retired(daemon: Daemon, ctl: Program, tmp_path: Path) -> None:
    urn, kid = f"urn:asap:agent:{uuid4().hex[:12]}", jwk_thumbprint(KEY)
    (tmp_path / "key").write_text(public_base64(KEY))
    assert kid.startswith("-")
    assert ctl("agents", "keys", "list", urn).code == 2
    made = ctl("agents", "keys", "import", urn, f"@{tmp_path / 'key'}")
    assert made.code == 0
    assert made.out.splitlines()[1].split()[:4] == [kid, "import", "active", "all"]
    (row,) = ctl("agents", "keys", "list", urn, "--json").json["data"]
    assert (row["kid"], row["public_key"]) == (kid, public_base64(KEY))
    assert ctl("agents", "keys", "retire", urn, kid).out.splitlines()[1].split()[2:4] == ["retiring", "older"]
    assert ctl("agents", "keys", "retire", urn, kid, "--overlap", "0s").out.splitlines()[1].split()[3] == "none"


def test_what_is_wrong_is_said(daemon: Daemon, ctl: Program) -> None:
    urn = f"urn:asap:agent:{uuid4().hex[:12]}"
    bad = ctl("agents", "keys", "import", urn, "AAAA")
    assert (bad.code, "public_key" in bad.err) == (2, True)
    own = "urn:asap:agent:asapd"
    (row,) = ctl("agents", "keys", "list", own, "--json").json["data"]
    kept = ctl("agents", "keys", "retire", own, row["kid"])
    assert (kept.code, "identity.pem" in kept.err) == (2, True)


def test_status_names_keys_that_are_not_used(own_daemon: Daemon, ctl: Program) -> None:
    keys = own_daemon.directory / "keys"
    keys.mkdir()
    (keys / "a.pem").write_text("nonsense")
    (keys / "a.pem").chmod(0o600)
    assert ctl("reload").code == 0
    shown = ctl("status")
    assert (shown.code, f"key not used: {keys / 'a.pem'}" in shown.err) == (0, True)
