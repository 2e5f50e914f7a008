"""``fedmosaic models build-quickstart``."""

from __future__ import annotations

from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option


@click.group()
def command() -> None:
    """Build the small bundled models."""


@command.command("build-quickstart")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to write."
)
@debug_option
def build_quickstart(*, out: Path) -> None:
    """Train the quickstart's base models again, from public data held out from every client.

    The wheel ships the result; this command reproduces it.

    \b
    Example:
      fedmosaic models build-quickstart --out models
    """
    from fedml_plugin_fedmosaic.runtime.pretrain import build_quickstart_models

    build_quickstart_models(out, log=click.echo)
    click.echo(out)
