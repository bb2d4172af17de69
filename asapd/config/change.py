"""What differs between two configurations, told apart by who has to act on it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from pydantic import BaseModel

from asapd.config.model import Agent, Config

_NEEDS_RESTART = ("http", "admin", "ingest", "limits", "store")


class Changes(msgspec.Struct, frozen=True):
    """The parts of a reload.

    `settings` names what is changed in these parts but for the agents, `restart_required` what only a restart applies,
    both as the file has them.
    """

    agents_added: tuple[Agent, ...] = ()
    agents_removed: tuple[Agent, ...] = ()
    agents_changed: tuple[Agent, ...] = ()
    prober: bool = False
    sla: bool = False
    delegation: bool = False
    metering: bool = False
    budgets: bool = False
    alerts: bool = False
    audit: bool = False
    retention: bool = False
    settings: tuple[str, ...] = ()
    restart_required: tuple[str, ...] = ()

    @property
    def agents(self) -> bool:
        """Whether the directory changed at all."""
        return bool(self.agents_added or self.agents_removed or self.agents_changed)

    @property
    def any(self) -> bool:
        """Whether anything changed."""
        return self != Changes()


def diff(old: Config, new: Config) -> Changes:
    """From `old` to `new`. What files named in them hold (prices, keys, certificates) is not looked at.

    An agent is known by its id; `agents_changed` has it in its new form.
    """
    before = {agent.id: agent for agent in old.agents}
    after = {agent.id: agent for agent in new.agents}
    waiting = tuple(_restart_required(old, new))
    return Changes(
        agents_added=tuple(agent for name, agent in after.items() if name not in before),
        agents_removed=tuple(agent for name, agent in before.items() if name not in after),
        agents_changed=tuple(agent for name, agent in after.items() if name in before and agent != before[name]),
        prober=old.prober != new.prober,
        sla=old.sla != new.sla,
        delegation=old.delegation != new.delegation,
        metering=old.metering != new.metering,
        budgets=old.budgets != new.budgets,
        alerts=old.alerts != new.alerts,
        audit=old.audit != new.audit,
        retention=old.retention != new.retention,
        settings=tuple(name for name in _changed(old, new) if name != "agents" and not _is_within(name, waiting)),
        restart_required=waiting,
    )


def _changed(old: BaseModel, new: BaseModel, section: str = "") -> Iterator[str]:
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        path = f"{section}{field.alias or name}"
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _changed(before, after, f"{path}.")
        elif before != after:
            yield path


def _is_within(name: str, settings: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{setting}.") for setting in settings)


def _restart_required(old: Config, new: Config) -> Iterator[str]:
    if old.state_dir != new.state_dir:
        yield "state_dir"
    for section in _NEEDS_RESTART:
        before, after = getattr(old, section), getattr(new, section)
        for name, field in type(before).model_fields.items():
            if getattr(before, name) != getattr(after, name):
                yield f"{section}.{field.alias or name}"
