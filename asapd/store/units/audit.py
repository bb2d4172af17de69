"""Units of the audit log: its tree, witnesses, erasure and retention."""

from __future__ import annotations

import msgspec

from asapd.core.errors import Refusal
from asapd.store.units.unit import RowWritten, Taken, Unit


class Sealed(msgspec.Struct, frozen=True, tag=True):
    """Nodes of the log's tree are kept, up to this size."""

    size: int


class Seal(Unit[Sealed], frozen=True):
    """Keep nodes of the tree over the audit log (level, index, hash), and a checkpoint of it unless `note` is None."""

    size: int
    root: bytes
    nodes: list[tuple[int, int, bytes]]
    note: str | None
    now_us: int


class Witnessed(msgspec.Struct, frozen=True, tag=True):
    """The size of a log that was seen last, and whether it is the one that was just shown."""

    size: int
    is_taken: bool


class Witness(Unit[Witnessed | Refusal], frozen=True):
    """Take a checkpoint of another log for its newest, if the proof leads there from the size that was seen last."""

    origin: str
    old_size: int
    size: int
    root: bytes
    proof: list[bytes]
    now_us: int


class KeepCosignature(Unit[RowWritten], frozen=True):
    """Keep what a witness signed of a checkpoint."""

    size: int
    witness: str
    line: str
    now_us: int


class Erased(msgspec.Struct, frozen=True, tag=True):
    """So many entries have no payload any more. `is_whole`: nothing of the consumer is left under its name.

    `pseudonym` is what it is called from now on: that of the first unit of its erasure, which may have been another,
    or with a `_` behind it where there was no room for its sums.
    `is_shared` says that something else has the name as well, `is_moved` that the consumer's rows are moved for that
    or because the pseudonym has a number by now, `took_all` that the steps and hours which the unit named have the
    pseudonym, and `has_rows` that more rows of usage may have to get it. With `is_stale` all has to be looked for anew.
    """

    entries: int
    is_whole: bool
    pseudonym: str
    is_shared: bool = False
    took_all: bool = False
    has_rows: bool = False
    is_moved: bool = False
    is_stale: bool = False


class EraseConsumer(Unit[Erased | Refusal], frozen=True):
    """Erase the payloads of these entries; with `after` those behind it as well, and give the consumer its pseudonym.

    Some of its reservations, and of the breaches of its budgets, get that with every unit, and the last when all have.

    `after` is an entry up to which `seqs` are the last that name the consumer; None while there are more. `news` are
    news of delegations that name it, and up to `news_after` the last of them.

    The rest is of what else has the name: whether anything has that was looked at, of usage the rows up to
    `usage_after`. If so the consumer's rows are moved to a number of its own, some with each unit that has `after`, and
    of `steps` of tasks (up to `steps_after`) and `hours` with sums of it these; `is_all` says that there are no others.
    Nobody looked at rows of usage behind `looked_from` that retention took since.
    """

    consumer: str
    pseudonym: str
    seqs: list[int]
    reason: str
    actor: str
    now_us: int
    after: int | None = 0
    news: list[int] = []
    news_after: int = 0
    is_shared: bool = False
    usage_after: int = 0
    steps: list[int] = []
    steps_after: int = 0
    hours: list[int] = []
    is_all: bool = False
    looked_from: int = 2**63 - 1


class SealHours(Unit[RowWritten | Refusal], frozen=True):
    """Enter what the sums of hours are, each hour with its rows and their digest, before retention takes their events.

    They agreed with the events when these were read, up to entry `head` and event `newest`; refused if anything of that
    time came since. Between them there is no other hour but sealed ones, and those that do not agree.
    """

    hours: list[tuple[int, int, str]]
    actor: str
    now_us: int
    head: int = 2**63 - 1
    newest: int = 2**63 - 1


class KeepArchive(Unit[RowWritten | Refusal], frozen=True):
    """Record that entries were written into a file that verifies; the next of them may be retired from now on."""

    first_seq: int
    last_seq: int
    last_hash: bytes
    before_us: int
    file: str
    sha256: str
    actor: str
    now_us: int


class AuditRetired(msgspec.Struct, frozen=True, tag=True):
    """The entries that a step took the content of, and whether the archive holds more that is not retired."""

    taken: Taken
    more: bool


class RetireAudit(Unit[AuditRetired], frozen=True):
    """Erase the content of the next `limit` entries of the archive at hand; their hashes stay."""

    actor: str
    now_us: int
    limit: int = 500
