"""``fedmosaic cancel``."""

from __future__ import annotations

from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@debug_option
def command(*, run: Path) -> None:
    """End the job of a run folder, also while it waits; its checkpoints stay.

    \b
    Examples:
      fedmosaic cancel runs/fedmosaic-drake-001
      fedmosaic run --resume runs/fedmosaic-drake-001     go on later
    """
    from fedml_plugin_fedmosaic.launch.jobs import attach

    job = attach(run)
    status = job.status()
    if status.is_over:
        click.echo(f"job {job.id} is over: {status.value}")
        return
    job.cancel()
    click.echo(f"job {job.id} is told to end; it was {status.value}")
