"""Figures of agents for whoever asks: what was promised in a window, what was kept, and what is to be expected."""

from __future__ import annotations

import dataclasses

import trio

from asapd import config
from asapd.actors.agent_book import AgentBook
from asapd.actors.books import Books
from asapd.actors.messages import Figures, FiguresRequest
from asapd.core import burnrate
from asapd.core.errors import FieldError, Refusal
from asapd.core.reputation import SPAN_US, PastBreach, reputation
from asapd.core.sla import burn_rate, compliance_percent, error_budget_left_percent, evaluate, sla_score
from asapd.core.types import HOUR_US
from asapd.runtime.clock import Clock
from asapd.store.database import Database
from asapd.store.sla_queries import past_breaches


async def answer_figures(
    request: FiguresRequest, books: Books, database: Database, clock: Clock
) -> list[Figures] | Refusal:
    """The figures that are asked for, with all counted that was committed when it was asked."""
    sla = books.sla
    windows_us = tuple(dict.fromkeys((*sla.windows_us, sla.breach_window_us)))
    if request.window_us not in windows_us:
        reason = f"must be one of the configured windows: {', '.join(map(config.duration_text, windows_us))}"
        return Refusal("invalid", f"window: {reason}", (FieldError("window", reason),))
    if books.behind:
        await books.catch_up()
    known = books.by_agent
    everybody = sorted(known if request.some is None else request.some & known.keys())
    asked = everybody if request.agent is None else [request.agent]
    found = [book for agent in asked if (book := known.get(agent)) is not None]
    if request.agent is not None and not found:
        return Refusal("agent_not_found", f"there is no agent {request.agent} in the directory: check the id")
    await books.advance(asked)
    if not request.in_full:
        return [_figures(book, request.window_us) for book in found]
    now_us = clock.now_us()
    past: dict[str, list[PastBreach]] = {}
    for agent, severity, ended_us in await database.read(past_breaches, now_us - SPAN_US):
        past.setdefault(agent, []).append(PastBreach("critical" if severity == "critical" else "warning", ended_us))
    figures = []
    for book in found:
        await trio.lowlevel.checkpoint()
        figures.append(_in_full(book, request.window_us, sla, past.get(book.agent.id, []), now_us))
    return figures


def _figures(book: AgentBook, window_us: int) -> Figures:
    metrics, held = book.metrics(window_us), book.held_to
    promise = held.promise
    verdicts = evaluate(metrics, promise)
    return Figures(
        metrics=metrics,
        promise=promise,
        promise_source=held.source,
        sla_error=held.error,
        verdicts=verdicts,
        compliance_percent=compliance_percent(verdicts),
        sla_score=sla_score(metrics, promise),
        error_budget_left_percent=error_budget_left_percent(metrics, promise),
        burn_rates={
            "availability": burn_rate(metrics, promise, "availability"),
            "error_rate": burn_rate(metrics, promise, "error_rate"),
        },
    )


def _in_full(book: AgentBook, window_us: int, sla: config.Sla, past: list[PastBreach], now_us: int) -> Figures:
    promise = book.held_to.promise
    all_windows = sorted({*sla.windows_us, sla.breach_window_us, *burnrate.WINDOWS_US})
    by_window = {window: book.metrics(window) for window in all_windows}
    longest_us = all_windows[-1]
    return dataclasses.replace(
        _figures(book, window_us),
        burning=burnrate.burning(by_window, promise, sla.min_samples),
        forecasts=burnrate.forecast(by_window[longest_us], by_window[HOUR_US], promise),
        budget_window_us=longest_us,
        reputation=reputation(
            [by_window[window] for window in all_windows],
            past,
            now_us,
            is_latency_promised=promise.max_latency_p95_ms is not None,
        ),
    )
