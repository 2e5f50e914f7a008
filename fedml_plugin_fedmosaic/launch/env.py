"""The only reader of rank variables: which process of an MPI job this is.

Nothing here imports mpi4py, because that would start MPI.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

_VARIABLES = (
    # (rank, size) as launchers set them
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH2
)


def mpi_world(environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Rank and number of ranks; ``(0, 1)`` outside of an MPI job.

    Args:
        environ: variables to read; this process's own by default.
    """
    variables = os.environ if environ is None else environ
    for rank_name, size_name in _VARIABLES:
        rank, size = variables.get(rank_name, ""), variables.get(size_name, "")
        if rank.isdecimal() and size.isdecimal():
            return int(rank), int(size)
    return 0, 1


def incarnation(environ: Mapping[str, str] | None = None) -> str:
    """Name of this start of the job, ``<job id>.<restart count>``; the same on all its ranks.

    A launcher's own word comes first, then Slurm's; outside of both it is the process id.
    """
    variables = os.environ if environ is None else environ
    if variables.get("FEDMOSAIC_INCARNATION"):
        return variables["FEDMOSAIC_INCARNATION"]
    restart = variables.get("SLURM_RESTART_COUNT") or "0"
    if variables.get("SLURM_ARRAY_JOB_ID") and variables.get("SLURM_ARRAY_TASK_ID"):
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}.{restart}"
    if variables.get("SLURM_JOB_ID"):
        return f"{variables['SLURM_JOB_ID']}.{restart}"
    return f"{os.getpid()}.0"
