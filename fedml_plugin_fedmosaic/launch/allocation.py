"""What a job was given: who started it, on which machines, with how many GPUs each.

Only ``launch.env`` reads which rank this is; here is what a scheduler says of the whole job, for
one line on the screen before anything is loaded, and for checks that name what is missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedml_plugin_fedmosaic.core.errors import ConfigError, LaunchError
from fedml_plugin_fedmosaic.launch.env import incarnation, local_rank, mpi_world

Starter = Literal["srun", "mpirun", "torchrun", "mpiexec", "none"]
_SHARED_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What the environment says about a job.

    Attributes:
        starter: what started the ranks: ``srun`` (PMIx, PMI or none), ``mpirun`` (Open MPI),
            ``mpiexec`` (MPICH, Intel MPI and others with PMI), ``torchrun``, or nothing.
        ranks: how many, by the starter's word.
        job: name of this start of a Slurm job; None outside of Slurm.
        nodes: Slurm's list of machines, e.g. ``n[1-2]``; None outside of Slurm.
        num_nodes: how many machines; None if nobody says.
        gpus_per_node: as Slurm was asked; None if it was not.
    """

    starter: Starter
    ranks: int
    job: str | None
    nodes: str | None
    num_nodes: int | None
    gpus_per_node: str | None

    def describe(self) -> str:
        """One line, e.g. ``Slurm job 12.0, 2 nodes n[1-2], 4 ranks by srun, 2 GPUs a node``."""
        parts = []
        if self.job is not None:
            parts.append(f"Slurm job {self.job}")
        if self.num_nodes is not None:
            parts.append(f"{self.num_nodes} node{'' if self.num_nodes == 1 else 's'} {self.nodes}")
        starter = "" if self.starter == "none" else f" by {self.starter}"
        parts.append(f"{self.ranks} rank{'' if self.ranks == 1 else 's'}{starter}")
        if self.gpus_per_node is not None:
            parts.append(f"GPUs a node: {self.gpus_per_node}")
        return ", ".join(parts)


def discover(environ: Mapping[str, str] | None = None) -> Allocation:
    """Reads the environment of a rank, a batch script, or a plain process."""
    variables = os.environ if environ is None else environ
    in_slurm = "SLURM_JOB_ID" in variables
    number = variables.get("SLURM_JOB_NUM_NODES") or variables.get("SLURM_NNODES") or ""
    return Allocation(
        starter=_starter(variables),
        ranks=mpi_world(variables)[1],
        job=incarnation(variables) if in_slurm else None,
        nodes=variables.get("SLURM_JOB_NODELIST") if in_slurm else None,
        num_nodes=int(number) if number.isdecimal() else None,
        gpus_per_node=variables.get("SLURM_GPUS_PER_NODE") or variables.get("SLURM_GPUS_ON_NODE"),
    )


def _starter(variables: Mapping[str, str]) -> Starter:
    if "TORCHELASTIC_RUN_ID" in variables:
        return "torchrun"
    if "OMPI_COMM_WORLD_SIZE" in variables:
        return "mpirun"
    if "SLURM_STEP_ID" in variables or "SLURM_STEPID" in variables:
        return "srun"
    if "PMI_SIZE" in variables or "MV2_COMM_WORLD_SIZE" in variables:
        return "mpiexec"
    return "none"


def gpu_of_rank(
    visible: int, first: int, ranks: int, environ: Mapping[str, str] | None = None
) -> int:
    """Which of the visible GPUs a rank takes: its own one, counted on its machine.

    Args:
        visible: GPUs that this process sees.
        first: the configuration's ``gpu_id``.
        ranks: ranks of the run.
        environ: variables to read; this process's own by default.

    Raises:
        ConfigError: there are fewer GPUs than ranks on this machine.
    """
    place = local_rank(environ) if ranks > 1 else None
    # One visible GPU for one of several ranks: the scheduler has bound it.
    index = first if place is None or visible == 1 else first + place
    if index < visible:
        return index
    if place is None:
        raise ConfigError(
            f"device_args.gpu_id is {first}, but torch sees {visible} CUDA device(s), "
            "numbered from 0"
        )
    raise ConfigError(
        f"the rank with place {place} on this machine (counted from 0) has no GPU: "
        f"{visible} are visible, device_args.gpu_id is {first}",
        hint="ask for one GPU per rank of a machine: --gpus-per-node as large as "
        "--ntasks-per-node, or more machines",
    )


def check_shared(run_dir: Path, rank: int, started_file: str) -> None:
    """Checks that a rank sees what rank 0 has written into the run folder.

    Network file systems may show a new file late; they get a minute.

    Raises:
        LaunchError: the folder is another one here.
    """
    end = time.monotonic() + _SHARED_WAIT_S
    while not (run_dir / started_file).is_file():
        if time.monotonic() > end:
            raise LaunchError(
                f"rank {rank} does not see {run_dir / started_file}, which rank 0 has written: "
                "the run folder is not on a file system that all machines share",
                hint="choose a --run-dir on the cluster's shared file system, not in /tmp",
            )
        time.sleep(0.1)
