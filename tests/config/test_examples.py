"""The shipped example files: they load, they are complete, and they say the truth about the defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from asapd.config import Config, load, parse
from asapd.config.positions import Place, lines_of
from asapd.core.money import parse_usd
from asapd.core.price_table import parse_price_table
from asapd.core.usage import UsageEvent

EXAMPLES = Path(__file__).parents[2] / "config"
TEXT = (EXAMPLES / "asapd.toml").read_text(encoding="utf-8")
# A comment mark without a space behind it hides a setting, with one it is prose.
UNHIDDEN = re.sub(r"(?m)^#(?=[^ \n])", "", TEXT)


def settings(model: type[BaseModel], at: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        path = f"{at}.{field.alias or name}".lstrip(".")
        yield path
        for inner in models_in(field.annotation):
            yield from settings(inner, path)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def keys_of(place: Place) -> str:
    return ".".join(step for step in place if isinstance(step, str))


def test_the_example_loads_as_it_is_and_shows_the_defaults() -> None:
    assert load(EXAMPLES / "asapd.toml") == Config()


def test_the_example_loads_with_everything_taken_from_behind_its_comment_mark() -> None:
    config = parse(UNHIDDEN)
    assert config.agents
    assert config.budgets
    assert config.alerts.webhooks
    assert config.ingest.allow
    assert config.http.tls


def test_the_example_holds_every_setting_and_no_other() -> None:
    assert {keys_of(place) for place in lines_of(UNHIDDEN)} == set(settings(Config))


def test_hidden_settings_of_a_section_that_has_defaults_show_those() -> None:
    shown = parse(UNHIDDEN)
    for name, model in (
        ("budgets", shown.budgets[0]),
        ("alerts", shown.alerts.webhooks[0]),
        ("agents", shown.agents[0]),
    ):
        for field in ("timezone", "events", "min_severity", "tenant"):
            if field in type(model).model_fields:
                assert getattr(model, field) == type(model).model_fields[field].default, (name, field)


def test_the_example_price_table_prices_well_known_models() -> None:
    table = parse_price_table((EXAMPLES / "prices.toml").read_text(encoding="utf-8"))
    assert table.version.startswith("2026-11-01")
    assert len(table.prices) >= 12
    assert {price.provider for price in table.prices} >= {"openai", "anthropic", "google"}
    assert all(price.input_pico > 0 for price in table.prices)
    # A pattern for everything would price models nobody looked up.
    assert all(price.model != "*" for price in table.prices)


@pytest.mark.parametrize(
    ("model", "input_per_mtok"),
    [
        ("gpt-4o", "2.50"),
        ("gpt-4o-2024-08-06", "2.50"),
        ("gpt-4o-2024-05-13", "5.00"),
        ("gpt-4o-mini-2024-07-18", "0.15"),
        ("gpt-4.1-2025-04-14", "2.00"),
        ("gpt-4.1-mini-2025-04-14", "0.40"),
        ("gpt-5-2025-08-07", "1.25"),
        ("gpt-5-mini-2025-08-07", "0.25"),
        ("o3-2025-04-16", "2.00"),
        ("claude-sonnet-4-20250514", "3.00"),
        # What has a price of its own is not guessed.
        ("gpt-4o-audio-preview", None),
        ("gpt-4o-mini-realtime-preview-2024-12-17", None),
        ("gpt-5-pro-2025-10-06", None),
        ("o3-pro", None),
        ("GPT-4o", None),
    ],
)
def test_the_example_price_table_knows_models_by_their_dates(model: str, input_per_mtok: str | None) -> None:
    table = parse_price_table((EXAMPLES / "prices.toml").read_text(encoding="utf-8"))
    price = table.find(UsageEvent("t", "urn:asap:agent:a", "c", 1_795_169_203_000_000, model=model))
    assert (None if price is None else price.input_pico) == (
        None if input_per_mtok is None else parse_usd(input_per_mtok)
    )
