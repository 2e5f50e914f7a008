"""Launcher ``slurm``: jobs, chains, arrays and heterogeneous jobs of a Slurm cluster.

What goes through submitit: handing scripts to ``sbatch`` (with its errors and the id that it
answers), and reading ``sacct``. What does not: submitit's own scripts unpickle a function on
rank 0, know no heterogeneous jobs, and checkpoint on rank 0 only, while ours start a command and
stop all ranks together. So the script is ``launch.slurm_script``'s, and no pickle is written or
read.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedml_plugin_fedmosaic.core.errors import LaunchError
from fedml_plugin_fedmosaic.launch.base import (
    LOG_FOLDER,
    SCRIPT_FILE,
    Job,
    JobRecord,
    JobSpec,
    JobStatus,
    now,
    read_record,
    wait_until_over,
    write_record,
    write_text_atomic,
)
from fedml_plugin_fedmosaic.launch.slurm_script import render_job
from fedml_plugin_fedmosaic.launch.status import read_status, true_status

NAME = "slurm"
CHAINED_VARIABLE = "FEDMOSAIC_CHAINED"
_POLL_S = 2.0
_TIMEOUT_S = 60
_MEANING: Mapping[JobStatus, tuple[str, ...]] = {
    JobStatus.PENDING: (
        "PENDING",
        "CONFIGURING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESV_DEL_HOLD",
        "SPECIAL_EXIT",
    ),
    JobStatus.RUNNING: (
        "RUNNING",
        "COMPLETING",
        "RESIZING",
        "SIGNALING",
        "STAGE_OUT",
        "STOPPED",
        "SUSPENDED",
    ),
    JobStatus.COMPLETED: ("COMPLETED",),
    JobStatus.FAILED: ("FAILED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "LAUNCH_FAILED"),
    JobStatus.CANCELLED: ("CANCELLED", "REVOKED"),
    JobStatus.TIMEOUT: ("TIMEOUT",),
    JobStatus.NODE_FAIL: ("NODE_FAIL",),
    JobStatus.PREEMPTED: ("PREEMPTED",),
}
_STATUS_OF = {word: status for status, words in _MEANING.items() for word in words}


class SlurmJob:
    """A job, an array element, a heterogeneous job or a chain of jobs.

    Args:
        record: what ``job.json`` says.
        run_dir: folder of the run.
    """

    def __init__(self, record: JobRecord, run_dir: Path) -> None:
        self.record = record
        self.run_dir = run_dir

    @property
    def id(self) -> str:
        """Slurm's job id, ``29_3`` of an array element; of a chain the first one's."""
        return self.record.ids[0]

    def status(self) -> JobStatus:
        """Joins the queue's word and the run's own; see :func:`launch.status.true_status`.

        Raises:
            LaunchError: Slurm does not answer.
        """
        states = [slurm_state(job_id) for job_id in self.record.ids]
        said = read_status(self.run_dir)
        if JobStatus.RUNNING in states:
            return JobStatus.RUNNING
        live = JobStatus.PENDING in states
        if live and len(states) > 1 and said is not None and said.job_id in self.record.ids:
            # The rest of a chain only looks at the run folder and ends.
            live = said.state not in ("finished", "failed")
        if live:
            return JobStatus.PENDING
        over = [state for state in states if state is not JobStatus.PENDING]
        return true_status(over[-1], said, self.record.ids)

    def wait(self, timeout_s: float | None = None) -> JobStatus:
        """Waits until the job is over.

        Raises:
            LaunchError: it was not over in time, or Slurm does not answer.
        """
        return wait_until_over(self, timeout_s, poll_s=_POLL_S)

    def cancel(self) -> None:
        """``scancel`` of every job of the record.

        Raises:
            LaunchError: Slurm refuses or does not answer.
        """
        for job_id in reversed(self.record.ids):
            _call(["scancel", job_id])

    def log_paths(self) -> tuple[Path, ...]:
        """Logs of all starts, the oldest first; lines of ranks begin with ``RANK:``."""
        folder = self.run_dir / LOG_FOLDER
        return tuple(sorted(folder.glob("*.out"), key=lambda path: (path.stat().st_mtime_ns, path)))


class SlurmLauncher:
    """Renders the script, keeps it in the run folder and submits it."""

    def submit(self, spec: JobSpec) -> Job:
        """Submits a job, or a chain of them.

        Raises:
            LaunchError: no ``sbatch``, or it refuses the job; its own words are in the message.
        """
        _prepare(spec)
        text = render_job(spec)
        write_text_atomic(spec.run_dir / SCRIPT_FILE, text)
        ids: list[str] = []
        try:
            for _ in range(spec.chain):
                after = ids[-1] if ids else None
                ids.append(_sbatch(spec.run_dir / LOG_FOLDER, text, spec.num_tasks, after))
        except LaunchError:
            for job_id in ids:
                _call(["scancel", job_id])
            raise
        return _remember(spec, tuple(ids))

    def submit_array(self, specs: Sequence[JobSpec], max_parallel: int) -> tuple[Job, ...]:
        """Submits one job array; one job is submitted as such.

        Raises:
            LaunchError: no ``sbatch``, it refuses the array, or the jobs' resources differ.
        """
        if max_parallel < 1:
            raise LaunchError(f"max_parallel must be >= 1, got {max_parallel}")
        if any(spec.chain > 1 for spec in specs):
            raise LaunchError(
                "a chain cannot be an array element",
                hint="leave --chain out: elements of an array are queued again by themselves",
            )
        if len(specs) < 2:
            return tuple(self.submit(spec) for spec in specs)
        for spec in specs:
            _prepare(spec)
        first = specs[0]
        text = render_job(first, array=specs, max_parallel=max_parallel)
        main = _sbatch(first.run_dir / LOG_FOLDER, text, first.num_tasks, None)
        jobs = []
        for number, spec in enumerate(specs):
            write_text_atomic(spec.run_dir / SCRIPT_FILE, text)
            jobs.append(_remember(spec, (f"{main}_{number}",)))
        return tuple(jobs)

    def attach(self, run_dir: Path) -> Job:
        """The job of a run folder."""
        return SlurmJob(read_record(run_dir, NAME), run_dir)


def _remember(spec: JobSpec, ids: tuple[str, ...]) -> SlurmJob:
    record = JobRecord(
        launcher=NAME,
        ids=ids,
        name=spec.name,
        submitted=now(),
        num_tasks=spec.num_tasks,
    )
    write_record(spec.run_dir, record)
    return SlurmJob(record, spec.run_dir)


def _prepare(spec: JobSpec) -> None:
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"no {missing[0]} on PATH: this machine cannot submit Slurm jobs",
            hint="log in to the cluster's login node, load its Slurm module, or take "
            "--launcher local",
        )
    (spec.run_dir / LOG_FOLDER).mkdir(parents=True, exist_ok=True)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise LaunchError(
            "the launcher 'slurm' needs the package submitit",
            hint="pip install 'fedml-plugin-fedmosaic[slurm]'",
        ) from error
    return submitit


def _sbatch(folder: Path, text: str, num_tasks: int, after: str | None) -> str:
    """Submits a script; returns the job's id.

    Args:
        folder: where submitit keeps its copy of the script.
        text: the script.
        num_tasks: processes of the job.
        after: job that must be over before this one starts.
    """
    submitit = _submitit()
    flags = []
    if after is not None:
        flags = [f"--dependency=afterany:{after}", f"--export=ALL,{CHAINED_VARIABLE}=1"]

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc, name-defined]
        """submitit's executor for a finished script."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
            return text

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["sbatch", *flags, str(submission_file_path)]

        def _num_tasks(self) -> int:
            return num_tasks

    try:
        job = Executor(folder=folder)._submit_command("unused: the script is complete")
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise _refusal(str(error)) from error
    return str(job.job_id)


def _refusal(text: str) -> LaunchError:
    """The words of sbatch, with what to do about the common ones."""
    lines = [line for line in text.splitlines() if "sbatch: error" in line] or text.splitlines()
    words = " ".join(line.replace("sbatch: error: ", "").strip() for line in lines)
    hint = "change --partition, --nodes, --gpus-per-node, --mem or --time; 'sinfo' shows the limits"
    for pattern, advice in _ADVICE:
        if pattern.lower() in words.lower():
            hint = advice
            break
    return LaunchError(f"sbatch refuses the job: {words}", hint=hint)


_ADVICE = (
    ("invalid partition", "'sinfo' lists the partitions; give one with --partition"),
    ("account", "'sacctmgr show user $USER withassoc' lists yours; give one with --account"),
    ("qos", "'sacctmgr show qos' lists them; give one with --qos"),
    ("time limit", "ask for less with --time, and let the run go on with requeueing or --chain"),
    ("hetjob", "this site forbids heterogeneous jobs: leave launcher.heterogeneous out"),
    ("heterogeneous", "this site forbids heterogeneous jobs: leave launcher.heterogeneous out"),
    ("unable to contact slurm controller", "the cluster is down: 'scontrol ping' shows it"),
)


def slurm_state(job_id: str) -> JobStatus:
    """A job's state as Slurm has it; UNKNOWN if it has forgotten the job.

    The queue still shows jobs that ended a few minutes ago; older ones are in the accounting.

    Raises:
        LaunchError: Slurm does not answer.
    """
    done = _call(
        [
            "squeue",
            "--noheader",
            "--array",
            "--states=all",
            "--format=%i|%T",
            f"--jobs={job_id}",
        ],
        check=False,
    )
    if done.returncode and "Invalid job id" not in done.stderr:
        raise LaunchError(
            f"Slurm does not answer: {done.stderr.strip() or done.stdout.strip()}",
            hint="'scontrol ping' and 'squeue' show whether the cluster is up",
        )
    word = ""
    for line in done.stdout.splitlines():
        name, _, state = line.strip().partition("|")
        # Components of a heterogeneous job are 12+0, 12+1, ...; the first one leads.
        if name in (job_id, f"{job_id}+0"):
            word = state
    word = word or _accounted(job_id)
    # sacct says "CANCELLED by 1000", and cuts long words to "CANCELLED+".
    return _STATUS_OF.get(word.partition(" ")[0].rstrip("+"), JobStatus.UNKNOWN)


def _accounted(job_id: str) -> str:
    """The accounting's word, empty if there is no accounting or no such job."""
    if shutil.which("sacct") is None:
        return ""
    columns = "--format=JobID,State,NodeList"
    done = _call(["sacct", f"--jobs={job_id}", columns, "--parsable2"], check=False)
    if done.returncode:
        return ""
    # submitit knows the ways in which sacct writes the elements of an array.
    known = type(_submitit().SlurmJob.watcher)().read_info(done.stdout)
    info = known.get(job_id) or known.get(f"{job_id}+0") or {}
    return str(info.get("State") or "")


def _call(command: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(  # noqa: S603
            list(command), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise LaunchError(
            f"no {command[0]} on PATH: this machine cannot talk to Slurm",
            hint="log in to the cluster's login node, or load its Slurm module",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{command[0]} gave no answer in {_TIMEOUT_S} s") from error
    if check and done.returncode and "Invalid job id" not in done.stderr:
        raise LaunchError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done
