"""Witnesses: other daemons and programs are told of our checkpoints, and we sign what others show us of theirs."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import trio
from nacl.signing import SigningKey

from asapd import config
from asapd.core.errors import Refusal
from asapd.core.types import MAX_INT
from asapd.runtime.clock import Clock
from asapd.runtime.posting import Posted, PostFailed
from asapd.store import checkpoint_log, seals, witnessing
from asapd.store.database import Database
from asapd.store.seals import SealedAt
from asapd.store.units.audit import KeepCosignature, Witness, Witnessed
from asapd.wire.checkpoint import is_signed_by, origin_of, read_size
from asapd.wire.keys import load_public
from asapd.wire.signed_note import NoteMalformedError, Signature, cosign, cosigned_us, read_signature
from asapd.wire.witness import MAX_BYTES, AddCheckpoint, write_request

ANSWER_S = 10.0
Post = Callable[..., Awaitable[Posted | PostFailed]]


class Witnesses:
    """Both sides of witnessing. `alarms` says which witness has seen another log of ours than this one.

    `failures` counts how often a witness did not take a checkpoint. The log hears of it once, and when that is over.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        identity: SigningKey,
        settings: config.Audit,
        log: logging.Logger,
        post: Post,
    ) -> None:
        self.settings = settings
        self.alarms: dict[str, str] = {}
        self.failures = 0
        self._troubles: dict[str, str] = {}
        self._database = database
        self._clock = clock
        self._identity = identity
        self._log = log
        self._post = post

    # --- others' checkpoints

    async def add(self, asked: AddCheckpoint) -> str | Witnessed | Refusal:
        """The signature line for a checkpoint of a log we witness; `Witnessed` has the size it has to go on from."""
        keys = [load_public(one.public_key) for one in self.settings.witness_for]
        checkpoint = asked.checkpoint
        known = [key for key in keys if origin_of(key) == checkpoint.origin]
        if not known:
            return Refusal("witness_unknown_log", f"{checkpoint.origin} is no log in audit.witness_for")
        if not is_signed_by(checkpoint, known[0]):
            return Refusal("witness_bad_signature", f"the checkpoint was not signed by the key of {checkpoint.origin}")
        if asked.old_size > checkpoint.size:
            return Refusal("malformed", f"a log of {checkpoint.size} entries does not go on from {asked.old_size}")
        if checkpoint.size > MAX_INT:
            return Refusal("malformed", f"no log has {checkpoint.size} entries: a size is below 2^53")
        unit = Witness(
            checkpoint.origin,
            asked.old_size,
            checkpoint.size,
            checkpoint.root,
            list(asked.proof),
            self._clock.now_us(),
        )
        taken = await self._database.submit(unit, urgent=True)
        if isinstance(taken, Refusal) or not taken.is_taken:
            return taken
        name = origin_of(bytes(self._identity.verify_key))
        return cosign(checkpoint.note.text, name, self._identity, self._clock.now_us()).line()

    # --- our own checkpoints

    async def tell(self, sealed: SealedAt) -> None:
        """Tell every witness of a new checkpoint; what fails is logged."""
        file, command = self.settings.witness_file, self.settings.witness_command
        if file is not None:
            self._heard(str(file), await self._append(file, sealed.note))
        if command:
            self._heard(command[0], await self._run(command, sealed.note))
        await self._tell_all(self.settings.witnesses, sealed)

    async def remind(self, sealed: SealedAt) -> None:
        """Tell those witnesses of a checkpoint again that have not signed it."""
        missing = [
            witness
            for witness in self.settings.witnesses
            if await self._database.read(witnessing.cosigned, _name_of(witness)) < sealed.size
        ]
        await self._tell_all(missing, sealed)

    def adopt(self, settings: config.Audit) -> None:
        """Go by these settings from now on; who is no witness any more raises no alarm."""
        self.settings = settings
        names = {_name_of(witness) for witness in settings.witnesses}
        self.alarms = {name: alarm for name, alarm in self.alarms.items() if name in names}
        told = {witness.url for witness in settings.witnesses} | {
            str(settings.witness_file),
            *settings.witness_command[:1],
        }
        self._troubles = {witness: trouble for witness, trouble in self._troubles.items() if witness in told}

    async def _tell_all(self, witnesses: Iterable[config.Witness], sealed: SealedAt) -> None:
        async with trio.open_nursery() as nursery:
            for witness in witnesses:
                nursery.start_soon(self._tell, witness, sealed)

    async def _tell(self, witness: config.Witness, sealed: SealedAt) -> None:
        self._heard(witness.url, await self._show(witness, sealed))

    def _heard(self, witness: str, problem: str | None) -> None:
        """Note how it went: a trouble is logged when it begins, when it becomes an alarm, and when it ends."""
        was = self._troubles.pop(witness, None)
        if problem is not None:
            self.failures += 1
            self._troubles[witness] = problem
            if was is None or (problem != was and problem in self.alarms.values()):
                self._log.warning("the witness %s did not take a checkpoint: %s", witness, problem)
        elif was is not None:
            self._log.info("the witness %s takes checkpoints again", witness)

    async def _append(self, path: Path, note: str) -> str | None:
        try:
            await trio.to_thread.run_sync(checkpoint_log.append, path, note)
        except OSError as error:
            return str(error)
        return None

    async def _run(self, command: tuple[str, ...], note: str) -> str | None:
        try:
            with trio.fail_after(ANSWER_S):
                done = await trio.run_process(
                    list(command),
                    stdin=note.encode(),
                    stdout=subprocess.DEVNULL,
                    check=False,
                    env={"PATH": os.defpath},
                )
        except trio.TooSlowError:
            return f"it took longer than {ANSWER_S:g} s"
        except OSError as error:
            return f"it cannot be run: {error}"
        return f"it ended with code {done.returncode}" if done.returncode else None

    async def _show(self, witness: config.Witness, sealed: SealedAt) -> str | None:
        """Show a checkpoint to a witness, twice if it has seen another size than we know; what went wrong."""
        key, name = load_public(witness.public_key), _name_of(witness)
        old = await self._database.read(witnessing.cosigned, name)
        for _ in range(2):
            if old > sealed.size:
                self.alarms[name] = f"{name} has seen {old} entries of this log, which has {sealed.size}"
                return self.alarms[name]
            proved = await self._database.read(seals.consistency, old, sealed.size) if old else None
            body = write_request(old, proved[1].hashes if proved else [], sealed.note)
            answer = await self._post(
                f"{witness.url.rstrip('/')}/add-checkpoint", body, deadline_s=ANSWER_S, max_bytes=MAX_BYTES
            )
            if isinstance(answer, PostFailed):
                return answer.detail
            text = answer.body.decode("utf-8", "replace")
            if answer.status == 200:
                return await self._keep(text, name, key, sealed)
            if answer.status == 409 and (seen := read_size(text.strip())) is not None and seen != old:
                old = seen
                continue
            if answer.status in {409, 422}:
                self.alarms[name] = f"{name} has seen another log of this daemon than this one"
                return self.alarms[name]
            return f"it answered with status {answer.status}"
        return "it has seen yet another size by now"

    async def _keep(self, text: str, name: str, key: bytes, sealed: SealedAt) -> str | None:
        body = sealed.note.rpartition("\n\n")[0] + "\n"
        for line in text.splitlines():
            try:
                signature: Signature = read_signature(line)
            except NoteMalformedError:
                continue
            if cosigned_us(body, signature, name, key) is not None:
                unit = KeepCosignature(sealed.size, name, signature.line(), self._clock.now_us())
                await self._database.submit(unit, urgent=True)
                self.alarms.pop(name, None)
                return None
        return "it answered with no valid signature of its key"


def _name_of(witness: config.Witness) -> str:
    """By what it signs."""
    return origin_of(load_public(witness.public_key))
