"""`asapctl delegation revocations`: a signed list out of one daemon, and into one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from asapd.cli.outcome import Exit
from tests.cli.programs import CONFIG, Daemon, Program

ROOT, WRITER = "urn:asap:agent:root", "urn:asap:agent:writer"


class _Stdin:
    """Standard input as a program has it."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def test_a_list_goes_out_and_comes_back(
    own_daemon: Daemon, ctl: Program, host: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = own_daemon.directory / "keys"
    keys.mkdir()
    host("keygen", keys / "root.pem")
    own_daemon.config.write_text(CONFIG + f'[delegation]\nkeys_dir = "keys"\nroots = ["{ROOT}"]\n')
    assert ctl("reload").code == Exit.DONE
    issue = ("delegation", "issue", "--expires-in", "1h", "--delegator", ROOT, "--delegate", WRITER, "--scope", "*")
    made = ctl(*issue, "--json").json
    export = ("delegation", "revocations", "export")
    empty = ctl(*export)
    assert (empty.code, empty.json["entries"]) == (Exit.DONE, [])
    assert ctl("delegation", "revoke", made["id"]).code == Exit.DONE
    file = tmp_path / "revoked.json"
    written = ctl(*export, file)
    assert (written.code, written.out) == (Exit.DONE, "")
    document: dict[str, Any] = json.loads(file.read_text())
    assert [entry["id"] for entry in document["entries"]] == [made["id"]]
    assert file.stat().st_mode & 0o077 == 0
    assert ctl(*export, "--since", "0").json["entries"] == document["entries"]
    assert ctl(*export, "--since", str(document["number"])).json["entries"] == []

    imported = ("delegation", "revocations", "import")
    ran = ctl(*imported, file)
    assert (ran.code, "known:" in ran.out, ran.err) == (Exit.DONE, True, "")
    shown = ctl(*imported, file, "--json")
    assert (shown.code, shown.json["known"], shown.json["added"]) == (Exit.DONE, 1, 0)
    monkeypatch.setattr("sys.stdin", _Stdin(file.read_bytes()))
    assert ctl(*imported, "-").code == Exit.DONE

    file.write_text(json.dumps({**document, "number": document["number"] + 1}))
    ran = ctl(*imported, file)
    assert (ran.code, ran.out, ran.err.startswith("asapctl: bad_signature: ")) == (Exit.NO, "", True)
    file.write_text(json.dumps({**document, "issuer": "urn:asap:agent:stranger"}))
    ran = ctl(*imported, file)
    assert (ran.code, ran.err.startswith("asapctl: unknown_key: ")) == (Exit.NO, True)
    file.write_text("{}")
    assert ctl(*imported, file).code == Exit.USAGE
    assert ctl(*imported, tmp_path / "none").code == Exit.USAGE


def test_entries_that_are_not_the_signers_are_said_to_be_left_out(
    own_daemon: Daemon, ctl: Program, host: Program, tmp_path: Path
) -> None:
    from asapd.wire.keys import load_private_pem, public_base64
    from asapd.wire.revocations import Entry, sign_list

    pem = tmp_path / "writer.pem"
    host("keygen", pem)
    key = load_private_pem(pem.read_bytes())
    agent = f'[[agents]]\nid = "{WRITER}"\nurl = "http://127.0.0.1:9"\n'
    own_daemon.config.write_text(CONFIG + agent + f'public_key = "{public_base64(bytes(key.verify_key))}"\n')
    assert ctl("reload").code == Exit.DONE
    ends_us = 4_000_000_000_000_000
    file = tmp_path / "list.json"
    file.write_bytes(
        sign_list(
            [Entry(WRITER, "mine", 1, ends_us), Entry(ROOT, "theirs", 1, ends_us)],
            key,
            issuer=WRITER,
            number=1,
            updated_us=None,
        )
    )
    ran = ctl("delegation", "revocations", "import", file)
    assert ran.code == Exit.DONE
    assert "1 entries are not" in ran.err
