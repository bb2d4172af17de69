"""The offline check: what a file says beside what is signed has to be the same, and only a file is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from nacl.signing import SigningKey

from asapd.cli.verified import CannotVerifyError
from asapd.cli.verify import verify_file
from asapd.core.merkle import leaf_hash
from asapd.store import audit
from asapd.store.migrations import migrate
from asapd.store.units.exchange import Envelope
from asapd.store.units.house import Note
from asapd.store.writer import Writer
from asapd.wire.audit_export import FORMATS
from asapd.wire.checkpoint import sign_checkpoint
from asapd.wire.revocations import sign_list

KEY = SigningKey(bytes(range(32)))
PUBLIC = bytes(KEY.verify_key)


@pytest.fixture
def proof() -> dict[str, Any]:
    connection = apsw.Connection(":memory:")
    migrate(connection, None)
    Writer(connection).run([Envelope(1, Note("test", "asapd", "s", {}, 1_800_000_000_000_000), False)])
    entry = audit.get_entry(connection, "1")
    assert entry is not None
    connection.close()
    root = leaf_hash(bytes.fromhex(entry["hash"]))
    return {
        "entry": entry,
        "leaf_index": 0,
        "leaf_hash": root.hex(),
        "tree_size": 1,
        "root_hash": root.hex(),
        "hashes": [],
        "checkpoint": sign_checkpoint(1, root, KEY).note.encode(),
    }


@pytest.mark.parametrize(
    ("field", "value"), [("tree_size", 9), ("tree_size", True), ("root_hash", "00" * 32), ("leaf_hash", None)]
)
def test_every_field_of_a_proof_has_to_say_what_is_signed(
    proof: dict[str, Any], tmp_path: Path, field: str, value: object
) -> None:
    file = tmp_path / "proof.json"
    file.write_bytes(msgspec.json.encode(proof))
    assert verify_file(file, PUBLIC).is_good
    file.write_bytes(msgspec.json.encode({**proof, field: value}))
    found = verify_file(file, PUBLIC)
    assert (found.is_good, found.verdict) == (False, f"bad: {field} is not what the checkpoint and the entry say")


def test_a_place_that_is_no_number_is_none(proof: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "proof.json"
    file.write_bytes(msgspec.json.encode({**proof, "leaf_index": False}))
    assert verify_file(file, PUBLIC).verdict == "bad: leaf_index, hashes or checkpoint is not of its form"


def test_two_roots_of_one_size_are_found_wherever_in_the_file_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints.log"
    notes = [sign_checkpoint(size, bytes([root] * 32), KEY).note.encode() for size, root in ((5, 1), (7, 2), (5, 3))]
    file.write_text("\n".join(notes[:2]), encoding="utf-8")
    assert verify_file(file, PUBLIC).is_good
    file.write_text("\n".join(notes), encoding="utf-8")
    assert "two checkpoints of 5 entries have different roots" in verify_file(file, PUBLIC).verdict


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_who_has_an_export_as_csv_is_told_which_format_can_be_verified(
    proof: dict[str, Any], tmp_path: Path, mark: str
) -> None:
    file = tmp_path / "audit.csv"
    csv = FORMATS["csv"]()
    file.write_bytes(mark.encode() + csv.begin() + csv.rows([proof["entry"]]) + csv.end())
    with pytest.raises(CannotVerifyError, match=r"as CSV.*asapctl audit export FILE --format ndjson"):
        verify_file(file, None)


@pytest.mark.parametrize("key", [None, PUBLIC])
def test_who_has_a_list_of_revocations_is_told_what_checks_it(tmp_path: Path, key: bytes | None) -> None:
    file = tmp_path / "revoked.json"
    file.write_bytes(sign_list([], KEY, issuer="asapd/x", number=0, updated_us=None))
    with pytest.raises(CannotVerifyError, match=r"list of revocations: asapctl delegation revocations import FILE"):
        verify_file(file, key)


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(CannotVerifyError, match="is no regular file"):
            verify_file(path, PUBLIC)
