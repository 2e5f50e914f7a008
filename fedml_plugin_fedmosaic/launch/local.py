"""Launcher ``local``: processes on this machine, under ``mpiexec`` when there are several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.base import (
    LOG_FOLDER,
    STARTED_FILE,
    Job,
    JobRecord,
    JobSpec,
    JobStatus,
    now,
    read_record,
    wait_until_over,
    write_record,
)
from fedml_plugin_fedmosaic.launch.mpiexec import mpiexec_command
from fedml_plugin_fedmosaic.launch.status import (
    INCARNATION_VARIABLE,
    read_status,
    true_status,
)

NAME = "local"
LOG_NAME = "job.log"
_GRACE_S = 10.0
_CHILDREN: list[subprocess.Popen[bytes]] = []
"""Processes that may outlive their job's object; kept so that Python does not warn of them."""


def command_of(spec: JobSpec) -> tuple[str, ...]:
    """The command of a job's next incarnation: from the start, or going on."""
    if spec.resume_command and (spec.run_dir / STARTED_FILE).is_file():
        return spec.resume_command
    return spec.command


class LocalJob:
    """A process group on this machine.

    Args:
        record: what ``job.json`` says.
        run_dir: folder of the run.
        process: the process, when this very program has started it.
        queue: worker that will start it, when it still waits for its turn.
    """

    def __init__(
        self,
        record: JobRecord,
        run_dir: Path,
        process: subprocess.Popen[bytes] | None = None,
        queue: _Queue | None = None,
    ) -> None:
        self.record = record
        self.run_dir = run_dir
        self._process = process
        self._queue = queue
        self._cancelled = False

    @property
    def id(self) -> str:
        """Name of the job, unique on this machine."""
        return self.record.ids[0]

    def status(self) -> JobStatus:
        """From the process and the run's own word."""
        if self._queue is not None and self._queue.waits(self):
            return JobStatus.CANCELLED if self._cancelled else JobStatus.PENDING
        if self._alive():
            return JobStatus.RUNNING
        self.record = read_record(self.run_dir, NAME)  # another program may have ended it
        if self._cancelled or self.record.details.get("cancelled"):
            return JobStatus.CANCELLED
        if self.record.details.get("failed"):
            return JobStatus.FAILED
        code = None if self._process is None else self._process.returncode
        word = true_status(JobStatus.UNKNOWN, read_status(self.run_dir), self.record.ids)
        if word is JobStatus.UNKNOWN and code is not None:
            # The command keeps no status (it is not a run), or died before it could.
            return JobStatus.COMPLETED if code == 0 else JobStatus.FAILED
        if word is JobStatus.COMPLETED and code:
            return JobStatus.FAILED
        return JobStatus.FAILED if word is JobStatus.UNKNOWN else word

    def wait(self, timeout_s: float | None = None) -> JobStatus:
        """Waits for the process.

        Raises:
            LaunchError: it was not over in time.
        """
        return wait_until_over(self, timeout_s, poll_s=0.1)

    def cancel(self) -> None:
        """Ends the process and all its ranks; waits for that, at most ten seconds gently."""
        if self.status().is_over:
            return
        self._cancelled = True
        pid = self._pid()
        details = {**self.record.details, "cancelled": now()}
        self.record = replace(self.record, details=details)
        write_record(self.run_dir, self.record)
        if pid is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                return
            end = time.monotonic() + _GRACE_S
            while time.monotonic() < end:
                if not self._alive():
                    return
                time.sleep(0.05)

    def log_paths(self) -> tuple[Path, ...]:
        """The one log of all ranks."""
        path = self.run_dir / LOG_FOLDER / LOG_NAME
        return (path,) if path.is_file() else ()

    def started(self, process: subprocess.Popen[bytes]) -> None:
        """Remembers the process; called once, by whoever starts it."""
        self._process = process
        details = {
            **self.record.details,
            "pid": str(process.pid),
            "start_ticks": _start_ticks(process.pid) or "",
        }
        self.record = replace(self.record, details=details)
        write_record(self.run_dir, self.record)

    def _pid(self) -> int | None:
        text = self.record.details.get("pid", "")
        return int(text) if text else None

    def _alive(self) -> bool:
        _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
        if self._process is not None:
            return self._process.poll() is None
        pid = self._pid()
        if pid is None:
            return False
        # A process id is reused some day; the moment of its start is not.
        return _start_ticks(pid) == self.record.details.get("start_ticks")


class LocalLauncher:
    """Starts jobs as processes of this machine, detached from this program."""

    def submit(self, spec: JobSpec) -> Job:
        """Starts the command and returns at once.

        Raises:
            LaunchError: there is no ``mpiexec`` for several ranks, or the program is missing.
        """
        job = _new_job(spec, None)
        _start(job, spec)
        return job

    def submit_array(self, specs: Sequence[JobSpec], max_parallel: int) -> tuple[Job, ...]:
        """Starts ``max_parallel`` jobs at once and the others as places become free.

        The places are filled by a thread of this program: it must live until the last job has
        started.
        """
        if max_parallel < 1:
            raise LaunchError(f"max_parallel must be >= 1, got {max_parallel}")
        queue = _Queue(max_parallel)
        jobs = [_new_job(spec, queue) for spec in specs]
        queue.run(list(zip(jobs, specs, strict=True)))
        return tuple(jobs)

    def attach(self, run_dir: Path) -> Job:
        """The job of a run folder."""
        return LocalJob(read_record(run_dir, NAME), run_dir)


class _Queue:
    """Jobs that wait for a free place."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._waiting: list[tuple[LocalJob, JobSpec]] = []
        self._lock = threading.Lock()

    def run(self, jobs: list[tuple[LocalJob, JobSpec]]) -> None:
        self._waiting = list(jobs)
        threading.Thread(target=self._work, name="fedmosaic-local-jobs").start()

    def waits(self, job: LocalJob) -> bool:
        with self._lock:
            return any(job is other for other, _ in self._waiting)

    def _work(self) -> None:
        active: list[LocalJob] = []
        while True:
            active = [job for job in active if not job.status().is_over]
            with self._lock:
                self._waiting = [
                    entry for entry in self._waiting if not entry[0].record.details.get("cancelled")
                ]
                if not self._waiting:
                    return
                while self._waiting and len(active) < self._places:
                    job, spec = self._waiting.pop(0)
                    try:
                        _start(job, spec)
                    except LaunchError as error:
                        _write_log(spec.run_dir, f"{error}\n")
                        details = {"failed": error.message}
                        job.record = replace(job.record, details=details)
                        write_record(job.run_dir, job.record)
                        continue
                    active.append(job)
            time.sleep(0.1)


def _new_job(spec: JobSpec, queue: _Queue | None) -> LocalJob:
    record = JobRecord(
        launcher=NAME,
        ids=(f"local-{uuid.uuid4().hex[:8]}",),
        name=spec.name,
        submitted=now(),
        num_tasks=spec.num_tasks,
    )
    write_record(spec.run_dir, record)
    return LocalJob(record, spec.run_dir, queue=queue)


def _start(job: LocalJob, spec: JobSpec) -> None:
    command = [
        *(mpiexec_command(ranks) if (ranks := spec.num_tasks) > 1 else []),
        *command_of(spec),
    ]
    if spec.setup:
        script = "\n".join((*spec.setup, 'exec "$@"'))
        command = ["bash", "-eu", "-c", script, "bash", *command]
    variables = {
        # Open MPI gives its ranks a terminal of its own, whatever its output goes to.
        "TTY_COMPATIBLE": "0",
        **os.environ,
        **spec.environment,
        INCARNATION_VARIABLE: f"{job.id}.0",
    }
    folder = spec.run_dir / LOG_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / LOG_NAME).open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
    except OSError as error:
        raise LaunchError(f"job {spec.name!r}: cannot start {command[0]!r}: {error}") from error
    _CHILDREN.append(process)
    job.started(process)


def _write_log(run_dir: Path, text: str) -> None:
    folder = run_dir / LOG_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_NAME).open("a", encoding="utf-8") as log:
        log.write(text)


def _start_ticks(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold spaces; the state follows, the start time is field 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
