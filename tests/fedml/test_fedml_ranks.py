"""The doors with several ranks: they end with exit code 0, or at once with what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_world import write_world

pytestmark = [pytest.mark.fedml, pytest.mark.timeout(600)]

MAIN = """
import fedml

if __name__ == "__main__":
    fedml.run_simulation(backend="MPI")
"""
# Client 2 cannot be trained in round 2; the others wait for it in the exchange that follows.
FAULT = """
from fedml_plugin_fedmosaic.runtime.client import ClientRunner

stock = ClientRunner.fit
def fit(self, pass_, round_idx, *rest, **options):
    if (self.manifest.client_id, round_idx) == (2, 1):
        raise RuntimeError("the disk of client 2 is gone")
    return stock(self, pass_, round_idx, *rest, **options)
ClientRunner.fit = fit
"""
COMMAND_MAIN = """
from fedml_plugin_fedmosaic.cli.main import main

main()
"""
# Everything a job needs to end when a rank fails; start-up and a loaded machine included.
SECONDS_TO_FAIL = 240


def run(folder: Path, *command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            "HOME": str(folder),
            **more,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    config = write_world(folder)
    one_round = config.read_text().replace("comm_round: 2", "comm_round: 1")
    (folder / "one_round.yaml").write_text(one_round)
    (folder / "main.py").write_text(MAIN)
    (folder / "failing_main.py").write_text(FAULT + MAIN)
    (folder / "failing_command.py").write_text(FAULT + COMMAND_MAIN)
    return folder


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.mark.mpi(2)
def test_the_command_starts_its_own_ranks(world: Path) -> None:
    script = Path(sys.executable).with_name("fedml")
    done = run(
        world,
        *(script, "run", "--algo", "fedmosaic", "--backend", "MPI", "-np", "2"),
        *("--cf", "one_round.yaml", "--run-dir", "command"),
        # As a user's shell: nobody has said that root may use mpiexec.
        OMPI_ALLOW_RUN_AS_ROOT="",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1: clients 0, 2, 25% of the work" in done.stdout
    assert done.stdout.count("report ") == 1
    trained = {event["client_id"] for event in events(world / "command", "ClientTrained")}
    assert trained == {0, 1, 2}


@pytest.mark.mpi(4)
def test_fedmls_own_way_with_one_round_and_an_idle_rank(world: Path) -> None:
    command = ["mpirun", "-np", "4", sys.executable, "main.py", "--cf", "one_round.yaml"]
    done = run(world, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = (world / "runs").iterdir()
    assert len(events(run_dir, "RoundFinished")) == 1
    assert "1 of 4 ranks have no client; 3 ranks would do" in done.stderr
    assert "group 0: rank 0: client 1, 75% of the work" in done.stderr
    assert (run_dir / "report.html").is_file()
    assert not list(run_dir.glob("*.err"))


def check_failure(done: subprocess.CompletedProcess[str], run_dir: Path, began: float) -> None:
    assert done.returncode not in (0, None)
    assert time.monotonic() - began < SECONDS_TO_FAIL
    # On 2 ranks, clients 0 and 2 are rank 1's.
    (report,) = run_dir.glob("rank*.err")
    assert report.name == "rank1.err"
    text = report.read_text()
    assert text.startswith("Traceback")
    assert "RuntimeError: the disk of client 2 is gone" in text
    assert "client 2, round 2, fit" in text
    assert "client 2, round 2, fit" in done.stderr


@pytest.mark.mpi(2)
def test_a_rank_that_fails_ends_fedmls_job(world: Path) -> None:
    began = time.monotonic()
    before = set((world / "runs").iterdir()) if (world / "runs").exists() else set()
    main = [sys.executable, "failing_main.py", "--cf", "tiny.yaml"]
    done = run(world, "mpirun", "-np", "2", *main)
    (run_dir,) = set((world / "runs").iterdir()) - before
    check_failure(done, run_dir, began)


@pytest.mark.mpi(2)
def test_a_rank_that_fails_ends_the_commands_job(world: Path) -> None:
    began = time.monotonic()
    main = [sys.executable, "failing_command.py", "run", "--cf", "tiny.yaml"]
    done = run(world, "mpirun", "-np", "2", *main, "--backend", "MPI", "--run-dir", "failed")
    check_failure(done, world / "failed", began)
    # The class of the error decides: a client failed.
    assert done.returncode == 4
