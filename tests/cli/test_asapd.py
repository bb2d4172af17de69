"""`asapd` without a daemon: configuration, keys, exports."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.cli.outcome import Exit
from asapd.cli.verify_export import walk_export
from asapd.store.audit import AuditFilter, list_entries
from asapd.store.units.exchange import Envelope
from asapd.store.units.house import Note
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.keys import key_id, load_private_pem, load_public, public_base64
from tests.cli.programs import Program

# --- check-config


def test_a_good_configuration_is_ok(host: Program) -> None:
    example = Path(__file__).parents[2] / "config" / "asapd.toml"
    ran = host("check-config", example)
    assert (ran.code, ran.out, ran.err) == (Exit.DONE, f"{example}: ok\n", "")


def test_every_problem_is_named_with_file_line_field_and_reason(host: Program, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('[http]\nauth = "maybe"\n\n[prober]\ninterval = 5\n')
    ran = host("check-config", file)
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    first, second = ran.err.splitlines()
    assert first.startswith(f"{file}:2: http.auth: must be ")
    assert second.startswith(f"{file}:5: prober.interval: must be ")


def test_a_file_that_cannot_be_read_is_a_problem(host: Program, tmp_path: Path) -> None:
    ran = host("check-config", tmp_path / "none.toml")
    assert (ran.code, "cannot be read" in ran.err) == (Exit.USAGE, True)


def test_a_public_key_that_is_no_safe_key_is_named_by_line(host: Program, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    weak = public_base64(bytes(32))
    file.write_text(f'[[agents]]\nid = "urn:asap:agent:a"\nurl = "http://127.0.0.1:1"\npublic_key = "{weak}"\n')
    ran = host("check-config", file)
    assert ran.code == Exit.USAGE
    assert ran.err == f"{file}:4: agents[0].public_key: is not a safe Ed25519 public key\n"


def test_a_webhooks_secret_that_cannot_be_used_is_named_by_line(host: Program, tmp_path: Path) -> None:
    file, secret = tmp_path / "a.toml", tmp_path / "hook.secret"
    file.write_text('[[alerts.webhook]]\nurl = "http://127.0.0.1:1"\nsecret_file = "hook.secret"\n')
    where = f"{file}:3: alerts.webhook[0].secret_file: {secret}: "
    ran = host("check-config", file)
    assert (ran.code, ran.err) == (Exit.USAGE, f"{where}cannot be read: No such file or directory\n")
    secret.write_text("short")
    assert host("check-config", file).err.startswith(f"{where}holds 5 bytes")
    secret.write_text("sixteen characters")
    assert host("check-config", file).code == Exit.DONE


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            "[[price]]\nmodel = 'm'\n[[price]]\nmodel = 'n'\ninput_per_mtok = -1\n",
            ":5: price[1].input_per_mtok: must be",
        ),
        ("[[price]]\nprovider = 'x'\n", ":1: price[0].model: must name"),
        ("version = '1'\ncurrency = 'EUR'\n", ":2: currency: must be"),
        ("version = '1'\nprice = \n", ":2: syntax: "),
        ("version = '1\n", ":1: syntax: "),
        ("version = [\n\n", ": syntax: "),
        (b"version = '1'\n#\xff\n", ":2: file: is not UTF-8"),
        (None, ": file: cannot be read"),
    ],
)
def test_problems_of_the_price_table_are_named_in_its_own_file(
    table: str | bytes | None, problem: str, host: Program, tmp_path: Path
) -> None:
    (tmp_path / "asapd.toml").write_text('[metering.pricing]\nfile = "prices.toml"\n')
    prices = tmp_path / "prices.toml"
    if table is not None:
        prices.write_bytes(table.encode() if isinstance(table, str) else table)
    ran = host("check-config", tmp_path / "asapd.toml")
    assert ran.code == Exit.USAGE
    assert ran.err.startswith(f"{prices}")
    assert problem in ran.err


def test_certificates_that_cannot_be_used_are_named_by_line(host: Program, tmp_path: Path) -> None:
    file, cert, key = tmp_path / "a.toml", tmp_path / "c.pem", tmp_path / "k.pem"
    file.write_text('[http.tls]\ncert_file = "c.pem"\nkey_file = "k.pem"\nclient_ca_file = "k.pem"\n')
    missing = "cannot be read: No such file or directory"
    ran = host("check-config", file)
    assert (ran.code, ran.err.splitlines()) == (
        Exit.USAGE,
        [
            f"{file}:2: http.tls.cert_file: {cert}: {missing}",
            f"{file}:3: http.tls.key_file: {key}: {missing}",
            f"{file}:4: http.tls.client_ca_file: {key}: {missing}",
        ],
    )
    cert.write_text("x")
    key.write_text("x")
    wrong, no_ca = host("check-config", file).err.splitlines()
    assert wrong.startswith(f"{file}:2: http.tls.cert_file: {cert} and {key} are no certificate with its key: ")
    assert no_ca.startswith(f"{file}:4: http.tls.client_ca_file: {key} holds no certificate: ")


def test_what_is_wrong_in_the_file_hides_nothing_of_what_it_names(host: Program, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    weak = public_base64(bytes(32))
    file.write_text(
        'foo = 1\n[ingest]\ngroup = "nogroupx"\n[metering.pricing]\nfile = "none.toml"\n'
        '[[alerts.webhook]]\nname = 1\n[[alerts.webhook]]\nurl = "http://127.0.0.1:1"\nsecret_file = "hook.secret"\n'
        "[[agents]]\nid = 1\n"
        f'[[agents]]\nid = "urn:asap:agent:a"\nhealth = "heartbeat"\npublic_key = "{weak}"\n'
        f'[[delegation.revocation_source]]\npublic_key = "{weak}"\nissuers = ["*"]\n'
    )
    ran = host("check-config", file)
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    *found, prices = ran.err.splitlines()
    assert [line.removeprefix(f"{file}:").split(": ")[:2] for line in found] == [
        ["1", "foo"],
        ["3", "ingest.group"],
        ["6", "alerts.webhook[0].url"],
        ["7", "alerts.webhook[0].name"],
        ["10", "alerts.webhook[1].secret_file"],
        ["11", "agents[0].url"],
        ["12", "agents[0].id"],
        ["16", "agents[1].public_key"],
        ["18", "delegation.revocation_source[0].public_key"],
    ]
    assert prices == f"{tmp_path / 'none.toml'}: file: cannot be read: No such file or directory"


@pytest.mark.parametrize("section", ["ingest", "admin"])
def test_a_group_that_this_host_does_not_know_is_a_problem_for_the_daemon_does_not_start(
    section: str, host: Program, tmp_path: Path
) -> None:
    file = tmp_path / "a.toml"
    file.write_text(f'[{section}]\ngroup = "nogroupx"\n')
    ran = host("check-config", file)
    assert (ran.code, ran.err) == (
        Exit.USAGE,
        f"{file}:2: {section}.group: there is no group 'nogroupx' on this host: create it, or leave `group` out\n",
    )
    file.write_text(f'[{section}]\ngroup = "{os.getgid()}"\n')
    assert host("check-config", file).code == Exit.DONE


def test_against_the_running_configuration_it_says_what_a_reload_does_and_what_needs_a_restart(
    host: Program, tmp_path: Path
) -> None:
    agent = '[[agents]]\nid = "urn:asap:agent:{}"\nurl = "http://127.0.0.1:{}"\n'
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text(agent.format("gone", 1) + agent.format("moved", 1))
    new.write_text(
        '[http]\nbind = ["127.0.0.1:1"]\n[prober]\ninterval = "9s"\n[metering.pricing]\nprefer = "reported"\n'
        '[[budget]]\nname = "b"\nperiod = "day"\nmatch = {project = "p"}\nhard_usd = 1\n[audit]\nmask = ["x{1,3}"]\n'
        + agent.format("moved", 2)
        + agent.format("new", 1)
    )
    ran = host("check-config", new, "--against", old)
    assert (ran.code, ran.err) == (Exit.DONE, "")
    assert ran.out.splitlines() == [
        f"{new}: ok",
        "reload adds agent urn:asap:agent:new",
        "reload removes agent urn:asap:agent:gone",
        "reload changes agent urn:asap:agent:moved",
        "reload changes metering.pricing.prefer",
        "reload changes prober.interval",
        "reload changes budget",
        "reload changes audit.mask",
        "a restart is needed for http.bind",
    ]
    assert host("check-config", new, "--against", new).out.endswith("nothing would change\n")
    old.write_text("x = 1\n")
    assert host("check-config", new, "--against", old).code == Exit.USAGE


def test_settings_that_this_version_does_not_act_on_are_said(host: Program, tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[audit]\nenabled = false\n")
    ran = host("check-config", file)
    assert (ran.code, ran.err) == (Exit.DONE, f"{file}: audit.enabled is not acted on by this version\n")


# --- keygen


def test_keygen_writes_a_private_key_for_its_owner_alone_and_prints_the_public_one(
    host: Program, tmp_path: Path
) -> None:
    out = tmp_path / "key.pem"
    ran = host("keygen", out)
    assert ran.code == Exit.DONE
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    public, name = (line.split(": ")[1] for line in ran.out.splitlines())
    key = load_private_pem(out.read_bytes())
    assert load_public(public) == bytes(key.verify_key)
    assert name == key_id(bytes(key.verify_key))


def test_keygen_overwrites_nothing_and_follows_no_link(host: Program, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(there)
    dangling.symlink_to(tmp_path / "elsewhere")
    for out in (there, link, dangling):
        ran = host("keygen", out)
        assert (ran.code, ran.out, "never overwritten" in ran.err) == (Exit.USAGE, "", True)
    assert there.read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    assert host("keygen", tmp_path / "no" / "key").code == Exit.USAGE


# --- verify


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Entries as the daemon gives them out."""
    connection = open_for_writing(tmp_path_factory.mktemp("audit") / "asapd.db", synchronous="off")
    details = {"text": 'quote " é \u2028 \x7f 😀', "list": [1, None, True], "b": {"a": -1}}
    notes = [Note("test.noted", "käthe", f"subject {number}", details, 1_000_000 * number) for number in range(6)]
    Writer(connection).run([Envelope(number, note, urgent=False) for number, note in enumerate(notes)])
    rows = list_entries(connection, AuditFilter(), 10, 0, descending=False)
    connection.close()
    return rows


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_an_export_in_any_form_is_verified(host: Program, tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    file = tmp_path / "export"
    page = {"data": entries, "count": len(entries), "next_cursor": None}
    for text in (lines(entries), json.dumps(entries), json.dumps(page, indent=2), b"\n" + lines(entries) + b"\n\n"):
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        ran = host("verify", file)
        assert (ran.code, ran.err) == (Exit.DONE, "")
        assert ran.out == f"ok: 6 entries, 1 to 6, the last with hash {entries[-1]['hash']}\n"


def test_a_part_of_the_log_is_verified_from_its_first_entry_on(
    host: Program, tmp_path: Path, entries: list[dict[str, Any]]
) -> None:
    file = tmp_path / "export"
    file.write_bytes(lines(entries[2:]))
    ran = host("verify", file)
    assert (ran.code, ran.err) == (Exit.DONE, "the entries before 3 are not in this file\n")
    file.write_text(json.dumps(entries[4], indent=2))
    assert host("verify", file).out.startswith("ok: 1 entries, 5 to 5")
    file.write_text('{"data": []}')
    assert host("verify", file).out == "ok: no entries\n"


def test_an_erased_entry_still_verifies(host: Program, tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    file = tmp_path / "export"
    erased = {**entries[3], **dict.fromkeys(("actor", "subject", "details", "salt"))}
    file.write_bytes(lines([*entries[:3], erased, *entries[4:]]))
    assert host("verify", file).code == Exit.DONE
    file.write_bytes(lines([*entries[:3], {**erased, "actor": "käthe"}, *entries[4:]]))
    assert host("verify", file).out == f"bad: entry 4 ({erased['id']}): payload is only partly erased\n"


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (3, {"actor": "kathe"}),
        (1, {"subject": None}),
        (6, {"details": {"text": 1.5}}),
        (6, {"details": []}),
        (2, {"details": {"\ud800": 1}}),
        (2, {"salt": "00"}),
        (2, {"salt": "0" * 32}),
        (2, {"hash": "X" * 64}),
        (2, {"payload_hash": 7}),
        (4, {"previous_hash": "0" * 64}),
        (5, {"timestamp": "1970-01-01T00:00:04Z"}),
        (5, {"timestamp": "soon"}),
        (5, {"timestamp": "1970-01-01T00:00:04.000001Z"}),
        (5, {"event_type": "test.note"}),
        (5, {"event_type": None}),
        (5, {"actor": 5}),
    ],
)
def test_a_change_is_found_and_its_entry_named(
    number: int, change: dict[str, Any], host: Program, tmp_path: Path, entries: list[dict[str, Any]]
) -> None:
    file = tmp_path / "export"
    file.write_bytes(lines([{**row, **(change if row["seq"] == number else {})} for row in entries]))
    ran = host("verify", file)
    assert ran.code == Exit.NO
    assert ran.out.startswith(f"bad: entry {number} ({entries[number - 1]['id']}): ")


def test_missing_swapped_and_unreadable_rows_are_found(
    host: Program, tmp_path: Path, entries: list[dict[str, Any]]
) -> None:
    file = tmp_path / "export"
    duplicate = lines(entries[2:3]).replace(b'{"id"', b'{"actor": "other", "id"')
    for text, said in (
        (lines([*entries[:2], *entries[3:]]), f"bad: entry 4 ({entries[3]['id']}): entry 3 is missing\n"),
        (lines([*entries[:2], entries[3], entries[2]]), "entry 3 is missing"),
        (lines(entries[::-1]), "sequence goes back to 5"),
        (lines(entries[:4])[:-40], "bad: at entry 4: entry 4 of the file is not JSON"),
        (lines(entries[:2]) + duplicate, "bad: at entry 3: entry 3 of the file"),
        (json.dumps([entries[0], 5]).encode(), "bad: at entry 2: is not an object"),
        (json.dumps([entries[0], {"seq": 2, "id": "x"}]).encode(), "bad: entry 2 (x): actor is missing"),
        (json.dumps([{**entries[0], "seq": "1"}]).encode(), "seq is not a whole number"),
    ):
        file.write_bytes(text)
        ran = host("verify", file)
        assert ran.code == Exit.NO
        assert said in ran.out


def test_what_is_no_export_is_wrong_usage(host: Program, tmp_path: Path, entries: list[dict[str, Any]]) -> None:
    file = tmp_path / "file"
    for text in (b"", b"\n \n", b"hello", b"[1]", b"{}", b'{"data": 1}', b'{"data": [{"id": 1}]}', b"\xff\x00"):
        file.write_bytes(text)
        ran = host("verify", file)
        assert (ran.code, ran.out) == (Exit.USAGE, "")
        assert "can be verified" in ran.err
    assert host("verify", tmp_path / "none").code == Exit.USAGE
    file.write_bytes(lines(entries))
    key = public_base64(bytes(SigningKey.generate().verify_key))
    ran = host("verify", file, "--public-key", key)
    assert (ran.code, "no signature" in ran.err) == (Exit.USAGE, True)


@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_byte_of_an_export_that_changes_a_value_is_found(
    entries: list[dict[str, Any]], data: st.DataObject
) -> None:
    """What is read as another log is never accepted: a flipped bit is found, or leaves the meaning as it was."""
    text = bytearray(lines(entries))
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] ^= 1 << data.draw(st.integers(0, 7))
    verdict = None
    try:
        verdict = walk_export(bytes(text).splitlines(keepends=True))
    except ValueError:
        return  # the first line is no entry any more
    if verdict.walk.fault is None:
        read = [json.loads(line) for line in bytes(text).splitlines() if line.strip()]
        fields = entries[0].keys()
        assert [{name: row.get(name) for name in fields} for row in read] == entries
