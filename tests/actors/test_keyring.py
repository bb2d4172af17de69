"""Which keys verify whose tokens, and who may be a root."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from asapd.actors.keyring import KeyDirectory, read_public_keys
from asapd.wire.keys import private_pem, public_base64

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
ONE, TWO, THREE = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3))
log = logging.getLogger("test.keyring")


def raw(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def test_keys_of_a_directory_are_named_after_their_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.pem", private_pem(ONE))
    write(tmp_path / "open.pem", private_pem(TWO), 0o644)
    write(tmp_path / "broken.pem", b"nonsense")
    write(tmp_path / "note.txt", private_pem(TWO))
    (tmp_path / "folder.pem").mkdir()
    keys = KeyDirectory()
    keys.load_held(tmp_path, log)
    assert set(keys.held) == {A, "urn:asap:agent:open"}
    assert "open.pem can be read by others" in caplog.text
    assert "broken.pem is not used" in caplog.text
    assert "folder.pem is not used" in caplog.text
    (tmp_path / "a.pem").unlink()
    keys.load_held(tmp_path, log)
    assert set(keys.held) == {"urn:asap:agent:open"}


def test_a_directory_that_is_not_there_holds_no_keys(tmp_path: Path) -> None:
    keys = KeyDirectory()
    keys.load_held(tmp_path / "missing", log)
    assert keys.held == {}


def test_a_held_or_pinned_key_rules_out_what_was_learned() -> None:
    keys = KeyDirectory()
    keys.learned = {A: {raw(THREE)}, B: {raw(THREE)}}
    assert keys.public_keys(A) == {raw(THREE)}
    assert keys.public_keys("urn:asap:agent:nobody") == set()
    keys.pinned = {A: raw(TWO)}
    assert keys.public_keys(A) == {raw(TWO)}
    keys.held = {A: ONE}
    assert keys.public_keys(A) == {raw(ONE), raw(TWO)}


def test_a_learned_key_never_makes_a_root() -> None:
    keys = KeyDirectory()
    keys.learned = {"learned": {raw(ONE)}}
    keys.held, keys.pinned = {"held": ONE}, {"pinned": raw(TWO)}
    assert [keys.is_root(name, ()) for name in ("learned", "held", "pinned")] == [False, True, True]
    assert [keys.is_root(name, ("learned",)) for name in ("learned", "held", "pinned")] == [True, False, False]


def test_a_public_key_that_is_none_is_reported_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    texts = [(A, public_base64(raw(ONE))), (A, public_base64(raw(TWO))), (B, "nonsense")]
    assert read_public_keys(texts, log) == {A: {raw(ONE), raw(TWO)}}
    assert f"the public key of {B} is not used" in caplog.text
