from __future__ import annotations

from asapd.core.access import Caller
from asapd.core.rates import Rate
from asapd.core.types import Role
from asapd.edge import throttle
from asapd.edge.throttle import Throttle


class Ticks:
    def __init__(self) -> None:
        self.s = 100.0

    def now_us(self) -> int:
        raise AssertionError("wall time may jump")

    def monotonic_s(self) -> float:
        return self.s


def caller(actor: str) -> Caller:
    return Caller(actor, Role.INGEST)


def test_each_key_has_a_bucket_of_its_own_and_processes_of_a_user_share_one() -> None:
    clock = Ticks()
    limit = Throttle(Rate(1, 2_000_000), 1, clock)
    assert limit.refusal(caller("key:a")) is None
    assert limit.refusal(caller("key:b")) is None
    assert limit.refusal(caller("uid:1000 pid:7")) is None
    refused = limit.refusal(caller("uid:1000 pid:8"))
    assert refused is not None
    assert (refused.code, refused.retry_after_s, refused.extra) == ("rate_limited", 2, {"retry_after_seconds": 2})
    assert "uid:1000" in refused.detail
    clock.s += 1.5
    again = limit.refusal(caller("key:a"))
    assert again is not None
    assert again.retry_after_s == 1
    clock.s += 0.5
    assert limit.refusal(caller("key:a")) is None


def test_whoever_owes_nothing_is_forgotten_when_they_become_many() -> None:
    clock = Ticks()
    limit = Throttle(Rate(1, 1_000_000), 1, clock)
    for number in range(throttle.SWEEP_AT - 1):
        assert limit.refusal(caller(f"uid:{number}")) is None
    clock.s += 1.5
    assert limit.refusal(caller("uid:last")) is None
    assert limit.refusal(caller("uid:new")) is None
    assert len(limit._buckets) == 2
    assert limit.refusal(caller("uid:last")) is not None
