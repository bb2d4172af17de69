"""Routes of prices: the table in force, and pricing recorded usage again by it."""

from __future__ import annotations

from typing import Any

from quart import Response
from quart_trio import QuartTrio

from asapd.actors.repricer import Progress, RepriceRequest
from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.core.money import to_usd
from asapd.core.pricing import Price
from asapd.core.types import format_us
from asapd.core.usage import UsageEvent
from asapd.edge.http.context import no_body, require_everything
from asapd.edge.http.parameters import Parameters, RefusedError, encode_cursor, page_from
from asapd.edge.http.replies import reply
from asapd.edge.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/prices")
    async def get_prices() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        model, provider = parameters.text("model"), parameters.text("provider")
        at_us = parameters.time_us("at")
        limit, after = parameters.limit(), parameters.cursor(int) or 0
        parameters.done()
        table = services.prices()
        rows = table.prices
        if model is not None:
            when_us = services.clock.now_us() if at_us is None else at_us
            found = table.find(UsageEvent("", "", "", when_us, model=model, provider=provider or ""))
            rows = () if found is None else (found,)
        pricing = services.settings().metering.pricing
        shown = {
            "version": table.version,
            "sha256": table.sha256 or None,
            "file": None if pricing.file is None else str(pricing.file),
            "prefer": pricing.prefer,
            "currency": "USD",
        }
        return reply({**shown, **page_from([public(price) for price in rows], limit, after)})

    @app.post("/prices/reprice")
    async def post_reprice() -> Response:
        parameters = Parameters()
        dry_run = parameters.flag("dry_run")
        caller = require_everything(Permission.OPERATE if dry_run else Permission.ADMINISTER)
        start_us, end_us = parameters.period_us()
        model = parameters.text("model")
        after: Progress | None = parameters.cursor_of("prices", Progress)
        parameters.done()
        await no_body()
        request = RepriceRequest(caller.actor, dry_run, start_us, end_us, model, after)
        done = await services.reprice(request)
        if isinstance(done, Refusal):
            raise RefusedError(done)
        shown, progress = done
        position = parameters.place("prices", progress)
        return reply({**shown, "next_cursor": None if position is None else encode_cursor(position)})


def public(price: Price) -> dict[str, Any]:
    """A row of the table as it is written in its file; a rate that it does not have is `null`."""

    def usd(pico: int | None) -> Any:
        return None if pico is None else to_usd(pico)

    return {
        "model": price.model,
        "provider": price.provider or None,
        "input_per_mtok": usd(price.input_pico),
        "output_per_mtok": usd(price.output_pico),
        "cached_input_per_mtok": usd(price.cached_pico),
        "cache_write_per_mtok": usd(price.cache_write_pico),
        "cache_write_1h_per_mtok": usd(price.cache_write_1h_pico),
        "reasoning_per_mtok": usd(price.reasoning_pico),
        "per_call": usd(price.per_call_microusd),
        "valid_from": None if price.valid_from_us is None else format_us(price.valid_from_us),
        "valid_until": None if price.valid_until_us is None else format_us(price.valid_until_us),
    }
