"""``fedmosaic submit``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedml_plugin_fedmosaic.cli.options import config_options, debug_option, strategy_options

if TYPE_CHECKING:
    from fedml_plugin_fedmosaic.config.sections import Experiment
    from fedml_plugin_fedmosaic.launch.base import JobSpec

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])?(?:i?B)?", re.IGNORECASE)
_KEY = "launcher_args.launcher"


def _minutes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:  # noqa: ARG001 - click's signature
    """Slurm's spelling of a time limit (``90``, ``12:00:00``, ``1-12:30``) as whole minutes."""
    if value is None:
        return None
    found = _CLOCK.fullmatch(value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a time; write minutes, H:MM:SS or D-HH:MM")
    days, first, second, third = (int(part or 0) for part in found.groups())
    if found[1] is not None:
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    elif found[4] is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    if seconds < 1:
        raise click.BadParameter("a time limit of zero")
    return -(-seconds // 60)


def _gibibytes(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:  # noqa: ARG001 - click's signature
    """Slurm's spelling of memory as GiB: ``64G``, ``500M``; a plain number is MiB, as in Slurm."""
    if value is None:
        return None
    found = _MEMORY.fullmatch(value)
    if found is None or float(found[1]) <= 0:
        raise click.BadParameter(f"{value!r} is not an amount of memory; write e.g. 64G")
    return float(found[1]) * {"M": 1 / 1024, "G": 1, "T": 1024}[(found[2] or "M").upper()]


@click.command()
@config_options
@strategy_options
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the results, on a file system that every machine sees.",
)
@click.option(
    "--launcher",
    "type",
    metavar="NAME",
    help="slurm, local (processes on this machine) or debug (in this process).",
)
@click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="MPI ranks in all.")
@click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(min=0), metavar="N", help="GPUs per machine.")
@click.option("--cpus-per-task", type=click.IntRange(min=1), metavar="N", help="Cores per rank.")
@click.option("--mem", "mem_gib", callback=_gibibytes, metavar="SIZE", help="Memory per machine.")
@click.option("--time", "time_min", callback=_minutes, metavar="TIME", help="Time limit.")
@click.option("--partition", metavar="NAME", help="Queue.")
@click.option("--account", metavar="NAME", help="Who pays.")
@click.option("--qos", metavar="NAME", help="Quality of service.")
@click.option("--constraint", metavar="TEXT", help="Features that the machines must have.")
@click.option("--mpi", metavar="NAME", help="MPI plug-in of srun, or mpirun.")
@click.option(
    "--heterogeneous/--homogeneous",
    default=None,
    help="One component per size class of clients, or equal machines for all.",
)
@click.option(
    "--chain",
    type=click.IntRange(min=1),
    metavar="N",
    help="N jobs in a row, each going on where the one before was stopped.",
)
@click.option("--dry-run", is_flag=True, help="Print the job (and its script), submit nothing.")
@debug_option
def command(
    *,
    cf: Path | None,
    overrides: tuple[str, ...],
    algo: str | None,
    backend: str | None,
    run_dir: Path | None,
    dry_run: bool,
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
      fedmosaic submit --launcher local --set comm_round=1
    """
    from fedml_plugin_fedmosaic.config.loader import load_experiment
    from fedml_plugin_fedmosaic.launch.jobs import job_spec, new_run_dir, submit

    asked = [
        f"{_KEY}.{name}={_yaml(value)}" for name, value in options.items() if value is not None
    ]
    experiment = load_experiment(cf, (*overrides, *asked), algo=algo, backend=backend)
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


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
