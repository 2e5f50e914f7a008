"""``fedmosaic collect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedml_plugin_fedmosaic.cli.options import debug_option

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.launch.sweep_manifest import Manifest


@click.command()
@click.argument("folder", metavar="SWEEP", type=click.Path(path_type=Path))
@click.option(
    "--offline", is_flag=True, help="Ask no scheduler; believe the runs' own status files."
)
@click.option("--compared", is_flag=True, help="Also show strategies that runs compare with.")
@debug_option
def command(*, folder: Path, offline: bool, compared: bool) -> None:
    """Show a sweep as one table, and write its plots and CSV files.

    Works while runs are still going: a group without a finished run shows its last evaluated
    round. Writes sweep.html, runs.csv and groups.csv into the sweep's folder.

    \b
    Examples:
      fedmosaic collect runs/sweep-quickstart
      fedmosaic collect runs/sweep-quickstart --offline
    """
    from fedml_plugin_fedmosaic.core.errors import LaunchError
    from fedml_plugin_fedmosaic.launch.sweep import refresh
    from fedml_plugin_fedmosaic.launch.sweep_manifest import require_manifest

    manifest = require_manifest(folder)
    try:
        refresh(folder, manifest, offline=offline)
    except LaunchError as error:
        click.echo(f"the scheduler cannot be asked: {error.message}", err=True)
        click.echo("  -> showing what the runs themselves say (--offline)", err=True)
        refresh(folder, manifest, offline=True)
    show(folder, manifest, compared=compared)


def show(folder: Path, manifest: Manifest, *, compared: bool) -> None:
    """Prints the table and the counts, and writes the page and the CSV files."""
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.report.sweep import load_results, sweep_table
    from fedml_plugin_fedmosaic.report.sweep_page import write_collection

    results = load_results(folder, manifest, compared=compared)
    print_table(sweep_table(results))
    counts = ", ".join(f"{number} {name.lower()}" for name, number in manifest.counts().items())
    click.echo(f"runs     {counts}")
    page, runs, groups = write_collection(results)
    click.echo(f"report   {page}\ncsv      {runs} {groups}")
