"""``fedmosaic sweep``."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedml_plugin_fedmosaic.cli.job_options import as_overrides, job_options
from fedml_plugin_fedmosaic.cli.options import config_options, debug_option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedml_plugin_fedmosaic.launch.sweep import SweepDriver
    from fedml_plugin_fedmosaic.launch.sweep_manifest import Entry, Manifest
    from fedml_plugin_fedmosaic.launch.sweep_plan import SweepPlan, SweepSpec

_MAX_LISTED = 20


@click.command()
@config_options
@click.option("--file", type=click.Path(path_type=Path), metavar="FILE", help="Sweep file (YAML).")
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="KEY=V1,V2,..",
    help="Values of one key; LOW:HIGH[:log] for the samplers that draw. May be repeated.",
)
@click.option(
    "--sampler",
    type=click.Choice(["grid", "random", "tpe"]),
    help="All combinations, random ones, or those that promise most.  [default: grid]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Configurations that random and tpe draw; each runs with every seed.",
)
@click.option(
    "--objective",
    type=click.Choice(["self", "others", "worst", "a_auc"]),
    help="What tpe maximises.  [default: self]",
)
@click.option(
    "--max-parallel",
    type=click.IntRange(min=1),
    metavar="N",
    help="Runs at once.  [default: 8]",
)
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the sweep; runs/sweep-NAME after the file's name by default.",
)
@job_options
@click.option("--wait/--no-wait", default=None, help="Follow the runs; not for slurm by default.")
@click.option("--fresh", is_flag=True, help="Start failed runs anew, not from their checkpoint.")
@click.option("--restart-unknown", is_flag=True, help="Also start runs that nobody knows about.")
@click.option("--dry-run", is_flag=True, help="Check every run, list what would start, stop.")
@debug_option
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Run an experiment with many settings, as one job array.

    The same command again starts only the runs that are missing or have failed.

    \b
    Examples:
      fedmosaic sweep --grid strategy.temperature=0.1,0.5,1.0 --grid seed=1,2,3
      fedmosaic sweep --cf mine.yaml --grid optim.learning_rate=1e-5:1e-3:log --grid seed=1,2 \\
          --sampler tpe --samples 20 --max-parallel 4
      fedmosaic sweep --file configs/sweeps/cross_family.yaml --dry-run
      fedmosaic sweep --file quick.yaml --launcher local --max-parallel 2
      fedmosaic sweep --cf mine.yaml --grid seed=1,2,3 --partition gpu --time 4:00:00
    """
    from fedml_plugin_fedmosaic.launch.sweep_manifest import locked
    from fedml_plugin_fedmosaic.launch.sweep_plan import make_plan

    spec = _spec(options)
    plan = make_plan(spec)
    folder = options["folder"] or _default_folder(options, plan)
    if options["dry_run"]:
        _describe(plan, folder)
        return
    if spec.sampler == "tpe":
        from fedml_plugin_fedmosaic.launch.sweep_tpe import require_optuna

        require_optuna()
    with locked(folder):
        driver = _driver(plan, folder, options)
        waits = spec.sampler == "tpe" or plan.base.launcher.type != "slurm"
        waits = waits if options["wait"] is None else options["wait"]
        if spec.sampler == "tpe":
            _optimise(driver, spec)
        else:
            _start(driver, restart_unknown=options["restart_unknown"], wait=waits)
    if waits:
        ctx.exit(_conclude(folder, driver.manifest))
    click.echo(f"table    fedmosaic collect {folder}")


def _spec(options: dict[str, Any]) -> SweepSpec:
    """The sweep that the options ask for; options stand above the file."""
    from fedml_plugin_fedmosaic.config.layout import keys_of
    from fedml_plugin_fedmosaic.core.errors import ConfigError
    from fedml_plugin_fedmosaic.launch.sweep_axes import parse_grid_option
    from fedml_plugin_fedmosaic.launch.sweep_plan import SweepSpec, read_sweep_file

    if options["file"] is not None:
        for name, given in (("--cf", options["cf"]), ("--grid", options["grids"])):
            if given:
                raise ConfigError(f"{name} does not go with --file, which has its own")
        spec = read_sweep_file(options["file"])
    else:
        grid: dict[str, Any] = {}
        for text in options["grids"]:
            key, values = parse_grid_option(text)
            if key in grid:
                raise ConfigError(f"--grid {text}: {key} is given twice; write all its values once")
            grid[key] = values
        spec = SweepSpec(cf=options["cf"], grids=(grid,))
    given = {
        name: options[name]
        for name in ("sampler", "samples", "objective", "max_parallel")
        if options[name] is not None
    }
    jobs = {name: value for name, value in options.items() if name in keys_of("launcher")}
    overrides = (*spec.overrides, *options["overrides"], *as_overrides(jobs))
    return replace(spec, overrides=overrides, **given)


def _default_folder(options: dict[str, Any], plan: SweepPlan) -> Path:
    source = options["file"] or options["cf"]
    return Path(plan.base.run.root) / f"sweep-{source.stem if source else 'quickstart'}"


def _describe(plan: SweepPlan, folder: Path) -> None:
    from fedml_plugin_fedmosaic.launch.sweep import open_sweep, refresh

    spec = plan.spec
    click.echo(f"folder   {folder}")
    if spec.sampler == "tpe":
        axes = ", ".join(axis.name for axis in plan.space[0])
        click.echo(f"tpe      {spec.samples} configurations of {axes}, maximising {spec.objective}")
    else:
        manifest = open_sweep(folder, plan)
        refresh(folder, manifest, offline=True)
        waiting = sum(entry.needs_start for entry in manifest.runs)
        click.echo(f"runs     {len(manifest.runs)}, at most {spec.max_parallel} at once")
        click.echo(f"missing  {waiting} would start")
        for entry in manifest.runs:
            click.echo(f"  {entry.name:<40}  {entry.status}")
    click.echo("nothing was submitted or written (--dry-run)")


def _driver(plan: SweepPlan, folder: Path, options: dict[str, Any]) -> SweepDriver:
    from fedml_plugin_fedmosaic.core.registry import LAUNCHERS
    from fedml_plugin_fedmosaic.launch.sweep import SweepDriver

    name = plan.base.launcher.type
    return SweepDriver(
        folder=folder,
        plan=plan,
        launcher=LAUNCHERS[name](),
        launcher_name=name,
        report=_show,
        fresh=options["fresh"],
        poll_s=10.0 if name == "slurm" else 0.5,
    )


def _show(entry: Entry) -> None:
    click.echo(
        f"{entry.status:<10} {entry.name}" + (f"  job {entry.job_id}" if entry.job_id else "")
    )
    sys.stdout.flush()


def _start(driver: SweepDriver, *, restart_unknown: bool, wait: bool) -> None:
    with _pending_cancelled(driver):
        started = driver.start(restart_unknown=restart_unknown)
        rest = len(driver.manifest.runs) - len(started)
        click.echo(f"{len(started)} runs started, {rest} left as they are; folder {driver.folder}")
        unknown = [entry.name for entry in driver.manifest.runs if entry.status == "UNKNOWN"]
        if unknown:
            click.echo(
                f"nobody knows about {unknown[0]}"
                + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
                + "; --restart-unknown starts it again"
            )
        if wait:
            driver.wait()


def _optimise(driver: SweepDriver, spec: SweepSpec) -> None:
    from fedml_plugin_fedmosaic.report.sweep import objective_value

    with _pending_cancelled(driver):
        best = driver.optimise(lambda run_dir: objective_value(run_dir, spec.objective))
    if best is not None:
        labels = ", ".join(f"{name}={value}" for name, value in best.point.configuration)
        click.echo(f"best     {labels}")


@contextmanager
def _pending_cancelled(driver: SweepDriver) -> Iterator[None]:
    """On Ctrl-C, runs that wait for a place on this machine are given up; running ones go on."""
    try:
        yield
    except KeyboardInterrupt:
        driver.give_up_waiting()
        click.echo("runs that had started go on; the same command starts the others", err=True)
        raise


def _conclude(folder: Path, manifest: Manifest) -> int:
    from fedml_plugin_fedmosaic.cli.collect import show
    from fedml_plugin_fedmosaic.core.errors import LaunchError

    show(folder, manifest, compared=False)
    failed = [entry for entry in manifest.runs if entry.status != "COMPLETED"]
    for entry in failed[:_MAX_LISTED]:
        logs = folder / entry.folder / "logs"
        click.echo(f"{entry.status}: {entry.name}, see {logs}", err=True)
    if len(failed) > _MAX_LISTED:
        click.echo(f"... and {len(failed) - _MAX_LISTED} more", err=True)
    return LaunchError.exit_code if failed else 0
