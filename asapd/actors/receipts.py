"""Receipts: a signed statement of what a task used, cost and was done under, with what proves each entry of it."""

from __future__ import annotations

from asapd.actors.sealer import Sealer
from asapd.actors.visible import visibility
from asapd.core.access import Caller
from asapd.core.canonical import exact
from asapd.core.errors import Refusal
from asapd.core.receipt import ReceiptError, totals
from asapd.core.types import format_us
from asapd.runtime.clock import Clock
from asapd.store import receipts
from asapd.store.audit import UnreadableEntryError
from asapd.store.database import Database
from asapd.store.receipts import MOST, TooManyEntriesError
from asapd.wire.keys import public_base64
from asapd.wire.receipt import KIND, VERSION


class Receipts:
    """Gives receipts of what a caller may see."""

    def __init__(self, database: Database, clock: Clock, sealer: Sealer) -> None:
        self._database = database
        self._clock = clock
        self._sealer = sealer

    async def receipt(self, caller: Caller, task: str) -> bytes | Refusal:
        """The receipt of a task, in its canonical form."""
        try:
            entries = await self._database.read(receipts.entries_of, visibility(caller), caller.may_see_given, task)
        except TooManyEntriesError:
            detail = f"task {task} has more than {MOST} entries: export its usage, and prove single entries"
            return Refusal("receipt_too_large", detail)
        except UnreadableEntryError:
            return self._sealer.unreadable()
        if not any(entry["event_type"].startswith(("usage.", "task.")) for entry in entries):
            return Refusal("task_not_found", f"nothing is known of task {task}: check the id")
        sealed = await self._sealer.covering(entries[-1]["seq"])
        if isinstance(sealed, Refusal):
            return sealed
        proofs = await self._database.read(receipts.proofs_of, [entry["seq"] for entry in entries], sealed.size)
        if proofs is None or any(proof.root != sealed.root for proof in proofs):
            return self._sealer.altered(sealed.size)
        try:
            sums = totals(task, entries)
        except ReceiptError as error:
            return Refusal("log_broken", f"the entries of task {task} do not agree: {error}")
        document = {
            "statement": KIND,
            "version": VERSION,
            "issuer": self._sealer.origin,
            "public_key": public_base64(self._sealer.public_key),
            "issued_at": format_us(self._clock.now_us()),
            "task_id": task,
            "totals": exact(sums),
            "entries": [
                {"entry": entry, "hashes": [node.hex() for node in proof.hashes]}
                for entry, proof in zip(entries, proofs, strict=True)
            ],
            "checkpoint": sealed.note,
        }
        return self._sealer.sign(document)
