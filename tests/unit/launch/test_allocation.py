"""What an environment says about a job, and the checks of what it was given."""

from __future__ import annotations

import pytest

from fedml_plugin_fedmosaic.core.errors import ConfigError, LaunchError
from fedml_plugin_fedmosaic.launch import allocation
from fedml_plugin_fedmosaic.launch.allocation import check_shared, discover, gpu_of_rank
from fedml_plugin_fedmosaic.launch.env import local_rank, mpi_world

BATCH = {
    "SLURM_JOB_ID": "12",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_GPUS_PER_NODE": "2",
}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({}, "1 rank"),
        (MPIRUN, "3 ranks by mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "5"}, "5 ranks by mpiexec"),
        (TORCHRUN, "2 ranks by torchrun"),
        (BATCH, "Slurm job 12.0, 2 nodes n[1-2], 1 rank, GPUs a node: 2"),
        (STEP, "Slurm job 12.0, 2 nodes n[1-2], 4 ranks by srun, GPUs a node: 2"),
        (
            {**BATCH, **MPIRUN, "SLURM_RESTART_COUNT": "1"},
            "Slurm job 12.1, 2 nodes n[1-2], 3 ranks by mpirun, GPUs a node: 2",
        ),
    ],
)
def test_discovery(environ, line):
    assert discover(environ).describe() == line


def test_torchrun_s_names_count_under_torchrun_only():
    assert mpi_world(TORCHRUN) == (1, 2)
    assert mpi_world({"RANK": "1", "WORLD_SIZE": "2"}) == (0, 1)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_LOCALID": "2"}, 2),
        ({"MPI_LOCALRANKID": "1"}, 1),
        # under mpirun in a batch script every rank has its shell's SLURM_LOCALID
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "SLURM_LOCALID": "0"}, 3),
    ],
)
def test_local_ranks(environ, expected):
    assert local_rank(environ) == expected


@pytest.mark.parametrize(
    ("visible", "first", "ranks", "place", "expected"),
    [
        (4, 0, 1, "3", 0),
        (4, 2, 1, None, 2),
        (4, 0, 4, "3", 3),
        (1, 0, 4, "3", 0),
        (4, 1, 3, "2", 3),
        (2, 0, 2, None, 0),
    ],
)
def test_every_rank_has_a_gpu(visible, first, ranks, place, expected):
    environ = {} if place is None else {"SLURM_LOCALID": place}
    assert gpu_of_rank(visible, first, ranks, environ) == expected


def test_too_few_gpus():
    with pytest.raises(ConfigError, match=r"place 2 .* has no GPU: 2 are visible"):
        gpu_of_rank(2, 0, 3, {"SLURM_LOCALID": "2"})
    with pytest.raises(ConfigError, match="gpu_id is 2, but torch sees 2"):
        gpu_of_rank(2, 2, 1, {})


def test_a_folder_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(allocation, "_SHARED_WAIT_S", 0.2)
    (tmp_path / "config.yaml").touch()
    check_shared(tmp_path, 1, "config.yaml")
    with pytest.raises(LaunchError, match=r"rank 1 does not see .*not on a file system"):
        check_shared(tmp_path / "other", 1, "config.yaml")
