"""``fedmosaic compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedml_plugin_fedmosaic.cli.cells import cell_options, comparison_spec, run_cells
from fedml_plugin_fedmosaic.cli.options import config_options, debug_option


@click.command()
@config_options
@click.option(
    "--strategies",
    default="local,fedavg,fedmosaic",
    show_default=True,
    metavar="A,B,..",
    help="Strategies to run, or all; the file's strategy_args belong to the file's own strategy.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Folder of the comparison; runs/compare-NAME after the file's name by default.",
)
@cell_options
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    cf: Path | None,
    overrides: tuple[str, ...],
    strategies: str,
    run_dir: Path | None,
    **options: Any,
) -> None:
    """Run strategies at equal compute with several seeds, and compare them.

    Every strategy with every seed is a run of its own, a cell. The same command again starts only
    the cells that are missing, have failed or were interrupted; with more strategies or seeds it
    adds to what is there. Prints means with 95 % confidence intervals and differences to local-only
    training, paired over the seeds, and writes comparison.html, results.json and results.md.

    \b
    Examples:
      fedmosaic compare --strategies local,fedmosaic --seeds 3
      fedmosaic compare --strategies all --jobs 2
      fedmosaic compare --cf mine.yaml --seeds 5 --run-dir runs/five --set comm_round=4
      fedmosaic compare --cf mine.yaml --for fedmosaic learning_rate=4e-3
      fedmosaic compare --cf mine.yaml -np 4
      fedmosaic compare --cf mine.yaml --launcher slurm --partition gpu --time 4:00:00
    """
    from fedml_plugin_fedmosaic.core.errors import LaunchError
    from fedml_plugin_fedmosaic.launch.comparison import chosen_strategies

    spec = comparison_spec(cf, overrides, chosen_strategies(strategies), options)
    name = "quickstart" if cf is None else cf.stem
    if not run_cells(spec, run_dir or Path("runs") / f"compare-{name}", options):
        ctx.exit(LaunchError.exit_code)
