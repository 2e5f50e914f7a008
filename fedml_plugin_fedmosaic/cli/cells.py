"""What ``compare`` and ``bench`` have in common: cells that start, are followed and are shown."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedml_plugin_fedmosaic.cli.job_options import as_overrides, job_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedml_plugin_fedmosaic.launch.comparison import ComparisonSpec, Settings
    from fedml_plugin_fedmosaic.launch.sweep import SweepDriver
    from fedml_plugin_fedmosaic.launch.sweep_manifest import Entry
    from fedml_plugin_fedmosaic.launch.sweep_plan import SweepPlan

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_LAUNCHER = "launcher_args.launcher"
_MAX_LISTED = 10
_MAX_TURNED = 4
"""Strategies up to which the table on the screen has one column each."""


def cell_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--seeds``, ``--jobs``, ``-np``, ``--fresh``, ``--dry-run``, ``--wait`` and the job's."""
    for decorate in (
        click.option(
            "--wait/--no-wait", default=None, help="Follow the cells; not for slurm by default."
        ),
        click.option("--dry-run", is_flag=True, help="Check every cell, list them, stop."),
        click.option(
            "--fresh", is_flag=True, help="Start failed cells anew, not from their checkpoint."
        ),
        job_options,
        click.option(
            "-np",
            "np",
            type=click.IntRange(min=1),
            metavar="N",
            help="MPI ranks of each cell (backend MPI).",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            metavar="N",
            help="Cells at once.  [default: 1 on this machine, 8 on a cluster]",
        ),
        click.option(
            "--for",
            "own",
            type=(str, str),
            multiple=True,
            metavar="STRATEGY KEY=VALUE",
            help="A learning rate or an option of one strategy only. May be repeated.",
        ),
        click.option(
            "--seeds",
            type=click.IntRange(min=1),
            default=3,
            show_default=True,
            help="Number of seeds; they count up from common_args.random_seed.",
        ),
    ):
        function = decorate(function)
    return function


def comparison_spec(
    cf: Path | None,
    overrides: tuple[str, ...],
    strategies: tuple[str, ...],
    options: dict[str, Any],
    settings: Settings | None = None,
) -> ComparisonSpec:
    """The comparison that the options ask for.

    Args:
        cf: configuration file; the bundled quickstart when None.
        overrides: ``--set`` texts.
        strategies: registry names.
        options: of :func:`cell_options`.
        settings: of single strategies, before those of ``--for``.

    Raises:
        ConfigError: ``--for`` is written wrongly, or names something that may not differ.
    """
    from fedml_plugin_fedmosaic.config.layout import keys_of
    from fedml_plugin_fedmosaic.launch.comparison import ComparisonSpec, parse_own

    jobs = {name: value for name, value in options.items() if name in keys_of("launcher")}
    jobs["type"] = jobs.get("type") or "local"
    count = options["jobs"] or (1 if jobs["type"] in ("local", "debug") else 8)
    extra = [*as_overrides(jobs)]
    if options["np"] is not None:
        extra += ["comm_args.backend=MPI", f"{_LAUNCHER}.ranks={options['np']}"]
    if jobs["type"] == "local" and "OMP_NUM_THREADS" not in os.environ:
        cores = os.cpu_count() or 1
        threads = max(1, cores // (count * (options["np"] or 1)))
        extra.append(f"{_LAUNCHER}.environment={{OMP_NUM_THREADS: '{threads}'}}")
    own = {name: dict(changes) for name, changes in (settings or {}).items()}
    for name, changes in parse_own(options["own"]).items():
        own.setdefault(name, {}).update(changes)
    return ComparisonSpec(
        cf=cf,
        overrides=(*overrides, *extra),
        strategies=strategies,
        seeds=options["seeds"],
        max_parallel=count,
        settings=own,
    )


def run_cells(spec: ComparisonSpec, folder: Path, options: dict[str, Any]) -> bool:
    """Starts what is missing of a comparison, follows it, and writes its results.

    Args:
        spec: what is compared.
        folder: of the comparison; may hold an earlier part of it.
        options: of the command.

    Returns:
        Whether no cell has failed; without following them, as far as is known.

    Raises:
        ConfigError: the folder holds another comparison, or the configuration is wrong.
        LaunchError: cells could not be submitted.
    """
    from fedml_plugin_fedmosaic.launch.comparison import make_comparison
    from fedml_plugin_fedmosaic.launch.sweep_manifest import locked

    plan = make_comparison(spec)
    if options["dry_run"]:
        _describe(plan, folder)
        return True
    with locked(folder):
        driver = _driver(plan, folder, fresh=options["fresh"])
        waits = plan.base.launcher.type != "slurm" if options["wait"] is None else options["wait"]
        with _pending_cancelled(driver):
            started = driver.start()
            rest = len(plan.points) - len(started)
            click.echo(f"{len(started)} cells started, {rest} left as they are; folder {folder}")
            if waits:
                driver.wait()
    failed = _name_failures(driver, plan)
    show_results(spec, plan, folder)
    return not failed


def show_results(spec: ComparisonSpec, plan: SweepPlan, folder: Path) -> None:
    """Prints the table of the finished cells and writes the files.

    Raises:
        DataError: a file of a run is damaged.
    """
    from fedml_plugin_fedmosaic.cli.tables import print_table
    from fedml_plugin_fedmosaic.launch.comparison import cell_folders
    from fedml_plugin_fedmosaic.report.cells import join_cells
    from fedml_plugin_fedmosaic.report.measures import comparison_table, cost_table, score_table
    from fedml_plugin_fedmosaic.report.results import missing_notes, write_results

    joined = join_cells(cell_folders(folder, plan))
    if not joined.runs:
        click.echo("no cell has finished yet")
        return
    if len(joined.strategies) <= _MAX_TURNED:
        table = comparison_table(joined.runs).transposed()
        table.notes.extend(missing_notes(joined))
        print_table(table)
    else:
        scores = score_table(joined.runs)
        scores.notes.extend(missing_notes(joined))
        print_table(scores)
        print_table(cost_table(joined.runs))
    page, results, text = write_results(folder, joined, origin_of(spec, folder.name))
    click.echo(f"report   {page}\nresults  {results} {text}")


def origin_of(spec: ComparisonSpec, title: str) -> Any:
    """Title, command and commit for the results file."""
    from fedml_plugin_fedmosaic.report.results import Origin

    words = ["fedmosaic", "compare"]
    if spec.cf is not None:
        words += ["--cf", spec.cf.name]
    words += ["--strategies", ",".join(spec.strategies), "--seeds", str(spec.seeds)]
    for text in spec.overrides:
        if not text.startswith(_LAUNCHER):
            words += ["--set", text]
    words += own_words(spec.settings)
    return Origin(title=title, command=shlex.join(words), commit=commit_of())


def own_words(settings: Settings) -> list[str]:
    """Settings of single strategies as the command line takes them."""
    from fedml_plugin_fedmosaic.launch.sweep_space import override

    return [
        word
        for name, changes in settings.items()
        for key, value in changes.items()
        for word in ("--for", name, override(key, value))
    ]


def commit_of() -> str | None:
    """The commit of the checkout that this package runs from; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(  # noqa: S603 - nothing of the user's in it
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - the user's own git
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _describe(plan: SweepPlan, folder: Path) -> None:
    from fedml_plugin_fedmosaic.launch.sweep import open_sweep, refresh

    manifest = open_sweep(folder, plan)
    refresh(folder, manifest, offline=True)
    cells = [entry for entry in manifest.runs if entry.name in plan.experiments]
    click.echo(f"folder   {folder}")
    click.echo(f"cells    {len(cells)}, at most {plan.spec.max_parallel} at once")
    click.echo(f"missing  {sum(entry.needs_start for entry in cells)} would start")
    for entry in cells:
        click.echo(f"  {entry.name:<40}  {entry.status}")
    click.echo("nothing was started or written (--dry-run)")


def _driver(plan: SweepPlan, folder: Path, *, fresh: bool) -> SweepDriver:
    from fedml_plugin_fedmosaic.core.registry import LAUNCHERS
    from fedml_plugin_fedmosaic.launch.sweep import SweepDriver

    name = plan.base.launcher.type
    return SweepDriver(
        folder=folder,
        plan=plan,
        launcher=LAUNCHERS[name](),
        launcher_name=name,
        report=_show,
        fresh=fresh,
        poll_s=10.0 if name == "slurm" else 0.5,
    )


def _show(entry: Entry) -> None:
    click.echo(f"{entry.status:<10} {entry.name}")
    sys.stdout.flush()


@contextmanager
def _pending_cancelled(driver: SweepDriver) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        driver.give_up_waiting()
        click.echo("cells that had started go on; the same command starts the others", err=True)
        raise


def _name_failures(driver: SweepDriver, plan: SweepPlan) -> int:
    """Says which cells have failed, and why; returns how many."""
    from fedml_plugin_fedmosaic.launch.status import read_status

    failed = [
        entry
        for entry in driver.manifest.runs
        if entry.name in plan.experiments and entry.needs_start
    ]
    for entry in failed[:_MAX_LISTED]:
        run_dir = driver.folder / entry.folder
        said = read_status(run_dir)
        text = said.message if said is not None and said.message else f"see {run_dir / 'logs'}"
        click.echo(f"{entry.status}: {entry.name}: {text}", err=True)
    if len(failed) > _MAX_LISTED:
        click.echo(f"... and {len(failed) - _MAX_LISTED} more", err=True)
    return len(failed)
