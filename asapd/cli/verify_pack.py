"""The offline check of an evidence pack: who signed it, and part by part whether it is what the log says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asapd.cli.verified import Verified
from asapd.cli.verify_checkpoint import signed
from asapd.cli.verify_evidence import verify_evidence
from asapd.cli.verify_proof import included, read_hashes
from asapd.cli.verify_statement import remarks_on, signer_of
from asapd.core import evidence_pack, merkle
from asapd.core.canonical import LARGEST_WRITTEN, canonical
from asapd.wire.checkpoint import Checkpoint
from asapd.wire.evidence_pack import KIND, PARTS, VERSION, digest_of, is_signed_pack
from asapd.wire.keys import key_id, public_base64
from asapd.wire.statement import floats


def is_pack(document: dict[str, Any]) -> bool:
    """Whether a document says that it is an evidence pack."""
    return document.get("statement") == KIND


def verify_pack(document: dict[str, Any], public_key: bytes | None) -> Verified:
    """The verdict over a pack, by the key given or else the one in it, which only says that it fits itself."""
    key = signer_of(document, public_key, "pack", VERSION, is_signed_pack)
    if isinstance(key, Verified):
        return key
    pack, digests = floats(document), document.get("parts")
    if not isinstance(digests, dict) or any(
        not isinstance(pack.get(name), str) for name in ("agent_id", "start", "end")
    ):
        return Verified(False, "bad: its head has not the form of a pack's")
    judged = _Judged(pack, key)
    for name in PARTS:
        if name not in pack:
            return Verified(False, f"bad: {name}: is missing")
        if digest_of(pack[name]) != digests.get(name):
            return Verified(False, f"bad: {name}: was changed since it was signed")
        try:
            wrong = judged.checks[name]() if name in judged.checks else None
        except (KeyError, TypeError, AttributeError):
            wrong = "has not the form of that part of a pack"
        if wrong is not None:
            return Verified(False, f"bad: {name}: {wrong}")
    return Verified(
        True,
        f"ok: {pack['agent_id']} from {pack['start']} to {pack['end']}: {len(judged.entries)} entries, "
        f"{len(pack['sla'])} reports, {len(pack['breaches'])} breaches, {len(pack['delegations'])} delegations, "
        f"signed by asapd/{key_id(key)}",
        remarks_on(key, public_key, "pack"),
    )


class _Judged:
    """What is known of a pack after each of its parts; a check answers what is wrong with one."""

    def __init__(self, pack: dict[str, Any], key: bytes) -> None:
        self._pack = pack
        self._key = key
        self._closing: Checkpoint
        self.entries: list[dict[str, Any]] = []
        self.checks: dict[str, Callable[[], str | None]] = {
            "checkpoints": self._checkpoints,
            "entries": self._entries,
            "sla": self._sla,
            "breaches": self._breaches,
            "delegations": self._delegations,
        }

    def _checkpoints(self) -> str | None:
        opening = self._pack["checkpoints"]["opening"]
        closing = signed(str(self._pack["checkpoints"]["closing"]), self._key)
        if isinstance(closing, str):
            return f"the closing one {closing}"
        self._closing = closing
        if opening is None:
            return None
        first = signed(str(opening["note"]), self._key)
        if isinstance(first, str):
            return f"the opening one {first}"
        hashes = read_hashes(opening["hashes"])
        if hashes is None or not merkle.is_consistent(first.size, closing.size, hashes, first.root, closing.root):
            return f"the log of {closing.size} entries is not that of {first.size} with more behind it"
        return None

    def _entries(self) -> str | None:
        last = 0
        for item in self._pack["entries"]:
            entry = included(item, self._closing)
            if isinstance(entry, str):
                return f"behind entry {last}: {entry}"
            if entry.seq <= last:
                return f"entry {entry.seq} is not in its place"
            last = entry.seq
            self.entries.append(item["entry"])
        return evidence_pack.stray(self.entries, self._pack["agent_id"], self._pack["start"], self._pack["end"])

    def _sla(self) -> str | None:
        reports = self._pack["sla"]
        if any(report["agent_id"] != self._pack["agent_id"] for report in reports):
            return "a report is of another agent"
        return evidence_pack.uncovered(reports, self._pack["start"], self._pack["end"])

    def _breaches(self) -> str | None:
        told = evidence_pack.opened(self.entries)
        for statement in self._pack["breaches"]:
            found = verify_evidence(canonical(statement, largest=LARGEST_WRITTEN), public_base64(self._key))
            if found.faults:
                return found.faults[0]
        given = [statement["breach"]["id"] for statement in self._pack["breaches"]]
        if given != told:
            odd = sorted(set(told) ^ set(given)) or given
            return f"{odd[0]} is not both here and among the entries that opened one"
        return None

    def _delegations(self) -> str | None:
        if self._pack["delegations"] != evidence_pack.delegations(self.entries):
            return "is not the tree that the entries make"
        return None
