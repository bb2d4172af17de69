"""How a command ends: exit codes, failures with a message, and the one place where both leave the program."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from enum import IntEnum

import click


class Exit(IntEnum):
    """Exit codes of both programs."""

    DONE = 0
    NO = 1
    """The answer is no: an invalid token, a broken audit log, an open breach with `--fail`."""
    USAGE = 2
    """Wrong usage or configuration, or a request that the daemon refuses as such."""
    UNREACHABLE = 3
    FORBIDDEN = 4
    INTERNAL = 70
    INTERRUPTED = 130
    """Ctrl-C, as shells count it: 128 and the signal's number."""
    BROKEN_PIPE = 141
    """Whoever read the output has left; 128 and the signal's number."""


class Failure(Exception):  # noqa: N818 -- also a plain outcome, such as a daemon that is not there
    """A command that ends with a message and a code other than 0; whose fault it is, the code says."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(command: click.Group, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a program and return its exit code. `arguments` are those of the process unless given."""
    try:
        # Without standalone mode click returns the code of `Context.exit`, and what a command returns.
        code = command.main(None if arguments is None else list(arguments), program, standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        error.show()
        return Exit.USAGE
    except Failure as failure:
        click.echo(f"{program}: {failure}", err=True)
        return failure.code
    except (click.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # On a broken pipe, and then only, click ends the process itself, with the code that says no.
        # The interpreter flushes once more at its end, which must not meet the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 -- the last stop: a bug is told apart from a no by its code
        traceback.print_exc()
        click.echo(f"{program}: internal failure, which is a bug: {type(error).__name__}: {error}", err=True)
        return Exit.INTERNAL
    return code if isinstance(code, int) else Exit.DONE
