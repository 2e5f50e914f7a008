"""ZeRO clients on two CPU ranks agree with an unsharded client, stage by stage."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fedml_plugin_fedmosaic.comm.rendezvous import free_port

pytestmark = [pytest.mark.deepspeed, pytest.mark.mpi(2), pytest.mark.timeout(400)]

PROGRAM = Path(__file__).with_name("zero_program.py")
SUPPORT = Path(__file__).parents[1] / "support"
TIME_LIMIT_S = 380  # the program ends itself after 300
CHECKS = [
    *(f"{case} parity" for case in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")),
    *(
        f"{case} reload_{kept}"
        for case in ("zero1", "zero2", "zero3")
        for kept in ("reset", "keep")
    ),
    "zero3_offload reload_keep",
    *(f"{case} {check}" for case in ("zero2", "zero3") for check in ("stop", "checkpointing")),
    *(f"{case} bfloat16" for case in ("zero2", "zero3")),
    "zero3 broken",
    "zero3 pictures",
    "zero3 pieces",
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the program says; started once, because a start costs more than a check."""
    folder = tmp_path_factory.mktemp("zero")
    flags = ["--oversubscribe"]
    if os.geteuid() == 0:
        flags.append("--allow-run-as-root")
    command = [
        str(Path(sysconfig.get_path("scripts")) / "mpiexec"),
        *flags,
        "-n",
        "2",
        sys.executable,
        str(PROGRAM),
        str(folder),
        str(free_port()),
    ]
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        text, _ = job.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        text, _ = job.communicate()
        pytest.fail(f"the ranks hung for {TIME_LIMIT_S} s:\n{text}")
    return f"{text}\nexit code {job.returncode}"


@pytest.mark.parametrize("check", CHECKS)
def test_as_an_unsharded_client(output: str, check: str) -> None:
    assert re.search(rf"^ok {check}\b", output, re.MULTILINE), output


def test_the_ranks_end_well(output: str) -> None:
    assert output.endswith("exit code 0"), output
    assert len(re.findall(r"^ok ", output, re.MULTILINE)) == len(CHECKS)
