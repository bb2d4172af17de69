"""`asapctl conformance`: whether a live agent keeps to the protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from asapd.cli.options import json_option, text_or_file
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import cell, show_json

if TYPE_CHECKING:
    from asapd.cli.conformance_visit import Report


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
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 120),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="For each request.",
)
@json_option
def conformance(
    url: str, agent: str | None, public_key: str | None, bearer: str | None, timeout_s: float, as_json: bool
) -> int:
    """Check a live agent at URL.

    Its health document, its manifest with signature, SLA and ttl, whether all of it names the same agent, its key set
    and how it guards delegations. Nothing is changed there unless --bearer is given. Exit code 1 means that something
    fails, 3 that nobody answers; a warning alone is 0. This needs no daemon.

    \b
    Examples:
      asapctl conformance http://127.0.0.1:9000
      asapctl conformance https://writer.example --agent urn:asap:agent:writer --public-key @writer.pub --json
    """
    import trio

    from asapd.cli.conformance_visit import Expectations, visit
    from asapd.wire.keys import KeyFormatError, load_public

    _check_url(url)
    try:
        key = None if public_key is None else load_public(public_key)
    except KeyFormatError as error:
        raise Failure(Exit.USAGE, f"--public-key: {error}") from None
    expected = Expectations(agent, key, bearer)

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
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isprintable() or " " in url or "@" in url or "?" in url or "#" in url:
        raise Failure(Exit.USAGE, f"{url!a}: must be the base URL of an agent, such as http://127.0.0.1:9000")


def _show(report: Report) -> None:
    click.echo(f"{cell(report.agent)} at {report.url}")
    for check, outcome in report.checks.items():
        click.echo(f"  {check:<12}{cell(outcome)}")
    for one in report.findings:
        click.echo(f"{one.severity} {one.code}: {cell(one.detail)}")
        click.echo(f"  {one.remedy}")
    click.echo("conforms" if report.conforms else "does not conform")
