"""Runs under mpirun: the same experiment on the first 1, 2, .. ranks of one job.

``runs_program.py CONFIG OUT SIZE..`` makes one run folder ``OUT/ranks-N`` per size; the ranks that
a size leaves out wait. One job is much faster than one per size, because Python starts once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mpi4py import MPI

from fedml_plugin_fedmosaic.comm.mpi_groups import GroupCommunicator
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.runtime import federation


def main() -> None:
    config, out, sizes = Path(sys.argv[1]), Path(sys.argv[2]), list(map(int, sys.argv[3:]))
    everyone = MPI.COMM_WORLD
    for size in sizes:
        inside = everyone.Get_rank() < size
        part = everyone.Split(0 if inside else MPI.UNDEFINED, everyone.Get_rank())
        if inside:
            federation.world = lambda backend, part=part: (part.Get_rank(), part.Get_size())
            federation.open_communicator = lambda experiment, topology, part=part: (
                GroupCommunicator(
                    [group.ranks for group in topology.groups], topology.owners, world=part
                )
            )
            experiment = load_experiment(config, backend="MPI")
            federation.prepare_run(experiment, out / f"ranks-{size}").execute()
        everyone.Barrier()


if __name__ == "__main__":
    main()
