"""Notes, checkpoints and proofs against the examples their specifications are published with."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from asapd.core.types import SECOND_US
from asapd.wire.checkpoint import is_signed_by, origin_of, read_checkpoint, sign_checkpoint, split_checkpoints
from asapd.wire.signed_note import (
    COSIGNATURE,
    ED25519,
    NoteMalformedError,
    cosign,
    cosigned_us,
    is_signed,
    note_key_id,
    read_note,
    read_signature,
    sign_note,
)
from asapd.wire.tlog_proof import read_proof, write_proof

# From the documentation of golang.org/x/mod/sumdb/note.
PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
PETERS_NOTE = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
    "\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
# From c2sp.org/tlog-checkpoint.
SOFA = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
)
KEY = SigningKey(bytes(range(32)))
PUBLIC = bytes(KEY.verify_key)


def test_the_published_note_verifies_and_no_changed_one_does() -> None:
    name, number, encoded = PETER.split("+", 2)
    raw = base64.b64decode(encoded)
    key = raw[1:]
    note = read_note(PETERS_NOTE)
    assert is_signed(note, name, key)
    assert note.encode() == PETERS_NOTE
    assert (raw[0], number) == (ED25519, note_key_id(name, key).hex())
    assert not is_signed(read_note(PETERS_NOTE.replace("think", "thinK")), name, key)
    assert not is_signed(note, "Peter", key)
    assert not is_signed(note, name, PUBLIC)


def test_the_published_checkpoint_is_read() -> None:
    checkpoint = read_checkpoint(SOFA)
    assert (checkpoint.origin, checkpoint.size) == ("example.com/behind-the-sofa", 20852163)
    assert checkpoint.note.encode() == SOFA


@given(st.data())
def test_a_checkpoint_verifies_with_its_key_and_no_changed_byte(data: st.DataObject) -> None:
    text = sign_checkpoint(1234, bytes(range(32)), KEY).note.encode()
    assert is_signed_by(read_checkpoint(text), PUBLIC)
    assert text.startswith(f"{origin_of(PUBLIC)}\n1234\n")
    raw = bytearray(text.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        changed = read_checkpoint(raw.decode())
    except (NoteMalformedError, UnicodeDecodeError):
        return
    assert not is_signed_by(changed, PUBLIC)


def test_a_checkpoint_of_another_key_is_not_ours() -> None:
    assert not is_signed_by(sign_checkpoint(1, bytes(32), SigningKey(bytes(32))), PUBLIC)
    # Our signature below another log's name, or another's text with our name, does not make it a checkpoint of ours.
    other = sign_note("asapd/0\n1\n" + "A" * 43 + "=\n", origin_of(PUBLIC), KEY)
    assert not is_signed_by(read_checkpoint(other.encode()), PUBLIC)


def test_a_second_signature_of_the_key_that_fails_refuses_the_note() -> None:
    note = sign_note("text\n", "me", KEY)
    assert is_signed(note, "me", PUBLIC)
    twice = note.encode() + sign_note("other\n", "me", KEY).signatures[0].line()
    assert not is_signed(read_note(twice), "me", PUBLIC)


def test_signatures_of_others_do_not_matter() -> None:
    note = sign_note("text\n", "me", KEY)
    assert is_signed(read_note(note.encode() + sign_note("x\n", "she", KEY).signatures[0].line()), "me", PUBLIC)


def test_a_cosignature_says_when_and_holds_for_this_text_name_and_key() -> None:
    now_us = 1_679_315_147 * SECOND_US
    text = sign_checkpoint(7, bytes(32), KEY).note.text
    witness = SigningKey(bytes([7]) * 32)
    signature = cosign(text, "w", witness, now_us)
    assert read_signature(signature.line()[:-1]) == signature
    assert signature.key == note_key_id("w", bytes(witness.verify_key), COSIGNATURE)
    assert cosigned_us(text, signature, "w", bytes(witness.verify_key)) == now_us
    assert cosigned_us(text + "x\n", signature, "w", bytes(witness.verify_key)) is None
    assert cosigned_us(text, signature, "v", bytes(witness.verify_key)) is None
    assert cosigned_us(text, signature, "w", PUBLIC) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\n",
        "a\n\n",
        "a\n\n— b",
        "a\n\n— b AAAA\n",
        "a\n\n— b AAAAAAA\n",
        "a\n\n-- b AAAAAAAA\n",
        "a\n\n— b+c AAAAAAAA\n",
        "a\n\n—  AAAAAAAA\n",
        "a\tb\n\n— b AAAAAAAA\n",
        "a\n\n" + "— b AAAAAAAA\n" * 65,
    ],
)
def test_what_is_no_note_is_refused(text: str) -> None:
    with pytest.raises(NoteMalformedError):
        read_note(text)


@pytest.mark.parametrize(
    "text",
    [
        "o\n1\n",
        "o\n01\n" + "A" * 43 + "=\n",
        "o\n-1\n" + "A" * 43 + "=\n",
        "o\n99999999999999999999\n" + "A" * 43 + "=\n",
        "o\n9999999999999999999\n" + "A" * 43 + "=\n",
        "o\n1\nAAAA\n",
        "o\n1\n" + "A" * 43 + "=\n\nx\n",
        "o" * 70_000 + "\n1\n" + "A" * 43 + "=\n",
    ],
)
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(NoteMalformedError):
        read_checkpoint(sign_note(text, "o", KEY).encode())


def test_a_file_of_checkpoints_is_split_with_or_without_blank_lines_between() -> None:
    notes = [sign_checkpoint(size, bytes(32), KEY).note.encode() for size in (1, 5)]
    for between in ("", "\n", "\n\n"):
        content = between.join(notes)
        assert list(split_checkpoints(content.splitlines(keepends=True))) == notes
    assert list(split_checkpoints([])) == []
    cut = "".join(notes)[:-60].splitlines(keepends=True)
    assert next(iter(split_checkpoints(cut))) == notes[0]


def test_proofs_are_written_as_specified_and_read_again() -> None:
    hashes = [bytes(32), bytes(range(32))]
    text = write_proof(10, hashes, SOFA, b"extra information")
    assert text.startswith("c2sp.org/tlog-proof@v1\nextra ZXh0cmEgaW5mb3JtYXRpb24=\nindex 10\nAAAA")
    proof = read_proof(text)
    assert (proof.index, list(proof.hashes), proof.extra, proof.checkpoint) == (10, hashes, b"extra information", SOFA)
    assert write_proof(0, [], "checkpoint\n") == "c2sp.org/tlog-proof@v1\nindex 0\n\ncheckpoint\n"
    assert read_proof("c2sp.org/tlog-proof@v1\nindex 0\n\ncheckpoint\n").checkpoint == "checkpoint\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x\nindex 0\n\nc",
        "c2sp.org/tlog-proof@v1",
        "c2sp.org/tlog-proof@v1\nindex 01\n\nc",
        "c2sp.org/tlog-proof@v1\nextra !\nindex 0\n\nc",
        "c2sp.org/tlog-proof@v1\nindex 0\nAAAA\n\nc",
        "c2sp.org/tlog-proof@v1\nindex 0\n" + ("A" * 43 + "=\n") * 64 + "\nc",
    ],
)
def test_what_is_no_proof_is_refused(text: str) -> None:
    with pytest.raises(NoteMalformedError):
        read_proof(text)
