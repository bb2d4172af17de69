"""The offline check of a task's receipt: who signed it, that every entry is in the log, that the sums are theirs."""

from __future__ import annotations

from typing import Any

from asapd.cli.verified import Verified
from asapd.cli.verify_checkpoint import signed
from asapd.cli.verify_proof import included
from asapd.cli.verify_statement import remarks_on, signer_of
from asapd.core.money import to_usd
from asapd.core.receipt import ReceiptError, same_totals, totals
from asapd.wire.checkpoint import Checkpoint
from asapd.wire.receipt import KIND, VERSION, is_signed_document


def is_receipt(document: dict[str, Any]) -> bool:
    """Whether a document says that it is a receipt."""
    return document.get("statement") == KIND


def verify_receipt(document: dict[str, Any], public_key: bytes | None) -> Verified:
    """The verdict over a receipt, by the key given or else the one in it, which only says that it fits itself."""
    key = signer_of(document, public_key, "receipt", VERSION, is_signed_document)
    if isinstance(key, Verified):
        return key
    checkpoint = signed(str(document.get("checkpoint")), key)
    if isinstance(checkpoint, str):
        return Verified(False, f"bad: the checkpoint in it {checkpoint}")
    sums = _sums(document, checkpoint)
    if isinstance(sums, str):
        return Verified(False, f"bad: {sums}")
    erased = f", {sums['erased']} entries with their content erased" if sums["erased"] else ""
    unknown = f", {sums['unpriced']} of them of unknown cost" if sums["unpriced"] else ""
    cost = f"{to_usd(sums['cost_microusd']):.6f} USD"
    return Verified(
        True,
        f"ok: task {document['task_id']}: {sums['events']} events{unknown}, {sums['tokens_in']} tokens in, "
        f"{sums['tokens_out']} out, {cost}{erased}; each is in the log of {checkpoint.origin}",
        remarks_on(key, public_key, "receipt"),
    )


def _sums(document: dict[str, Any], checkpoint: Checkpoint) -> dict[str, int] | str:
    """What the entries of a receipt come to, or what is wrong with it."""
    items, task = document.get("entries"), document.get("task_id")
    if not isinstance(items, list) or not isinstance(task, str):
        return "entries or task_id is not of its form"
    for item in items:
        entry = included(item, checkpoint)
        if isinstance(entry, str):
            return f"an entry in it: {entry}"
    seqs = [item["entry"]["seq"] for item in items]
    if seqs != sorted(set(seqs)):
        return "its entries are not in their order, or twice the same"
    try:
        sums = totals(task, (item["entry"] for item in items))
    except (ReceiptError, KeyError, TypeError) as error:
        return f"its entries are not those of the task: {error}"
    if not same_totals(document.get("totals"), sums):
        return "totals are not the sums of its entries"
    return sums
