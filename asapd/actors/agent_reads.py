"""What the doors read of the directory: agents, their keys, probes, manifests and history."""

from __future__ import annotations

from typing import Any

from asapd.actors.visible import visibility
from asapd.core.access import Caller
from asapd.core.agent_keys import AgentKey
from asapd.core.types import format_us
from asapd.store import agent_history, agent_keys, agents, former, manifests, promises
from asapd.store.agent_history import AgentEvent
from asapd.store.agents import DirectoryAgent, StoredProbe
from asapd.store.database import Database
from asapd.store.manifests import StoredManifest
from asapd.wire.keys import jwk_thumbprint


class AgentReads:
    """Each is one snapshot, narrowed to what its caller may see."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def directory(self, caller: Caller, agent: str | None = None) -> list[DirectoryAgent]:
        """The directory."""
        return await self._database.read(agents.directory, visibility(caller), agent)

    async def held(self, caller: Caller, agent: str | None) -> list[DirectoryAgent]:
        """The directory, or an agent of it; one that is not there any more as the caller's tenant had it last."""

        def query(connection: Any) -> list[DirectoryAgent]:
            found = agents.directory(connection, visibility(caller), agent)
            if found or agent is None:
                return found
            left = former.last_held(connection, visibility(caller), agent)
            return [] if left is None else [left]

        return await self._database.read(query)

    async def keys(self, agent: str) -> list[AgentKey]:
        """The public keys of an agent from every source, replaced and claimed ones too, the oldest first."""
        return await self._database.read(agent_keys.keys_of, agent)

    async def standing(self) -> dict[str, Any]:
        """How many agents there are, and which of them need a look: at most a hundred of each kind."""

        def query(connection: Any) -> dict[str, Any]:
            total, paused, flapping = agents.standing(connection)
            rejected = [{"agent": agent, "error": error} for agent, error in promises.errors(connection)]
            return {"total": total, "paused": paused, "flapping": flapping, "sla_errors": rejected}

        return await self._database.read(query)

    async def unconfirmed_keys(self) -> list[dict[str, str]]:
        """Keys that manifests were signed with and nobody confirmed, by agent."""
        return [
            {"agent": key.agent, "kid": jwk_thumbprint(key.public_key), "since": format_us(key.since_us)}
            for key in await self._database.read(agent_keys.claimed)
        ]

    async def probes(
        self, caller: Caller, agent: str, *, start_us: int | None, end_us: int | None, limit: int, before: int | None
    ) -> list[tuple[int, StoredProbe]]:
        """Probes of an agent since it is of the caller's tenant, the newest first."""

        def query(connection: Any) -> list[tuple[int, StoredProbe]]:
            held_us = agent_history.held_since_us(connection, visibility(caller), agent)
            return agents.probes(connection, agent, max(held_us, start_us or 0), end_us, limit, before)

        return await self._database.read(query)

    async def transitions(self, caller: Caller, agent: str, limit: int) -> list[tuple[int, str, str, str | None]]:
        """Changes of an agent's state, the newest first."""
        return await self._database.read(agent_history.transitions, visibility(caller), agent, limit)

    async def events(self, caller: Caller, agent: str, *, limit: int, before: int | None) -> list[AgentEvent]:
        """What happened to an agent, the newest first; one that left the directory has its history still."""
        return await self._database.read(agent_history.events, visibility(caller), agent, limit, before)

    async def manifests(
        self, caller: Caller, agent: str, *, limit: int, before: int | None
    ) -> list[tuple[int, StoredManifest]]:
        """The versions of an agent's manifest, the newest first, each with its row number."""
        return await self._database.read(manifests.versions, visibility(caller), agent, limit, before)

    async def manifest_body(self, caller: Caller, agent: str, digest: str) -> tuple[StoredManifest, bytes] | None:
        """One version of an agent's manifest and what the agent served."""
        return await self._database.read(manifests.body_of, visibility(caller), agent, digest)
