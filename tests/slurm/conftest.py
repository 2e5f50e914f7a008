"""Runs on a real Slurm cluster; ``tests/slurm/cluster.sh up DIR`` starts one on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_world import write_world

from fedml_plugin_fedmosaic.launch.base import Job
from fedml_plugin_fedmosaic.launch.jobs import attach
from fedml_plugin_fedmosaic.launch.status import RunStatus, read_status

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300


def command(*arguments: str, cwd: Path, check: bool = True) -> str:
    """Output of a command."""
    done = subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    if check:
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


class Cluster:
    """One experiment and its jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_world(folder)
        # Another number of threads may change the last bits of a product.
        text = self.config.read_text()
        self.config.write_text(f"{text}device_args: {{num_threads: 1}}\n")

    def submit(self, name: str, *options: str, config: Path | None = None) -> Path:
        """``fedmosaic submit`` with little memory; returns the run folder."""
        run_dir = self.folder / "runs" / name
        self.command(
            *(sys.executable, "-m", "fedml_plugin_fedmosaic", "submit"),
            *("--cf", str(config or self.config), "--run-dir", str(run_dir)),
            *("--backend", "MPI", "--mem", "2G", *options),
        )
        return run_dir

    def command(self, *arguments: str) -> str:
        """Output of a command in the experiment's folder."""
        return command(*arguments, cwd=self.folder)

    def log(self, run_dir: Path) -> str:
        """All that a job has written."""
        return "".join(path.read_text() for path in attach(run_dir).log_paths())

    def wait_for(self, condition: Callable[[], bool], run_dir: Path) -> None:
        """Waits for something in a run."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            queue = self.command("squeue")
            assert time.monotonic() < end, f"{self.log(run_dir)}\n{queue}"
            time.sleep(0.5)

    def wait_started(self, run_dir: Path, start: str) -> RunStatus:
        """Waits until the given start of a job has reached the run."""
        found: list[RunStatus] = []

        def there() -> bool:
            said = read_status(run_dir)
            if said is None or said.incarnation != start:
                return False
            found.append(said)
            return True

        self.wait_for(there, run_dir)
        return found[0]

    def job(self, run_dir: Path) -> Job:
        """The job of a run."""
        return attach(run_dir)


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    # Two cores for all ranks of all nodes: who waits for a message must not keep a core busy.
    os.environ.update({"OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"})
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert shutil.which("sinfo"), "no Slurm here: tests/slurm/cluster.sh up DIR"
    subprocess.run(["sinfo"], check=True, timeout=60, capture_output=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)
