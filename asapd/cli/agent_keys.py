"""`asapctl agents keys`: which public keys are believed of an agent."""

from __future__ import annotations

import re
from typing import Any

import click

from asapd.cli.door import segment
from asapd.cli.options import Session, asks_daemon, text_or_file
from asapd.cli.show import show_json, show_table

_KID = re.compile(r"-[A-Za-z0-9_-]{42}\Z")
_MARK = "kid:"


class _TakesThumbprint(click.Command):
    """A command that takes thumbprints for what they are: one in 64 begins with a dash, as an option does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_MARK + arg if _KID.match(arg) else arg for arg in args])


@click.group("keys")
def agent_keys() -> None:
    """Which public keys are believed of an agent.

    Keys come from the configuration, from keys_dir, from the directory's API, from imports, and from signed manifests.
    """


@agent_keys.command("list")
@click.argument("urn")
@asks_daemon
def list_agent_keys(session: Session, urn: str) -> None:
    """List the keys of an agent.

    A claimed one was seen in a manifest and is not believed; a retiring one verifies what was issued before.

    \b
    Example:
      asapctl agents keys list urn:asap:agent:writer
    """
    _show(session, session.door.whole(f"/agents/{segment(urn)}/keys"))


@agent_keys.command("import")
@click.argument("urn")
@click.argument("key", type=text_or_file)
@asks_daemon
def import_key(session: Session, urn: str, key: str) -> None:
    """Believe a public key of an agent.

    KEY is base64, or @FILE with a PEM. Keys that were learned from manifests step back for it, after their overlap.

    \b
    Examples:
      asapctl agents keys import urn:asap:agent:writer s0l8kjq8smWf5OnQ+1iP4oBpUJ2EnYOSU0QKZIYbKUY=
      asapctl agents keys import urn:asap:agent:writer @writer.pub
    """
    _show(session, session.door.post(f"/agents/{segment(urn)}/keys", {"public_key": key}))


@agent_keys.command(cls=_TakesThumbprint)
@click.argument("urn")
@click.argument("kid", type=lambda text: text.removeprefix(_MARK))
@click.option(
    "--overlap",
    metavar="DURATION",
    help="For so long it still verifies what was issued before; 0s for a key that leaked. Without it as configured.",
)
@asks_daemon
def retire(session: Session, urn: str, kid: str, overlap: str | None) -> None:
    """Retire a key of an agent, or dismiss a claimed one.

    KID is its thumbprint, as the list shows it. A shorter overlap also ends one that already runs.

    \b
    Example:
      asapctl agents keys retire urn:asap:agent:writer kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k --overlap 0s
    """
    _show(session, session.door.delete(f"/agents/{segment(urn)}/keys/{segment(kid)}", overlap=overlap))


def _show(session: Session, found: dict[str, Any]) -> None:
    if session.as_json:
        show_json(found)
        return
    fields = ("kid", "source", "state", "verifies", "since", "until")
    show_table(fields, [[row[field] for field in fields] for row in found["data"]])
