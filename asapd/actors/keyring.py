"""The signing keys the daemon holds, and the public keys it believes, each with where it comes from."""

from __future__ import annotations

import logging
from pathlib import Path

from nacl.signing import SigningKey

from asapd.wire.keys import KeyFormatError, load_private_pem, load_public

URN_PREFIX = "urn:asap:agent:"


class KeyDirectory:
    """Keys by agent.

    `held` are private keys from `keys_dir`, one PEM file an agent, named after it: `<name>.pem` is the key
    of `urn:asap:agent:<name>`. `pinned` come from the configuration. `learned` come from the API or a
    verified manifest: they verify that agent's own tokens, and never make it a root.
    """

    def __init__(self) -> None:
        self.held: dict[str, SigningKey] = {}
        self.pinned: dict[str, bytes] = {}
        self.learned: dict[str, set[bytes]] = {}

    def load_held(self, keys_dir: Path, log: logging.Logger) -> None:
        """Read all keys of a directory; one that cannot be read is reported and left out."""
        held: dict[str, SigningKey] = {}
        for path in sorted(keys_dir.glob("*.pem")):
            try:
                if path.stat().st_mode & 0o077:
                    log.warning("%s can be read by others: chmod 600 it", path)
                held[URN_PREFIX + path.stem] = load_private_pem(path.read_bytes())
            except (OSError, KeyFormatError) as error:
                log.error("%s is not used: %s", path, error)
        self.held = held

    def public_keys(self, agent: str) -> set[bytes]:
        """Every public key that may verify a token of this agent. A pinned key rules out a learned one."""
        own = {bytes(self.held[agent].verify_key)} if agent in self.held else set()
        pinned = {self.pinned[agent]} if agent in self.pinned else set()
        return own | pinned or self.learned.get(agent, set())

    def is_root(self, agent: str, roots: tuple[str, ...]) -> bool:
        """Whether a chain may begin with this agent."""
        return agent in roots if roots else agent in self.held or agent in self.pinned


def read_public_keys(agents: list[tuple[str, str]], log: logging.Logger) -> dict[str, set[bytes]]:
    """Agents and their keys as text (base64 or PEM) to raw keys; a bad one is reported and left out."""
    keys: dict[str, set[bytes]] = {}
    for agent, text in agents:
        try:
            key = load_public(text)
        except KeyFormatError as error:
            log.error("the public key of %s is not used: %s", agent, error)
        else:
            keys.setdefault(agent, set()).add(key)
    return keys
