"""Which keys verify whose tokens, and who may be a root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from asapd.actors.keyring import KeyDirectory, load_held
from asapd.core.agent_keys import AgentKey
from asapd.wire.keys import private_pem

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
ONE, TWO, THREE = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3))


def raw(key: SigningKey) -> bytes:
    return bytes(key.verify_key)


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    path.write_bytes(content)
    path.chmod(mode)


def keys_of(keys: KeyDirectory, agent: str, *, issued_at_us: int = 10, now_us: int = 10) -> frozenset[bytes]:
    return keys.public_keys(agent, issued_at_us=issued_at_us, now_us=now_us)


def test_keys_of_a_directory_are_named_after_their_files(tmp_path: Path) -> None:
    write(tmp_path / "a.pem", private_pem(ONE))
    write(tmp_path / "team-1:x.y.pem", private_pem(TWO), 0o400)
    write(tmp_path / "note.txt", private_pem(TWO))
    held, problems = load_held(tmp_path)
    assert held == {A: ONE, "urn:asap:agent:team-1:x.y": TWO}
    assert problems == []


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o611])
def test_a_key_that_others_may_use_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    write(tmp_path / "a.pem", private_pem(ONE), mode)
    held, (problem,) = load_held(tmp_path)
    assert held == {}
    assert f"{tmp_path / 'a.pem'} is not used: its mode is {mode:04o}" in problem
    assert f"chmod 600 {tmp_path / 'a.pem'}" in problem


def test_what_is_no_key_is_said_and_the_others_are_used(tmp_path: Path) -> None:
    write(tmp_path / "a.pem", private_pem(ONE))
    write(tmp_path / "broken.pem", b"nonsense")
    write(tmp_path / "no agent.pem", private_pem(TWO))
    (tmp_path / "folder.pem").mkdir(mode=0o700)
    (tmp_path / "gone.pem").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe.pem", 0o600)
    held, problems = load_held(tmp_path)
    assert held == {A: ONE}
    assert [problem.removeprefix(f"{tmp_path}/").partition(" is not used: ")[::2] for problem in problems] == [
        ("broken.pem", "it is not a PEM file"),
        ("folder.pem", "it is not a file"),
        ("gone.pem", "No such file or directory"),
        ("no agent.pem", "its name is not that of an agent: letters, digits, . _ : and - only"),
        ("pipe.pem", "it is not a file"),
    ]


def test_a_directory_that_is_not_there_holds_no_keys(tmp_path: Path) -> None:
    assert load_held(tmp_path / "missing") == ({}, [])
    (tmp_path / "file").touch()
    assert load_held(tmp_path / "file") == ({}, [f"{tmp_path / 'file'} is not used: Not a directory"])


def test_a_held_or_pinned_key_rules_out_what_was_learned() -> None:
    keys = KeyDirectory()
    keys.learn([AgentKey(A, raw(THREE), "api", "active", 1), AgentKey(B, raw(THREE), "manifest", "active", 1)])
    assert keys_of(keys, A) == keys_of(keys, B) == {raw(THREE)}
    assert keys_of(keys, "urn:asap:agent:nobody") == set()
    keys.pinned = {A: raw(TWO)}
    assert keys_of(keys, A) == {raw(TWO)}
    keys.held = {A: ONE}
    assert keys_of(keys, A) == {raw(ONE), raw(TWO)}


def test_what_is_held_and_pinned_now_is_said_by_the_files_alone() -> None:
    keys = KeyDirectory()
    keys.learn([AgentKey(A, raw(ONE), "configuration", "active", 1), AgentKey(B, raw(TWO), "held", "active", 1)])
    assert keys_of(keys, A) == keys_of(keys, B) == set()


def test_a_replaced_key_verifies_what_was_issued_before_for_as_long_as_its_overlap_runs() -> None:
    keys = KeyDirectory()
    keys.pinned = {A: raw(TWO)}
    keys.learn([AgentKey(A, raw(ONE), "configuration", "retired", 1, retired_us=20, until_us=30)])
    assert keys_of(keys, A, issued_at_us=19, now_us=29) == {raw(ONE), raw(TWO)}
    assert keys_of(keys, A, issued_at_us=20, now_us=29) == {raw(TWO)}
    assert keys_of(keys, A, issued_at_us=19, now_us=30) == {raw(TWO)}
    assert keys.public_keys(A, issued_at_us=None, now_us=29) == {raw(TWO)}


def test_strict_believes_no_manifest() -> None:
    keys = KeyDirectory()
    keys.learn([AgentKey(A, raw(ONE), "manifest", "active", 1), AgentKey(B, raw(TWO), "import", "active", 1)])
    keys.manifest_keys = "strict"
    assert (keys_of(keys, A), keys_of(keys, B)) == (set(), {raw(TWO)})


def test_a_learned_key_never_makes_a_root() -> None:
    keys = KeyDirectory()
    keys.learn([AgentKey("learned", raw(ONE), "import", "active", 1)])
    keys.held, keys.pinned = {"held": ONE}, {"pinned": raw(TWO)}
    assert [keys.is_root(name, ()) for name in ("learned", "held", "pinned")] == [False, True, True]
    assert [keys.is_root(name, ("learned",)) for name in ("learned", "held", "pinned")] == [True, False, False]


def test_what_an_agent_says_of_itself_verifies_links_and_begins_no_chain() -> None:
    keys = KeyDirectory()
    keys.learn(
        [
            AgentKey(A, raw(ONE), "api", "active", 1),
            AgentKey(A, raw(TWO), "import", "active", 1),
            AgentKey(B, raw(THREE), "manifest", "active", 1),
        ]
    )
    assert keys_of(keys, A) == {raw(ONE), raw(TWO)}
    assert keys.founding_keys(A, issued_at_us=19, now_us=29) == {raw(TWO)}
    assert keys_of(keys, B) == {raw(THREE)}
    assert keys.founding_keys(B, issued_at_us=19, now_us=29) == frozenset()
    # A pin rules out what was imported, here as well.
    keys.pinned = {A: raw(THREE)}
    assert keys_of(keys, A) == keys.founding_keys(A, issued_at_us=19, now_us=29) == {raw(THREE)}
