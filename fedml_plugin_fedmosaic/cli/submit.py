"""``fedmosaic submit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedml_plugin_fedmosaic.cli.job_options import as_overrides, job_options
from fedml_plugin_fedmosaic.cli.options import config_options, debug_option, strategy_options

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.config.sections import Experiment
    from fedml_plugin_fedmosaic.launch.base import JobSpec


@click.command()
@config_options
@strategy_options
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the results, on a file system that every machine sees.",
)
@job_options
@click.option("--dry-run", is_flag=True, help="Print the job (and its script), submit nothing.")
@click.option(
    "--scripts",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write hand-run scripts (DIR/slurm) and configurations (DIR/configs), submit nothing.",
)
@debug_option
def command(
    *,
    cf: Path | None,
    overrides: tuple[str, ...],
    algo: str | None,
    backend: str | None,
    run_dir: Path | None,
    dry_run: bool,
    scripts: Path | None,
    **options: str | int | float | bool | None,
) -> None:
    """Start a run as a job of a cluster, and return at once.

    What is not given follows from the configuration: ranks and GPUs from its models, memory from
    their sizes. Options change the configuration's section launcher_args.

    \b
    Examples:
      fedmosaic submit --cf configs/drake/small.yaml --partition gpu --account me
      fedmosaic submit --cf mine.yaml --time 2:00:00 --chain 5 --set comm_round=20
      fedmosaic submit --cf mine.yaml --dry-run > job.sbatch
      fedmosaic submit --scripts .
      fedmosaic submit --launcher local --set comm_round=1
    """
    from fedml_plugin_fedmosaic.config.loader import load_experiment
    from fedml_plugin_fedmosaic.launch.jobs import job_spec, new_run_dir, submit
    from fedml_plugin_fedmosaic.launch.recipes import write_recipes

    if scripts is not None:
        for path in write_recipes(scripts):
            click.echo(path)
        return
    experiment = load_experiment(
        cf, (*overrides, *as_overrides(options)), algo=algo, backend=backend
    )
    if dry_run:
        _describe(experiment, job_spec(experiment, run_dir or Path(experiment.run.root) / "new"))
        return
    job_spec(experiment, Path("checked"))  # a misfit is found before a folder is made
    folder = run_dir or new_run_dir(experiment)
    job = submit(experiment, folder)
    click.echo(f"job      {job.id} ({experiment.launcher.type}), {job.status().value}")
    click.echo(f"run      {folder}")
    click.echo(f"status   fedmosaic jobs {folder.parent}")
    click.echo(f"output   fedmosaic logs {folder} --follow")


def _describe(experiment: Experiment, spec: JobSpec) -> None:
    if experiment.launcher.type == "slurm":
        from fedml_plugin_fedmosaic.launch.slurm_script import render_job

        click.echo(render_job(spec), nl=False)
        return
    for label, value in (
        ("launcher", experiment.launcher.type),
        ("ranks", str(spec.num_tasks)),
        ("command", " ".join(spec.command)),
        ("run", str(spec.run_dir)),
    ):
        click.echo(f"{label:<9}{value}")
