"""How many connections the doors take, by how many files may be open."""

from __future__ import annotations

import logging
import resource

import pytest

from asapd import config
from asapd.daemon import descriptors
from asapd.daemon.descriptors import KEPT, RESERVE, kept_connections, max_connections

LOG = logging.getLogger("test.descriptors")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and hard limit of a made-up kernel: what a process lowers of its own it cannot raise again."""
    held = [1024, 524_288]

    def setrlimit(which: int, pair: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        assert pair[1] == held[1]
        if pair[0] > held[1] != resource.RLIM_INFINITY:
            raise ValueError("current limit exceeds maximum limit")
        held[0] = pair[0]

    monkeypatch.setattr(descriptors.resource, "getrlimit", lambda which: tuple(held))
    monkeypatch.setattr(descriptors.resource, "setrlimit", setrlimit)
    return held


def settings(text: str = "") -> config.Config:
    return config.parse(text)


LANE = '[ingest]\nbind = ["127.0.0.1:0"]'


def test_the_soft_limit_is_raised_as_far_as_the_doors_need(limits: list[int], caplog: pytest.LogCaptureFixture) -> None:
    assert max_connections(settings(), LOG) == 4096
    assert limits[0] == 2 * 4096 + RESERVE
    assert max_connections(settings(LANE), LOG) == 4096
    assert limits[0] == 3 * 4096 + RESERVE
    assert caplog.text == ""


@pytest.mark.parametrize("high", [100_000, resource.RLIM_INFINITY])
def test_a_high_limit_is_left_alone(limits: list[int], high: int) -> None:
    limits[:] = [high, high]
    assert max_connections(settings(), LOG) == 4096
    assert limits[0] == high


def test_an_unlimited_hard_limit_is_not_reached_for(limits: list[int]) -> None:
    limits[1] = resource.RLIM_INFINITY
    assert max_connections(settings(), LOG) == 4096
    assert limits[0] == 2 * 4096 + RESERVE


@pytest.mark.parametrize(("hard", "most"), [(1024, 256), (4096, 1728), (400, 100), (3, 1)])
def test_under_a_low_hard_limit_doors_take_fewer_and_the_operator_is_told(
    limits: list[int], caplog: pytest.LogCaptureFixture, hard: int, most: int
) -> None:
    limits[:] = [hard // 2, hard]
    assert max_connections(settings(), LOG) == most
    assert limits[0] == hard
    assert f"only {hard} open files" in caplog.text
    assert f"{most} connections" in caplog.text
    assert "LimitNOFILE=" in caplog.text


def test_a_sandbox_that_forbids_raising_is_lived_with(
    limits: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(which: int, pair: tuple[int, int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(descriptors.resource, "setrlimit", forbidden)
    assert max_connections(settings(), LOG) == 1024 // 4
    assert "only 1024 open files" in caplog.text


def test_the_limits_of_this_process_are_read() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert max_connections(settings("[limits]\nmax_connections = 1"), LOG) == 1
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before or before[0] < 2 + RESERVE


def test_connections_to_agents_are_kept_where_the_limit_has_room(limits: list[int]) -> None:
    assert kept_connections(settings(), 4096) == KEPT
    assert limits[0] == 2 * 4096 + RESERVE + KEPT
    limits[:] = [1024, 2 * 4096 + RESERVE + 100]
    assert kept_connections(settings(), 4096) == 100
    limits[:] = [1024, 1024]
    assert kept_connections(settings(), 256) == 0
