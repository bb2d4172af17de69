"""`asapctl config` and `asapctl reload`: what is in force, what would be, and back to what was."""

from __future__ import annotations

import codecs
import hashlib
import os
from pathlib import Path
from typing import Any

import click

from asapd.cli.door import RefusedError
from asapd.cli.options import Session, asks_daemon
from asapd.cli.outcome import Exit, Failure
from asapd.cli.show import cell, show_json, show_table
from asapd.cli.written import whole


@click.command()
@asks_daemon
def reload(session: Session) -> int:
    """Read the configuration again.

    Waits for the outcome. A file with a problem changes nothing: each problem is printed as file:line: field: reason,
    and the exit code is 2.

    \b
    Example:
      asapctl reload
    """
    try:
        outcome = session.door.post("/reload")
    except RefusedError as refused:
        return _show_problems(session, refused)
    if session.as_json:
        show_json(outcome)
    else:
        _show_applied(outcome)
    return Exit.DONE


@click.group()
def config() -> None:
    """The configuration in force, and those before it."""


@config.command()
@click.option("--version", "number", type=click.IntRange(1), help="Print the text of that version instead, as it is.")
@asks_daemon
def show(session: Session, number: int | None) -> None:
    """Print the configuration in force, as TOML.

    With all defaults, and without what may be a secret: paths of webhooks, arguments of programs. The text of a version
    is as it was written; it takes an admin.

    \b
    Examples:
      asapctl config show
      asapctl config show --version 3 > asapd.toml
    """
    if number is not None:
        kept = session.door.get(f"/config/versions/{number}")
        if session.as_json:
            show_json(kept)
        else:
            click.echo(kept["text"], nl=False)
        return
    shown = session.door.get("/config")
    if session.as_json:
        show_json(shown)
        return
    click.echo(shown["toml"], nl=False)
    for name in shown["waiting_for_restart"]:
        click.echo(f"waits for a restart: {name}", err=True)
    for problem in shown["errors"]:
        click.echo(f"the file was refused: {problem}", err=True)


@config.command()
@click.argument("number", metavar="[VERSION]", type=click.IntRange(1), required=False)
@asks_daemon
def diff(session: Session, number: int | None) -> int:
    """Compare what is in force with the file, or a version of it.

    With the file it is what `asapctl reload` would change. Where that would be refused, the problems are printed, and
    the exit code is 2.

    \b
    Examples:
      asapctl config diff
      asapctl config diff 3
    """
    try:
        found = session.door.get("/config/diff", version=number)
    except RefusedError as refused:
        return _show_problems(session, refused)
    if session.as_json:
        show_json(found)
        return Exit.DONE
    there = "file" if number is None else f"version {number}"
    if not found["changes"]:
        click.echo(f"no difference between what is in force and the {there}")
        return Exit.DONE
    rows = [(row["setting"], row["in_force"], row["there"]) for row in found["changes"]]
    show_table(("setting", "in force", there), rows)
    for name in found["restart_required"]:
        click.echo(f"only a restart applies: {name}", err=True)
    return Exit.DONE


@config.command("versions")
@asks_daemon
def list_versions(session: Session) -> None:
    """List the versions of the file that were accepted.

    The newest first; asapd keeps the last fifty.

    \b
    Example:
      asapctl config versions
    """
    rows = list(session.door.rows("/config/versions"))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    fields = ("version", "accepted_at", "in_force", "sha256")
    show_table(("version", "accepted", "in force", "sha256"), [[row[field] for field in fields] for row in rows])


@config.command()
@click.argument("number", metavar="[VERSION]", type=click.IntRange(1), required=False)
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write; needed where asapd runs as another user, whose word for it is not taken.",
)
@asks_daemon
def rollback(session: Session, number: int | None, file: Path | None) -> int:
    """Go back to a version of the file that was accepted before.

    Without VERSION it is the newest that is not what the file says now: after a reload the one before, and before a
    reload, or when that was refused, the one in force. The file is written and read again, so this user has to be one
    who may write it. What stood there and was never accepted is kept beside it as FILE.before-rollback. When the
    version is refused, because what it names is gone for example, the file is put back and the exit code is 2.

    \b
    Examples:
      asapctl config rollback
      asapctl config rollback 3 --file /etc/asapd/asapd.toml
    """
    versions = list(session.door.rows("/config/versions"))
    is_named = file is not None
    file = _file_of(session, file)
    before = _read(file)
    number = _newest_other(versions, before) if number is None else number
    text = session.door.get(f"/config/versions/{number}")["text"].encode()
    if not is_named:
        _trust(session, file)
    if before is not None and before != text and _digest(before) not in {row["sha256"] for row in versions}:
        _write(file.with_name(f"{file.name}.before-rollback"), before, like=file)
    _write(file, text, like=file)
    try:
        outcome = session.door.post("/reload")
    except RefusedError as refused:
        if before is not None:
            _write(file, before, like=file)
            click.echo(f"{file}: put back as it was: version {number} is refused now", err=True)
        return _show_problems(session, refused)
    if session.as_json:
        show_json({**outcome, "path": str(file), "rolled_back_to": number})
        return Exit.DONE
    click.echo(f"{file}: as in version {number}")
    _show_applied(outcome)
    return Exit.DONE


def _file_of(session: Session, named: Path | None) -> Path:
    """The daemon's file. Of a daemon of another user it has to be named: one that was taken over could name any."""
    told = Path(session.door.get("/config")["path"])
    if named is None:
        _trust(session, told)
    if named is not None and named.resolve() != told.resolve():
        raise Failure(Exit.USAGE, f"asapd does not read {named}, but {told}: nothing was changed")
    return told.resolve()


def _trust(session: Session, told: Path) -> None:
    """Refuse unless all that was told came from this user's own programs."""
    if session.door.owners != {os.geteuid()}:
        what = f"asapd runs as another user, and says that its file is {told}"
        raise Failure(Exit.USAGE, f"{what}: if so, add --file {told}")


def _newest_other(versions: list[dict[str, Any]], now: bytes | None) -> int:
    standing = None if now is None else _digest(now)
    for row in versions:
        if row["sha256"] != standing:
            number: int = row["version"]
            return number
    raise Failure(Exit.USAGE, "there is no other version to go back to: see `asapctl config versions`")


def _digest(text: bytes) -> str:
    """As asapd has it: of the text alone, without the mark that some editors put before it."""
    return hashlib.sha256(text.removeprefix(codecs.BOM_UTF8)).hexdigest()


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _cannot(file, error) from None


def _write(file: Path, text: bytes, *, like: Path) -> None:
    """Write a file whole or not at all, for the same owner and with the same mode as another that may be there."""
    try:
        with whole(file, like=like.stat() if like.exists() else None) as out:
            out.write(text)
    except OSError as error:
        raise _cannot(file, error) from None


def _cannot(file: Path, error: OSError) -> Failure:
    what = f"{file}: {error.strerror or error}: nothing was changed"
    return Failure(
        Exit.FORBIDDEN, f"{what}; run this as a user who may write it, or take `asapctl config show --version N`"
    )


def _show_problems(session: Session, refused: RefusedError) -> int:
    if refused.problem.get("code") != "config_refused":
        raise refused
    if session.as_json:
        show_json(refused.problem)
    for problem in refused.problem.get("problems") or [str(refused)]:
        click.echo(problem, err=True)
    return Exit.USAGE


def _show_applied(outcome: dict[str, Any]) -> None:
    changed = [(name, what) for name, what in outcome["applied"].items() if what not in (None, False, 0, [], {})]
    for name, what in changed:
        click.echo(f"applied: {name}" if what is True else f"applied: {name}: {cell(what)}")
    for name in outcome["restart_required"]:
        click.echo(f"restart required: {name}")
    if not changed and not outcome["restart_required"]:
        click.echo("nothing changed in the configuration")
