"""What tables look like, in a pipe and on a terminal."""

from __future__ import annotations

import sys
from decimal import Decimal

import pytest

from asapd.cli.show import cell, show_pairs, show_table

ROWS = [("urn:a", 12, "ok"), ("b[bold]", None, "open")]


def test_a_piped_table_is_aligned_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("agent", "count", "state"), ROWS)
    assert capsys.readouterr().out == "AGENT    COUNT  STATE\nurn:a       12  ok\nb[bold]      -  open\n"


def test_an_empty_table_has_its_headings(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("agent", "count"), [])
    assert capsys.readouterr().out == "AGENT  COUNT\n"


def test_a_terminal_gets_a_drawn_table_in_which_names_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_table(("agent", "count", "state"), ROWS)
    show_pairs([("state", "healthy")])
    out = capsys.readouterr().out
    assert "b[bold]" in out
    assert "─" in out
    assert "\x1b[31mopen" in out
    assert "\x1b[32mhealthy" in out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        (True, "yes"),
        (False, "no"),
        (0.5, "0.5"),
        (10.0, "10"),
        (Decimal("0.000001"), "0.000001"),
        (1000, "1000"),
        ([], "-"),
        (["a", None], "a, -"),
        ({"a": 1.0}, "a 1"),
        ("grün", "grün"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb", "a\\nb"),
    ],
)
def test_a_value_is_shown_without_anything_a_terminal_obeys(value: object, text: str) -> None:
    assert cell(value) == text
