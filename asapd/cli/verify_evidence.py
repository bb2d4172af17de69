"""The offline check of a breach's evidence: who signed it, and whether it makes the verdict that it states."""

from __future__ import annotations

from zoneinfo import ZoneInfo

from msgspec import Struct

from asapd.core import budget_evidence
from asapd.core.evidence import EvidenceError, arithmetic, differences
from asapd.core.evidence_form import malformed
from asapd.core.evidence_parts import on_trust
from asapd.wire.hours import read_support_hours
from asapd.wire.keys import key_id, load_public
from asapd.wire.statement import StatementMalformed, decode_statement


class EvidenceVerdict(Struct, frozen=True):
    """What is wrong with a statement, nothing when all of it holds, and a line that says what was verified.

    `on_trust` is what it says that cannot be computed from it.
    """

    faults: list[str]
    summary: str
    on_trust: tuple[str, ...] = ()


def verify_evidence(raw: bytes, public_key: str | None) -> EvidenceVerdict:
    """Check a statement's signature, by the key given or else the one in it, and recompute the breach.

    Raises:
        KeyFormatError: the key given is none.
    """
    try:
        statement = decode_statement(raw)
    except StatementMalformed as problem:
        return EvidenceVerdict([str(problem)], "")
    key = statement.public_key if public_key is None else load_public(public_key)
    faults: list[str] = []
    if not statement.signed_by(key):
        whose = "in the statement" if public_key is None else "given"
        faults.append(f"signature: is not of the key {whose} ({key_id(key)}), or the statement was changed")
    own = key_id(statement.public_key)
    for name, given, expected in (
        ("issuer", statement.issuer, f"asapd/{own}"),
        ("key_id", statement.key_id, own),
    ):
        if given != expected:
            faults.append(f"{name}: is {given}, and the statement's public_key is that of {expected}")
    breach = statement.breach
    trusted: tuple[str, ...] = ()
    # What is not of its form is not computed with.
    if misshapen := malformed(breach, statement.evidence):
        faults += misshapen
    elif breach.get("agent_id") is None:
        try:
            faults += budget_evidence.faults(breach, statement.evidence, ZoneInfo)
            trusted = tuple(budget_evidence.on_trust(statement.evidence))
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            faults.append(f"evidence: it has not the form of a budget's evidence: {problem!r}")
    else:
        try:
            faults += differences(breach, statement.evidence, read_support_hours)
            trusted = tuple(on_trust(statement.evidence))
            if statement.arithmetic != arithmetic(statement.evidence):
                faults.append("arithmetic: is not what the evidence makes")
        except EvidenceError as problem:
            faults.append(f"evidence: {problem}")
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            faults.append(f"evidence: it has not the form of evidence: {problem!r}")
    said = f"{breach.get('breach_type')} breach {breach.get('id')} of {breach.get('agent_id') or breach.get('budget')}"
    measured = f"promised {breach.get('threshold')}, measured {breach.get('actual')}"
    return EvidenceVerdict(faults, f"{said}: {measured}, signed by asapd/{key_id(key)}", trusted)
