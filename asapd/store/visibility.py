"""Which rows a caller may see, as SQL: by tenant and by agent patterns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from asapd.core.types import DEFAULT_TENANT


class Visibility(msgspec.Struct, frozen=True):
    """`tenant` None is every tenant; `agents` are exact names or prefixes ending in `*`."""

    tenant: str | None = None
    agents: tuple[str, ...] = ("*",)

    @property
    def is_everything(self) -> bool:
        """Whether nothing limits it."""
        return self.tenant is None and "*" in self.agents


EVERYTHING = Visibility()
_NUMBER = "(SELECT id FROM name WHERE name = ?)"
_AGENTS = "SELECT n.id FROM agent a JOIN name n ON n.name = a.id"


def _globs(agents: Sequence[str]) -> list[str]:
    # GLOB knows more wildcards than our patterns do: a bracket around each keeps it literal.
    escaped = ("".join(f"[{char}]" if char in "*?[" else char for char in agent.removesuffix("*")) for agent in agents)
    return [text + ("*" if agent.endswith("*") else "") for agent, text in zip(agents, escaped, strict=True)]


def visible_agents(visible: Visibility) -> tuple[str, list[str]] | None:
    """The numbers of the names that a caller's patterns admit, as `IN (...)`, and its values; None where all are."""
    if "*" in visible.agents:
        return None
    globs = _globs(visible.agents)
    return f"IN (SELECT id FROM name WHERE {' OR '.join(['name GLOB ?'] * len(globs))})", globs


def visible_names(visible: Visibility, columns: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Conditions over interned columns: any of them matches a pattern, and the tenant is the caller's.

    What was reported without a tenant stands in the default one, and is that of its agent where the directory says one.
    """
    where: list[str] = []
    values: list[Any] = []
    if visible.tenant == DEFAULT_TENANT:
        where.append(f"tenant = {_NUMBER} AND agent NOT IN ({_AGENTS} WHERE a.tenant <> ?)")
        values += [DEFAULT_TENANT, DEFAULT_TENANT]
    elif visible.tenant is not None:
        where += [
            f"tenant IN ({_NUMBER}, {_NUMBER})",
            f"(tenant = {_NUMBER} OR agent IN ({_AGENTS} WHERE a.tenant = ?))",
        ]
        values += [visible.tenant, DEFAULT_TENANT, visible.tenant, visible.tenant]
    if (admitted := visible_agents(visible)) is not None:
        matched, globs = admitted
        where.append("(" + " OR ".join(f"{column} {matched}" for column in columns) + ")")
        values.extend(globs * len(columns))
    return where, values


def visible_text(
    visible: Visibility, columns: Sequence[str], tenants: Sequence[str] = ("tenant",)
) -> tuple[list[str], list[Any]]:
    """The same over columns that hold the names themselves; of `tenants` one has to be the caller's."""
    where: list[str] = []
    values: list[Any] = []
    if visible.tenant is not None:
        where.append(f"? IN ({', '.join(tenants)})")
        values.append(visible.tenant)
    if "*" not in visible.agents:
        globs = _globs(visible.agents)
        where.append("(" + " OR ".join(f"{column} GLOB ?" for column in columns for _ in globs) + ")")
        values.extend(globs * len(columns))
    return where, values
