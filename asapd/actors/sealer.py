"""The sealer: grows the tree over the audit log behind the commits, signs checkpoints, and holds the log to them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import trio
from nacl.signing import SigningKey

from asapd import config
from asapd.core import merkle
from asapd.core.errors import Refusal
from asapd.core.merkle import MadeNode, Tree
from asapd.core.types import SECOND_US
from asapd.runtime.beating import beating
from asapd.runtime.clock import Clock
from asapd.store import audit, checkpoint_log, seals, verifying, witnessing
from asapd.store.database import Database
from asapd.store.seals import HoleInLogError, SealedAt
from asapd.store.units.audit import Seal
from asapd.store.units.house import Note
from asapd.wire.checkpoint import Checkpoint, is_signed_by, origin_of, sign_checkpoint
from asapd.wire.keys import load_public
from asapd.wire.receipt import sign_document

STEP = 4_096
"""Entries that the tree grows by in one go: about five milliseconds in a reader's thread."""

KEEP = 512
"""Nodes that are kept in one unit of bulk: two for each 256 entries."""

AHEAD = 65_536
"""Entries that the tree is grown by between two checkpoints: those of a minute of much reporting, all at once, have the
loop share the interpreter with a reader's thread for seconds."""

HELD = 1_000
"""Checkpoints of the file the log is held to at the start: a second. The verifier holds it to all of them."""

READ_AT_ONCE = 1_000
"""Checkpoints that are read in one go: some thirty milliseconds of a thread."""


def _take(checkpoints: Iterator[Checkpoint]) -> list[Checkpoint]:
    return list(islice(checkpoints, READ_AT_ONCE))


class Sealer:
    """Makes checkpoints, one at a time. `alarms` says in what way the log is not the one that was sealed before."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        identity: SigningKey,
        path: Path,
        settings: config.Audit,
        log: logging.Logger,
        off_loop: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self.settings = settings
        self.alarms: list[str] = []
        self.public_key = bytes(identity.verify_key)
        self.origin = origin_of(self.public_key)
        self.path = path
        self._database = database
        self._clock = clock
        self._identity = identity
        self._log = log
        self._off_loop = off_loop
        self._tree: Tree | None = None
        self._lock = trio.Lock()

    async def check(self) -> None:
        """Hold the log to the newest checkpoint of the database, and to those of the file that the database lacks.

        To be called before the log grows. What is wrong is logged, entered into the log, and stays in `alarms`: the
        daemon goes on, because what is recorded from here on has to be kept all the same.
        """
        stored = await self._database.read(seals.newest)
        keys = (self.public_key, *map(load_public, self.settings.former_keys))
        if stored is not None:
            reason = verifying.misfit(stored.size, stored.root, stored.note, keys)
            reason = reason or await self._database.read(seals.differs, stored.size, stored.root)
            if reason is not None:
                await self._alarm(f"held to the newest checkpoint in the database: {reason}")
        try:
            largest, lacking = await self._kept({origin_of(key) for key in keys})
        except OSError as error:
            await self._alarm(f"{self.path.name} cannot be read: {error.strerror}; what it held is not compared")
            return
        await self._hold_to(lacking, largest, keys)
        if stored is not None and not self.alarms and largest < stored.size:
            # The daemon ended between the commit and the file, or the file was taken away.
            await self._remember(stored.note)

    async def _kept(self, origins: set[str]) -> tuple[int, list[Checkpoint]]:
        """The largest size in the file (-1 without one), and the checkpoints in it that the database has not."""
        largest, is_empty = -1, True
        lacking: dict[tuple[int, bytes], Checkpoint] = {}
        kept = checkpoint_log.read(self.path)
        while read := await self._off_loop(_take, kept):
            is_empty = False
            own = [found for found in read if found.origin in origins]
            largest = max([largest, *(found.size for found in own)])
            for found in await self._database.read(seals.not_stored, own):
                lacking[found.size, found.root] = found
        if is_empty and self.path.exists() and await self._off_loop(checkpoint_log.is_strange, self.path, self.origin):
            await self._alarm(f"{self.path.name} holds no checkpoint but something else: it was overwritten")
        return largest, [lacking[key] for key in sorted(lacking, reverse=True)]

    async def _hold_to(self, lacking: list[Checkpoint], largest: int, keys: Sequence[bytes]) -> None:
        """Hold the log to checkpoints, the largest first, up to one that does not fit; those that fit are put back."""
        is_told = False
        for checkpoint in lacking[:HELD]:
            if not any(is_signed_by(checkpoint, key) for key in keys):
                if not is_told:
                    await self._alarm(
                        f"{self.path.name} holds a checkpoint of {checkpoint.size} entries with a false signature"
                    )
                is_told = True
                continue
            reason = await self._database.read(seals.differs, checkpoint.size, checkpoint.root)
            if reason is not None:
                which = "the newest checkpoint" if checkpoint.size == largest else "a checkpoint"
                await self._alarm(f"held to {which} in {self.path.name}: {reason}")
                return
            # A power cut may take the last commits where the store does not wait for the disk.
            self._log.warning("the database lacked the checkpoint of %d entries: it is put back", checkpoint.size)
            note = checkpoint.note.encode()
            unit = Seal(checkpoint.size, checkpoint.root, [], note, self._clock.now_us())
            await self._database.submit(unit, urgent=True)

    async def _alarm(self, reason: str) -> None:
        self.alarms.append(reason)
        self._log.error("the audit log is not the one that was sealed: %s", reason)
        note = Note("log.alarm", "asapd", "audit", {"reason": reason}, self._clock.now_us())
        written = await self._database.submit(note, urgent=True)
        if isinstance(written, Refusal):
            self._log.error("the alarm is not in the audit log: %s", written.detail)

    async def newest(self) -> SealedAt | None:
        """The newest checkpoint there is."""
        return await self._database.read(seals.newest)

    async def covering(self, size: int) -> SealedAt | Refusal:
        """The newest checkpoint, or a new one if it has fewer entries than `size`."""
        sealed = await self.newest()
        return await self.seal() if sealed is None or sealed.size < size else sealed

    def sign(self, document: dict[str, Any]) -> bytes:
        """A statement of the daemon with its signature, in canonical form."""
        return sign_document(document, self._identity)

    def unreadable(self) -> Refusal:
        """The refusal of what would be made of entries that cannot be read."""
        return Refusal("log_broken", "an entry of the log cannot be read as it was written: run asapctl audit verify")

    def altered(self, size: int) -> Refusal:
        """The refusal of what cannot be proved, the log not being the one that was sealed."""
        return Refusal(
            "log_broken",
            f"the log is not the one a checkpoint of {size} entries was signed over: run asapctl audit verify",
        )

    async def sealed_at(self, size: int) -> SealedAt | Refusal:
        """The checkpoint of a size."""
        found = await self._database.read(seals.checkpoint_at, size)
        return found or Refusal("no_such_size", f"there is no checkpoint of {size} entries")

    async def current(self) -> SealedAt | Refusal:
        """The newest checkpoint, or a new one if more was entered since than what witnessing enters.

        A checkpoint has witnesses enter what they saw, and this log what they signed: two that are otherwise idle would
        go on for ever, and the newest would never be one that is signed.
        """
        newest = await self.newest()
        return await self.seal() if newest is None or await self.waiting_since_us(newest) is not None else newest

    async def waiting_since_us(self, newest: SealedAt | None) -> int | None:
        """Since when something waits for a checkpoint behind the newest; None when that is what witnessing enters."""
        return await self._database.read(seals.waiting_since_us, 0 if newest is None else newest.size)

    async def is_of_former_key(self, newest: SealedAt) -> bool:
        """Whether a checkpoint is one of another key than the daemon has now, and there is something for a new one."""
        return newest.note.partition("\n")[0] != self.origin and await self.waiting_since_us(newest) is not None

    async def seal(self) -> SealedAt | Refusal:
        """A checkpoint of the log as it is now: the newest, if nothing was entered since, else a new one."""
        async with self._lock:
            try:
                return await self._seal()
            except HoleInLogError as error:
                return Refusal("log_broken", f"the log cannot be sealed, {error}: run asapctl audit verify")

    async def _seal(self) -> SealedAt | Refusal:
        head, _ = await self._database.read(audit.head)
        newest = await self._database.read(seals.newest)
        if newest is not None and newest.size == head:
            return newest
        grown = await self._grow(head)
        if isinstance(grown, Refusal):
            return grown
        tree, nodes = grown
        checkpoint = sign_checkpoint(tree.size, tree.root(), self._identity)
        sealed = SealedAt(tree.size, tree.root(), checkpoint.note.encode(), self._clock.now_us())
        unit = Seal(sealed.size, sealed.root, nodes, sealed.note, sealed.sealed_us)
        written = await self._database.submit(unit, urgent=True)
        if isinstance(written, Refusal):
            return written
        self._tree = tree
        await self._remember(sealed.note)
        return sealed

    async def keep_up(self) -> None:
        """Grow the tree where much was entered since, so that the next checkpoint finds little left to do."""
        async with self._lock:
            head, _ = await self._database.read(audit.head)
            with contextlib.suppress(HoleInLogError):  # the next checkpoint is refused for it
                if head - (await self._newest_tree()).size >= AHEAD:
                    grown = await self._grow(head)
                    if not isinstance(grown, Refusal) and grown[1]:  # refused, the next checkpoint tries again
                        await self._keep(*grown)

    async def _newest_tree(self) -> Tree:
        if self._tree is None:
            self._tree = await self._database.read(seals.grown)
        return self._tree

    async def _grow(self, head: int) -> tuple[Tree, list[MadeNode]] | Refusal:
        """The tree over so many entries, and those of its nodes that are not kept yet."""
        tree, nodes = await self._newest_tree(), list[MadeNode]()
        while tree.size < head:
            tree, made = await self._database.read(seals.grow_step, tree, min(STEP, head - tree.size))
            nodes += made
            if len(nodes) >= KEEP:
                kept = await self._keep(tree, nodes)
                if kept is not None:
                    return kept
                nodes = []
        return tree, nodes

    async def _keep(self, tree: Tree, nodes: list[MadeNode]) -> Refusal | None:
        kept = await self._database.submit(Seal(tree.size, b"", nodes, None, self._clock.now_us()))
        if isinstance(kept, Refusal):
            return kept
        self._tree = tree
        return None

    async def noted(self, sealed: SealedAt) -> str:
        """A checkpoint with the signatures of all witnesses that have seen it."""
        return sealed.note + "".join(await self._database.read(witnessing.cosignatures, sealed.size))

    async def inclusion(self, entry: str) -> dict[str, Any] | Refusal:
        """An entry, by id or number, with what proves that it is in the log of the newest checkpoint."""
        found = await self._database.read(audit.get_entry, entry)
        if found is None:
            return Refusal("entry_not_found", f"there is no audit entry {entry}: check the id")
        sealed = await self.covering(found["seq"])
        if isinstance(sealed, Refusal):
            return sealed
        proof = await self._database.read(seals.inclusion, found["seq"], sealed.size)
        leaf, index = merkle.leaf_hash(bytes.fromhex(found["hash"])), found["seq"] - 1
        if proof is None or not merkle.includes(leaf, index, sealed.size, proof.hashes, sealed.root):
            return self.altered(sealed.size)
        return {
            "entry": found,
            "leaf_index": index,
            "leaf_hash": leaf.hex(),
            "tree_size": sealed.size,
            "root_hash": sealed.root.hex(),
            "hashes": [node.hex() for node in proof.hashes],
            "checkpoint": sealed.note,
        }

    async def consistency(self, first: int, second: int | None) -> dict[str, Any] | Refusal:
        """What proves that the log of `second` entries (now, when None) is that of `first` with more behind it."""
        sealed = await self.seal() if second is None else await self.covering(second)
        if isinstance(sealed, Refusal):
            return sealed
        size = sealed.size if second is None else second
        if not 0 <= first <= size <= sealed.size:
            detail = f"no proof leads from {first} to {size}: the log has {sealed.size} entries, and only grows"
            return Refusal("no_such_size", detail)
        proved = await self._database.read(seals.consistency, first, size)
        if proved is None:
            return self.altered(size)
        root, proof = proved
        at = sealed if sealed.size == size else await self._database.read(seals.checkpoint_at, size)
        if at is not None and at.root != proof.root:
            return self.altered(size)
        return {
            "first_size": first,
            "first_root": root.hex(),
            "second_size": size,
            "second_root": proof.root.hex(),
            "hashes": [node.hex() for node in proof.hashes],
            "checkpoint": None if at is None else at.note,
        }

    async def _remember(self, note: str) -> None:
        try:
            await self._off_loop(checkpoint_log.append, self.path, note)
        except OSError as error:
            self._log.error("%s cannot be written: %s; checkpoints are in the database only", self.path, error)


async def run_sealer(
    sealer: Sealer,
    *,
    tell: Callable[[SealedAt], Awaitable[None]],
    remind: Callable[[SealedAt], Awaitable[None]],
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Seal at intervals, and tell the witnesses, until cancelled.

    Between new checkpoints those that have not signed the newest are reminded: an idle log may not get another one.
    """
    task_status.started()
    told = -1
    while True:
        async with beating(beat):
            sealed = await sealer.current()
            if isinstance(sealed, Refusal):
                log.warning("no checkpoint was made: %s", sealed.detail)
            elif sealed.size != told:
                await tell(sealed)
                told = sealed.size
            else:
                await remind(sealed)
        waited_us = 0
        # In seconds, so that a changed setting counts at once and the actor is seen to live.
        while waited_us < sealer.settings.checkpoint_every_us:
            beat()
            await trio.sleep(min(1.0, (sealer.settings.checkpoint_every_us - waited_us) / SECOND_US))
            waited_us += SECOND_US
            if isinstance(sealed, SealedAt):
                async with beating(beat):
                    await sealer.keep_up()
                if await sealer.is_of_former_key(sealed):
                    break  # proofs rest on the newest, and who has the key of now cannot verify it
