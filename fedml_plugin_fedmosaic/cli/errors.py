"""Errors on the screen: one block without traceback, and the exit code of the error's class."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass

import click

from fedml_plugin_fedmosaic.core.errors import FedMosaicError, OutOfMemory

EXIT_INTERRUPTED = 130
_ISSUES = "please report it, with the lines above"


@dataclass(slots=True)
class Settings:
    """What the options of one call say to the error handler."""

    debug: bool = False


def _known(error: BaseException) -> BaseException:
    """Memory that ran out anywhere is no bug; other errors as they are."""
    if isinstance(error, FedMosaicError):
        return error
    # Without torch in memory the error cannot be one of its.
    if not isinstance(error, MemoryError) and "torch" not in sys.modules:
        return error
    from fedml_plugin_fedmosaic.engine.memory import in_short, ran_out_of_memory

    if not ran_out_of_memory(error):
        return error
    known = OutOfMemory(
        in_short(error),
        hint="use smaller models or batches (optim.batch_size, evaluation.batch_size), or more "
        "ranks (-np); 'fedmosaic run --estimate' says what fits, --debug where it happened",
    )
    known.__cause__ = error
    return known


def exit_code_of(error: BaseException, *, debug: bool = False) -> int:
    """Prints an error on standard error and returns the process's exit code.

    Args:
        error: what ended the command.
        debug: also print the traceback of an expected error.
    """
    if isinstance(error, KeyboardInterrupt):
        click.secho("stopped by the user", fg="yellow", err=True)
        return EXIT_INTERRUPTED
    error = _known(error)
    if not isinstance(error, FedMosaicError):
        traceback.print_exception(error, file=sys.stderr)
        click.secho(
            f"error: this is a bug of fedml-plugin-fedmosaic; {_ISSUES}", fg="red", err=True
        )
        return 1
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    lines = error.message.splitlines() or [type(error).__name__]
    body = lines if len(lines) > 1 else []
    head = f"{len(lines)} mistakes" if body else lines[0]
    click.secho(f"error: {head}", fg="red", err=True)
    for line in body:
        click.secho(f"  {line}", fg="red", err=True)
    for note in getattr(error, "__notes__", ()):
        click.echo(f"  {note}", err=True)
    if error.hint:
        click.echo(f"  -> {error.hint}", err=True)
    return error.exit_code
