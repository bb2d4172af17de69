"""Reload: validate everything, then give each actor its part; a bad file changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio

from asapd import config
from asapd.actors.messages import (
    ReconfigureMeter,
    ReconfigureProber,
    ReconfigureRegistry,
    ReconfigureWatcher,
    Remark,
)
from asapd.config import Changes, ConfigError
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import format_us
from asapd.daemon.boot import Loaded, load
from asapd.daemon.versions import Version, Versions
from asapd.edge.asking import ask_actor
from asapd.runtime.clock import Clock

_RESTART_SECTIONS = ("state_dir", "http", "admin", "ingest", "limits", "store")
_log = logging.getLogger("asapd.config")


class Target(Protocol):
    """What a reload changes."""

    @property
    def mailboxes(self) -> dict[str, trio.MemorySendChannel[Any]]:
        """The send ends by actor."""
        ...

    @property
    def clock(self) -> Clock:
        """The clock."""
        ...

    def adopt(self, settings: config.Config) -> None:
        """Make a configuration the one in force."""
        ...

    async def mask(self, patterns: Sequence[str]) -> Refusal | None:
        """Mask entries by other patterns from now on."""
        ...

    def retarget(self, settings: config.Config, secrets: Mapping[Path, bytes]) -> None:
        """Push alerts to the targets of a configuration."""
        ...


class Reloader:
    """The configuration in force, and the outcome of the last attempt to change it."""

    def __init__(self, path: Path | None, loaded: Loaded, target: Target, versions: Versions) -> None:
        self._path = path
        self._loaded = loaded
        self._target = target
        self._versions = versions
        self.accepted = loaded.config
        """What the file said when it was read last and accepted: some of it may wait for a restart."""
        self.version: Version | None = None
        """That among those that are kept."""
        self._busy = trio.Lock()
        self._errors: list[str] = []
        self._loaded_us = self._tried_us = target.clock.now_us()

    def status(self) -> dict[str, Any]:
        """`state` is "error" from a refused reload until one is accepted; `tried_at` is of the last one, either way."""
        return {
            "state": "error" if self._errors else "ok",
            "errors": self._errors,
            "loaded_at": format_us(self._loaded_us),
            "tried_at": format_us(self._tried_us),
            "path": None if self._path is None else str(self._path.absolute()),
            "without_effect": config.settings_without_effect(self._loaded.config),
        }

    @property
    def in_force(self) -> config.Config:
        """What the daemon goes by."""
        return self._loaded.config

    async def started(self) -> None:
        """Keep what the daemon was started with, and have the log tell when it is new."""
        if await self._keep(self._loaded.text):
            await self._remark("config.loaded", "asapd", self._told())

    async def reload(self, actor: str) -> dict[str, Any] | Refusal:
        """Read the file again and apply it, or say why not."""
        async with self._busy:
            try:
                return await self._reload(actor)
            finally:
                self._tried_us = self._target.clock.now_us()

    async def _reload(self, actor: str) -> dict[str, Any] | Refusal:
        try:
            fresh = await trio.to_thread.run_sync(load, self._path)
        except ConfigError as error:
            return self._refuse(error)
        # What only a restart applies stays as it is until then.
        kept: dict[str, Any] = {section: getattr(self._loaded.config, section) for section in _RESTART_SECTIONS}
        changes = config.diff(self._loaded.config, fresh.config)
        effective = fresh.config.model_copy(update=kept)
        keys = await self._apply(fresh, effective, actor)
        if isinstance(keys, Refusal):
            if effective.audit.mask != self.in_force.audit.mask:
                # Also where the store did not say what became of it: a writer that comes later has these.
                await self._target.mask(self.in_force.audit.mask)
            self._errors = [keys.detail]
            return keys
        applied = _summary(changes)
        if keys:
            applied["keys"] = list(keys)
        if fresh.prices != self._loaded.prices:
            applied["prices"] = fresh.prices.version
        self._loaded = Loaded(effective, fresh.prices, fresh.pinned, fresh.agents, fresh.secrets, fresh.text)
        self.accepted = fresh.config
        await self._keep(fresh.text)
        self._errors = []
        self._loaded_us = self._target.clock.now_us()
        details = {
            "applied": sorted(applied),
            "restart_required": list(changes.restart_required),
            **self._told(),
        }
        await self._remark("config.reloaded", actor, details)
        if changes.restart_required:
            _log.warning("reloaded; a restart is needed for %s", ", ".join(changes.restart_required))
        else:
            _log.info("reloaded")
        return {"state": "ok", "applied": applied, "restart_required": list(changes.restart_required)}

    def _refuse(self, error: ConfigError) -> Refusal:
        self._errors = str(error).splitlines()
        for line in self._errors:
            _log.error("the configuration was not reloaded: %s", line)
        errors = tuple(FieldError(problem.field, problem.reason) for problem in error.problems)
        detail = f"nothing was changed: {self._errors[0]}"
        return Refusal("config_refused", detail, errors, {"problems": self._errors})

    async def _apply(self, fresh: Loaded, effective: config.Config, actor: str) -> Refusal | tuple[str, ...]:
        """Everybody's part, the directory first: it alone can be refused, by a store that is away.

        Returns the agents whose key is held now and was not, or the other way round.
        """
        boxes = self._target.mailboxes
        changed = await ask_actor(
            boxes["prober"],
            lambda to: ReconfigureProber(
                effective.prober, fresh.agents, actor, to, effective.delegation.key_overlap_us
            ),
        )
        if isinstance(changed, Refusal):
            return changed
        refused = await self._target.mask(effective.audit.mask)
        if refused is not None:
            return refused
        self._target.adopt(effective)
        self._target.retarget(effective, fresh.secrets)
        priced = await ask_actor(boxes["meter"], lambda to: ReconfigureMeter(effective.metering, fresh.prices, to))
        keys = await ask_actor(
            boxes["registry"],
            lambda to: ReconfigureRegistry(effective.delegation, fresh.pinned, to, effective.budgets, actor),
        )
        judged = await ask_actor(boxes["watcher"], lambda to: ReconfigureWatcher(effective.sla, to))
        for outcome in (priced, judged):
            if isinstance(outcome, Refusal):
                return outcome
        return keys

    def _told(self) -> dict[str, Any]:
        """What entries of the audit log say of the text."""
        kept = self.version
        return {} if kept is None else {"version": kept.number, "sha256": kept.sha256}

    async def _keep(self, text: str | None) -> bool:
        """Whether a text is kept now and was not before. It is in force whether it can be kept or not."""
        if text is None:
            return False
        now_us = self._target.clock.now_us()
        try:
            kept = await trio.to_thread.run_sync(self._versions.keep, text, now_us)
        except OSError as error:
            self.version = None
            _log.error("this configuration is in force, and cannot be gone back to: it was not kept: %s", error)
            return False
        self.version = kept
        return kept.accepted_us == now_us

    async def _remark(self, event_type: str, actor: str, details: dict[str, Any]) -> None:
        outcome = await ask_actor(
            self._target.mailboxes["auditor"], lambda to: Remark(event_type, actor, "config", details, to)
        )
        if isinstance(outcome, Refusal):
            _log.error("the reload is not in the audit log: %s", outcome.detail)


def _summary(changes: Changes) -> dict[str, Any]:
    """What changed, for a person: the agents by id, the sections by name."""
    agents = {
        "agents_added": [agent.id for agent in changes.agents_added],
        "agents_removed": [agent.id for agent in changes.agents_removed],
        "agents_changed": [agent.id for agent in changes.agents_changed],
    }
    sections = ("prober", "sla", "delegation", "metering", "budgets", "alerts", "audit", "retention")
    return {
        **{name: ids for name, ids in agents.items() if ids},
        **{section: True for section in sections if getattr(changes, section)},
    }
