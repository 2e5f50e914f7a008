"""Launcher ``debug``: the command runs in this process, under its debugger and profiler.

One rank, no log files, no waiting: ``submit`` returns when the run is over.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.base import (
    Job,
    JobRecord,
    JobSpec,
    JobStatus,
    now,
    read_record,
    write_record,
)
from fedml_plugin_fedmosaic.launch.local import command_of
from fedml_plugin_fedmosaic.launch.status import INCARNATION_VARIABLE, read_status

NAME = "debug"
_MODULE_FLAG = "-m"


@dataclass(frozen=True, slots=True)
class DebugJob:
    """A job that is over since it was submitted."""

    id: str
    run_dir: Path
    code: int

    def status(self) -> JobStatus:
        """COMPLETED or FAILED, by the exit code."""
        return JobStatus.COMPLETED if self.code == 0 else JobStatus.FAILED

    def wait(self, timeout_s: float | None = None) -> JobStatus:  # noqa: ARG002 - it is over
        """The same."""
        return self.status()

    def cancel(self) -> None:
        """Nothing is left to end."""

    def log_paths(self) -> tuple[Path, ...]:
        """None: it wrote to this process's own output."""
        return ()


class DebugLauncher:
    """Runs ``python -m module`` commands in this process."""

    def submit(self, spec: JobSpec) -> Job:
        """Runs the command to its end.

        Raises:
            LaunchError: it needs several ranks, or is not a ``python -m module`` command.
        """
        if spec.num_tasks > 1:
            raise LaunchError(
                f"launcher 'debug' runs one rank, job {spec.name!r} has {spec.num_tasks}",
                hint="take --launcher local, or --set comm_args.backend=sp",
            )
        command = command_of(spec)
        if len(command) < 3 or command[1] != _MODULE_FLAG:
            raise LaunchError(
                f"launcher 'debug' runs 'python -m MODULE ...', got: {' '.join(command)}"
            )
        job_id = str(os.getpid())
        write_record(
            spec.run_dir,
            JobRecord(launcher=NAME, ids=(job_id,), name=spec.name, submitted=now(), num_tasks=1),
        )
        variables = {**spec.environment, INCARNATION_VARIABLE: f"{job_id}.0"}
        with _as_program(command[2:], variables):
            code = _run_module(command[2])
        return DebugJob(job_id, spec.run_dir, code)

    def submit_array(self, specs: Sequence[JobSpec], max_parallel: int) -> tuple[Job, ...]:  # noqa: ARG002 - one after the other
        """Runs one after the other."""
        return tuple(self.submit(spec) for spec in specs)

    def attach(self, run_dir: Path) -> Job:
        """The job, from its record and the run's own word."""
        record = read_record(run_dir, NAME)
        said = read_status(run_dir)
        code = 1 if said is None or said.exit_code is None else said.exit_code
        return DebugJob(record.ids[0], run_dir, code)


@contextmanager
def _as_program(arguments: Sequence[str], variables: Mapping[str, str]) -> Iterator[None]:
    """This process's arguments and variables, as the command's own process would have them."""
    old_arguments, old_variables = sys.argv, dict(os.environ)
    sys.argv = list(arguments)
    os.environ.update(variables)
    try:
        yield
    finally:
        sys.argv = old_arguments
        os.environ.clear()
        os.environ.update(old_variables)


def _run_module(name: str) -> int:
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=False)
    except SystemExit as stopped:
        if stopped.code is None or isinstance(stopped.code, int):
            return stopped.code or 0
        return 1
    return 0
