"""`asapctl conformance`: whether a live agent keeps to the protocol."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from asapd.cli.options import needs_no_daemon, text_or_file
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import cell, show_json
from asapd.core.types import AGENT_URN

if TYPE_CHECKING:
    from asapd.cli.conformance_visit import Report

_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}\Z")


@click.command()
@click.argument("url")
@click.option("--agent", metavar="URN", help="Whose address this should be.")
@click.option("--public-key", type=text_or_file, metavar="KEY", help="The key it should sign with: base64, or @FILE.")
@click.option(
    "--bearer",
    type=text_or_file,
    metavar="TOKEN",
    help="Credentials for its /asap/delegations, or @FILE: a delegation for a minute is issued there and revoked.",
)
@click.option("--delegator", metavar="URN", help="Whom the bearer stands for, unless that is the agent itself.")
@click.option("--delegator-key", type=text_or_file, metavar="KEY", help="The key of that delegator: base64, or @FILE.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 120),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="For each request.",
)
@needs_no_daemon
def conformance(
    url: str,
    agent: str | None,
    public_key: str | None,
    bearer: str | None,
    delegator: str | None,
    delegator_key: str | None,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Check a live agent at URL.

    Its health document, its manifest with signature, SLA and ttl, whether all of it names the same agent, its key set
    and how it guards delegations. Without --bearer nothing is changed at an agent that asks for credentials; one that
    does not issues a delegation for a minute. What cannot be checked is skipped with the reason. Exit code 1 means that
    something fails, 3 that nobody answers; a warning alone is 0. This needs no daemon.

    \b
    Examples:
      asapctl conformance http://127.0.0.1:9000
      asapctl conformance https://writer.example --agent urn:asap:agent:writer --public-key @writer.pub --json
    """
    import trio

    from asapd.cli.conformance_visit import Expectations, visit

    _check_url(url)
    _check_agent("--agent", agent)
    _check_agent("--delegator", delegator)
    _check_bearer(bearer)
    if bearer is None and (delegator is not None or delegator_key is not None):
        raise Failure(Exit.USAGE, "--delegator and --delegator-key: are of the token that --bearer asks for; give it")
    expected = Expectations(
        agent, _key("--public-key", public_key), bearer, delegator, _key("--delegator-key", delegator_key)
    )

    async def run() -> Report:
        return await visit(url, expected, timeout_s=timeout_s)

    report = trio.run(run)
    if as_json:
        show_json(
            {
                "url": report.url,
                "agent": report.agent,
                "reachable": report.reachable,
                "conforms": report.conforms,
                "checks": report.checks,
                "findings": report.findings,
            }
        )
    if not report.reachable:
        raise Failure(Exit.UNREACHABLE, f"{url} cannot be reached: {report.checks['reachable']}")
    if not as_json:
        _show(report)
    return Exit.DONE if report.conforms else Exit.NO


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        parts, host, port = urlsplit(""), "", 0
    fault = ""
    if parts.scheme not in ("http", "https") or not host or port == 0 or any(mark in url for mark in "@?#"):
        fault = "must be the base URL of an agent, such as http://127.0.0.1:9000"
    elif not host.isascii():
        fault = "names of hosts beyond ASCII are written in their xn-- form"
    elif not url.isascii() or not url.isprintable() or any(mark in url for mark in ' "<>\\^`{|}'):
        fault = "holds a character that no URL has: write it as the percent signs and hex digits of its UTF-8"
    elif not _is_host(host):
        fault = f"{host}: must be an IP address, or a name of labels of 1 to 63 letters, digits, - and _ between dots"
    if fault:
        raise Failure(Exit.USAGE, f"{url!a}: {fault}")


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    # RFC 1035 section 2.3.4.
    return len(host) <= 253 and all(_LABEL.match(label) for label in host.removesuffix(".").split("."))


def _check_agent(option: str, name: str | None) -> None:
    if name is not None and AGENT_URN.match(name) is None:
        raise Failure(Exit.USAGE, f"{option}: {name!a}: must be an agent's name, urn:asap:agent:<name>")


def _check_bearer(bearer: str | None) -> None:
    """The message holds nothing of the credentials."""
    if bearer == "":
        raise Failure(Exit.USAGE, "--bearer: is empty")
    if bearer is not None and not all("!" <= character <= "~" for character in bearer):
        raise Failure(
            Exit.USAGE, "--bearer: holds a character other than visible ASCII, such as a space or a line's end"
        )


def _key(option: str, text: str | None) -> bytes | None:
    from asapd.wire.keys import KeyFormatError, load_public

    try:
        return None if text is None else load_public(text)
    except KeyFormatError as error:
        raise Failure(Exit.USAGE, f"{option}: {error}") from None


def _show(report: Report) -> None:
    click.echo(f"{cell(report.agent)} at {report.url}")
    for check, outcome in report.checks.items():
        click.echo(f"  {check:<12}{cell(outcome)}")
    for one in report.findings:
        click.echo(f"{one.severity} {one.code}: {cell(one.detail)}")
        click.echo(f"  {one.remedy}")
    click.echo("conforms" if report.conforms else "does not conform")
