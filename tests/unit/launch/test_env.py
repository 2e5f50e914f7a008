from __future__ import annotations

import pytest

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch import env
from fedml_plugin_fedmosaic.launch.env import end_job, mpi_world, world

BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, (2, 3)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4"}, (1, 4)),
        # Inside srun; with PMIx its rank counts.
        ({**BATCH_SCRIPT, "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        (
            {
                **BATCH_SCRIPT,
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "4",
                "PMIX_RANK": "2",
            },
            (2, 4),
        ),
        # A batch script is one process, whatever the job asked for.
        (BATCH_SCRIPT, (0, 1)),
        # mpirun inside a Slurm job: its daemons are started by srun, its ranks by mpirun.
        (
            {
                **BATCH_SCRIPT,
                "SLURM_STEP_NUM_TASKS": "1",
                "PMIX_RANK": "5",
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
            },
            (5, 8),
        ),
        ({"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "x"}, (0, 1)),
        ({"PMIX_RANK": "1"}, (0, 1)),
    ],
)
def test_rank_and_size_from_the_launchers_variables(variables, expected):
    assert mpi_world(variables) == expected


def test_backend_sp_is_one_process():
    assert world("sp", {}) == (0, 1)
    with pytest.raises(
        LaunchError, match="backend sp is one process, but this is rank 1 of 3"
    ) as e:
        world("sp", {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"})
    assert "--backend MPI" in str(e.value.hint)


def test_a_launcher_of_another_mpi_is_found_out():
    pytest.importorskip("mpi4py.MPI", exc_type=ImportError)
    text = "started rank 1 of 2, but MPI says rank 0 of 1: launcher and MPI library do not belong"
    with pytest.raises(LaunchError, match=text) as info:
        world("MPI", {"PMI_RANK": "1", "PMI_SIZE": "2"})
    assert str(info.value.hint).startswith("mpi4py uses ")
    assert len(str(info.value.hint)) < 200
    assert world("MPI", {}) == (0, 1)


def test_ending_the_job_of_one_process_is_left_to_the_caller(monkeypatch):
    monkeypatch.setattr(env, "mpi_world", lambda: (0, 1))
    end_job(5)


def test_ending_a_job_flushes_and_leaves_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(env, "mpi_world", lambda: (1, 4))
    monkeypatch.setattr(env, "started_mpi", lambda: None)
    monkeypatch.setattr(env.os, "_exit", codes.append)
    end_job(5)
    assert codes == [5]
