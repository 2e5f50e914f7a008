"""``fedmosaic bench``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedml_plugin_fedmosaic.cli.cells import cell_options, comparison_spec, origin_of, run_cells
from fedml_plugin_fedmosaic.cli.options import debug_option

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.launch.benchmarks import Benchmark
    from fedml_plugin_fedmosaic.launch.comparison import ComparisonSpec


@click.command()
@click.argument("name", metavar="BENCHMARK", required=False)
@click.option(
    "--strategies",
    metavar="A,B,..",
    help="Other strategies than the benchmark's, or all of them.",
)
@click.option(
    "--only",
    "labels",
    multiple=True,
    metavar="LABEL",
    help="Only this experiment of the benchmark. May be repeated.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key of every experiment. May be repeated.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the benchmark; runs/bench-NAME by default.",
)
@click.option(
    "--unseen",
    is_flag=True,
    help="Then adapt every cell's adapters to the benchmark's unseen tasks, on this machine.",
)
@click.option("--list", "listed", is_flag=True, help="List the bundled benchmarks and stop.")
@cell_options
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    *,
    name: str | None,
    strategies: str | None,
    labels: tuple[str, ...],
    overrides: tuple[str, ...],
    run_dir: Path | None,
    unseen: bool,
    listed: bool,
    **options: Any,
) -> None:
    """Run a benchmark: strategies on several experiments, and the leaderboard.

    BENCHMARK is a bundled one (--list) or a YAML file with title, strategies and configs. Every
    experiment is a comparison in a folder of its own; the same command again starts only what is
    missing or has failed, and adds further strategies and seeds. Writes leaderboard.html,
    results.json and results.md.

    \b
    Examples:
      fedmosaic bench --list
      fedmosaic bench quickstart --jobs 2
      fedmosaic bench drake-lite --strategies local,fedavg,fedmosaic --seeds 3
      fedmosaic bench drake-lite --unseen
      fedmosaic bench drake-lite --launcher slurm --partition gpu --time 4:00:00
    """
    from fedml_plugin_fedmosaic.core.errors import LaunchError
    from fedml_plugin_fedmosaic.launch.benchmarks import load_benchmark

    if listed or name is None:
        _list()
        return
    benchmark = _chosen(load_benchmark(name), strategies, labels)
    if ctx.get_parameter_source("seeds") is click.core.ParameterSource.DEFAULT:
        options["seeds"] = benchmark.seeds
    folder = run_dir or Path("runs") / f"bench-{benchmark.name}"
    complete = True
    specs: dict[str, ComparisonSpec] = {}
    for label, config in benchmark.configs.items():
        click.echo(f"{benchmark.title}: {label}")
        changes = (*config.overrides, *overrides)
        spec = comparison_spec(
            config.cf, changes, benchmark.strategies, options, benchmark.settings
        )
        specs[label] = spec
        complete &= run_cells(spec, folder / label, options)
        if unseen and not options["dry_run"]:
            _adapt(benchmark, spec, folder / label)
    if options["dry_run"]:
        return
    words = ["fedmosaic", "bench", name]
    words += [word for label in labels for word in ("--only", label)]
    words += ["--strategies", ",".join(benchmark.strategies)]
    words += ["--seeds", str(options["seeds"]), *(["--unseen"] if unseen else [])]
    words += [word for text in overrides for word in ("--set", text)]
    words += [word for pair in options["own"] for word in ("--for", *pair)]
    _conclude(benchmark, specs, folder, shlex.join(words))
    if not complete:
        ctx.exit(LaunchError.exit_code)


def _list() -> None:
    from fedml_plugin_fedmosaic.launch.benchmarks import benchmark_files, load_benchmark

    for name in benchmark_files():
        benchmark = load_benchmark(name)
        experiments = ", ".join(benchmark.configs)
        click.echo(f"{name:<16} {benchmark.title}: {experiments}; {benchmark.seeds} seeds")
        click.echo(f"{'':<16} {', '.join(benchmark.strategies)}")


def _chosen(benchmark: Benchmark, strategies: str | None, labels: tuple[str, ...]) -> Benchmark:
    """The benchmark with the strategies and experiments that were asked for.

    Raises:
        ConfigError: one of them is not known.
    """
    from fedml_plugin_fedmosaic.config.messages import unknown
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.launch.comparison import chosen_strategies

    for label in labels:
        if label not in benchmark.configs:
            raise ConfigError(f"--only: {unknown('experiment', label, list(benchmark.configs))}")
    configs = {k: v for k, v in benchmark.configs.items() if not labels or k in labels}
    names = benchmark.strategies if strategies is None else chosen_strategies(strategies)
    settings = {name: own for name, own in benchmark.settings.items() if name in names}
    return replace(benchmark, configs=configs, strategies=names, settings=settings)


def _adapt(benchmark: Benchmark, spec: ComparisonSpec, folder: Path) -> None:
    """Tries the adapters of every finished cell on the unseen tasks, as far as nobody has yet."""
    from fedml_plugin_fedmosaic.launch.comparison import cell_folders, make_comparison
    from fedml_plugin_fedmosaic.report.adaptation import read_adaptations
    from fedml_plugin_fedmosaic.report.cells import finished_run
    from fedml_plugin_fedmosaic.report.html import write_report
    from fedml_plugin_fedmosaic.runtime.adaptation import adapt_run

    for strategy, seeds in cell_folders(folder, make_comparison(spec)).items():
        for seed, cell in seeds.items():
            if finished_run(cell, strategy) is None:
                continue
            known = {task.scenario for task in read_adaptations(cell)}
            missing = [name for name in benchmark.unseen if name not in known]
            for scenario in missing:
                click.echo(f"unseen     {strategy}, seed {seed}: {scenario}")
                adapt_run(cell, scenario)
            if missing:
                write_report(cell)


def _conclude(
    benchmark: Benchmark, specs: dict[str, ComparisonSpec], folder: Path, command_line: str
) -> None:
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.launch.comparison import cell_folders, make_comparison
    from fedml_plugin_fedmosaic.report.cells import join_cells
    from fedml_plugin_fedmosaic.report.leaderboard import leaderboard_table, write_leaderboard

    comparisons = {}
    origins = {}
    for label, spec in specs.items():
        joined = join_cells(cell_folders(folder / label, make_comparison(spec)))
        if joined.runs:
            comparisons[label] = joined
            origins[label] = origin_of(spec, label)
    if not comparisons:
        return
    print_table(leaderboard_table(comparisons))
    page, results, text = write_leaderboard(
        folder, comparisons, origins, title=benchmark.title, command=command_line
    )
    click.echo(f"report   {page}\nresults  {results} {text}")
