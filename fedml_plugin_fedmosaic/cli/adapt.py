"""``fedmosaic adapt``."""

from __future__ import annotations

from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.options import debug_option


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    required=True,
    metavar="NAME|FILE",
    help="Scenario with the unseen tasks, of the run's data set. May be repeated.",
)
@click.option("--strategy", metavar="NAME", help="Strategy of the run; the main one by default.")
@click.option("--model", metavar="NAME", help="Model of the new clients; the scenario's otherwise.")
@click.option(
    "--updates",
    default="0,5,10,20,50",
    show_default=True,
    metavar="N,N,..",
    help="Optimizer steps after which to score.",
)
@click.option(
    "--max-test-samples", type=click.IntRange(min=1), metavar="N", help="Test samples per task."
)
@debug_option
def command(
    *,
    run_dir: Path,
    scenarios: tuple[str, ...],
    strategy: str | None,
    model: str | None,
    updates: str,
    max_test_samples: int | None,
) -> None:
    """See how fast a new client learns tasks that no client has had.

    It starts from the run's aggregated adapters, and for comparison from fresh ones. Prints the
    scores after some numbers of updates (0 is zero-shot), keeps them in adaptation.json in the run
    folder, and adds them to its report.

    \b
    Examples:
      fedmosaic adapt runs/a --scenario unseen_new_task_type
      fedmosaic adapt runs/a --scenario mine.json --updates 0,10,100 --model small
    """
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.report.adaptation import adaptation_table, read_adaptations
    from fedml_plugin_fedmosaic.report.html import write_report
    from fedml_plugin_fedmosaic.runtime.adaptation import adapt_run
    from fedml_plugin_fedmosaic.runtime.newcomer import check_updates

    try:
        numbers = check_updates(int(part) for part in updates.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"--updates {updates}: expected whole numbers with commas between them"
        ) from error
    for scenario in scenarios:
        adapt_run(
            run_dir,
            scenario,
            strategy=strategy,
            model=model,
            updates=numbers,
            max_test_samples=max_test_samples,
            say=click.echo,
        )
    print_table(adaptation_table(read_adaptations(run_dir)))
    click.echo(f"report   {write_report(run_dir)}")
