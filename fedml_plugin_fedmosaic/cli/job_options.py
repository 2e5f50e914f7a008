"""Options that say what jobs need; each stands for a key of ``launcher_args``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import click

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


_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--launcher",
        "type",
        metavar="NAME",
        help="slurm, local (processes on this machine) or debug (in this process).",
    ),
    click.option("--ranks", type=click.IntRange(min=1), metavar="N", help="MPI ranks in all."),
    click.option("--nodes", type=click.IntRange(min=1), metavar="N", help="Machines."),
    click.option(
        "--gpus-per-node", type=click.IntRange(min=0), metavar="N", help="GPUs per machine."
    ),
    click.option(
        "--cpus-per-task", type=click.IntRange(min=1), metavar="N", help="Cores per rank."
    ),
    click.option(
        "--mem", "mem_gib", callback=_gibibytes, metavar="SIZE", help="Memory per machine."
    ),
    click.option("--time", "time_min", callback=_minutes, metavar="TIME", help="Time limit."),
    click.option("--partition", metavar="NAME", help="Queue."),
    click.option("--account", metavar="NAME", help="Who pays."),
    click.option("--qos", metavar="NAME", help="Quality of service."),
    click.option("--constraint", metavar="TEXT", help="Features that the machines must have."),
    click.option("--mpi", metavar="NAME", help="MPI plug-in of srun, or mpirun."),
    click.option(
        "--heterogeneous/--homogeneous",
        default=None,
        help="One component per size class of clients, or equal machines for all.",
    ),
    click.option(
        "--chain",
        type=click.IntRange(min=1),
        metavar="N",
        help="N jobs in a row, each going on where the one before was stopped.",
    ),
)


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--launcher``, ``--ranks``, ``--partition``, ``--time`` and the like."""
    for decorate in reversed(_OPTIONS):
        function = decorate(function)
    return function


def as_overrides(options: Mapping[str, str | int | float | bool | None]) -> tuple[str, ...]:
    """The options that were given, as ``--set`` texts."""
    return tuple(
        f"{_KEY}.{name}={_yaml(value)}" for name, value in options.items() if value is not None
    )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
