"""Single values: writing durations back, and reading them again."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.config import Config, remarks
from asapd.config.values import MAX_DURATION_US, check_timezone, duration_text, read_duration, shown


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0, "0s"),
        (1, "1us"),
        (250_000, "250ms"),
        (90_000_000, "90s"),
        (3_600_000_000, "1h"),
        (86_400_000_000, "24h"),
        (172_800_000_000, "2d"),
        (604_800_000_000, "7d"),
    ],
)
def test_a_duration_is_written_in_its_largest_whole_unit(us: int, text: str) -> None:
    assert duration_text(us) == text


@given(st.integers(0, MAX_DURATION_US))
def test_a_written_duration_reads_back(us: int) -> None:
    assert read_duration(duration_text(us)) == us


def test_a_shown_value_is_one_readable_line() -> None:
    assert shown("x" * 200) == '"' + "x" * 55 + '..."'
    assert shown("a\n\x1b[31m") == '"a\\n\\x1b[31m"'
    assert shown(5) == "5"


def test_utc_needs_no_time_zone_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoneinfo.TZPATH", ())
    ZoneInfo.clear_cache()
    assert check_timezone("UTC") == "UTC"


def test_it_is_said_when_no_breach_of_availability_can_open() -> None:
    assert remarks(Config()) == ()
    assert remarks(Config.model_validate({"prober": {"interval": "3m"}})) == ()
    (remark,) = remarks(Config.model_validate({"prober": {"interval": "5m"}}))
    assert remark.startswith(
        "sla.min_samples is 20, and sla.breach_window (1h) has 12 probes at a prober.interval of 5m"
    )
    found = remarks(Config.model_validate({"retention": {"usage": "7d", "probes": "29d"}}))
    assert [remark.split(",")[0] for remark in found] == ["retention.usage is 7d", "retention.probes is 29d"]


def test_it_is_said_when_the_admin_socket_lets_in_whom_it_refuses() -> None:
    assert remarks(Config.model_validate({"admin": {"mode": "0660"}})) == ()
    (remark,) = remarks(Config.model_validate({"admin": {"mode": "0666"}}))
    assert remark.startswith('admin.mode is "0666", and who is not root')
