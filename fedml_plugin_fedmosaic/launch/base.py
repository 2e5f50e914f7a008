"""Contract of a launcher: what a job needs, what became of it, how to find it again.

A job is one command on some machines. Everything a later command needs to find it again is in its
run folder, as plain JSON::

    RUN/job.json            launcher, ids, where the logs are
    RUN/job.sbatch          the script as it was submitted (Slurm)
    RUN/submitted.yaml      the configuration as it was submitted
    RUN/logs/               standard output and error
    RUN/status.json         written by the run itself, never by a launcher
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from fedml_plugin_fedmosaic.core.errors import LaunchError

JOB_FILE = "job.json"
SCRIPT_FILE = "job.sbatch"
SUBMITTED_FILE = "submitted.yaml"
STATUS_FILE = "status.json"
LOG_FOLDER = "logs"
STARTED_FILE = "config.yaml"
LOCK_FILE = "run.lock"
LAUNCH_FILES = frozenset(
    (JOB_FILE, SCRIPT_FILE, SUBMITTED_FILE, STATUS_FILE, LOG_FOLDER, LOCK_FILE)
)
"""What may be in a run folder before the run starts."""

POLL_S = 1.0


class JobStatus(Enum):
    """State of a job as far as its owner is concerned."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMEOUT = "TIMEOUT"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    UNKNOWN = "UNKNOWN"

    @property
    def is_over(self) -> bool:
        """Whether nothing further will happen."""
        return self not in (JobStatus.PENDING, JobStatus.RUNNING, JobStatus.UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a job, or a component of a heterogeneous job, asks for. None: the site's default.

    Attributes:
        nodes: machines.
        ntasks: processes in all; ``nodes * ntasks_per_node`` when None.
        ntasks_per_node: processes per machine.
        cpus_per_task: cores per process.
        gpus_per_node: accelerators per machine.
        mem_gib: memory per machine, in GiB.
        time_min: time limit, in minutes.
        partition: queue.
        account: who pays.
        qos: quality of service.
        constraint: node features.
        extra: further ``sbatch`` options by long name, e.g. ``{"exclude": "n7"}``.
    """

    nodes: int = 1
    ntasks: int | None = None
    ntasks_per_node: int | None = None
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem_gib: float | None = None
    time_min: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_tasks(self) -> int:
        """Processes in all."""
        return self.ntasks if self.ntasks is not None else self.nodes * (self.ntasks_per_node or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a heterogeneous job: the clients of one size class and their machines."""

    name: str
    resources: Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A job to be.

    Attributes:
        name: shown in queues; letters, digits, ``-``, ``_`` and ``.``.
        command: arguments of the process (each rank runs the same).
        resume_command: arguments of a later incarnation, when the run folder says that an earlier
            one has started (``config.yaml`` is there); ``command`` again when empty.
        run_dir: folder of the run, on a file system that every machine sees.
        resources: of the whole job, or of its first component.
        components: parts of a heterogeneous job, in the order of their ranks; empty otherwise.
        setup: shell lines that make the environment, e.g. ``module load openmpi``.
        environment: variables of the process.
        mpi: Slurm's MPI plug-in (``srun --mpi=list``).
        requeue: queue the job again when it was stopped before its end.
        signal_s: seconds before the time limit at which the ranks are told to save and stop.
        chain: jobs that follow each other, for sites without requeueing; 1 means no chain.
    """

    name: str
    command: tuple[str, ...]
    run_dir: Path
    resources: Resources = field(default_factory=Resources)
    resume_command: tuple[str, ...] = ()
    components: tuple[Component, ...] = ()
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    mpi: str = "pmix"
    requeue: bool = True
    signal_s: int = 120
    chain: int = 1

    @property
    def num_tasks(self) -> int:
        """Processes in all, over all components."""
        if self.components:
            return sum(part.resources.num_tasks for part in self.components)
        return self.resources.num_tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """``job.json``: how to find a job again.

    Attributes:
        launcher: name on the LAUNCHERS shelf.
        ids: the scheduler's ids (or process ids), one per job of a chain, oldest first.
        name: of the job.
        submitted: ISO time, UTC.
        num_tasks: processes.
        details: what only the launcher itself reads.
    """

    launcher: str
    ids: tuple[str, ...]
    name: str
    submitted: str
    num_tasks: int
    details: Mapping[str, str] = field(default_factory=dict)


class Job(Protocol):
    """A submitted job."""

    @property
    def id(self) -> str:
        """The scheduler's id; of a chain the first one's."""
        ...

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        ...

    def status(self) -> JobStatus:
        """What has become of it; a run whose process failed is FAILED whatever the scheduler says.

        Raises:
            LaunchError: the scheduler cannot be asked.
        """
        ...

    def wait(self, timeout_s: float | None = None) -> JobStatus:
        """Waits until the job is over, and returns its last status.

        Args:
            timeout_s: longest wait; without end when None.

        Raises:
            LaunchError: it was not over in time.
        """
        ...

    def cancel(self) -> None:
        """Ends it, also while it waits; does nothing when it is over."""
        ...

    def log_paths(self) -> tuple[Path, ...]:
        """Log files that exist, the job's own first, then those of ranks."""
        ...


class Launcher(Protocol):
    """Starts jobs; a member of the LAUNCHERS shelf, made without arguments."""

    def submit(self, spec: JobSpec) -> Job:
        """Starts one job (or chain of jobs) and writes ``job.json``.

        Raises:
            LaunchError: it could not be started.
        """
        ...

    def submit_array(self, specs: Sequence[JobSpec], max_parallel: int) -> tuple[Job, ...]:
        """Starts jobs of equal resources of which at most ``max_parallel`` run at once.

        Raises:
            LaunchError: they could not be started.
        """
        ...

    def attach(self, run_dir: Path) -> Job:
        """The job of a run folder that this launcher has filled.

        Raises:
            LaunchError: there is no record, or another launcher's.
        """
        ...


def now() -> str:
    """This moment, as ISO text in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_record(run_dir: Path, record: JobRecord) -> None:
    """Writes ``job.json``."""
    write_text_atomic(run_dir / JOB_FILE, json.dumps(asdict(record), indent=1) + "\n")


def read_record(run_dir: Path, launcher: str | None = None) -> JobRecord:
    """Reads ``job.json``.

    Args:
        run_dir: folder of a run.
        launcher: the launcher that must have written it; any when None.

    Raises:
        LaunchError: there is none, it is damaged, or it is another launcher's.
    """
    path = run_dir / JOB_FILE
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record = JobRecord(**{**raw, "ids": tuple(raw["ids"])})
    except FileNotFoundError as error:
        raise LaunchError(
            f"{run_dir} holds no job: there is no {JOB_FILE}",
            hint="only runs started by 'fedmosaic submit' or 'fedmosaic sweep' have one",
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise LaunchError(f"{path} is damaged: {error}") from error
    if launcher is not None and record.launcher != launcher:
        raise LaunchError(f"{path} belongs to the launcher {record.launcher!r}, not {launcher!r}")
    return record


def wait_until_over(job: Job, timeout_s: float | None, poll_s: float = POLL_S) -> JobStatus:
    """Asks for the status until the job is over.

    Raises:
        LaunchError: it was not over in time.
    """
    started = time.monotonic()
    while True:
        status = job.status()
        if status.is_over:
            return status
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise LaunchError(
                f"job {job.id} in {job.run_dir} is {status.value} after {timeout_s:g} s",
                hint=f"'fedmosaic logs {job.run_dir}' shows what it does",
            )
        time.sleep(poll_s)
