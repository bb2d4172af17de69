"""`asapctl delegation`: tokens, with and without a daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asapd.cli.door import RefusedError, segment
from asapd.cli.options import (
    SOCKET_PATH,
    Session,
    asks_daemon,
    duration,
    json_option,
    needs_no_daemon,
    now_us,
    open_door,
    text_or_file,
    usd,
)
from asapd.cli.outcome import Exit, Failure
from asapd.cli.revocations import revocations
from asapd.cli.show import cell, show_json, show_pairs, show_table

if TYPE_CHECKING:
    from asapd.core.delegation import Claims
    from asapd.wire.token import SignedToken


@click.group()
def delegation() -> None:
    """Tokens: who may do what for whom.

    A TOKEN may be given as @FILE, or as - for stdin.
    """


delegation.add_command(revocations)


class _SeveralScopes(click.Command):
    """A command whose `--scope` takes all that follows it up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give each scope an option of its own, which is what click knows."""
        told: list[str] = []
        more = False  # whether a word that is no option is one more scope
        for before, word in zip([None, *args], args, strict=False):
            if before == "--scope" or word.startswith("-"):
                more = before == "--scope" or word.startswith("--scope=")
                told.append(word)
            else:
                told += ["--scope", word] if more else [word]
        return super().parse_args(ctx, told)


@delegation.command(cls=_SeveralScopes)
@click.option(
    "--key",
    "key_file",
    type=click.Path(path_type=Path),
    help="The delegator's private key (PEM), to sign here, without a daemon. Without it the daemon signs.",
)
@click.option("--delegator", required=True, metavar="URN", help="Who lets.")
@click.option("--delegate", required=True, metavar="URN", help="Who is let.")
@click.option("--scope", "scopes", required=True, multiple=True, help="What is let: a.b, a.* or *; one or several.")
@click.option("--max-cost-usd", "max_cost_microusd", type=usd, metavar="USD", help="At most so much may be spent.")
@click.option("--max-tasks", type=click.IntRange(min=0), help="At most so many tasks.")
@click.option(
    "--expires-in", "expires_in_us", required=True, type=duration, metavar="DURATION", help="Such as 7d or 30m."
)
@click.option("--parent", type=text_or_file, metavar="TOKEN", help="The token that the delegator passes on a part of.")
@click.option(
    "--form", type=click.Choice(("jws", "document")), default="jws", help="A compact token, or JSON; with --key."
)
@click.option("--socket", type=SOCKET_PATH, help="The daemon's admin socket, where no --key is given.")
@json_option
def issue(key_file: Path | None, form: str, socket: Path | None, as_json: bool, **terms: Any) -> None:
    """Sign a token, and print it.

    With --key this needs no daemon; a daemon learns of the token when it is first used or registered.

    \b
    Examples:
      asapctl delegation issue --key root.pem --delegator urn:asap:agent:root \\
          --delegate urn:asap:agent:writer --scope 'task.*' --max-cost-usd 10 --expires-in 7d
      asapctl delegation issue --key writer.pem --delegator urn:asap:agent:writer \\
          --delegate urn:asap:agent:helper --scope task.execute task.read --expires-in 1h --parent @root.token
    """
    from asapd.core.types import SECOND_US

    if terms["expires_in_us"] < SECOND_US:
        raise Failure(Exit.USAGE, "--expires-in: a token holds for at least 1s")
    if key_file is None and form != "jws":
        raise Failure(Exit.USAGE, f"the daemon signs compact tokens only: for a {form} give --key")
    made = _signed_by_daemon(socket, terms) if key_file is None else _signed_here(key_file, form, terms)
    if as_json:
        show_json(made)
    else:
        click.echo(made["token"])


def _signed_here(key_file: Path, form: str, terms: dict[str, Any]) -> dict[str, Any]:
    from ulid import ULID

    from asapd.core.delegation import Claims, check_chain
    from asapd.wire.keys import KeyFormatError, load_private_pem
    from asapd.wire.token import TokenMalformed, decode, lineage, sign, sign_document

    try:
        key = load_private_pem(key_file.read_bytes())
    except OSError as error:
        raise Failure(Exit.USAGE, f"{key_file}: cannot be read: {error.strerror}") from None
    except KeyFormatError as error:
        raise Failure(Exit.USAGE, f"{key_file}: {error}") from None
    time_us = now_us()
    claims = Claims(
        id=f"del_{ULID()}",
        delegator=terms["delegator"],
        delegate=terms["delegate"],
        scopes=tuple(dict.fromkeys(terms["scopes"])),
        max_tasks=terms["max_tasks"],
        max_cost_microusd=terms["max_cost_microusd"],
        issued_at_us=time_us,
        expires_at_us=time_us + terms["expires_in_us"],
    )
    try:
        token = decode((sign if form == "jws" else sign_document)(claims, key, parent=terms["parent"]))
    except TokenMalformed as error:
        raise Failure(Exit.USAGE, f"nothing was issued: {error.reason}") from None
    denied = check_chain(
        [link.claims for link in lineage(token)],
        now_us=time_us,
        max_depth=32,
        is_trusted_root=lambda _: True,
        is_revoked=lambda _: False,
        action=None,
        delegate=None,
    )
    if denied is not None:
        click.echo(f"warning: every daemon will refuse this token: {denied.reason}: {denied.detail}", err=True)
    return {"id": claims.id, "token": token.text, "delegation": _shown(token.claims)}


def _signed_by_daemon(socket: Path | None, terms: dict[str, Any]) -> Any:
    from asapd.core.delegation import Reason
    from asapd.core.money import to_usd
    from asapd.core.types import format_us

    cost = terms["max_cost_microusd"]
    constraints = {
        "max_cost_usd": None if cost is None else to_usd(cost),
        "max_tasks": terms["max_tasks"],
        "expires_at": format_us(now_us() + terms["expires_in_us"]),
    }
    body = {name: terms[name] for name in ("delegator", "delegate", "scopes", "parent")}
    body["constraints"] = {name: value for name, value in constraints.items() if value is not None}
    try:
        return open_door(socket).post("/delegations", body)
    except RefusedError as refused:
        code = refused.problem.get("code")
        if code in set(Reason):
            raise Failure(Exit.NO, f"{code}: {refused}") from None
        raise


@delegation.command()
@click.argument("token", type=text_or_file)
@needs_no_daemon
def inspect(token: str, as_json: bool) -> None:
    """Show what a token and its parents say.

    Takes both forms, and works without a daemon; signatures are not checked, which `validate` does.

    \b
    Example:
      asapctl delegation inspect @writer.token
    """
    from asapd.wire.token import TokenMalformed, decode, lineage

    try:
        chain: tuple[SignedToken, ...] = lineage(decode(token, max_depth=64, max_bytes=256 * 1024))
    except TokenMalformed as error:
        raise Failure(Exit.NO, f"malformed: {error.reason}") from None
    links = [_inspected(link) for link in chain]
    if as_json:
        show_json({**links[-1], "chain": links, "signature_checked": False})
        return
    for number, link in enumerate(links):
        click.echo(f"{'root' if number == 0 else f'link {number}'}" if len(links) > 1 else "token")
        show_pairs([(f"  {name.replace('_', ' ')}", value) for name, value in link.items()])
    click.echo("signatures were not checked", err=True)


def _inspected(link: SignedToken) -> dict[str, Any]:
    parent = link.parent_id if link.parent is None else link.parent.claims.id
    form = "document" if link.text.startswith("{") else "jws"
    return {**_shown(link.claims), "parent": parent, "form": form, "kid": link.kid, "digest": link.digest.hex()}


def _shown(claims: Claims) -> dict[str, Any]:
    from asapd.core.money import to_usd
    from asapd.core.types import format_us

    cost, start_us, issued_us = claims.max_cost_microusd, claims.not_before_us, claims.issued_at_us
    return {
        "id": claims.id,
        "delegator": claims.delegator,
        "delegate": claims.delegate,
        "scopes": list(claims.scopes),
        "max_cost_usd": None if cost is None else to_usd(cost),
        "max_tasks": claims.max_tasks,
        "issued_at": None if issued_us is None else format_us(issued_us),
        "not_before": None if start_us is None else format_us(start_us),
        "expires_at": format_us(claims.expires_at_us),
    }


@delegation.command()
@click.argument("token", type=text_or_file)
@click.option("--action", help="Whether it allows this action.")
@click.option("--delegate", metavar="URN", help="Whether it was given to this agent.")
@asks_daemon
def validate(session: Session, token: str, action: str | None, delegate: str | None) -> int:
    """Ask whether a token holds.

    The exit code is 1 when it does not.

    \b
    Example:
      asapctl delegation validate @writer.token --action task.execute
    """
    verdict = session.door.post("/delegations/validate", {"token": token, "action": action, "delegate": delegate})
    if session.as_json:
        show_json(verdict)
    elif verdict["valid"]:
        fields = ("delegator", "delegate", "scopes", "expires_at", "remaining")
        show_pairs([("valid", True), *((name.replace("_", " "), verdict[name]) for name in fields)])
    else:
        click.echo(f"{verdict['code']}: {verdict['reason']}")
    return Exit.DONE if verdict["valid"] else Exit.NO


@delegation.command()
@click.argument("delegation_id", metavar="ID")
@click.option("--reason", help="Why, for the record.")
@asks_daemon
def revoke(session: Session, delegation_id: str, reason: str | None) -> None:
    """Revoke a delegation.

    Everything that was passed on from it is revoked with it.

    \b
    Example:
      asapctl delegation revoke del_01JD0Q6Y8T5W3N9V2X4Z7B1C6D --reason "key lost"
    """
    outcome = session.door.delete(f"/delegations/{segment(delegation_id)}", reason=reason)
    if session.as_json:
        show_json(outcome)
        return
    for revoked in outcome["revoked"]:
        click.echo(f"revoked: {revoked}")
    for other in outcome["namesakes"]:
        what = f"the token {delegation_id} of {other['delegator']}, which goes by {other['id']} here"
        click.echo(f"warning: not revoked: {what}", err=True)
    for reservation in outcome["open_reservations"]:
        click.echo(f"still open: {reservation}", err=True)


@delegation.command("list")
@click.option("--delegator", metavar="URN", help="Only those that this agent gave.")
@click.option("--delegate", metavar="URN", help="Only those that this agent was given.")
@click.option("--state", type=click.Choice(("active", "revoked", "expired")))
@asks_daemon
def list_delegations(session: Session, **filters: Any) -> None:
    """List all delegations.

    \b
    Example:
      asapctl delegation list --state active
    """
    rows = list(session.door.rows("/delegations", **filters))
    if session.as_json:
        show_json({"data": rows, "count": len(rows), "next_cursor": None})
        return
    show_table(
        ("id", "state", "delegator", "delegate", "scopes", "spent usd", "max usd", "tasks", "max tasks", "expires"),
        [
            (
                *(row["id"], row["state"], row["delegator"], row["delegate"], row["scopes"], row["spent_usd"]),
                *(row["constraints"]["max_cost_usd"], row["tasks_used"], row["constraints"]["max_tasks"]),
                row["constraints"]["expires_at"],
            )
            for row in rows
        ],
    )


@delegation.command()
@click.argument("delegation_id", metavar="[ID]", required=False)
@asks_daemon
def tree(session: Session, delegation_id: str | None) -> None:
    """Show who passed on what to whom, and what is left.

    From all roots, or from one delegation. What is left is the least over a delegation and its ancestors.

    \b
    Example:
      asapctl delegation tree
    """
    rows = {row["id"]: row for row in session.door.rows("/delegations")}
    if delegation_id is not None and delegation_id not in rows:
        raise Failure(Exit.USAGE, f"there is no delegation {delegation_id}: `asapctl delegation list` shows all")
    tops = (
        [row for row in rows.values() if row["parent"] not in rows] if delegation_id is None else [rows[delegation_id]]
    )
    if session.as_json:
        show_json({"data": [_branch(row, rows) for row in tops], "count": len(tops), "next_cursor": None})
        return
    for row, depth in _walk(tops, rows):
        limits, left = row["constraints"], row["remaining"]
        click.echo(
            f"{'  ' * depth}{row['id']}  {cell(row['delegator'])} -> {cell(row['delegate'])}  {row['state']}  "
            f"{cell(row['scopes'])}  spent {cell(row['spent_usd'])} of {cell(limits['max_cost_usd'])} USD  "
            f"tasks {row['tasks_used']} of {cell(limits['max_tasks'])}  "
            f"left {cell(left['cost_usd'])} USD, {cell(left['tasks'])} tasks"
        )


def _walk(tops: list[dict[str, Any]], rows: dict[str, dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows with their depth, each before its children; on a stack, since chains may be as deep as configured."""
    left = [(row, 0) for row in reversed(tops)]
    while left:
        row, depth = left.pop()
        yield row, depth
        left += [(rows[child], depth + 1) for child in reversed(row["children"]) if child in rows]


def _branch(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {**row, "children": [_branch(rows[child], rows) for child in row["children"] if child in rows]}
