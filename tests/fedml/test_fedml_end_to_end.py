"""The installed ``fedml`` command and MPI mains really train, on tiny random models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import write_world

pytestmark = [pytest.mark.fedml, pytest.mark.timeout(600)]

BLOCK = """
import socket
def refuse(*args, **kwargs):
    raise SystemExit("the test blocks the network")
socket.getaddrinfo = socket.create_connection = refuse
"""
MPI_MAIN = """
import fedml

if __name__ == "__main__":
    fedml.run_simulation(backend="MPI")
"""


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "HOME": str(folder),
    }


def run(folder: Path, *command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={**environment(folder), **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def fedml_command() -> Path:
    script = Path(sys.executable).with_name("fedml")
    if not script.exists():
        pytest.skip(f"no fedml command beside {sys.executable}")
    return script


def losses(run_dir: Path) -> dict[tuple[int, int], float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    trained = [event for event in map(json.loads, lines) if event["event"] == "ClientTrained"]
    return {(e["round_idx"], e["client_id"]): e["mean_loss"] for e in trained}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    (folder / "block").mkdir()
    (folder / "block/sitecustomize.py").write_text(BLOCK)
    (folder / "mpi_main.py").write_text(MPI_MAIN)
    return folder


@pytest.fixture(scope="module")
def single(world):
    """A run of the installed command in one process, with the network blocked."""
    command = [fedml_command(), "run", "--algo", "fedmosaic", "--cf", "tiny.yaml"]
    done = run(world, *command, "--run-dir", "single", PYTHONPATH=str(world / "block"))
    assert done.returncode == 0, done.stderr
    return done


def test_the_command_trains_and_prints_its_table(world, single):
    assert sorted(losses(world / "single")) == [(r, c) for r in range(2) for c in range(3)]
    assert "fedmosaic" in single.stdout
    assert (world / "single/report.html").is_file()


def test_privacy_options_reach_fedmls_hooks(world, single):
    done = run(
        world,
        fedml_command(),
        *("run", "--algo", "fedmosaic", "--cf", "tiny.yaml", "--run-dir", "private"),
        *("--set", "dp_args.enable_dp=true"),
    )
    assert done.returncode == 0, done.stderr
    plain, private = losses(world / "single"), losses(world / "private")
    # The noise is on what is sent after round 1, so round 2 is the first to differ.
    assert all(plain[0, client] == private[0, client] for client in range(3))
    assert any(plain[1, client] != private[1, client] for client in range(3))


@pytest.mark.mpi(2)
def test_an_mpi_main_gives_the_numbers_of_one_process(world, single):
    mpiexec = shutil.which("mpiexec")
    done = run(world, mpiexec, "-n", "2", sys.executable, "mpi_main.py", "--cf", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (world / "runs").iterdir()
    assert losses(run_dir) == pytest.approx(losses(world / "single"), abs=1e-6)
    assert "fedmosaic: round 2 took" in done.stderr
