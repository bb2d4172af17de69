"""`asapctl delegation revocations`: the signed list of what is revoked, out of one daemon and into another."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from asapd.cli.door import RefusedError
from asapd.cli.options import Session, asks_daemon
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import show_json, show_pairs
from asapd.cli.written import written

# The answer to a list that nobody here has a reason to believe, told apart from one that cannot be read.
_NO = frozenset({"unknown_key", "bad_signature"})


@click.group()
def revocations() -> None:
    """Tokens that are revoked, as a signed list."""


@revocations.command("export")
@click.argument("file", type=click.Path(path_type=Path), default="-")
@click.option(
    "--since", type=click.IntRange(0), metavar="NUMBER", help="Only what came behind this number of the list."
)
@asks_daemon
def export_list(session: Session, file: Path, since: int | None) -> None:
    """Write the signed list to a file, or to stdout.

    A list that is too long for others goes in parts: from --since 0, and then from the number in each part, until one
    has no entries.

    \b
    Examples:
      asapctl delegation revocations export revoked.json
      asapctl delegation revocations export | ssh other asapctl delegation revocations import -
      asapctl delegation revocations export --since 0 part.json
    """
    query = "" if since is None else f"?since={since}"
    _, parts = session.door.download(f"/delegations/revocations{query}")
    with written(file) as out:
        for part in parts:
            out.write(part)
        if str(file) == "-":
            out.write(b"\n")


@revocations.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@asks_daemon
def import_list(session: Session, file: Path) -> int:
    """Revoke what a signed list says.

    Of the tokens in it those that are its signer's to revoke. The exit code is 1 when nobody here believes the list.
    FILE may be -, for stdin.

    \b
    Example:
      asapctl delegation revocations import revoked.json
    """
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise Failure(Exit.USAGE, f"{file}: cannot be read: {error.strerror}") from None
    try:
        outcome = session.door.send("/delegations/revocations", content)
    except RefusedError as refused:
        code = refused.problem.get("code")
        if code in _NO:
            raise Failure(Exit.NO, f"{code}: {refused}") from None
        raise
    if session.as_json:
        show_json(outcome)
        return Exit.DONE
    names = ("issuer", "number", "entries", "added", "known", "expired", "not_allowed", "revoked")
    show_pairs([(name.replace("_", " "), outcome[name]) for name in names])
    if outcome["not_allowed"]:
        click.echo(
            f"{outcome['not_allowed']} entries are not {outcome['issuer']}'s to revoke and were left out", err=True
        )
    return Exit.DONE
