"""A price table from the figures of the package genai-prices: what our table can say exactly, and nothing else.

The package is read as data (`genai_prices.data`), by the names of its classes, and never asked over the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from itertools import pairwise
from typing import Any

MAKERS = ("anthropic", "cohere", "deepseek", "google", "mistral", "openai", "x-ai")
"""Those who make the models they sell, by the package's names; resellers price the same names in their own way."""

TELEMETRY_NAMES = {
    "aws": ("aws.bedrock",),
    "azure": ("azure.ai.openai", "azure.ai.inference", "az.ai.openai", "az.ai.inference"),
    "google": ("gcp.gemini", "gcp.gen_ai", "gcp.vertex_ai", "gemini", "vertex_ai"),
    "mistral": ("mistral_ai",),
    "moonshotai": ("moonshot_ai",),
    "x-ai": ("x_ai", "xai"),
}
"""What OpenTelemetry calls a provider (`gen_ai.provider.name`, before that `gen_ai.system`), where it differs."""

_RATES = {
    "input_mtok": "input_per_mtok",
    "output_mtok": "output_per_mtok",
    "cache_read_mtok": "cached_input_per_mtok",
    "cache_write_mtok": "cache_write_per_mtok",
    "cache_write_1h_mtok": "cache_write_1h_per_mtok",
    "output_reasoning_mtok": "reasoning_per_mtok",
    "requests_kcount": "per_call",
}
_BESIDES = re.compile(r"(?:.*_searches|code_executions)_kcount\Z")
"""What is billed besides tokens: an event does not count it, and its tokens cost the same."""

_MODALITY = re.compile(r"(?:input|output|cache)_(?:text|audio|image|video|tool|citation)(?:_.*)?_mtok\Z")
_LITERAL = re.compile(r"(?:[^\\.^$*+?{}\[\]|()]|\\[^A-Za-z0-9])*")


class NotUnderstoodError(Exception):
    """The package has another shape than the one this was written for; install the version that asapd asks for."""


@dataclass(frozen=True)
class Left:
    """A model, or a time of it, that is not in force in the table, and why."""

    provider: str
    model: str
    reason: str


@dataclass
class Seeded:
    """A table's text, how many rows of it are in force, and what is not."""

    text: str
    rows: int = 0
    left: list[Left] = field(default_factory=list)


@dataclass(frozen=True)
class _Span:
    """What a model costs for a time; `reason` says why the table cannot have it."""

    rates: dict[str, Decimal]
    first_day: date | None
    last_day_before: date | None
    besides: tuple[str, ...]
    reason: str | None
    is_base: bool


def provider_ids(providers: Iterable[Any]) -> list[str]:
    """The providers that the package knows."""
    return sorted(provider.id for provider in providers)


def seed(providers: Sequence[Any], wanted: Sequence[str], version: str) -> Seeded:
    """The table of some providers, in the order in which they are named.

    Raises:
        NotUnderstoodError: see there.
    """
    known = {provider.id: provider for provider in providers}
    found = Seeded("")
    lines = list(_head(version, wanted))
    try:
        for name in wanted:
            lines += ["", f"# --- {_comment(known[name].name)}"]
            lines += [f"# {_comment(url)}" for url in known[name].pricing_urls or ()]
            in_force: set[str] = set()
            for model in known[name].models:
                lines += _model(known[name], model, in_force, found)
    except (AttributeError, TypeError, ValueError) as error:
        raise NotUnderstoodError(f"the figures of genai-prices {version} are not understood: {error}") from error
    found.text = "\n".join(lines) + "\n"
    return found


def _head(version: str, wanted: Sequence[str]) -> Iterator[str]:
    yield f"# Prices of {', '.join(wanted)}, from the package genai-prices {version}, in USD per million tokens."
    yield "#"
    yield "# List prices change, and the package may be wrong: hold what you rely on against the provider's own page."
    yield "# Standard rates only: an event does not say whether it was a batch, flex or priority request."
    yield "# A row that begins with # is not in force, because it would be wrong for some usage: what stands above it"
    yield "# says for which. Take the # away where that part is not yours. Names are compared as they are written."
    yield "# An event that names no provider has no price where several of these charge differently for its model."
    yield ""
    yield f"version = {_text(f'genai-prices-{version}')}"
    yield 'currency = "USD"'


def _model(provider: Any, model: Any, in_force: set[str], found: Seeded) -> list[str]:
    """The lines of a model; `in_force` has the names before it that are in force at all times, and gets its own."""
    names, is_whole = _names(provider, model, in_force)
    lines = ["", f"# {_comment(model.id)}"]

    def leave(reason: str) -> None:
        found.left.append(Left(provider.id, model.id, reason))

    if not names:
        reason = "another model of this provider goes by its names"
        leave(reason)
        return [*lines, f"# Left out: {reason}."]
    spans = _spans(model)
    if isinstance(spans, str):
        leave(spans)
        return [*lines, f"# Left out: {spans}."]
    if not is_whole:
        lines.append("# It has other names too, by a pattern that has no place here: events under those have no price.")
    if all(span.reason is None for span in spans):
        in_force.update(names)
    wide = [name.removesuffix("*") for name in names if name.endswith("*")]
    names = [name for name in names if name.endswith("*") or not any(map(name.startswith, wide))]
    for span in spans:
        lines += [f"# Billed besides: {_comment(what)}." for what in span.besides]
        if span.reason is None:
            found.rows += 1
            lines += _row(provider.id, names, span)
            continue
        leave(span.reason + _days(span))
        lines.append(f"# {'Not in force' if span.is_base else 'Left out'}{_days(span)}: {span.reason}.")
        if span.is_base:
            lines += [f"# {line}" for line in _row(provider.id, names, span)]
    return lines


def _row(provider: str, names: list[str], span: _Span) -> list[str]:
    also = TELEMETRY_NAMES.get(provider, ())
    lines = ["[[price]]", f"provider = {_texts([provider, *also])}", f"model = {_texts(names)}"]
    lines += [f'{name} = "{_plain(rate)}"' for name, rate in span.rates.items()]
    if span.first_day is not None:
        lines.append(f"valid_from = {span.first_day.isoformat()}")
    if span.last_day_before is not None:
        lines.append(f"valid_until = {span.last_day_before.isoformat()}")
    return lines


def _days(span: _Span) -> str:
    begin = "" if span.first_day is None else f" from {span.first_day.isoformat()}"
    return begin + ("" if span.last_day_before is None else f" until {span.last_day_before.isoformat()}")


# --- names


def _names(provider: Any, model: Any, in_force: set[str]) -> tuple[list[str], bool]:
    """Names and beginnings of names that lead to a model in the package and in our table; and whether to all of it.

    The package asks its models in order and takes the first whose pattern fits, our table takes the most specific row:
    a name is written where both come to the same. A beginning of names (`*`) that a model before it has a part of must
    not price what that one is not in force for. That one name holds those of two models is not expected.
    """
    before = provider.models[: next(place for place, one in enumerate(provider.models) if one is model)]
    taken = [clause for one in before for clause in _flat(one.match) if not _is_said(clause, in_force)]
    names: dict[str, None] = {}
    is_whole = True
    for clause in [*_flat(model.match), None]:
        name, is_exact = (model.id, True) if clause is None else _written(clause)
        is_whole &= clause is None or is_exact
        if not name or (clause is None and not model.is_match(name)):
            continue
        begin = name.removesuffix("*")
        if not begin or begin != begin.strip() or "*" in begin or provider.find_model(begin) is not model:
            is_whole &= clause is None
        elif name.endswith("*") and any(_may_meet(other, begin) for other in taken):
            names[begin] = None
            is_whole = False
        else:
            names[name] = None
    return list(names), is_whole


def _flat(clause: Any) -> Iterator[Any]:
    if type(clause).__name__ == "ClauseOr":
        for part in clause.or_:
            yield from _flat(part)
    else:
        yield clause


def _written(clause: Any) -> tuple[str, bool]:
    """A clause as a name of our table, empty if there is none; and whether the name says all of the clause."""
    match type(clause).__name__:
        case "ClauseEquals":
            return clause.equals, True
        case "ClauseStartsWith":
            return f"{clause.starts_with}*", True
        case "ClauseContains":
            return f"{clause.contains}*", False
        case "ClauseEndsWith":
            return clause.ends_with, False
    return "", False


def _is_said(clause: Any, in_force: set[str]) -> bool:
    name, is_exact = _written(clause)
    return is_exact and name in in_force


def _may_meet(clause: Any, begin: str) -> bool:
    """Whether a clause fits names that begin so."""
    match type(clause).__name__:
        case "ClauseEquals":
            return bool(clause.equals.startswith(begin))
        case "ClauseStartsWith":
            return clause.starts_with.startswith(begin) or begin.startswith(clause.starts_with)
        case "ClauseContains":
            return _overlaps(begin, clause.contains)
        case "ClauseEndsWith":
            return _overlaps(begin, clause.ends_with)
        case "ClauseRegex":
            if not clause.regex.startswith("^") or "|" in clause.regex:
                return True
            found = _LITERAL.match(clause.regex, 1)
            assert found is not None, "it matches nothing as well"
            literal = found[0].replace("\\", "")
            if clause.regex[found.end() : found.end() + 1] in ("?", "*", "{"):
                literal = literal[:-1]  # may come as often as never
            return literal.startswith(begin) or begin.startswith(literal)
        case "ClauseAnd":
            return all(_may_meet(part, begin) for part in clause.and_)
    return True


def _overlaps(begin: str, part: str) -> bool:
    """Whether the end of a beginning is the beginning of a part, so that what follows can make the part whole."""
    return any(part.startswith(begin[place:]) for place in range(len(begin)))


# --- prices


def _spans(model: Any) -> list[_Span] | str:
    """What a model costs at which time, or why that cannot be told by days."""
    if not isinstance(model.prices, list):
        return [_span(model.prices, None, None)]
    starts: list[tuple[date | None, Any]] = []
    for conditional in model.prices:
        constraint = conditional.constraint
        if constraint is not None and type(constraint).__name__ != "StartDateConstraint":
            return "its price depends on the time of day"
        starts.append((None if constraint is None else constraint.start_date, conditional.prices))
    days = sorted({day for day, _ in starts if day is not None})
    found: list[tuple[date | None, Any]] = []
    for day in (None, *days):
        # The last that has begun goes first; before any has, the first of all.
        begun = [prices for start, prices in starts if start is None or (day is not None and start <= day)]
        prices = begun[-1] if begun else starts[0][1]
        if not found or found[-1][1] is not prices:
            found.append((day, prices))
    return [_span(prices, day, until) for (day, prices), (until, _) in pairwise([*found, (None, None)])]


def _span(prices: Any, first_day: date | None, last_day_before: date | None) -> _Span:
    given = {name: price for name, price in vars(prices).items() if price is not None}
    besides = tuple(
        f"{name.removesuffix('_kcount').replace('_', ' ')}, {price} USD a thousand"
        for name, price in given.items()
        if _BESIDES.match(name) and isinstance(price, Decimal)
    )
    reasons: list[str] = []
    rates: dict[str, Decimal] = {}
    tiers: dict[int, list[str]] = {}
    other: list[str] = []
    is_base = True
    for name, price in given.items():
        if name in _RATES and isinstance(price, Decimal):
            rate = price / 1_000 if name == "requests_kcount" else price
            rates[_RATES[name]] = rate
            if -_exponent(rate) > 6:
                reasons.append(f"{_RATES[name]} has more than six decimals ({price})")
                is_base = False
        elif name in _RATES:
            rates[_RATES[name]] = price.base
            for tier in price.tiers:
                tiers.setdefault(tier.start, []).append(f"{_RATES[name]} {tier.price}")
            is_base &= -_exponent(price.base) <= 6
        elif _MODALITY.match(name):
            reasons.append(f"{name.removesuffix('_mtok').replace('_', ' ')} tokens have a rate of their own ({price})")
        elif not _BESIDES.match(name):
            other.append(name.replace("_", " "))
            is_base = False
    for start, dearer in sorted(tiers.items()):
        reasons.append(f"a request of more than {start} input tokens has {', '.join(dearer)}")
    if other:
        reasons.append(f"it is billed by {', '.join(other)}")
    elif "input_per_mtok" not in rates:
        reasons.append("it has no rate for input tokens")
        is_base = False
    reason = "; ".join(_comment(one) for one in reasons) or None
    return _Span(rates, first_day, last_day_before, besides, reason, is_base)


def _exponent(amount: Decimal) -> int:
    exponent = amount.normalize().as_tuple().exponent
    if not isinstance(exponent, int):
        raise ValueError(f"{amount} is no amount")
    return exponent


def _plain(amount: Decimal) -> str:
    return format(amount.normalize(), "f")


def _text(value: str) -> str:
    return json.dumps(value)


def _texts(values: list[str]) -> str:
    return _text(values[0]) if len(values) == 1 else f"[{', '.join(map(_text, values))}]"


def _comment(text: str) -> str:
    """Text that stays on the line of its comment."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
