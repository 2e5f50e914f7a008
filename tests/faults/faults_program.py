"""Runs the tiny federation on each MPI rank while clients fail; started by test_faults_mpi.py.

``faults_program.py FOLDER`` makes one run per case below the folder that holds ``tiny.yaml``;
``faults_program.py FOLDER abort`` makes one that ends with the first failure.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from faulty_fit import Plan, faulty_fit

from fedml_plugin_fedmosaic.cli.run import run_command
from fedml_plugin_fedmosaic.config.loader import load_experiment
from fedml_plugin_fedmosaic.engine.torch import TorchEngine
from fedml_plugin_fedmosaic.launch.env import mpi_world
from fedml_plugin_fedmosaic.runtime.federation import prepare_run

OVERRIDES = ("evaluation.base=false", "evaluation.others=false", "comm.backend=MPI")
EVERYONE: Plan = {(client, 0): "data" for client in range(3)}


def plan_of(case: str, rank: int) -> Plan:
    """Who fails in the first round: one client, all clients of rank 1, or everyone."""
    match case:
        case "one":
            return {(1, 0): "memory"}
        case "rank":
            return EVERYONE if rank == 1 else {}
        case _:
            return EVERYONE


def main() -> int:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank, _ = mpi_world()
    fit = TorchEngine.fit
    if "abort" in sys.argv:
        TorchEngine.fit = faulty_fit({(1, 0): "memory"})  # type: ignore[method-assign]
        return run_command(
            cf=folder / "tiny.yaml", overrides=OVERRIDES, run_dir=folder / "abort", backend="MPI"
        )
    for case in ("one", "rank", "everyone"):
        TorchEngine.fit = fit  # type: ignore[method-assign]
        TorchEngine.fit = faulty_fit(plan_of(case, rank))  # type: ignore[method-assign]
        overrides = [*OVERRIDES, "faults.policy=drop", "faults.quorum=0.3"]
        experiment = load_experiment(folder / "tiny.yaml", overrides)
        prepare_run(experiment, folder / f"mpi-{case}").execute()
    return 0


if __name__ == "__main__":
    sys.exit(main())
