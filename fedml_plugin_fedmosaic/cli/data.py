"""``fedmosaic data headroom``."""

from __future__ import annotations

from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import config_options, debug_option


@click.group()
def command() -> None:
    """Look at the data of an experiment."""


@command.command()
@config_options
@debug_option
def headroom(*, cf: Path | None, overrides: tuple[str, ...]) -> None:
    """Measure what there is to learn, per task.

    Prints the majority baseline, a model that sees no images, the base model, and central
    training on all clients' data as the ceiling. Takes some minutes.

    \b
    Examples:
      fedmosaic data headroom
      fedmosaic data headroom --cf mine.yaml --set optim.num_steps=50
    """
    from rich.console import Console

    from fedml_plugin_fedmosaic.cli.progress import LiveProgress
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.config.loader import load_experiment
    from fedml_plugin_fedmosaic.runtime.headroom import headroom as measure

    experiment = load_experiment(cf, overrides)
    console = Console()
    if console.is_terminal:
        with LiveProgress(console) as live:
            table = measure(experiment, (live,))
    else:
        table = measure(experiment, ())
    print_table(table, console)
