"""``fedmosaic compare``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import config_options, debug_option


@click.command()
@config_options
@click.option(
    "--strategies",
    default="local,fedavg,fedmosaic",
    show_default=True,
    metavar="A,B,..",
    help="Strategies to run; the last one is the main one and takes the file's strategy_args.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of runs; seeds count up from common_args.random_seed.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Folder for one run folder per seed (seed-0, seed-1, ..) and comparison.html.",
)
@debug_option
def command(
    *,
    cf: Path | None,
    overrides: tuple[str, ...],
    strategies: str,
    seeds: int,
    run_dir: Path | None,
) -> None:
    """Run strategies at equal compute with several seeds, and compare them.

    Prints means with 95 % confidence intervals and differences to local-only training, paired
    inside each seed.

    \b
    Examples:
      fedmosaic compare --strategies local,fedmosaic --seeds 3
      fedmosaic compare --cf mine.yaml --seeds 5 --run-dir runs/five --set comm_round=4
    """
    from fedml_plugin_fedmosaic.cli.run import train
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.config.loader import load_experiment
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.report.comparison import write_comparison
    from fedml_plugin_fedmosaic.report.html import write_report
    from fedml_plugin_fedmosaic.report.measures import compare_rows
    from fedml_plugin_fedmosaic.report.tables import write_summary

    names = list(dict.fromkeys(part.strip() for part in strategies.split(",") if part.strip()))
    if not names:
        raise ConfigError("--strategies names no strategy", hint="for example local,fedmosaic")
    others = f"eval_args.evaluation.compare=[{', '.join(names[:-1])}]"
    experiment = load_experiment(cf, [*overrides, others], algo=names[-1])
    root = run_dir or Path(experiment.run.root) / f"compare-{'-'.join(names)}"
    first = experiment.common.random_seed
    folders = [root / f"seed-{seed}" for seed in range(first, first + seeds)]
    taken = next((path for path in folders if path.exists() and any(path.iterdir())), None)
    if taken is not None:
        raise ConfigError(f"{taken} exists and is not empty", hint="choose another --run-dir")
    for seed, folder in enumerate(folders, start=first):
        click.echo(f"seed {seed} -> {folder}")
        common = replace(experiment.common, random_seed=seed)
        train(replace(experiment, common=common), folder)
        write_summary(folder)
        write_report(folder)
    print_table(compare_rows(folders).transposed())
    click.echo(f"report   {write_comparison(folders, root / 'comparison.html')}")
