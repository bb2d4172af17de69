"""Validation of a chain of three beside the three bare signatures it takes: `python -m tests.bench.validation`.

One process, no store, no door: the text of a token in, a verdict out. Cold has never seen a token of the chain, warm
has.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from nacl.signing import SigningKey

from asapd.actors.chains import Chain, Chains
from asapd.actors.keyring import KeyDirectory
from asapd.core.agent_keys import AgentKey
from asapd.core.delegation import Claims
from asapd.wire.token import decode, lineage, sign

AGENTS = tuple(f"urn:asap:agent:{name}" for name in ("root", "middle", "leaf", "last"))
KEYS = tuple(SigningKey(bytes([number]) * 32) for number in range(1, 4))
NOW_US = 1_800_000_000_000_000
WARM = 20


@dataclass(frozen=True)
class Times:
    """Medians in microseconds; `ratio` is the median of each round's own cold over bare."""

    bare_us: float
    cold_us: float
    warm_us: float
    ratio: float


def measure(rounds: int) -> Times:
    """Bare, cold and warm in turn, `rounds` times over, so that all meet the same machine."""
    text = _chain()
    links = [(key.verify_key, token) for key, token in zip(KEYS, lineage(decode(text)), strict=True)]
    directory = KeyDirectory()
    directory.pinned = {AGENTS[0]: bytes(KEYS[0].verify_key)}
    directory.learn(
        AgentKey(agent, bytes(key.verify_key), "manifest", "active", 0)
        for agent, key in zip(AGENTS[1:3], KEYS[1:], strict=True)
    )

    def bare() -> None:
        for key, token in links:
            key.verify(token.signed[0], token.signature)

    def validate(chains: Chains) -> None:
        chain = chains.open(text, max_depth=8, now_us=NOW_US + 1)
        assert isinstance(chain, Chain)
        denied = chains.judge(
            chain,
            now_us=NOW_US + 1,
            max_depth=8,
            roots=(),
            is_revoked=lambda claims: (claims.delegator, claims.id) in revoked,
            action="task.execute",
            delegate=AGENTS[3],
            skew_us=300_000_000,
        )
        assert denied is None

    revoked = {("urn:asap:agent:other", str(number)) for number in range(10_000)}
    known = Chains(directory)
    validate(known)
    # As the daemon does it.
    gc.collect()
    gc.freeze()
    took: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        new = Chains(directory)
        took.append(
            (
                _us(bare),
                _us(lambda new=new: validate(new)),
                statistics.median(_us(lambda: validate(known)) for _ in range(WARM)),
            )
        )
    gc.unfreeze()
    bare_us, cold_us, warm_us = (statistics.median(column) for column in zip(*took, strict=True))
    return Times(bare_us, cold_us, warm_us, statistics.median(cold / alone for alone, cold, _ in took))


def _us(work: Callable[[], None]) -> float:
    start_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start_ns) / 1000


def _chain() -> str:
    text: str | None = None
    for number, key in enumerate(KEYS):
        terms = (("task.*",), 10, 10_000_000, NOW_US, NOW_US + 3_600_000_000)
        text = sign(Claims(f"del_{number}", AGENTS[number], AGENTS[number + 1], *terms), key, parent=text)
    assert text is not None
    return text


if __name__ == "__main__":
    times = measure(3000)
    print(f"three bare signatures {times.bare_us:.1f} us, cold {times.cold_us:.1f} us ({times.ratio:.2f} of bare)")
    print(f"warm {times.warm_us:.1f} us")
