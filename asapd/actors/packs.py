"""Evidence packs: all that asapd recorded of an agent in a period, in one signed file that verifies anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import trio
from nacl.signing import SigningKey

from asapd.actors.sealer import Sealer
from asapd.actors.visible import visibility
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.evidence_pack import MADE, REVOKED, delegations, leading_to, opened
from asapd.core.types import format_us
from asapd.runtime.clock import Clock
from asapd.store import breaches, packs, seals
from asapd.store.audit import WINDOW, UnreadableEntryError, span
from asapd.store.database import Database
from asapd.store.packs import MOST
from asapd.store.seals import SealedAt
from asapd.store.units.alerts import BreachRow
from asapd.wire.evidence_pack import KIND, VERSION, sign_pack
from asapd.wire.keys import public_base64
from asapd.wire.statement import sign_evidence

MOST_SEEN = 5_000_000
"""Entries of the log that are looked through for one pack, some ten seconds of one reader."""

VERIFICATION = [
    "asapd verify FILE --public-key KEY checks all of this file anywhere, without a daemon and without a network.",
    "KEY is public_key, which is to be had from somebody else than whoever gave you this file.",
    "signature is Ed25519 over the RFC 8785 form of all members but those named in parts, and but signature itself.",
    "parts holds the SHA-256 of the RFC 8785 form of each of these.",
    "checkpoints are C2SP signed notes; hashes of each entry lead from it to the root of the closing one (RFC 6962).",
    "hashes of the opening checkpoint prove that the log of the closing one began with that of the opening one.",
    "breaches are signed statements of their own: each verdict can be computed anew from its evidence.",
]


class Packs:
    """Gives packs of what a caller may see."""

    def __init__(self, database: Database, clock: Clock, sealer: Sealer, identity: SigningKey) -> None:
        self._database = database
        self._clock = clock
        self._sealer = sealer
        self._identity = identity

    async def pack(
        self,
        caller: Caller,
        agent: str,
        period: tuple[int, int],
        configuration: dict[str, Any],
        sla: list[dict[str, Any]],
    ) -> bytes | Refusal:
        """The pack of an agent that the caller may see, in its canonical form."""
        try:
            found = await self._entries(caller, agent, period)
        except UnreadableEntryError:
            return self._sealer.unreadable()
        if isinstance(found, Refusal):
            return found
        entries, last = found
        sealed = await self._sealer.covering(last)
        if isinstance(sealed, Refusal):
            return sealed
        seqs = [entry["seq"] for entry in entries]
        proved = await self._database.read(packs.proofs_at, seqs, sealed.size)
        if proved is None or proved[0] != sealed.root:
            return self._sealer.altered(sealed.size)
        opening = await self._opening(period[0], sealed)
        if isinstance(opening, Refusal):
            return opening
        broken: list[tuple[BreachRow, int]] = []
        for name in opened(entries):
            row = await self._database.read(breaches.get_breach, name)
            broken += [] if row is None else [row]
        now_us = self._clock.now_us()
        head = {
            "statement": KIND,
            "version": VERSION,
            "issuer": self._sealer.origin,
            "public_key": public_base64(self._sealer.public_key),
            "issued_at": format_us(now_us),
            "agent_id": agent,
            "start": format_us(period[0]),
            "end": format_us(period[1]),
        }

        def write() -> bytes:
            parts = {
                "configuration": configuration,
                "checkpoints": {"opening": opening, "closing": sealed.note},
                "entries": [
                    {"entry": entry, "hashes": [node.hex() for node in hashes]}
                    for entry, hashes in zip(entries, proved[1], strict=True)
                ],
                "sla": sla,
                "breaches": [
                    json.loads(
                        sign_evidence({**breaches.public(row), "seq": seq}, row.evidence, self._identity, now_us)
                    )
                    for row, seq in broken
                ],
                "delegations": delegations(entries),
                "verification": VERIFICATION,
            }
            return sign_pack(head, parts, self._identity)

        # A full one takes about a second of Python: in a thread, so that the loop goes on meanwhile.
        return await trio.to_thread.run_sync(write)

    async def _entries(
        self, caller: Caller, agent: str, period: tuple[int, int]
    ) -> tuple[list[dict[str, Any]], int] | Refusal:
        """The entries of the pack, and the number of the last of the period."""
        may_see: Callable[..., bool] = caller.may_see_given
        first, last = await self._database.read(span, *period)
        if last - first >= MOST_SEEN:
            return _too_large(f"the period has more than {MOST_SEEN} entries")
        seqs = set(await self._database.read(packs.delegated, agent, period, may_see))
        while first <= last and len(seqs) <= MOST:
            window = (first, min(last, first + WINDOW - 1))
            seqs.update(await self._database.read(packs.mentioned, visibility(caller), agent, period, window))
            first += WINDOW
        if len(seqs) > MOST:
            return _too_large(f"{agent} has more than {MOST} entries in the period")
        entries = await self._database.read(packs.entries_at, sorted(seqs))
        wanted = leading_to(entries, agent)
        kept = [one for one in entries if one["event_type"] not in (MADE, REVOKED) or one["subject"] in wanted]
        return kept, max([last, *(entry["seq"] for entry in kept)])

    async def _opening(self, start_us: int, closing: SealedAt) -> dict[str, Any] | Refusal | None:
        before = await self._database.read(packs.sealed_before, start_us, self._sealer.origin)
        if before is None or before.size > closing.size:
            return None
        proved = await self._database.read(seals.consistency, before.size, closing.size)
        if proved is None or (proved[0], proved[1].root) != (before.root, closing.root):
            return self._sealer.altered(closing.size)
        return {"note": before.note, "hashes": [node.hex() for node in proved[1].hashes]}


def _too_large(reason: str) -> Refusal:
    return Refusal("pack_too_large", f"{reason}, more than one pack holds: ask for shorter periods")
