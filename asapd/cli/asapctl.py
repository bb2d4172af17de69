"""`asapctl`: asks a running daemon over its admin socket."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from asapd import __version__
from asapd.cli.agents import agents
from asapd.cli.alerts import alerts, breaches, silences
from asapd.cli.audit import audit
from asapd.cli.backup import backup
from asapd.cli.budgets import budgets
from asapd.cli.configuration import config, reload
from asapd.cli.conformance import conformance
from asapd.cli.dashboard import dashboard
from asapd.cli.delegation import delegation
from asapd.cli.doctor import doctor
from asapd.cli.door import segment
from asapd.cli.keys import keys
from asapd.cli.maintenance import maintenance
from asapd.cli.options import SETTINGS, SOCKET_PATH, Session, asks_daemon
from asapd.cli.outcome import run
from asapd.cli.prices import prices
from asapd.cli.retention import retention
from asapd.cli.show import show_json, show_pairs, show_table
from asapd.cli.sla import sla
from asapd.cli.top import top
from asapd.cli.usage import usage


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="asapctl", message="%(prog)s %(version)s")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in every command.")
@click.option(
    "--socket",
    type=SOCKET_PATH,
    help="The daemon's admin socket; without it $ASAPD_SOCKET, else the default of a daemon of this user.",
)
def asapctl(as_json: bool, socket: Path | None) -> None:
    """Ask a running asapd, and tell it what to do.

    \b
    Exit codes: 0 done; 1 the answer is no (an invalid token, a broken audit log,
    an open breach with --fail); 2 wrong usage; 3 the daemon cannot be reached;
    4 refused for lack of permission; 70 internal failure.

    \b
    Examples:
      asapctl status
      asapctl usage report --by agent --period day --since 7d
      asapctl sla breaches --watch
      asapctl --json agents list
    """


@asapctl.command()
@asks_daemon
def status(session: Session) -> None:
    """Show how the daemon is.

    Version, readiness, addresses, actors, store and configuration.

    \b
    Examples:
      asapctl status
      asapctl status --json
    """
    state = session.door.get("/status")
    if session.as_json:
        show_json(state)
        return
    config, store = state["config"], state["store"]
    show_pairs(
        [
            ("version", state["version"]),
            ("ready", state["ready"]),
            ("uptime", _uptime(int(state["uptime_seconds"]))),
            ("listening", state.get("listening")),
            ("configuration", config["state"]),
            *(
                (f"  {name.replace('_', ' ')}", value)
                for name, value in config.items()
                if name not in ("state", "errors")
            ),
            *(("  problem", problem) for problem in config["errors"]),
            ("store", store["path"]),
            *((f"  {name.replace('_', ' ')}", value) for name, value in store.items() if name != "path"),
            ("events of unknown cost", state["usage"]["unpriced_events"]),
            ("agents", state["agents"]["total"]),
            *((f"  {name.replace('_', ' ')}", state["agents"][name]) for name in ("paused", "flapping", "not_probed")),
        ]
    )
    for error in state["agents"]["sla_errors"]:
        click.echo(f"SLA not used: the manifest of {error['agent']}: {error['error']}", err=True)
    keys = state.get("keys") or {}
    for problem in keys.get("problems", []):
        click.echo(f"key not used: {problem}", err=True)
    for claim in keys.get("unconfirmed", []):
        click.echo(f"key not confirmed: {claim['agent']} signs with {claim['kid']} since {claim['since']}", err=True)
    for target in (state.get("alerts") or {}).get("targets", []):
        if target["state"] == "failing":
            waiting = f"{target['name']} fails since {target['failing_since']}, {target['backlog']} wait"
            click.echo(f"alerts not taken: {waiting}: {target['last_error']}", err=True)
    click.echo()
    columns = ("actor", "state", "restarts", "mailbox", "last error")
    fields = ("state", "restarts", "mailbox", "last_error")
    show_table(columns, [(name, *(actor.get(field) for field in fields)) for name, actor in state["actors"].items()])


def _uptime(seconds: int) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3_600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}"
    return f"{days}d {clock}" if days else clock


@asapctl.group()
def actor() -> None:
    """The parts of the daemon."""


@actor.command()
@click.argument("name")
@asks_daemon
def restart(session: Session, name: str) -> None:
    """Restart one part of the daemon.

    What waits in its mailbox is kept.

    \b
    Example:
      asapctl actor restart prober
    """
    outcome = session.door.post(f"/actors/{segment(name)}/restart")
    if session.as_json:
        show_json(outcome)
    else:
        click.echo(f"restarted: {outcome['restarted']}")


for command in (conformance, dashboard, doctor, reload, top):
    asapctl.add_command(command)
for group in (
    agents,
    usage,
    prices,
    retention,
    backup,
    delegation,
    budgets,
    sla,
    maintenance,
    breaches,
    silences,
    alerts,
    audit,
    keys,
    config,
):
    asapctl.add_command(group)


def main() -> int:
    """The console script."""
    return run(asapctl, "asapctl")


if __name__ == "__main__":
    sys.exit(main())
