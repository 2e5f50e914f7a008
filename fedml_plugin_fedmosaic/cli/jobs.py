"""``fedmosaic jobs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option


@dataclass(frozen=True, slots=True)
class _Table:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@click.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False), default=".")
@debug_option
def command(*, root: Path) -> None:
    """List the jobs of all run folders below ROOT, and what became of them.

    A run whose process failed is FAILED, whatever the scheduler calls it.

    \b
    Examples:
      fedmosaic jobs runs
      fedmosaic jobs runs/fedmosaic-drake-001
    """
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.launch.jobs import find_jobs

    rows = []
    problems: dict[str, None] = {}
    for line in find_jobs(root):
        said = line.said
        word = "" if said is None or said.job_id not in line.record.ids else said.state
        message = "" if said is None or not word else said.message or ""
        if line.problem is not None:
            problems[line.problem] = None
        rows.append(
            (
                str(line.run_dir),
                line.record.launcher,
                line.record.ids[0] + ("" if len(line.record.ids) == 1 else ", ..."),
                line.status.value,
                word,
                str(line.record.num_tasks),
                line.record.submitted.replace("+00:00", "Z"),
                message,
            )
        )
    if not rows:
        click.echo(f"no jobs below {root}; 'fedmosaic submit' starts one")
        return
    head = ("run", "launcher", "id", "job", "run says", "ranks", "submitted", "error")
    print_table(_Table(head, tuple(rows)))
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)
