"""What `asapd check-config` finds: problems of a configuration and its price table, and what a reload would do."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from pathlib import Path

from asapd.config import Config, ConfigError, Finding, diff, load
from asapd.config.positions import Place, lines_of
from asapd.core.errors import FieldError
from asapd.core.price_table import PriceTableError, parse_price_table, unused_rows
from asapd.edge.sockets import CannotListen, group_id
from asapd.wire.keys import KeyFormatError, load_public
from asapd.wire.webhook import SecretError, read_secret

_SYNTAX_LINE = re.compile(r" \(at line (\d+), column \d+\)\Z")


def check(path: Path) -> tuple[Config | None, list[str]]:
    """A configuration, and every problem of it and of what it names, as `file:line: field: reason`."""
    in_prices: list[str] = []

    def named(config: Config) -> Iterator[Finding]:
        if config.metering.pricing.file is not None:
            in_prices.extend(price_problems(config.metering.pricing.file))
        for find in (_unsafe_keys, _unknown_groups, _unread_secrets, _unread_certificates):
            yield from find(config)

    try:
        return load(path, named), in_prices
    except ConfigError as error:
        return None, [*str(error).splitlines(), *in_prices]


def _unsafe_keys(config: Config) -> Iterator[Finding]:
    given: list[tuple[Place, str | None]] = [
        *((("agents", i), agent.public_key) for i, agent in enumerate(config.agents)),
        *(
            (("delegation", "revocation_source", i), source.public_key)
            for i, source in enumerate(config.delegation.revocation_sources)
        ),
        *((("audit", "witness", i), witness.public_key) for i, witness in enumerate(config.audit.witnesses)),
        *((("audit", "witness_for", i), log.public_key) for i, log in enumerate(config.audit.witness_for)),
    ]
    for place, key in given:
        try:
            if key is not None:
                load_public(key)
        except KeyFormatError as error:
            yield Finding((*place, "public_key"), str(error))


def _unknown_groups(config: Config) -> Iterator[Finding]:
    for door, group in (("admin", config.admin.group), ("ingest", config.ingest.group)):
        try:
            if group is not None:
                group_id(group)
        except CannotListen as error:
            yield Finding((door, "group"), str(error))


def _unread_secrets(config: Config) -> Iterator[Finding]:
    for index, hook in enumerate(config.alerts.webhooks):
        if hook.secret_file is not None:
            try:
                read_secret(hook.secret_file.read_bytes())
            except (OSError, SecretError) as error:
                reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
                yield Finding(("alerts", "webhook", index, "secret_file"), f"{hook.secret_file}: {reason}")


def _unread_certificates(config: Config) -> Iterator[Finding]:
    tls = config.http.tls
    if tls is None:
        return

    def problem(setting: str, reason: str) -> Finding:
        return Finding(("http", "tls", setting), reason)

    unread = []
    for setting in ("cert_file", "key_file", "client_ca_file"):
        file: Path | None = getattr(tls, setting)
        try:
            if file is not None:
                file.read_bytes()
        except OSError as error:
            unread.append(problem(setting, f"{file}: cannot be read: {error.strerror}"))
    if unread:
        yield from unread
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    except ssl.SSLError as error:
        yield problem(
            "cert_file", f"{tls.cert_file} and {tls.key_file} are no certificate with its key: {error.reason}"
        )
    try:
        if tls.client_ca_file is not None:
            context.load_verify_locations(tls.client_ca_file)
    except ssl.SSLError as error:
        yield problem("client_ca_file", f"{tls.client_ca_file} holds no certificate: {error.reason}")


def price_problems(path: Path) -> Iterator[str]:
    """Every problem of a price table as `file:line: field: reason`, in the order of the lines."""
    try:
        text = path.read_bytes().decode("utf-8")
        parse_price_table(text)
    except OSError as error:
        yield f"{path}: file: cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        yield f"{path}:{line}: file: is not UTF-8 text; save it as UTF-8"
    except PriceTableError as error:
        yield from (f"{path}:{line}: {said}" for line, said in sorted(_told(text, one) for one in error.problems))


def _told(text: str, problem: FieldError) -> tuple[int, str]:
    """The line of a problem of a price table, and what it is."""
    if problem.field == "toml":
        found = _SYNTAX_LINE.search(problem.reason)
        return int(found[1]) if found else len(text.splitlines()) or 1, f"syntax: {problem.reason}"
    return _line_of(text, problem.field), f"{problem.field}: {problem.reason}"


def price_remarks(path: Path) -> Iterator[str]:
    """Rows of a good price table that are of no use, in the same form."""
    text = path.read_bytes().decode("utf-8")
    for remark in unused_rows(text):
        yield f"{path}:{_line_of(text, remark.field)}: {remark.field}: {remark.reason}"


def _line_of(text: str, field: str) -> int:
    lines = lines_of(text)
    place: Place = tuple(int(step) if step.isdecimal() else step for step in re.findall(r"[^.\[\]]+", field))
    while place and place not in lines:
        place = place[:-1]
    return lines.get(place, 1)


def reload_effects(running: Config, new: Config) -> Iterator[str]:
    """What a reload from one configuration to another would do, a line each."""
    changes = diff(running, new)
    for agent in changes.agents_added:
        yield f"reload adds agent {agent.id}"
    for agent in changes.agents_removed:
        yield f"reload removes agent {agent.id}"
    for agent in changes.agents_changed:
        yield f"reload changes agent {agent.id}"
    for name in changes.settings:
        yield f"reload changes {name}"
    for name in changes.restart_required:
        yield f"a restart is needed for {name}"
    if not changes.any:
        yield "nothing would change"
