"""`asapd`: runs the daemon, and what needs none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from asapd import __version__
from asapd.cli.options import SETTINGS
from asapd.cli.outcome import Exit, Failure, run

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="asapd", message="%(prog)s %(version)s")
def asapd() -> None:
    """The daemon beside your agents: metering, delegation, health, service levels and audit.

    \b
    Exit codes: 0 done; 1 the answer is no; 2 wrong usage or configuration; 70 internal failure.

    \b
    Examples:
      asapd demo
      asapd run --state-dir state
      asapd check-config /etc/asapd/asapd.toml

    `asapctl` talks to a daemon that runs.
    """


@asapd.command("run")
@click.option("--config", "config_path", type=_FILE, metavar="FILE", help="The configuration; none is needed.")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where everything is kept. Without it: as the configuration says, else $STATE_DIRECTORY, "
    "/var/lib/asapd for root, ~/.local/state/asapd for others.",
)
def run_daemon(config_path: Path | None, state_dir: Path | None) -> int:
    """Run the daemon in the foreground.

    SIGTERM or SIGINT ends it, a second one at once; SIGHUP reloads the configuration.

    \b
    Examples:
      asapd run
      asapd run --config /etc/asapd/asapd.toml
    """
    from asapd.daemon import run as run_until_stopped

    return run_until_stopped(config_path, state_dir)


@asapd.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="End by itself after so long; the promise is broken after some 8 s.",
)
@click.option("--http", metavar="HOST:PORT", help="Where the daemon listens. Without it: a free port of 127.0.0.1.")
def demo(seconds: float | None, http: str | None) -> int:
    """See it work.

    Agents at work, a broken promise, a refused delegation, an audit. Starts a daemon and three agents in a temporary
    directory; Ctrl-C ends it and leaves nothing behind.

    \b
    Examples:
      asapd demo
      asapd demo --seconds 60 --http 127.0.0.1:8727
    """
    from asapd.cli.demo import run_demo

    return run_demo(seconds, http)


@asapd.command("check-config")
@click.argument("file", type=_FILE)
@click.option("--against", type=_FILE, metavar="RUNNING.toml", help="Say what a reload from this one would change.")
def check_config(file: Path, against: Path | None) -> int:
    """Check a configuration file.

    The price table it names is checked as well. Each problem is printed as file:line: field: reason, and the exit
    code is 2.

    \b
    Examples:
      asapd check-config asapd.toml
      asapd check-config new.toml --against /etc/asapd/asapd.toml
    """
    from asapd.cli.config_check import check, reload_effects
    from asapd.config import remarks

    config, problems = check(file)
    running, running_problems = (None, []) if against is None else check(against)
    for problem in (*problems, *running_problems):
        click.echo(problem, err=True)
    if config is None or problems or running_problems:
        return Exit.USAGE
    for remark in remarks(config):
        click.echo(f"{file}: {remark}", err=True)
    click.echo(f"{file}: ok")
    if running is not None:
        for effect in reload_effects(running, config):
            click.echo(effect)
    return Exit.DONE


@asapd.command()
@click.argument("out", type=_FILE)
def keygen(out: Path) -> None:
    """Make an Ed25519 key.

    OUT gets the private key (PKCS#8 PEM, mode 0600), and must not exist. Prints the public key, in base64, and the
    key's id.

    \b
    Example:
      asapd keygen writer.pem
    """
    from nacl.signing import SigningKey

    from asapd.wire.keys import key_id, private_pem, public_base64

    key = SigningKey.generate()
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Failure(
            Exit.USAGE, f"{out}: exists already, and a key is never overwritten: choose another name"
        ) from None
    except OSError as error:
        raise Failure(Exit.USAGE, f"{out}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(private_pem(key))
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        out.unlink(missing_ok=True)
        raise Failure(Exit.USAGE, f"{out}: cannot be written: {error.strerror}") from None
    raw = bytes(key.verify_key)
    click.echo(f"public key: {public_base64(raw)}")
    click.echo(f"key id: {key_id(raw)}")


@asapd.command()
@click.argument("file", type=_FILE)
@click.option(
    "--public-key",
    metavar="KEY",
    help="The key that has to have signed it: base64, PEM or @FILE. Checkpoints and proofs cannot be verified without; "
    "receipts, packs and evidence name one, which is taken then; exports are the one kind without a signature.",
)
def verify(file: Path, public_key: str | None) -> int:
    """Check an export, a proof, or what the daemon signed.

    Needs no daemon and no network; the exit code is 1 when something is wrong, and the first bad place is named. FILE
    is what `asapctl audit export`, `checkpoint`, `proof`, `receipt` and `pack` write, checkpoints.log, or the
    evidence of a breach, from which the verdict is computed anew.

    \b
    Examples:
      asapctl audit export audit.ndjson && asapd verify audit.ndjson
      asapd verify entry.tlog-proof --public-key "$KEY"
      asapctl sla evidence brc_01JD0000000000000000000000 > breach.json && asapd verify breach.json
    """
    from asapd.cli.options import text_or_file
    from asapd.cli.verified import CannotVerifyError
    from asapd.cli.verify import verify_file
    from asapd.wire.keys import KeyFormatError, load_public

    try:
        key = None if public_key is None else load_public(text_or_file(public_key))
        verified = verify_file(file, key)
    except KeyFormatError as error:
        raise Failure(Exit.USAGE, f"--public-key {error}") from None
    except OSError as error:
        raise Failure(Exit.USAGE, f"{file}: cannot be read: {error.strerror}") from None
    except CannotVerifyError as error:
        raise Failure(Exit.USAGE, f"{file}: {error}") from None
    click.echo(verified.verdict)
    for remark in verified.remarks:
        click.echo(remark, err=True)
    return Exit.DONE if verified.is_good else Exit.NO


@asapd.command()
@click.argument("file", type=_FILE)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="The state directory of the daemon, which is stopped; made if it is not there.",
)
@click.option(
    "--give-up-checkpoints",
    is_flag=True,
    help="Do not hold FILE to checkpoints.log in DIR, which is of another log, and set that aside.",
)
@click.option(
    "--config",
    "config_path",
    type=_FILE,
    metavar="FILE",
    help="The configuration, whose audit.former_keys may have signed FILE's checkpoints.",
)
def restore(file: Path, state_dir: Path, give_up_checkpoints: bool, config_path: Path | None) -> int:
    """Put a backup into the place of the database.

    FILE is what `asapctl backup` wrote. It is copied and verified first: every entry and hash, all that they record,
    and every checkpoint in DIR that it should fit; when anything is wrong, nothing is replaced and the exit code is 1.
    The database that was there is kept beside it. The log says what was restored and what was given up for it.

    \b
    Example:
      systemctl stop asapd && asapd restore asapd.backup --state-dir /var/lib/asapd
    """
    from asapd import config
    from asapd.cli.options import now_us
    from asapd.daemon.restoring import BadBackupError, CannotRestoreError
    from asapd.daemon.restoring import restore as restored_from
    from asapd.wire.keys import KeyFormatError, load_public

    def progress(verified: int, entries: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{verified:,} of {entries:,} entries", err=True, nl=False)

    try:
        settings = config.Config() if config_path is None else config.load(config_path)
        former = [load_public(key) for key in settings.audit.former_keys]
    except (config.ConfigError, KeyFormatError) as error:
        raise Failure(Exit.USAGE, str(error)) from None
    try:
        done = restored_from(
            file,
            state_dir.absolute(),
            actor=f"uid:{os.getuid()} pid:{os.getpid()}",
            now_us=now_us(),
            give_up_checkpoints=give_up_checkpoints,
            former_keys=former,
            progress=progress,
        )
    except CannotRestoreError as error:
        raise Failure(Exit.USAGE, str(error)) from None
    except BadBackupError as error:
        click.echo(f"bad: {error}")
        click.echo(f"{file}: does not verify: nothing was replaced", err=True)
        return Exit.NO
    click.echo(f"restored: the audit log up to entry {done.head.entries}")
    if done.abandoned is not None:
        click.echo(f"given up: a log of {done.abandoned.entries} entries with root {done.abandoned.root.hex()}")
    if done.kept is not None:
        click.echo(f"kept: {done.kept}")
    for remark in done.remarks:
        click.echo(remark, err=True)
    return Exit.DONE


def main() -> int:
    """The console script."""
    return run(asapd, "asapd")
