"""A configuration as its file would have it: every setting by its name there, as it is written there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from asapd.config.model import Config
from asapd.config.values import Bind, duration_text, rate_text, size_text
from asapd.core.money import to_usd
from asapd.core.rates import Rate

MASKED = "[masked]"


def written(config: Config) -> dict[str, Any]:
    """Every setting that has a value, defaults too; as TOML it reads as the same configuration again."""
    return _section(config)


def masked(document: Mapping[str, Any]) -> dict[str, Any]:
    """A `written` configuration without what may be a secret: paths of webhooks and witnesses, arguments."""
    shown = dict(document)
    alerts = {name: [dict(target) for target in document["alerts"][name]] for name in ("webhook", "command")}
    for hook in alerts["webhook"]:
        hook["url"] = _masked_url(hook["url"])
    for command in alerts["command"]:
        command["argv"] = _masked_arguments(command["argv"])
    shown["alerts"] = {**document["alerts"], **alerts}
    mailed = _masked_arguments(document["audit"]["witness_command"])
    witness = [{**one, "url": _masked_url(one["url"])} for one in document["audit"]["witness"]]
    shown["audit"] = {**document["audit"], "witness": witness, "witness_command": mailed}
    return shown


def flat(document: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Values by the names that pages and messages use, such as `sla.hold` and `agents[urn:asap:agent:x].url`."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        path = f"{at}{name}"
        if isinstance(value, dict):
            found |= flat(value, f"{path}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                found |= flat(item, f"{path}[{item.get('id') or item.get('name') or index}].")
        elif value != []:  # a list of tables that is empty has no place of its own
            found[path] = value
    return found


def as_toml(document: Mapping[str, Any]) -> str:
    """A `written` configuration as TOML."""
    return "".join(_tables(document, "")).lstrip("\n")


def _section(section: BaseModel) -> dict[str, Any]:
    found = {}
    for name, field in type(section).model_fields.items():
        value = _value(name, getattr(section, name))
        if value is not None:
            found[field.alias or name] = value
    return found


def _value(name: str, value: Any) -> Any:
    """A value as it is written, by its unit, which its name ends in; None for what is not set."""
    match value:
        case BaseModel():
            return _section(value)
        case tuple():
            return [_value(name, item) for item in value]
        case None:
            # Of all that may be left out, it alone has a word for that.
            return "forever" if name == "audit_us" else None
        case Bind():
            return value.text
        case Path() | IPv4Network() | IPv6Network():
            return str(value)
        case Rate():
            return rate_text(value)
        case Decimal():
            return f"{value:f}%"
        case int() if name.endswith("_us"):
            return duration_text(value)
        case int() if name.endswith("_bytes"):
            return size_text(value)
        case int() if name.endswith("_microusd"):
            return str(to_usd(value))
        case int() if name == "mode":
            return f"{value:04o}"
        case _:
            return value


def _masked_url(url: str) -> str:
    parts = urlsplit(url)
    return url if parts.path in {"", "/"} and not parts.query else f"{parts.scheme}://{parts.netloc}/{MASKED}"


def _masked_arguments(argv: list[str]) -> list[str]:
    return [*argv[:1], *(MASKED for _ in argv[1:])]


def _tables(table: Mapping[str, Any], at: str) -> Iterator[str]:
    inner = {name: value for name, value in table.items() if _is_table(value) or _is_tables(value)}
    for name, value in table.items():
        if name not in inner:
            yield f"{_key(name)} = {_text(value)}\n"
    for name, value in inner.items():
        path = f"{at}.{_key(name)}" if at else _key(name)
        for item in value if _is_tables(value) else ():
            yield f"\n[[{path}]]\n"
            yield from _tables(item, path)
        if _is_table(value):
            yield f"\n[{path}]\n"
            yield from _tables(value, path)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: Any) -> str:
    """A scalar or a list of them. TOML takes JSON's, but for one character that JSON leaves as it is."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
