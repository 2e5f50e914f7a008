"""``fedmosaic data headroom|schedule|fetch|build|show|stats|verify``."""

from __future__ import annotations

from pathlib import Path

import click

from fedml_plugin_fedmosaic.cli.data_build import drake_lite
from fedml_plugin_fedmosaic.cli.data_look import show, stats, verify
from fedml_plugin_fedmosaic.cli.options import config_options, debug_option


@click.group()
def command() -> None:
    """Look at, check, fetch or build the data of an experiment."""


for _command in (show, stats, verify):
    command.add_command(_command)


@command.command()
@config_options
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Optimizer steps of each training.  [default: six times those of one client in the run]",
)
@debug_option
def headroom(*, cf: Path | None, overrides: tuple[str, ...], steps: int | None) -> None:
    """Measure what there is to learn, per task.

    Prints the majority baseline, a model that sees no images, the base model, and central
    training on all clients' data as the ceiling. Takes some minutes.

    \b
    Examples:
      fedmosaic data headroom
      fedmosaic data headroom --cf mine.yaml --steps 300
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
            table = measure(experiment, (live,), num_steps=steps)
    else:
        table = measure(experiment, (), num_steps=steps)
    print_table(table, console)


@command.command()
@config_options
@debug_option
def schedule(*, cf: Path | None, overrides: tuple[str, ...]) -> None:
    """Show when samples arrive and which clients are away, before anything is trained.

    \b
    Examples:
      fedmosaic data schedule
      fedmosaic data schedule --set shift.label_alpha=0.3 --set shift.leave_rate=0.2
    """
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.config.loader import load_experiment
    from fedml_plugin_fedmosaic.core.registry import DATASETS
    from fedml_plugin_fedmosaic.runtime.attendance import schedule_table

    experiment = load_experiment(cf, overrides)
    print_table(schedule_table(experiment, DATASETS[experiment.data.source](experiment.data)))


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME|FILE]...")
@config_options
@click.option("--repo", metavar="OWNER/NAME", help="Another data set repository of the hub.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="With NAME: folder for the data; ./NAME by default.",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="DATASET",
    help="With NAME: only this data set, e.g. Fashion200K. May be repeated.",
)
@debug_option
def fetch(
    *,
    names: tuple[str, ...],
    cf: Path | None,
    overrides: tuple[str, ...],
    repo: str | None,
    root: Path | None,
    datasets: tuple[str, ...],
) -> None:
    """Download or build data, on a machine with internet.

    NAME is a published benchmark: drake or hflb, all of its data sets. FILE is a configuration or a
    sweep file: what it needs goes into its data.root, which compute nodes must see. What is there
    already is kept, a download that was cut goes on, and archives are compared with the hub's
    checksums.

    \b
    Examples:
      fedmosaic data fetch                              build the bundled quickstart beforehand
      fedmosaic data fetch drake                        all of DRAKE, into the folder drake
      fedmosaic data fetch drake --dataset Fashion200K --root /data/drake
      fedmosaic data fetch --cf configs/drake/small.yaml
    """
    from fedml_plugin_fedmosaic.cli.fetching import experiments_of, fetch_benchmark
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.core.registry import SOURCES

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    benchmarks = [name for name in names if name not in files]
    if (datasets or root is not None) and not benchmarks:
        raise ConfigError("--dataset and --root need the NAME of a benchmark: drake or hflb")
    for name in benchmarks:
        click.echo(fetch_benchmark(name, root or Path(name), datasets, repo, click.echo))
    wanted: list[Path | None] = [Path(name) for name in files]
    if cf is not None or not names:
        wanted.append(cf)
    done = set()
    for experiment in experiments_of(wanted, overrides):
        data = experiment.data
        if (data.source, data.root, data.scenario) in done:
            continue
        done.add((data.source, data.root, data.scenario))
        if data.source not in SOURCES:
            raise ConfigError(
                f"data set {data.source!r} has no source to fetch from; known: {', '.join(SOURCES)}"
            )
        click.echo(SOURCES[data.source]().fetch(data, repo, click.echo))


@command.group()
def build() -> None:
    """Make the data of tasks in the published layout."""


build.add_command(drake_lite)


@build.command("text-tasks")
@click.argument("tasks", nargs=-1, metavar="[TASK]...")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.")
@click.option(
    "--sources",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    envvar="FEDMOSAIC_DATA_SOURCES",
    metavar="DIR",
    help="Folder with the source files instead of downloads.",
)
@click.option("--train", type=click.IntRange(1), default=400, show_default=True)
@click.option("--test", type=click.IntRange(1), default=200, show_default=True)
@click.option("--public", type=click.IntRange(0), default=50, show_default=True)
@click.option("--max-words", type=click.IntRange(1), default=32, show_default=True)
@debug_option
def text_tasks(
    *,
    tasks: tuple[str, ...],
    out: Path | None,
    sources: Path | None,
    train: int,
    test: int,
    public: int,
    max_words: int,
) -> None:
    """Make real text tasks: sentiment, topics, inference, meaning, reasoning.

    TASK is a name such as sst2-0; all of them when omitted. --train, --test and --public are rows
    per task; texts of more than --max-words words are cut, or left out where their end may decide.
    Without --out they go where 'data: {source: text}' looks for them. Each data set keeps its own
    licence, see origin.json.

    \b
    Examples:
      fedmosaic data build text-tasks
      fedmosaic data build text-tasks sst2-0 agnews-1 --out text --max-words 40
    """
    from fedml_plugin_fedmosaic.data.text_files import TEXT_SETS
    from fedml_plugin_fedmosaic.data.text_tasks import (
        BuildOptions,
        build_text_tasks,
        default_root,
    )

    root = out or default_root()
    options = BuildOptions(train=train, test=test, public=public, max_words=max_words)
    for task, rows in build_text_tasks(root, tasks, options, sources=sources, say=click.echo):
        counts = ", ".join(f"{count} {split}" for split, count in rows.items())
        click.echo(f"{task.name:10} {task.group:10} {counts:38} {TEXT_SETS[task.source].licence}")
    click.echo(root)
