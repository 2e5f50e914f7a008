"""``fedmosaic logs``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option

_POLL_S = 0.5
_STATUS_EVERY = 10


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--follow", "-f", is_flag=True, help="Go on until the job is over.")
@click.option(
    "--rank", type=click.IntRange(min=0), metavar="N", help="Only this rank's lines, unlabelled."
)
@debug_option
@click.pass_context
def command(ctx: click.Context, *, run: Path, follow: bool, rank: int | None) -> None:
    """Show what the job of a run folder has written, all its starts.

    With --follow the exit code is 0 if the job completed and 1 otherwise.

    \b
    Examples:
      fedmosaic logs runs/fedmosaic-drake-001 --follow
      fedmosaic logs runs/fedmosaic-drake-001 --rank 3
    """
    ctx.exit(_show_all(run, follow=follow, rank=rank))


def _show_all(run: Path, *, follow: bool, rank: int | None) -> int:
    """Prints the job's logs; returns the exit code."""
    from fedml_plugin_fedmosaic.launch.base import JobStatus
    from fedml_plugin_fedmosaic.launch.jobs import attach

    job = attach(run)
    places: dict[Path, int] = {}
    status = job.status()
    looks = 0
    while True:
        for path in job.log_paths():
            places[path] = _show(path, places.get(path, 0), rank)
        if status.is_over or not follow:
            break
        time.sleep(_POLL_S)
        looks += 1
        if looks % _STATUS_EVERY == 0:
            status = job.status()
    if not follow:
        return 0
    click.echo(f"job {job.id} is {status.value}", err=True)
    return 0 if status is JobStatus.COMPLETED else 1


def _show(path: Path, start: int, rank: int | None) -> int:
    """Prints the complete lines from ``start`` on; returns where the next ones begin."""
    from fedml_plugin_fedmosaic.launch.jobs import rank_of_line

    with path.open("rb") as stream:
        stream.seek(start)
        block = stream.read()
    end = block.rfind(b"\n") + 1
    for line in block[:end].decode("utf-8", errors="replace").splitlines():
        writer, text = rank_of_line(line)
        if rank is None:
            click.echo(line)
        elif writer == rank:
            click.echo(text)
    sys.stdout.flush()
    return start + end
