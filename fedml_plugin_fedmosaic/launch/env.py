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
