"""`asapctl dashboard`: a way into the page without a key."""

from __future__ import annotations

import click

from asapd.cli.options import Session, asks_daemon
from asapd.cli.show import show_json


@click.command()
@asks_daemon
def dashboard(session: Session) -> None:
    """Print an address that opens the page of figures, once.

    It opens within five minutes, for one browser, which may then read for eight hours what this user may read. Paste it
    there: the arguments of a program such as xdg-open are everybody's to read.

    \b
    Example:
      asapctl dashboard
    """
    made = session.door.post("/login")
    if session.as_json:
        show_json(made)
        return
    click.echo(made["url"] or made["path"])
    if made["url"] is None:
        click.echo("http.bind has no TCP address: open this path where the page is served", err=True)
    click.echo(f"opens once, until {made['expires_at']}", err=True)
