"""The signing keys the daemon holds, and the public keys it believes, each with where it comes from."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nacl.signing import SigningKey

from asapd.core.agent_keys import FOUNDING, AgentKey, verifying
from asapd.core.types import AGENT_URN
from asapd.wire.keys import KeyFormatError, load_private_pem

URN_PREFIX = "urn:asap:agent:"
# Far beyond a PEM of such a key, which has 120 bytes.
_MAX_FILE_BYTES = 8192


class KeyDirectory:
    """Keys by agent.

    `held` are private keys from `keys_dir`. `pinned` come from the configuration. `known` are the public keys of the
    store, from every source, with what was replaced. Only keys that are held, pinned or imported begin a chain.
    """

    def __init__(self) -> None:
        self.held: dict[str, SigningKey] = {}
        self.pinned: dict[str, bytes] = {}
        self.manifest_keys: Literal["tofu", "strict"] = "tofu"
        self._known: dict[str, tuple[AgentKey, ...]] = {}
        self._settled: dict[str, _Settled] = {}

    def learn(self, keys: Iterable[AgentKey]) -> None:
        """Go by these keys of the store."""
        known: dict[str, list[AgentKey]] = {}
        for key in keys:
            # What is held and pinned now is said by the files; of both, the store knows what was before.
            if key.source not in ("held", "configuration") or key.state != "active":
                known.setdefault(key.agent, []).append(key)
        self._known = {agent: tuple(found) for agent, found in known.items()}
        self._settled.clear()

    def public_keys(self, agent: str, *, issued_at_us: int | None, now_us: int) -> frozenset[bytes]:
        """The raw public keys that verify a token which the agent issued at a time, if it says when."""
        return self._verifying(agent, issued_at_us, now_us).keys

    def founding_keys(self, agent: str, *, issued_at_us: int | None, now_us: int) -> frozenset[bytes]:
        """Those of the public keys that verify the first token of a chain as well."""
        return self._verifying(agent, issued_at_us, now_us).founding

    def _verifying(self, agent: str, issued_at_us: int | None, now_us: int) -> _Settled:
        held, pin, settled = self.held.get(agent), self.pinned.get(agent), self._settled.get(agent)
        if (
            settled is not None
            and settled.held is held
            and settled.pin is pin
            and settled.manifest_keys == self.manifest_keys
        ):
            return settled
        known = self._known.get(agent, ())
        keys = list(known)
        if held is not None:
            keys.append(AgentKey(agent, bytes(held.verify_key), "held", "active", 0))
        if pin is not None:
            keys.append(AgentKey(agent, pin, "configuration", "active", 0))
        believe = self.manifest_keys == "tofu"
        found = verifying(keys, issued_at_us=issued_at_us, now_us=now_us, believe_manifests=believe)
        given = (key for key in keys if key.source in FOUNDING)
        founding = found & verifying(given, issued_at_us=issued_at_us, now_us=now_us, believe_manifests=False)
        settled = _Settled(held, pin, self.manifest_keys, found, founding)
        if not any(key.is_retiring(now_us) for key in known):
            self._settled[agent] = settled
        return settled

    def is_root(self, agent: str, roots: tuple[str, ...]) -> bool:
        """Whether a chain may begin with this agent, by a key of `founding_keys`."""
        return agent in roots if roots else agent in self.held or agent in self.pinned


@dataclass(frozen=True, slots=True)
class _Settled:
    """An answer that neither the clock nor the token changes, and what it was made from besides the store's keys."""

    held: SigningKey | None
    pin: bytes | None
    manifest_keys: str
    keys: frozenset[bytes]
    founding: frozenset[bytes]


def load_held(keys_dir: Path) -> tuple[dict[str, SigningKey], list[str]]:
    """The keys of a directory by agent, and why each file that is not used is not.

    `<name>.pem` is the key of `urn:asap:agent:<name>`: an unencrypted PKCS#8 PEM that nobody but its owner may read. A
    directory that is not there holds no keys.
    """
    held: dict[str, SigningKey] = {}
    problems: list[str] = []
    try:
        paths = sorted(path for path in keys_dir.iterdir() if path.suffix == ".pem")
    except FileNotFoundError:
        return {}, []
    except OSError as error:
        return {}, [f"{keys_dir} is not used: {error.strerror or error}"]
    for path in paths:
        named = AGENT_URN.match(URN_PREFIX + path.stem) is not None
        found = _read_held(path) if named else "its name is not that of an agent: letters, digits, . _ : and - only"
        if isinstance(found, str):
            problems.append(f"{path} is not used: {found}")
        else:
            held[URN_PREFIX + path.stem] = found
    return held, problems


def _read_held(path: Path) -> SigningKey | str:
    try:
        # A pipe of that name must not hold up the daemon.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "it is not a file"
        if status.st_mode & 0o077:
            return (
                f"its mode is {stat.S_IMODE(status.st_mode):04o}, so others than its owner may use it: "
                f"chmod 600 {path} and reload; if others could have read it, make a new key"
            )
        return load_private_pem(os.read(descriptor, _MAX_FILE_BYTES))
    except KeyFormatError as error:
        return f"it {error}"
    finally:
        os.close(descriptor)
